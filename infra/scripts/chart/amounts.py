"""Amounts of processor, memory and storage, compared as Kubernetes compares them.

- A quantity is a number with a suffix of 1024 (`Ki` to `Ei`), of 1000 (`n` to `E`), or an exponent.
- Figures are exact: they are never floats.
"""

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:[eE]([+-]?\d{1,3})|([KMGTPE]i|[numkMGTPE]))?")
_SUFFIXES = {
    **{f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTPE", 1)},
    **{letter: Decimal(1000) ** power for power, letter in enumerate("num kMGTPE", -3)},
}


def quantity(text: Any) -> Decimal:
    """The number that a quantity stands for.

    Raises:
        ValueError: it is none.
    """
    found = None if isinstance(text, bool) else _QUANTITY.fullmatch(str(text))
    if found is None:
        raise ValueError(f"{text!r} is no quantity: write it as 500m, 2Gi or 3e9")
    number, exponent, suffix = found.groups()
    return Decimal(number).scaleb(int(exponent or 0)) * _SUFFIXES.get(suffix, 1)


_NAMES = re.compile(r"cpu|memory|storage|ephemeral-storage|hugepages-\d+[KMG]i|[a-z0-9.-]+/[\w.-]+")
_COUNTED = re.compile(r"hugepages-.*|.*/.*")
"""What cannot be overcommitted: a pod asks for as much as it may have."""
_LEAST_MEMORY = 16 * 1024**2


def check_amounts(at: str, resources: dict[str, Any]) -> Iterator[str]:
    """Amounts are of what there is, more than nothing, and no request is above its limit."""
    read: dict[str, dict[str, Decimal]] = {"requests": {}, "limits": {}}
    for side, values in read.items():
        for name, text in (resources.get(side) or {}).items():
            try:
                values[name] = quantity(text)
            except ValueError as error:
                yield f"{at}: resources.{side}.{name}: {error}"
                continue
            yield from _check_amount(f"{at}: resources.{side}.{name}", name, text, values[name])
        least = values.get("memory") if side == "limits" else None
        if least is not None and 0 < least < _LEAST_MEMORY:
            text = resources[side]["memory"]
            yield f"{at}: resources.limits.memory is {text}, too little to start: give 16Mi or more"
    for name in filter(_COUNTED.fullmatch, {**read["requests"], **read["limits"]}):
        if read["requests"].get(name, read["limits"].get(name)) != read["limits"].get(name):
            yield f"{at}: resources.requests.{name} is not its limit: give both alike"
    for name, least in read["requests"].items():
        most = read["limits"].get(name, least)
        if least > most:
            texts = [resources[side][name] for side in ("requests", "limits")]
            yield (
                f"{at}: resources.requests.{name} is {texts[0]}, above the limit of {texts[1]}:"
                " raise the limit, or ask for less"
            )


def _check_amount(at: str, name: str, text: Any, number: Decimal) -> Iterator[str]:
    if not _NAMES.fullmatch(name):
        yield f"{at} is nothing that a node has: give cpu, memory, or a name with a slash"
    if number <= 0:
        yield f"{at} is {text}: give more than 0"
    elif name != "cpu" and (str(text)[-1] in "num" or (_COUNTED.fullmatch(name) and number % 1)):
        yield f"{at} is {text}, not a whole number (m is a thousandth): give whole ones"

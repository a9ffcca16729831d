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


def check_amounts(at: str, resources: dict[str, Any]) -> Iterator[str]:
    """Amounts are more than nothing, and no request is above its limit."""
    read: dict[str, dict[str, Decimal]] = {"requests": {}, "limits": {}}
    for side, values in read.items():
        for name, text in (resources.get(side) or {}).items():
            try:
                values[name] = quantity(text)
            except ValueError as error:
                yield f"{at}: resources.{side}.{name}: {error}"
                continue
            if values[name] <= 0:
                yield f"{at}: resources.{side}.{name} is {text}: give more than 0"
    for name, least in read["requests"].items():
        most = read["limits"].get(name, least)
        if least > most:
            texts = [resources[side][name] for side in ("requests", "limits")]
            yield (
                f"{at}: resources.requests.{name} is {texts[0]}, above the limit of {texts[1]}:"
                " raise the limit, or ask for less"
            )

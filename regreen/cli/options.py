"""Options that many commands share.

- `--home` names the directory of the local stack; the endpoints are read from it.
"""

import re
from pathlib import Path
from typing import Annotated

import typer

from regreen.client.stack import Endpoints, Stack
from regreen.rollout.context import check_settings
from regreen.rpc.errors import InvalidArgument
from regreen.settings import default_home

Home = Annotated[
    Path | None,
    typer.Option(help="Directory of the stack's data; default REGREEN_HOME.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def open_stack(home: Path | None, *, patience_s: float = 60.0) -> Stack:
    """Clients of the running local stack.

    Raises:
        Unavailable: no stack runs from this home.
    """
    return Stack(Endpoints.load(home or default_home()), patience_s=patience_s)


def parse_age(text: str) -> float | None:
    """Seconds of an age such as 7d; None where it is none."""
    found = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if found is None:
        return None
    return int(found[1]) * {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}[found[2]]


def parse_labels(values: list[str], field: str = "set") -> dict[str, str]:
    """`name=value` words as a mapping.

    Raises:
        InvalidArgument: a word without an equals sign.
    """
    labels: dict[str, str] = {}
    for value in values:
        name, sign, setting = value.partition("=")
        if not sign or not name:
            raise InvalidArgument(field, f"{value!r} is no setting", "write name=value")
        labels[name] = setting
    return labels


def parse_settings(values: list[str]) -> dict[str, str]:
    """`group.name=value` words as episode settings.

    Raises:
        InvalidArgument: a word without an equals sign, an unknown setting, or a wrong value.
    """
    labels = parse_labels(values)
    for name, value in labels.items():
        try:
            check_settings({name: value})
        except InvalidArgument as error:
            raise InvalidArgument(f"set {name}", error.problem, error.remedy) from error
    check_settings(labels)
    return labels


def parse_numbers(values: list[str], field: str = "hyper") -> dict[str, float | int | str]:
    """`name=value` words as a mapping, numbers as numbers."""
    return {name: _number(text) for name, text in parse_labels(values, field).items()}


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

"""What a sample may have to be, and how large that is for who has to follow it token by token.

A grammar's states are copied for each repetition, so that `(.{1,500}\\n){1,500}` has 250,000 places
where a sample can be, and takes minutes to prepare; a schema's bounds are such repetitions.
"""

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

from regreen.rpc.errors import InvalidArgument

_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT)
_LOOKS = (_constants.ASSERT, _constants.ASSERT_NOT)
_BOUNDS = ("Items", "Length", "Properties")


class Kind(StrEnum):
    """How it is said; the name of the field that says it."""

    REGEX = "regex"
    JSON_SCHEMA = "json_schema"


@dataclass(frozen=True, slots=True)
class Structure:
    """What a sample has to match, or be an instance of."""

    kind: Kind
    text: str

    @property
    def field(self) -> str:
        """The field of a request."""
        return f"sampling.{self.kind}"

    def check(self, characters: int, places: int) -> None:
        """See that it can be read and is of at most that size.

        Raises:
            InvalidArgument: it cannot, or is too large.
        """
        if len(self.text) > characters:
            found = f"has {len(self.text)} characters"
            raise InvalidArgument(self.field, found, f"use up to {characters}")
        try:
            size = _places(self.text) if self.kind is Kind.REGEX else _size(_schema(self.text))
        except (re.error, ValueError, RecursionError, OverflowError) as error:
            wanted = {
                Kind.REGEX: ("regular expression", "give one that Python's re compiles"),
                Kind.JSON_SCHEMA: ("JSON Schema", "give a JSON object"),
            }
            name, remedy = wanted[self.kind]
            raise InvalidArgument(self.field, f"is no {name}: {error}", remedy) from error
        if size > places:
            found = f"has {size} places with all its repetitions"
            raise InvalidArgument(self.field, found, f"repeat less, up to {places}")


def _places(regex: str) -> int:
    return _longest(_parser.parse(regex))


def _longest(tree: Any) -> int:
    """Characters of the longest way through, where what has no bound is passed once."""
    found = 0
    for operation, value in tree:
        if operation in _REPEATS:
            least, most, repeated = value
            times = least + 1 if most == _constants.MAXREPEAT else most
            found += max(1, times) * _longest(repeated)
        elif operation is _constants.SUBPATTERN:
            found += _longest(value[3])
        elif operation is _constants.BRANCH:
            found += sum(map(_longest, value[1]))
        elif operation in _LOOKS:
            found += _longest(value[1])
        elif operation is _constants.ATOMIC_GROUP:
            found += _longest(value)
        elif operation is _constants.GROUPREF_EXISTS:
            found += sum(_longest(part) for part in value[1:] if part)
        else:
            found += 1
    return found


def _schema(text: str) -> dict[str, Any]:
    value = json.loads(text, parse_constant=_no_number)
    if not isinstance(value, dict):
        raise ValueError("it is no object")
    return value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _size(value: Any) -> int:
    """Keywords of a schema, each as often as what is around it may repeat."""
    if isinstance(value, list):
        return sum(map(_size, value))
    if not isinstance(value, dict):
        return 1
    times, found = 1, 1
    for name, part in value.items():
        if name[:3] in ("min", "max") and name[3:] in _BOUNDS and isinstance(part, int):
            times = max(times, part)
        elif name == "pattern" and isinstance(part, str):
            found += _places(part)
        else:
            found += _size(part) + (sum(map(_places, part)) if name == "patternProperties" else 0)
    return times * found

"""How large a regular expression is for who has to follow it token by token.

A grammar's states are copied for each repetition, so that `(.{1,500}\\n){1,500}` has 250,000 places
where a sample can be, and takes minutes to prepare.
"""

import re
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

from regreen.rpc.errors import InvalidArgument

_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT)
_LOOKS = (_constants.ASSERT, _constants.ASSERT_NOT)


def check_regex(regex: str, characters: int, places: int) -> None:
    """See that it is an expression of at most that size.

    Raises:
        InvalidArgument: it is none, or too large.
    """
    if len(regex) > characters:
        raise InvalidArgument(
            "sampling.regex", f"has {len(regex)} characters", f"use up to {characters}"
        )
    try:
        found = _places(_parser.parse(regex))
    except (re.error, RecursionError, OverflowError) as error:
        raise InvalidArgument(
            "sampling.regex",
            f"is no regular expression: {error}",
            "give one that Python's re compiles",
        ) from error
    if found > places:
        raise InvalidArgument(
            "sampling.regex",
            f"has {found} places with all its repetitions",
            f"repeat less, up to {places}",
        )


def _places(tree: Any) -> int:
    """Characters of the longest way through, where what has no bound is passed once."""
    found = 0
    for operation, value in tree:
        if operation in _REPEATS:
            least, most, repeated = value
            times = least + 1 if most == _constants.MAXREPEAT else most
            found += max(1, times) * _places(repeated)
        elif operation is _constants.SUBPATTERN:
            found += _places(value[3])
        elif operation is _constants.BRANCH:
            found += sum(map(_places, value[1]))
        elif operation in _LOOKS:
            found += _places(value[1])
        elif operation is _constants.ATOMIC_GROUP:
            found += _places(value)
        elif operation is _constants.GROUPREF_EXISTS:
            found += sum(_places(part) for part in value[1:] if part)
        else:
            found += 1
    return found

"""Column types that keep what Postgres alone would refuse or change.

- Any protobuf string survives a round trip, NUL included, though Postgres text holds no NUL.
- An unsigned 64-bit value survives a round trip in a signed column.
"""

from typing import Any

from sqlalchemy import BigInteger, Dialect, Text
from sqlalchemy.types import TypeDecorator

_MARK, _MARK_ITSELF, _NUL = "\ufdd0", "\ufdd0\ufdd1", "\ufdd0\ufdd2"
_TOP = 1 << 63


def stored_text(value: str | None) -> str | None:
    """Text as it is stored."""
    if value is None or (value.isascii() and "\0" not in value):
        return value
    return value.replace(_MARK, _MARK_ITSELF).replace("\0", _NUL)


class AnyText(TypeDecorator[str]):
    """Text in which NUL is stored as a pair of Unicode noncharacters."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return stored_text(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        if value is None or _MARK not in value:
            return value
        return str(value).replace(_NUL, "\0").replace(_MARK_ITSELF, _MARK)


class Unsigned64(TypeDecorator[int]):
    """An unsigned 64-bit integer, stored as the signed one with the same bits."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> int | None:
        return None if value is None else (value + _TOP) % (1 << 64) - _TOP

    def process_result_value(self, value: Any, dialect: Dialect) -> int | None:
        return None if value is None else int(value) % (1 << 64)

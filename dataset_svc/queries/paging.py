"""Keyset pages and the opaque tokens between them.

- A token says where the next page starts and which query it belongs to; another query refuses it.
- Rows that are inserted or deleted between pages never make a row appear twice.
"""

import base64
import binascii
import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

from regreen.rpc.errors import InvalidArgument

T = TypeVar("T")
_TAG_BYTES = 12
_MOST = 1 << 63


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some rows and the token of the next page; an empty token marks the end."""

    rows: list[T]
    next_token: str = ""
    keys: list[list[Any]] = field(default_factory=list)
    """Key of each row."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a page starts and how long it is."""

    size: int
    after: list[Any] | None
    """Key of the last row of the previous page; None at the start."""
    tag: str

    def page(self, rows: list[T], keys: list[list[Any]]) -> Page[T]:
        """A page of at most `size` of `rows`; one row more than that means another page follows."""
        if len(rows) <= self.size:
            return Page(rows, "", keys)
        kept = keys[: self.size]
        return Page(rows[: self.size], self.token(kept[-1]), kept)

    def token(self, last_key: list[Any]) -> str:
        """The token of the page that starts after the row with this key."""
        body = json.dumps([self.tag, last_key], separators=(",", ":")).encode()
        signed = hashlib.sha256(body).digest()[:_TAG_BYTES] + body
        return base64.urlsafe_b64encode(signed).decode().rstrip("=")

    def cut(self, page: Page[T], sizes: list[int], most: int) -> Page[T]:
        """As much of a page as fits into `most` bytes, and at least one row."""
        total = 0
        for position, size_bytes in enumerate(sizes):
            total += size_bytes
            if position and total > most:
                kept = page.keys[:position]
                return Page(page.rows[:position], self.token(kept[-1]), kept)
        return page


def cursor(
    name: str,
    query: Any,
    size: int,
    token: str,
    key: tuple[type, ...],
    *,
    default: int = 100,
    most: int = 1000,
) -> Cursor:
    """The place that `page_size` and `page_token` of a request ask for.

    `key` has the types of a row's key; whoever makes a token of his own gets no further than that.

    Raises:
        InvalidArgument: the size is out of bounds, or the token is not one of this query.
    """
    if not 0 <= size <= most:
        raise InvalidArgument("page_size", f"is {size}", f"give 0 to {most}")
    described = json.dumps([name, asdict(query) if query is not None else None], sort_keys=True)
    tag = hashlib.sha256(described.encode()).hexdigest()[:16]
    return Cursor(size or default, _after(token, tag, key) if token else None, tag)


def _after(token: str, tag: str, key: tuple[type, ...]) -> list[Any]:
    wrong = InvalidArgument(
        "page_token", "is not a token of this query", "pass next_page_token on with the same filter"
    )
    try:
        signed = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        body = signed[_TAG_BYTES:]
        if hashlib.sha256(body).digest()[:_TAG_BYTES] != signed[:_TAG_BYTES]:
            raise wrong
        token_tag, after = json.loads(body)
    except (binascii.Error, ValueError, TypeError, RecursionError) as error:
        raise wrong from error
    if token_tag != tag or not isinstance(after, list):
        raise wrong
    if [type(part) for part in after] != list(key):
        raise wrong
    if any(isinstance(part, int) and abs(part) >= _MOST for part in after):
        raise wrong
    return after

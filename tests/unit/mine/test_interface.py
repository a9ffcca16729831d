"""Tests for what modules offer, and what a release adds to it."""

import pytest

from regreen.mine.interface import additions, offered

BEFORE = b"""
import os
LIMIT, _own = 3, 4
class Cart:
    size: int = 0
    def __init__(self, items, _cache=None): ...
    def total(self, tax): ...
    def _sum(self): ...
def open_cart(path): ...
if os.name == "nt":
    SEP = ";"
try:
    import fast
except ImportError:
    fast = None
"""


def test_public_names_and_parameters() -> None:
    assert offered(BEFORE) == {
        "LIMIT", "Cart", "Cart.size", "Cart.__init__(self)", "Cart.__init__(items)", "Cart.total",
        "Cart.total(self)", "Cart.total(tax)", "open_cart", "open_cart(path)", "SEP", "fast",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "added"),
    [
        (b"return_tax", b"return_tax", []),
        (b"tax): ...", b"tax):\n        return tax or 0", []),
        (b"def _sum(self): ...", b"def _sum(self, more): ...", []),
        (b"def _sum(self): ...", b"def _sum(self): ...\n    def _more(self): ...", []),
        (b"tax): ...", b"tax, rounded=False): ...", ["a.py:Cart.total(rounded)"]),
        (b"items,", b"items, owner,", ["a.py:Cart.__init__(owner)"]),
        (b"def open_cart", b"async def close_cart(): ...\ndef open_cart", ["a.py:close_cart"]),
        (b"LIMIT, _own", b"LIMIT, most", ["a.py:most"]),
        (b"fast = None", b"fast = None\n    slow = 1", ["a.py:slow"]),
        (b"import os", b"import os, sys", []),
    ],
)
def test_what_a_release_adds(old, new, added) -> None:
    assert additions({"a.py": BEFORE}, {"a.py": BEFORE.replace(old, new)}) == added


def test_what_cannot_be_read_says_nothing() -> None:
    assert additions({"a.py": b"x ="}, {"a.py": b"x ="}) == []
    assert offered(b"\0") == frozenset()
    assert additions({"a.txt": b"", "b.py": b""}, {"a.txt": b"x = 1", "c.py": b"y = 1"}) == []

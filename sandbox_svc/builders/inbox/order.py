"""Runs the collected tests in an order drawn from a seed: files, then classes, then tests.

- Standard library only, Python 3.7 and newer.
- What belongs together stays together, so that fixtures of a file or a class are made once.
- The order depends on the seed and the ids alone; it is the last word on it.
- An odd seed gives the reverse of the even one below it: of two tests, each runs first in one.
"""

from __future__ import annotations

import hashlib
from typing import Any


class Order:
    """pytest hooks that shuffle."""

    def __init__(self, seed: int, pytest: Any) -> None:
        self.seed = seed
        pytest.hookimpl(hookwrapper=True, tryfirst=True)(Order.pytest_collection_modifyitems)

    def pytest_collection_modifyitems(self, items: list[Any]) -> Any:
        yield
        items.sort(key=self.place, reverse=bool(self.seed % 2))

    def place(self, item: Any) -> tuple[str, ...]:
        """Where a test stands: the place of its file, of its class within, and its own."""
        parts = item.nodeid.partition("[")[0].split("::")
        above = ["::".join(parts[:end]) for end in range(1, len(parts))]
        return tuple(map(self.draw, [*above[:1], "::".join(parts[:-1]), item.nodeid]))

    def draw(self, name: str) -> str:
        text = f"{self.seed // 2} {name}"
        return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()

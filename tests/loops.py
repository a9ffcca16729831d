"""The event loop that the sandbox service runs on, for the tests of it that run in one process."""

from collections.abc import Callable, Mapping

import uvloop


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], uvloop.Loop]]:
    """A hook of pytest-asyncio, for a `conftest.py` to import."""
    return {"uvloop": uvloop.new_event_loop}

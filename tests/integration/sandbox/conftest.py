"""Fixtures of the sandbox service's tests."""

from tests.integration.sandbox.overlay import service
from tests.loops import pytest_asyncio_loop_factories

__all__ = ["pytest_asyncio_loop_factories", "service"]

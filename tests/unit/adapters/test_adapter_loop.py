"""The loop that all adapters of a process share."""

import asyncio

import pytest

from regreen.adapters import loop


def test_calls_from_any_thread_and_loop() -> None:
    async def answer() -> int:
        return 42

    async def through() -> int:
        return await loop.hand_over(answer())

    assert loop.call(answer()) == asyncio.run(through()) == asyncio.run(through()) == 42
    with pytest.raises(TimeoutError):
        loop.call(asyncio.sleep(60), timeout_s=0.05)

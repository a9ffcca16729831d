"""The pool of waiting containers, over an engine that is functions of the test."""

import asyncio

import pytest

from sandbox_svc.backends.base import Limits
from sandbox_svc.backends.docker_pool import ContainerPool, PoolSize, Recipe

pytestmark = pytest.mark.asyncio(loop_scope="function")


async def test_what_is_being_discarded_is_not_given_out() -> None:
    started: list[str] = []
    discarded: list[str] = []
    asked, answer, full = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def start(recipe: Recipe) -> str:
        started.append(f"c{len(started)}")
        if len(started) == 3:  # the first two are on the shelf
            full.set()
            await asyncio.Event().wait()
        return started[-1]

    async def discard(container: str) -> None:
        discarded.append(container)

    async def running(container: str) -> bool:
        asked.set()
        await answer.wait()
        return container != "c0"

    pool = ContainerPool(PoolSize(each=3), start=start, discard=discard, running=running)
    recipe = Recipe(("layer",), Limits())
    assert await pool.take(recipe) is None
    async with asyncio.timeout(10):
        await full.wait()
        assert pool.waiting == 2
        taking = asyncio.create_task(pool.take(recipe))
        await asked.wait()  # whether the first of them runs
        await pool.drop_layer("layer")
        assert discarded == ["c1"]
        answer.set()
        assert await taking is None
        assert discarded == ["c1", "c0"]
        await pool.close()

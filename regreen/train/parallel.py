"""Bounded concurrency with plain errors.

- At most `limit` jobs run at a time; the first failure cancels the rest and is raised as itself.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable


async def run_bounded(jobs: Iterable[Callable[[], Awaitable[None]]], limit: int) -> None:
    """Run every job; returns when all are done, raises the first error of any."""
    room = asyncio.Semaphore(max(1, limit))

    async def one(job: Callable[[], Awaitable[None]]) -> None:
        async with room:
            await job()

    tasks = [asyncio.ensure_future(one(job)) for job in jobs]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

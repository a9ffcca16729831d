"""A worker that is stopped while the dataset service is away ends soon, and without an error."""

import asyncio

from regreen.client.stack import Endpoints, Stack
from regreen.rollout.episode import Runner
from regreen.rollout.knowledge import Knowledge
from regreen.rollout.worker import Worker


async def test_a_stopped_worker_does_not_wait_for_a_service_that_is_away() -> None:
    async with Stack(Endpoints(dataset="127.0.0.1:1"), patience_s=0.1) as stack:
        worker = Worker(stack, Runner(stack, Knowledge()), patience_s=600.0)
        running = asyncio.create_task(worker.run())
        done, _ = await asyncio.wait({running}, timeout=0.5)
        assert not done, "a worker waits for a service that may come back"
        worker.stop()
        async with asyncio.timeout(20):
            stats = await running
    assert (stats.committed, stats.given_back, stats.expired) == (0, 0, 0)

"""The rollout worker of `tests.load.episodes`, in a process that may be killed at any moment."""

import asyncio
import json
import sys
from pathlib import Path

from regreen.client.stack import Endpoints, Stack
from regreen.rollout.episode import Runner
from regreen.rollout.worker import Worker

_PATIENCE_S = 120.0
"""That of `regreen rollout worker`."""


async def drive(job: Path) -> None:
    """Work for ever."""
    given = json.loads(job.read_text())
    async with Stack(Endpoints(**given["endpoints"]), patience_s=_PATIENCE_S) as stack:
        worker = Worker(
            stack,
            Runner(stack),
            run_id=given["run_id"],
            concurrency=given["at_once"],
        )
        await worker.run()


if __name__ == "__main__":
    asyncio.run(drive(Path(sys.argv[1])))

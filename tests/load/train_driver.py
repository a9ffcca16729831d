"""The driver of a run of `tests.load.train`, in a process that may be killed at any moment.

- `python -m tests.load.train_driver JOB`: the job is a file; what is reported is appended to
  another as it comes; the result is written when the run is done.
"""

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regreen.client.stack import Endpoints, Stack
from regreen.rollout.worker import worker_pool
from regreen.train.config import GrpoConfig
from regreen.train.progress import Progress
from regreen.train.rl import train_grpo

_PATIENCE_S = 90.0


@dataclass(frozen=True, slots=True)
class Job:
    """A run, the services that it runs on, and where to say how far it is."""

    endpoints: Mapping[str, str]
    config: Mapping[str, Any]
    progress: str
    result: str
    lease_s: float = 5.0
    """Of rollouts: what a killed driver held is another's so soon."""

    def write(self, path: Path) -> None:
        """As `read` reads it."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "Job":
        """The job in a file."""
        return cls(**json.loads(path.read_text()))

    def stack(self) -> Stack:
        """Clients of its services."""
        return Stack(Endpoints(**self.endpoints), patience_s=_PATIENCE_S)

    def grpo(self) -> GrpoConfig:
        """Its settings."""
        tuples = {n: tuple(v) if isinstance(v, list) else v for n, v in self.config.items()}
        return GrpoConfig(**tuples)


async def drive(job: Job) -> None:
    """The run, or the rest of it."""
    out = os.open(job.progress, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def listen(progress: Progress) -> None:
        line = [progress.stage, progress.done, progress.total, progress.detail]
        os.write(out, (json.dumps(line) + "\n").encode())

    def workers(stack: Stack, run_id: str, count: int) -> AbstractAsyncContextManager[object]:
        return worker_pool(stack, run_id=run_id, concurrency=count, lease_s=job.lease_s)

    async with job.stack() as stack:
        result = await train_grpo(stack, job.grpo(), listen, workers=workers)
    Path(job.result).write_text(json.dumps({"state": result.state, "sha256": result.sha256}))


if __name__ == "__main__":
    asyncio.run(drive(Job.read(Path(sys.argv[1]))))

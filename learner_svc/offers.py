"""Offers of published weights: the process that sends them, one at a time.

- An offer is answered when its process waits; a new one ends the one before.
- A process that fails says so in this service's log, and takes nothing with it.
"""

import asyncio
import contextlib
import json
import sys
import uuid
from dataclasses import asdict, dataclass

from learner_svc.broadcast import Job, Waiting
from learner_svc.published import Published
from regreen.rpc.errors import InfraError, InvalidArgument, NotFound

_START_S = 120.0
"""It loads torch."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What is offered, and where."""

    host: str
    group: str
    receivers: int
    waiting: Waiting
    published: Published


class Offers:
    """The process of this service that sends, if any."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()

    async def make(self, published: Published | None, receivers: int) -> Offer:
        """Have a process wait with the weights that a run published last.

        Raises:
            NotFound: it has published none.
            InvalidArgument: nobody would receive.
            InfraError: it did not start.
        """
        if published is None:
            raise NotFound("the run has published no weights")
        if receivers < 1:
            raise InvalidArgument("receivers", f"is {receivers}", "give 1 or more")
        async with self._lock:
            await self._end()
            group = f"regreen-{uuid.uuid4().hex[:16]}"
            job = Job(str(published.file), receivers, group, self._host)
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "learner_svc.broadcast", json.dumps(asdict(job))),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                limit=64 << 20,
            )
            assert self._process.stdout
            try:
                async with asyncio.timeout(_START_S):
                    line = await self._process.stdout.readline()
                waiting = Waiting(**json.loads(line))
            except (TimeoutError, ValueError, TypeError) as error:
                await self._end()
                raise InfraError("the process that sends weights did not start") from error
            return Offer(self._host, group, receivers, waiting, published)

    async def close(self) -> None:
        """End what waits or sends."""
        async with self._lock:
            await self._end()

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

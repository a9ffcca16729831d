"""Gathers calls that come while one is under way, and runs them as one.

- Nobody waits to be gathered: a call that comes when nothing is under way runs at once, alone.
- Each caller gets its own result or its own error; one that is refused spoils no other.
- Calls are taken in the order in which they came.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from regreen.rpc.errors import Aborted, InvalidArgument, RegreenError

A = TypeVar("A")
R = TypeVar("R")


class Gatherer(Generic[A, R]):
    """Runs `work` over everything that has been submitted since it last began.

    `work` gives one result, or the error to raise, for each item.
    """

    def __init__(
        self,
        work: Callable[[Sequence[A]], Awaitable[Sequence[R | RegreenError]]],
        *,
        most: int = 64,
        flights: int = 2,
    ) -> None:
        self._work, self._most, self._flights = work, most, flights
        self._waiting: deque[tuple[A, asyncio.Future[R]]] = deque()
        self._flying: set[asyncio.Task[None]] = set()

    async def submit(self, item: A) -> R:
        """The result for `item`.

        Raises:
            RegreenError: what `work` gave for it, or what it raised for all.
        """
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        self._start()
        return await future

    async def close(self) -> None:
        """Wait for what is under way; what waits behind it is run too."""
        while self._flying:
            await asyncio.wait(self._flying)

    def _start(self) -> None:
        while self._waiting and len(self._flying) < self._flights:
            size = min(len(self._waiting), self._most)
            batch = [self._waiting.popleft() for _ in range(size)]
            task = asyncio.create_task(self._fly(batch))
            self._flying.add(task)
            task.add_done_callback(self._landed)

    def _landed(self, task: "asyncio.Task[None]") -> None:
        self._flying.discard(task)
        self._start()

    async def _fly(self, batch: "list[tuple[A, asyncio.Future[R]]]") -> None:
        try:
            await self._run(batch)
        except BaseException as error:
            # Whatever it is, nobody may be left waiting; a defect is theirs to raise.
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            if not isinstance(error, Exception):
                raise

    async def _run(self, batch: "list[tuple[A, asyncio.Future[R]]]") -> None:
        batch = [(item, future) for item, future in batch if not future.done()]
        try:
            results = await self._work([item for item, _ in batch]) if batch else []
        except (Aborted, InvalidArgument):
            if len(batch) == 1:
                raise
            # The database names no row: each goes alone, so that only the bad ones fail.
            for entry in batch:
                await self._fly([entry])
            return
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, RegreenError):
                future.set_exception(result)
            else:
                future.set_result(result)

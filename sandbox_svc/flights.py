"""Equal work is done once for all who ask for it meanwhile.

- A flight goes on while anyone waits for it and ends with its last waiter.
- Nobody joins a flight that has ended or is ending; the next one starts anew.
- Whoever joins late hears the latest progress first.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from sandbox_svc.builders.base import Progress, Stage

T = TypeVar("T")
Work = Callable[[Progress], Awaitable[T]]
"""The work of a flight; it may report how far it is."""


@dataclass(slots=True)
class _Flight(Generic[T]):
    task: "asyncio.Task[T]"
    listeners: list[Progress] = field(default_factory=list)
    last: Stage | None = None
    waiters: int = 0


class Flights(Generic[T]):
    """The work in progress, by key."""

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[T]] = {}
        self._ending: set[asyncio.Task[T]] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._flights

    async def join(self, key: str, work: Work[T], progress: Progress | None = None) -> T:
        """The result of `work`, or of the equal one in flight."""
        flight = self._flights.get(key) or self._depart(key, work)
        if progress is not None:
            flight.listeners.append(progress)
            if flight.last is not None:
                progress(flight.last)
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        except asyncio.CancelledError:
            if flight.waiters == 1 and not flight.task.done():
                self._land(key, flight)
                flight.task.cancel()
                self._ending.add(flight.task)
                flight.task.add_done_callback(self._ending.discard)
            raise
        finally:
            flight.waiters -= 1
            if progress is not None:
                flight.listeners.remove(progress)

    def _depart(self, key: str, work: Work[T]) -> _Flight[T]:
        async def run() -> T:
            return await work(report)

        def report(stage: Stage) -> None:
            flight.last = stage
            for listener in list(flight.listeners):
                listener(stage)

        flight = self._flights[key] = _Flight(asyncio.create_task(run()))
        flight.task.add_done_callback(lambda _: self._land(key, flight))
        return flight

    def _land(self, key: str, flight: _Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def close(self) -> None:
        """End what is in flight."""
        tasks = [*self._ending, *(flight.task for flight in self._flights.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

"""Answers a repeated request from memory: same `request_id`, same answer, done once.

- Two calls with one id that overlap share one execution; it goes on while anyone waits for it.
- Only success is remembered; a failure may be tried again.
- An id that comes back with another request is refused, never answered with the wrong result.
- What is remembered is bounded by count, bytes and age and lies outside the process's memory
  (`answers`); what must survive a restart is kept by the service.
"""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

from regreen.rpc.answers import Answers, Kept
from regreen.rpc.errors import InvalidArgument


class Message(Protocol):
    """What this module needs of a protobuf message."""

    def SerializeToString(self, *, deterministic: bool = ...) -> bytes:
        """The message as bytes."""
        ...

    @classmethod
    def FromString(cls, data: bytes) -> Self:
        """The message of bytes."""
        ...


T = TypeVar("T", bound=Message)


@dataclass(slots=True)
class _Flight(Generic[T]):
    """An execution under way."""

    request: bytes
    task: "asyncio.Task[T]"
    waiters: int = 0


class Idempotency(Generic[T]):
    """Remembers the answers of one server."""

    def __init__(
        self,
        *,
        ttl_s: float = 24 * 3600.0,
        max_entries: int = 500_000,
        max_bytes: int = 128 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._flights: dict[bytes, _Flight[T]] = {}
        self._answers = Answers(
            ttl_s=ttl_s, max_entries=max_entries, max_bytes=max_bytes, clock=clock
        )
        self._types: dict[str, type[T]] = {}
        """By method, what its answers are."""

    def close(self) -> None:
        """Forget every answer."""
        self._answers.close()

    async def once(
        self, method: str, request_id: str, request: Message, work: Callable[[], Awaitable[T]]
    ) -> T:
        """The answer of `work`, run at most once for this method and id.

        Raises:
            InvalidArgument: the id was used for a different request.
        """
        fingerprint = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
        name = hashlib.sha256(f"{method}\n{request_id}".encode("utf-8", "surrogatepass")).digest()
        flight = self._flights.get(name)
        kept = self._answers.find(name) if flight is None else None
        known = flight.request if flight else kept.request if kept else fingerprint
        if known != fingerprint:
            raise InvalidArgument(
                "request_id", f"{request_id[:80]!r} was used for another request", "use a fresh id"
            )
        if kept is not None:
            return self._types[method].FromString(kept.answer)
        if flight is None:
            flight = self._begin(method, name, fingerprint, work)
        return await self._wait(name, flight)

    def _begin(
        self, method: str, name: bytes, fingerprint: bytes, work: Callable[[], Awaitable[T]]
    ) -> _Flight[T]:
        flight = _Flight(fingerprint, asyncio.ensure_future(_as_coroutine(work)))

        def done(task: "asyncio.Task[T]") -> None:
            self._land(name, flight)
            if task.cancelled() or task.exception():
                return
            answer = task.result()
            self._types[method] = type(answer)
            self._answers.put(name, Kept(fingerprint, answer.SerializeToString()))

        self._flights[name] = flight
        flight.task.add_done_callback(done)
        return flight

    async def _wait(self, name: bytes, flight: _Flight[T]) -> T:
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        except asyncio.CancelledError:
            if flight.waiters == 1 and not flight.task.done():
                flight.task.cancel()
                self._land(name, flight)
            raise
        finally:
            flight.waiters -= 1

    def _land(self, name: bytes, flight: _Flight[T]) -> None:
        if self._flights.get(name) is flight:
            del self._flights[name]


async def _as_coroutine(work: Callable[[], Awaitable[T]]) -> T:
    return await work()

"""Answers a repeated request from memory: same `request_id`, same answer, done once.

- Two calls with one id that overlap share one execution.
- An execution whose callers have all left goes on to its end, and its answer is kept; of methods
  that say so it ends with them (`Leaving`). Its id is taken until it has really ended.
- Only success is remembered; a failure may be tried again.
- What was done, and whose answer is not to be had (any more), is refused and never done again, as
  long as that is known (`answers`).
- An id that comes back with another request is refused, never answered with the wrong result.
- What is remembered is bounded by count, bytes and age and lies outside the process's memory; what
  must survive a restart is kept by the service. Executions are bounded in number and time.
"""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Generic, Protocol, Self, TypeVar

from regreen.rpc.answers import Answers, Fate, Kept, Room
from regreen.rpc.errors import Aborted, InvalidArgument, ResourceExhausted, Unavailable
from regreen.rpc.logging import get

_RETRY_S = 1.0
_UNDO_S = 10.0
"""For so long the end of the server waits for what it broke off."""
_SHOWN_CHARS = 80


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


class Leaving(Enum):
    """What becomes of an execution whose callers have all left."""

    GOES_ON = auto()
    """It goes on to its end, and its answer is kept."""
    ENDS = auto()
    """It ends, and nothing is left of it: the id is free again."""
    BREAKS = auto()
    """It ends, and what it did stays: the id is refused from then on."""


@dataclass(slots=True)
class _Flight(Generic[T]):
    """An execution under way."""

    request: bytes
    leaving: Leaving
    task: "asyncio.Task[T] | None" = None
    waiters: int = 0
    ending: bool = False
    """Its callers have left, and it ends with them."""


class Idempotency(Generic[T]):
    """Remembers the answers of one server."""

    def __init__(
        self,
        *,
        ttl_s: float = 24 * 3600.0,
        room: Room | None = None,
        max_flights: int = 512,
        flight_s: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._flights: dict[bytes, _Flight[T]] = {}
        self._max_flights, self._flight_s = max_flights, flight_s
        self._answers = Answers(ttl_s, room or Room(), clock)
        self._types: dict[str, type[T]] = {}
        """By method, what its answers are."""
        self._closed = False

    async def finish(self, patience_s: float) -> None:
        """Let what is under way end for so long, then break it off."""
        self._closed = True
        tasks = [flight.task for flight in self._flights.values() if flight.task]
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=max(0.0, patience_s))
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=_UNDO_S)

    def close(self) -> None:
        """Forget every answer."""
        self._closed = True
        self._answers.close()

    async def once(
        self,
        method: str,
        request_id: str,
        request: Message,
        work: Callable[[], Awaitable[T]],
        leaving: Leaving = Leaving.GOES_ON,
    ) -> T:
        """The answer of `work`, run at most once for this method and id.

        Raises:
            InvalidArgument: the id was used for a different request.
            Aborted: it was done, or broken off, and there is no answer (any more).
            ResourceExhausted: too much is under way; carries a delay.
        """
        fingerprint = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
        name = hashlib.sha256(f"{method}\n{request_id}".encode("utf-8", "surrogatepass")).digest()
        while (flight := self._flights.get(name)) is not None:
            _check(request_id, flight.request, fingerprint)
            if not flight.ending:
                return await self._wait(flight)
            assert flight.task is not None
            await asyncio.wait([flight.task])
        if (kept := self._answers.find(name)) is not None:
            _check(request_id, kept.request, fingerprint)
            if kept.fate is not Fate.KEPT:
                raise _no_answer(request_id, kept.fate)
            return self._types[method].FromString(kept.answer)
        return await self._wait(self._begin(method, name, fingerprint, work, leaving))

    def _begin(
        self,
        method: str,
        name: bytes,
        fingerprint: bytes,
        work: Callable[[], Awaitable[T]],
        leaving: Leaving,
    ) -> _Flight[T]:
        if self._closed:
            raise Unavailable("the service stops; send the request again", retry_after_s=_RETRY_S)
        if len(self._flights) >= self._max_flights:
            raise ResourceExhausted(
                f"{len(self._flights)} requests are being served, or finished for callers that "
                "have left",
                retry_after_s=_RETRY_S,
            )
        flight: _Flight[T] = _Flight(fingerprint, leaving)

        def done(task: "asyncio.Task[T]") -> None:
            self._flights.pop(name, None)
            kept = self._outcome(method, flight, task)
            if kept is not None and not self._closed:
                self._answers.put(name, kept, method)

        flight.task = asyncio.ensure_future(self._run(work))
        self._flights[name] = flight
        flight.task.add_done_callback(done)
        return flight

    async def _run(self, work: Callable[[], Awaitable[T]]) -> T:
        async with asyncio.timeout(self._flight_s):
            return await work()

    def _outcome(self, method: str, flight: _Flight[T], task: "asyncio.Task[T]") -> Kept | None:
        """What is remembered of an execution that has ended."""
        if task.cancelled():
            broken = flight.leaving is Leaving.BREAKS
            return Kept(flight.request, fate=Fate.BROKEN) if broken else None
        if (error := task.exception()) is not None:
            if not flight.waiters:
                get().warning(
                    "a call failed whose caller had left", method=method, error=_of(error)
                )
            return None
        answer = task.result()
        self._types[method] = type(answer)
        return Kept(flight.request, answer.SerializeToString())

    async def _wait(self, flight: _Flight[T]) -> T:
        assert flight.task is not None
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        except asyncio.CancelledError:
            last = flight.waiters == 1 and not flight.task.done()
            if last and flight.leaving is not Leaving.GOES_ON:
                flight.ending = True
                flight.task.cancel()
            raise
        finally:
            flight.waiters -= 1


def _of(error: BaseException) -> str:
    return type(error).__name__


def _check(request_id: str, known: bytes, asked: bytes) -> None:
    if known != asked:
        raise InvalidArgument(
            "request_id",
            f"{request_id[:_SHOWN_CHARS]!r} was used for another request",
            "use a fresh id",
        )


def _no_answer(request_id: str, fate: Fate) -> Aborted:
    what = (
        "was done, and its answer is no longer kept"
        if fate is Fate.GONE
        else "was begun, and broken off when its caller left"
    )
    shown = request_id[:_SHOWN_CHARS]
    return Aborted(
        f"request_id: {shown!r} {what}; look at what it did, then use a fresh id",
        metadata={"request_id": shown},
    )

"""Answers a repeated request from memory: same `request_id`, same answer, done once.

- Two calls with one id that overlap share one execution; it goes on while anyone waits for it.
- Only success is remembered; a failure may be tried again.
- An id that comes back with another request is refused, never answered with the wrong result.
- Memory is bounded by count, bytes and age; what must survive a restart is kept by the service.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from regreen.rpc.errors import InvalidArgument


class Message(Protocol):
    """What this module needs of a protobuf message."""

    def SerializeToString(self, *, deterministic: bool = ...) -> bytes:
        """The message as bytes."""
        ...


T = TypeVar("T", bound=Message)


@dataclass(slots=True)
class _Entry(Generic[T]):
    fingerprint: bytes
    task: "asyncio.Task[T] | None"
    """What is under way; None once there is an answer."""
    answer: T | None = None
    waiters: int = 0
    expires_s: float = 0.0
    size_bytes: int = 0
    done: bool = field(default=False)


class Idempotency(Generic[T]):
    """Remembers the answers of one server."""

    def __init__(
        self,
        *,
        ttl_s: float = 24 * 3600.0,
        max_entries: int = 20_000,
        max_bytes: int = 128 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ttl_s, self._max_entries, self._max_bytes = ttl_s, max_entries, max_bytes
        self._clock = clock
        self._entries: OrderedDict[tuple[str, str], _Entry[T]] = OrderedDict()
        self._bytes = 0

    async def once(
        self, method: str, request_id: str, request: Message, work: Callable[[], Awaitable[T]]
    ) -> T:
        """The answer of `work`, run at most once for this method and id.

        Raises:
            InvalidArgument: the id was used for a different request.
        """
        fingerprint = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
        key = (method, request_id)
        entry = self._entries.get(key)
        if entry and entry.done and entry.expires_s < self._clock():
            self._forget(key)
            entry = None
        if entry and entry.fingerprint != fingerprint:
            raise InvalidArgument(
                "request_id", f"{request_id[:80]!r} was used for another request", "use a fresh id"
            )
        if entry is None:
            entry = _Entry(fingerprint, asyncio.ensure_future(_as_coroutine(work)))
            self._entries[key] = entry
        return await self._wait(key, entry)

    async def _wait(self, key: tuple[str, str], entry: _Entry[T]) -> T:
        task = entry.task
        if task is None:
            assert entry.answer is not None
            return entry.answer
        entry.waiters += 1
        try:
            answer = await asyncio.shield(task)
        except asyncio.CancelledError:
            if entry.waiters == 1 and not task.done():
                task.cancel()
                self._forget(key)
            raise
        except BaseException:
            self._forget(key)
            raise
        finally:
            entry.waiters -= 1
        self._remember(entry, answer)
        return answer

    def _remember(self, entry: _Entry[T], answer: T) -> None:
        if entry.done:
            return
        entry.done, entry.task, entry.answer = True, None, answer
        entry.expires_s = self._clock() + self._ttl_s
        entry.size_bytes = len(answer.SerializeToString())
        self._bytes += entry.size_bytes
        while len(self._entries) > self._max_entries or self._bytes > self._max_bytes:
            oldest = next((key for key, value in self._entries.items() if value.done), None)
            if oldest is None:
                return
            self._forget(oldest)

    def _forget(self, key: tuple[str, str]) -> None:
        entry = self._entries.pop(key, None)
        if entry:
            self._bytes -= entry.size_bytes


async def _as_coroutine(work: Callable[[], Awaitable[T]]) -> T:
    return await work()

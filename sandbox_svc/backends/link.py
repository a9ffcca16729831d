"""Request and reply over a SEQPACKET socket on the event loop.

- Every request begins with an id; a reply carries it back; other messages go to `on_event`.
- When the other side ends, every waiting request fails with `LinkClosed` at once.
- Descriptors that arrive for nobody are closed; those of an event are its receiver's.
"""

import asyncio
import contextlib
import itertools
import json
import os
import socket
from collections.abc import Callable, Iterable

from sandbox_svc.backends import wire
from sandbox_svc.backends.fds import NONE_LEFT, exhausted

_REPLY_S = 60.0
_BATCH = 32


class LinkClosed(Exception):
    """The process at the other end is gone."""


Reply = tuple[wire.Message, list[int]]


class Link:
    """One socket to a spawner or to the first process of a sandbox."""

    def __init__(
        self, sock: socket.socket, on_event: Callable[[wire.Message, list[int]], None] | None = None
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._on_event = on_event
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._ids = itertools.count(1)
        self.closed = False
        self._loop.add_reader(sock.fileno(), self._on_readable)

    def next_id(self) -> int:
        """A fresh id for a request."""
        return next(self._ids)

    async def request(
        self,
        what: str,
        *fields: wire.Field,
        fds: tuple[int, ...] = (),
        number: int | None = None,
        timeout_s: float | None = _REPLY_S,
    ) -> Reply:
        """Send a request and wait for its reply; the caller owns the descriptors in it.

        `number`: an id that was taken before with `next_id`.

        Raises:
            LinkClosed: the other side has ended.
            TimeoutError: no reply came in time.
            ResourceExhausted: there are no descriptors to send it with.
        """
        number = self.next_id() if number is None else number
        future: asyncio.Future[Reply] = self._loop.create_future()
        self._waiting[number] = future
        try:
            await self.post(number, what, *fields, fds=fds)
            async with asyncio.timeout(timeout_s):
                return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and not future.exception():
                close_all(future.result()[1])
            raise
        finally:
            self._waiting.pop(number, None)

    async def post(self, *fields: wire.Field, fds: tuple[int, ...] = ()) -> None:
        """Send a message whose reply, if it has one, nobody waits for."""
        while True:
            if self.closed:
                raise LinkClosed
            try:
                wire.send(self._sock, fields, fds)
                return
            except BlockingIOError:
                await asyncio.sleep(0.001)
            except OSError as error:
                if error.errno in NONE_LEFT:
                    raise exhausted("a request to a sandbox") from error
                raise LinkClosed from error

    def _on_readable(self) -> None:
        """Take what came, to the end where there is one: uvloop watches no socket any more that
        had an error, which is how the other side's end shows if it has left requests unread."""
        left = _BATCH
        while left:
            try:
                received = wire.receive(self._sock)
            except BlockingIOError:
                return
            except ConnectionResetError:
                left = -1  # told once, before what the other side sent last
                continue
            except (OSError, json.JSONDecodeError):
                received = None
            if received is None:
                self.close()
                return
            self._dispatch(*received)
            left -= 1

    def _dispatch(self, message: wire.Message, fds: list[int]) -> None:
        number = message.get("id")
        is_event = "status" in message or "ready" in message or "refused" in message
        if not is_event and isinstance(number, int) and number in self._waiting:
            future = self._waiting[number]
            if not future.done():
                future.set_result((message, fds))
                return
        if is_event and self._on_event is not None:
            self._on_event(message, fds)
        else:
            close_all(fds)

    def close(self) -> None:
        """Close the socket and fail what waits; safe to call twice."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(LinkClosed())
                future.exception()  # who asked may have left meanwhile, and that is no trouble
        if self._on_event is not None:
            self._on_event({"closed": True}, [])


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors, whatever becomes of it."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)

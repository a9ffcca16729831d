"""One exec of a container: started in the engine's threads, read and written on the event loop.

- The stream of an exec lives as long as any process holds it; the end of its main process is asked
  for separately, so that a daemon cannot hold a call.
- Standard streams arrive in frames of eight header bytes; a terminal's output arrives as it is.
- One whose start was cut short is not lost: whoever began it gets it, or `drop` does.
- Helpers run with a fixed path: nothing that a sandbox may write is looked up by their names.
"""

import asyncio
import contextlib
import itertools
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regreen.rpc.errors import InfraError
from sandbox_svc.backends.base import Captured
from sandbox_svc.backends.docker_engine import ContainerGone, Engine, EngineSilent
from sandbox_svc.backends.output import Collector

HELPER_PATH = "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
ROOT = "0:0"
_READ_BYTES = 65_536
_HEADER_BYTES = 8
_AT_ONCE = 8
_POLL_S = 0.05
_GRACE_S = 0.3
_CODE_S = 2.0
_BEGIN_S = 10.0
_AGAIN = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


@dataclass(frozen=True, slots=True)
class Wish:
    """What an exec is started with."""

    argv: Sequence[str]
    user: str
    env: Mapping[str, str]
    cwd: str = "/"
    stdin: bool = False
    terminal: bool = False


class Exec:
    """One exec of a container; `feed` gets what it prints, and may ask for a short pause."""

    def __init__(
        self, engine: Engine, wish: Wish, feed: Callable[[str, bytes], float | None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._engine, self._wish, self._feed = engine, wish, feed
        self.id = ""
        """Known to the engine from before it is started."""
        self.drained = asyncio.Event()
        """Set when nothing more can come."""
        self._response: Any = None
        self._sock: socket.socket | None = None
        self._buffer = b""
        self._room: asyncio.Future[None] | None = None
        self._reading = False
        self.seen_s = 0.0
        """When it last printed, by the loop's clock."""

    async def open(
        self, container: str, late: Callable[["Exec"], Awaitable[object]] | None = None
    ) -> None:
        """Start it; if the caller goes away meanwhile, `late` gets it once it runs.

        Raises:
            ContainerGone: the container does not run.
            InfraError: the engine did not start it.
        """

        async def drop(_: None) -> None:
            try:
                if late is not None:
                    await late(self)
            finally:
                self.close()

        await self._engine.owned(self._open(container), drop)
        self._resume()

    async def _open(self, container: str) -> None:
        response, sock = await self._engine.blocking(self._start, container)
        sock.setblocking(False)
        self._response, self._sock = response, sock
        self.seen_s = self._loop.time()

    def _start(self, container: str) -> tuple[Any, socket.socket]:
        api, wish = self._engine.api, self._wish
        made = api.exec_create(
            container,
            list(wish.argv),
            stdin=wish.stdin,
            tty=wish.terminal,
            environment=dict(wish.env),
            workdir=wish.cwd,
            user=wish.user,
        )
        self.id = made["Id"]
        stream = api.exec_start(made["Id"], socket=True, tty=wish.terminal)
        return stream, getattr(stream, "_sock", stream)

    def _resume(self) -> None:
        if self._sock is not None and not self._reading and not self.drained.is_set():
            self._loop.add_reader(self._sock, self._on_readable, self._sock)
            self._reading = True
            self._loop.call_soon(self._on_readable, self._sock)  # TLS may hold what came before

    def _pause(self) -> None:
        if self._reading and self._sock is not None:
            self._loop.remove_reader(self._sock)
            self._reading = False

    def _on_readable(self, sock: socket.socket) -> None:
        pending = getattr(sock, "pending", int)
        for number in itertools.count():
            if not self._reading or (number >= _AT_ONCE and not pending()):
                return
            try:
                data = sock.recv(_READ_BYTES)
            except _AGAIN:
                return
            except OSError:
                data = b""
            if not data:
                self._pause()
                self.drained.set()
                return
            self.seen_s = self._loop.time()
            pause_s = self._feed("stdout", data) if self._wish.terminal else self._frames(data)
            if pause_s is not None:
                self._pause()
                self._loop.call_later(pause_s, self._resume)
                return

    def _frames(self, data: bytes) -> float | None:
        self._buffer += data
        pause_s: float | None = None
        while len(self._buffer) >= _HEADER_BYTES:
            kind, size = struct.unpack(">BxxxL", self._buffer[:_HEADER_BYTES])
            end = _HEADER_BYTES + size
            if len(self._buffer) < end:
                break
            name = "stderr" if kind == 2 else "stdout"
            wanted = self._feed(name, self._buffer[_HEADER_BYTES:end])
            pause_s = pause_s if wanted is None else wanted
            self._buffer = self._buffer[end:]
        return pause_s

    @property
    def open_for_input(self) -> bool:
        """Whether it can still be written to."""
        return self._sock is not None

    async def write(self, data: bytes) -> int:
        """Give it the first bytes of `data`, once there is room; returns how many.

        Raises:
            BrokenPipeError: its input is closed.
        """
        while True:
            if self._sock is None:
                raise BrokenPipeError
            try:
                return self._sock.send(data[:_READ_BYTES])
            except _AGAIN:
                await self._wait_for_room(self._sock)
            except OSError as error:
                raise BrokenPipeError from error

    async def _wait_for_room(self, sock: socket.socket) -> None:
        room = self._room = self._loop.create_future()
        self._loop.add_writer(sock, _wake, room)
        try:
            await room
        finally:
            self._room = None
            if self._sock is not None:
                self._loop.remove_writer(sock)

    async def give(self, data: bytes) -> None:
        """Give it all of its input and let it see the end, as far as it reads."""
        with contextlib.suppress(BrokenPipeError):
            while data:
                data = data[await self.write(data) :]
            self.end_input()

    def end_input(self) -> None:
        """Let it see the end of its input."""
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)

    async def look(self) -> dict[str, Any]:
        """What the engine knows of it; empty if its container is gone."""
        try:
            found: dict[str, Any] = await self._engine.blocking(
                self._engine.api.exec_inspect, self.id
            )
        except ContainerGone:
            return {}
        return found

    async def begun(self) -> bool:
        """Whether its process was made or never will be; the engine answers a start before that.

        Raises:
            InfraError: the engine does not answer.
        """
        until_s = self._loop.time() + _BEGIN_S
        while self.id:  # without one it was not even started
            found = await self.look()
            if not found or found.get("Pid") or found.get("ExitCode") is not None:
                return True
            if self._loop.time() > until_s:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    async def ended(self) -> dict[str, Any]:
        """What the engine knows once it tells the exit code, or after a while without one."""
        until_s = self._loop.time() + _CODE_S
        while True:
            found = await self.look()
            told = found.get("ExitCode") is not None and not found.get("Running")
            if told or not found or self._loop.time() > until_s:
                return found
            await asyncio.sleep(_POLL_S)

    def close(self) -> None:
        """Release the stream; the command is not ended by that."""
        sock, stream = self._sock, self._response
        self._pause()
        self._sock = self._response = None
        self.drained.set()
        if sock is None:
            return
        self._loop.remove_writer(sock)
        if self._room is not None:
            _wake(self._room)
        with contextlib.suppress(OSError):
            stream.close()
            sock.close()


def _wake(room: "asyncio.Future[None]") -> None:
    if not room.done():
        room.set_result(None)


async def within(event: asyncio.Event, timeout_s: float) -> bool:
    """Whether an event comes in time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
    return event.is_set()


@dataclass(frozen=True, slots=True)
class Answer:
    """How a helper ended."""

    code: int
    """-1 where the engine does not tell, or where it did not end in time."""
    out: Captured
    err: Captured
    ended: bool
    """Whether it ended by itself, with everything that held its output."""


class Helper:
    """A short command and what it answers; it goes by itself, or is ended by whoever began it."""

    def __init__(
        self,
        engine: Engine,
        argv: Sequence[str],
        *,
        user: str,
        stdin: bytes = b"",
        limit_bytes: int = 1 << 20,
    ) -> None:
        self._engine, self._stdin = engine, stdin
        self._out, self._err = Collector(limit_bytes, head_only=True), Collector(1 << 16)
        wish = Wish(argv, user, {"PATH": HELPER_PATH, "LC_ALL": "C"}, stdin=bool(stdin))
        self.exec = Exec(engine, wish, self._feed)
        self._opening: asyncio.Task[None] | None = None

    def _feed(self, name: str, data: bytes) -> None:
        (self._err if name == "stderr" else self._out).feed(data)

    async def answer(self, container: str, *, timeout_s: float = 60.0) -> Answer:
        """Run it; one that does not end in time is left to the caller."""
        opening = self._opening = self._engine.task(self.exec.open(container))
        writer: asyncio.Task[None] | None = None
        try:
            await asyncio.shield(opening)
            if self._stdin:
                writer = asyncio.create_task(self.exec.give(self._stdin))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    return await self._ended()
            return Answer(-1, self._out.captured(), self._err.captured(), False)
        finally:
            if writer is not None:
                writer.cancel()
            opening.add_done_callback(lambda _: self.exec.close())

    async def _ended(self) -> Answer:
        running, drained = True, self.exec.drained
        while running and not await within(drained, 1.0):
            running = bool((await self.exec.look()).get("Running"))
        code = (await self.exec.ended()).get("ExitCode")
        await within(drained, _GRACE_S)
        ended = code is not None and drained.is_set()
        code = -1 if code is None else int(code)
        return Answer(code, self._out.captured(), self._err.captured(), ended)

    async def may_run(self) -> bool:
        """Whether the engine began it, or may yet do so; waits for what it says."""
        if self._opening is None:
            return False
        try:
            await asyncio.shield(self._opening)
        except EngineSilent:
            return True
        except InfraError:
            return False
        return True


async def ask(
    engine: Engine,
    container: str,
    argv: Sequence[str],
    *,
    user: str,
    timeout_s: float = 60.0,
) -> Answer:
    """Run a short helper command; one that does not end in time is left to the caller."""
    return await Helper(engine, argv, user=user).answer(container, timeout_s=timeout_s)

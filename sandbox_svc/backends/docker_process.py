"""A command in a container that is spoken to while it runs.

- The engine's exec socket carries input and output; it is read on the event loop, and every call
  of the engine's API runs in the runtime's threads.
- As with any command there, its own end is asked for: a daemon may hold the socket for ever.
- Signals go to the process group of the oldest process that carries the command's mark.
- A signal that ended it is told by its exit code, as everywhere in this backend.
"""

import asyncio
import contextlib
import secrets
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from regreen.rpc.errors import FailedPrecondition, InvalidArgument
from sandbox_svc.backends.base import Command, EndReason, ExecResult, TerminalSize
from sandbox_svc.backends.docker_exec import KILL, MARK, capture
from sandbox_svc.backends.output import OutputLog, Pulse

if TYPE_CHECKING:
    from sandbox_svc.backends.docker_box import DockerBox

_POLL_S = 0.1
_GRACE_S = 0.3
_FLOOD_PAUSE_S = 0.002
_READ_BYTES = 65_536
_HEADER_BYTES = 8
_KILLED = 137
_GONE = "the command's standard input is closed"
_SIGNAL = (
    "f=; for p in /proc/[0-9]*; do n=${p#/proc/}; "
    f'if tr "\\0" "\\n" < $p/environ 2>/dev/null | grep -qx "{MARK}=$1" '
    '&& { [ -z "$f" ] || [ $n -lt $f ]; }; then f=$n; fi; done; '
    '[ -n "$f" ] && kill -$2 -$f'
)


class DockerProcess:
    """See `backends.base.Process`."""

    def __init__(self, box: "DockerBox", command: Command) -> None:
        self._loop = asyncio.get_running_loop()
        self._box, self._command = box, command
        self._container, self._mark = box.container, secrets.token_hex(8)
        self.changed = Pulse()
        self.stdout = OutputLog(command.output_bytes, self.changed)
        self.stderr = OutputLog(command.output_bytes, self.changed)
        self._id = ""
        self._stream: Any = None
        self._sock: socket.socket | None = None
        self._buffer = b""
        self._drained = asyncio.Event()
        self._input_open = command.open_stdin or command.terminal is not None
        self._room: asyncio.Future[None] | None = None
        self._feeder: asyncio.Task[None] | None = None
        self._ended = False
        self._began_s = time.monotonic()

    @classmethod
    async def begin(cls, box: "DockerBox", command: Command) -> "DockerProcess":
        """Start a command of a box."""
        self = cls(box, command)
        self._sock = await box.blocking(self._open)
        self._sock.setblocking(False)
        self._read_on()
        if not self._input_open and command.stdin:
            self._input_open = True
            self._feeder = asyncio.create_task(self._feed())
        if command.terminal is not None:
            await self.resize(command.terminal)
        return self

    def _open(self) -> socket.socket:
        api, command, user = self._box.api, self._command, self._box.user
        code, _, _ = capture(api, self._container, ["test", "-d", command.cwd], user=user)
        if code != 0:
            raise InvalidArgument("cwd", f"no such directory in the sandbox: {command.cwd}")
        terminal, script = command.terminal is not None, 'exec "$@"'
        if command.terminal is not None:  # before it starts, so that it sees no change of size
            size = command.terminal
            script = f"stty rows {size.rows} cols {size.columns} 2>/dev/null; {script}"
        term = {"TERM": "xterm-256color"} if terminal else {}
        env = self._box.env | term | dict(command.env) | {MARK: self._mark}
        created = api.exec_create(
            self._container,
            ["/bin/sh", "-c", script, "-", *command.argv],
            stdin=self._input_open or bool(command.stdin),
            tty=terminal,
            environment=env,
            workdir=command.cwd,
            user=user,
        )
        self._id = created["Id"]
        self._stream = api.exec_start(self._id, socket=True, tty=terminal)
        sock: socket.socket = getattr(self._stream, "_sock", self._stream)
        return sock

    def _read_on(self) -> None:
        if self._sock is not None and not self._drained.is_set():
            self._loop.add_reader(self._sock, self._on_readable, self._sock)

    def _on_readable(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(sock)
            self._drained.set()
        elif self._command.terminal is not None:
            self.stdout.feed(data)
        else:
            self._frames(data)
        if data and (self.stdout.over or self.stderr.over):
            self._loop.remove_reader(sock)
            self._loop.call_later(_FLOOD_PAUSE_S, self._read_on)

    def _frames(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= _HEADER_BYTES:
            kind, size = struct.unpack(">BxxxL", self._buffer[:_HEADER_BYTES])
            end = _HEADER_BYTES + size
            if len(self._buffer) < end:
                return
            log = self.stderr if kind == 2 else self.stdout
            log.feed(self._buffer[_HEADER_BYTES:end])
            self._buffer = self._buffer[end:]

    async def write(self, data: bytes) -> int:
        """Give it the first bytes of `data`, once there is room; returns how many."""
        while True:
            if self._sock is None or not self._input_open:
                raise FailedPrecondition(_GONE)
            try:
                return self._sock.send(data[:_READ_BYTES])
            except BlockingIOError:
                await self._wait_for_room(self._sock)
            except OSError as error:
                self._input_open = False
                raise FailedPrecondition(_GONE) from error

    async def _feed(self) -> None:
        """Give a command that is not spoken to its input."""
        rest = self._command.stdin
        with contextlib.suppress(FailedPrecondition):
            while rest:
                rest = rest[await self.write(rest) :]
            await self.close_input()

    async def _wait_for_room(self, sock: socket.socket) -> None:
        room = self._room = self._loop.create_future()
        self._loop.add_writer(sock, _wake, room)
        try:
            await room
        finally:
            self._room = None
            if self._sock is not None:
                self._loop.remove_writer(sock)

    async def close_input(self) -> None:
        """Let it see the end of its input; on a terminal that is a character."""
        if self._sock is None or not self._input_open:
            return
        if self._command.terminal is not None:
            with contextlib.suppress(FailedPrecondition):
                await self.write(b"\x04")
            return
        self._input_open = False
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    async def signal(self, number: int) -> bool:
        """Send a signal to its process group; whether it still ran."""
        return not self._ended and await self._script(_SIGNAL, str(number)) == 0

    async def _script(self, script: str, *arguments: str) -> int:
        argv: Sequence[str] = ["/bin/sh", "-c", script, "-", self._mark, *arguments]
        box = self._box
        code, _, _ = await box.blocking(capture, box.api, self._container, argv, user=box.user)
        return int(code)

    async def resize(self, size: TerminalSize) -> None:
        """Set the size of its terminal."""
        from docker.errors import APIError

        if self._command.terminal is None:
            raise FailedPrecondition("the command has no terminal; start it with one")
        with contextlib.suppress(APIError):  # it has ended
            await self._box.blocking(self._box.api.exec_resize, self._id, size.rows, size.columns)

    async def wait(self) -> ExecResult:
        """Wait for its end, within its time limit."""
        try:
            return await self._wait()
        except asyncio.CancelledError:
            await asyncio.shield(self._script(KILL))
            raise
        finally:
            self._ended = True
            self._close()

    async def _wait(self) -> ExecResult:
        stopped: EndReason | None = None
        wall_s = self._box.limits.wall_s or self._command.timeout_s
        until_s = self._began_s + min(self._command.timeout_s, wall_s)
        while await self._runs():
            now = time.monotonic()
            most = self._box.limits.output_bytes
            flooded = 0 < most < self.stdout.total_bytes + self.stderr.total_bytes
            if stopped is None and (now > until_s or flooded):
                stopped = EndReason.OUTPUT if flooded else EndReason.TIMEOUT
                await self._script(KILL)
            left_s = max(0.0, until_s - now) or _POLL_S
            await _within(self._drained, min(_POLL_S, left_s))
        await _within(self._drained, _GRACE_S)
        code = await self._box.blocking(self._exit_code)
        result = await self._box.blocking(
            self._box.result,
            code,
            stopped is not None,
            self.stdout,
            self.stderr,
            time.monotonic() - self._began_s,
        )
        return result if stopped is None else replace(result, reason=stopped)

    async def _runs(self) -> bool:
        from docker.errors import APIError

        try:
            found = await self._box.blocking(self._box.api.exec_inspect, self._id)
        except APIError:  # the container is gone, and the command with it
            return False
        return bool(found["Running"])

    def _exit_code(self) -> int | None:
        from docker.errors import APIError

        try:
            code = self._box.api.exec_inspect(self._id)["ExitCode"]
        except APIError:
            return _KILLED
        return None if code is None else int(code)

    def _close(self) -> None:
        sock, self._sock, self._input_open = self._sock, None, False
        if sock is None:
            return
        self._drained.set()
        self._loop.remove_reader(sock)
        self._loop.remove_writer(sock)
        if self._feeder is not None:
            self._feeder.cancel()
        if self._room is not None:
            _wake(self._room)
        with contextlib.suppress(OSError):
            self._stream.close()
            sock.close()


def _wake(room: "asyncio.Future[None]") -> None:
    if not room.done():
        room.set_result(None)


async def _within(event: asyncio.Event, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()

"""A command of the embedded runtime that is spoken to while it runs.

- Input goes straight into the command's pipe or terminal and waits there for room; nothing is
  kept here, so that a command which does not read costs no memory.
- A write either gives bytes or, cancelled, has given none: the count of its caller stays true.
- A terminal is one of the sandbox's own; the service holds its outer side and no terminal of the
  host is ever open.
- When the command has ended its input is closed and its terminal hung up, whatever its
  descendants hold open.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import struct
import termios
from dataclasses import replace
from typing import TYPE_CHECKING

from regreen.rpc.errors import FailedPrecondition, InfraError
from sandbox_svc.backends import wire
from sandbox_svc.backends.base import Captured, Command, ExecResult, TerminalSize
from sandbox_svc.backends.jobs import prepared
from sandbox_svc.backends.link import LinkClosed
from sandbox_svc.backends.output import OutputLog, Pulse

if TYPE_CHECKING:
    from sandbox_svc.backends.embedded_box import EmbeddedBox
    from sandbox_svc.backends.jobs import Job

_WRITE_BYTES = 65_536
_TERMINAL_ENV = {"TERM": "xterm-256color"}
_CLOSED = (errno.EPIPE, errno.EIO)


class EmbeddedProcess:
    """See `backends.base.Process`."""

    def __init__(self, box: "EmbeddedBox", command: Command) -> None:
        self._loop = asyncio.get_running_loop()
        self._box, self._command = box, command
        self.changed = Pulse()
        self.stdout = OutputLog(command.output_bytes, self.changed)
        self.stderr = OutputLog(command.output_bytes, self.changed)
        self._job: Job | None = None
        self._input = -1
        self._room: asyncio.Future[None] | None = None
        self._last = b"\n"
        self._ended = False

    @classmethod
    async def begin(cls, box: "EmbeddedBox", command: Command) -> "EmbeddedProcess":
        """Start a command of a box."""
        if command.terminal is not None:
            command = replace(command, env=_TERMINAL_ENV | dict(command.env))
        self = cls(box, command)

        def stdin() -> int:
            if not command.open_stdin or command.terminal is not None:
                return wire.bytes_fd(command.stdin)
            theirs, self._input = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(self._input, False)
            return theirs

        outputs = [("stdout", self.stdout, None), ("stderr", self.stderr, None)]
        readers, theirs = prepared(outputs, stdin)
        try:
            self._job = await box.begin(command, readers, theirs)
        except BaseException:
            self._close_input()
            raise
        if self._job.terminal >= 0:
            self._input = self._job.terminal
        refused = self._job.refused
        if refused is not None and command.terminal is not None:
            refused = self._job.refused = replace(refused, stdout=refused.stderr, stderr=Captured())
        if refused is not None:
            self.stdout.feed(refused.stdout.head)
            self.stderr.feed(refused.stderr.head)
        return self

    async def write(self, data: bytes) -> int:
        """Give it the first bytes of `data`, once there is room; returns how many."""
        while True:
            if self._input < 0:
                raise FailedPrecondition("the command's standard input is closed")
            try:
                given = os.write(self._input, data[:_WRITE_BYTES])
            except BlockingIOError:
                await self._wait_for_room()
            except OSError as error:
                if error.errno not in _CLOSED:
                    raise
                self._close_input()
            else:
                self._last = data[given - 1 : given]
                return given

    async def _wait_for_room(self) -> None:
        room = self._room = self._loop.create_future()
        self._loop.add_writer(self._input, _wake, room)
        try:
            await room
        finally:
            self._room = None
            if self._input >= 0:
                self._loop.remove_writer(self._input)

    def _close_input(self) -> None:
        fd, self._input = self._input, -1
        if fd < 0:
            return
        if self._room is not None:
            self._loop.remove_writer(fd)
            _wake(self._room)
        os.close(fd)

    async def close_input(self) -> None:
        """Let it see the end of its input; on a terminal that is a character."""
        if self._command.terminal is None or self._input < 0:
            self._close_input()
            return
        end = termios.tcgetattr(self._input)[6][termios.VEOF]
        with contextlib.suppress(FailedPrecondition):
            if self._last != b"\n":
                await self.write(end)  # passes on the line that was begun
            await self.write(end)

    async def signal(self, number: int) -> bool:
        """Send a signal to its process group; whether it still ran."""
        job = self._job
        if job is None or self._ended or job.done.done():
            return False
        try:
            reply, _ = await job.link.request("signal", job.id, number)
        except LinkClosed:
            return False
        except TimeoutError as error:
            raise InfraError("the sandbox's first process does not answer") from error
        return bool(reply.get("delivered"))

    async def resize(self, size: TerminalSize) -> None:
        """Set the size of its terminal."""
        if self._command.terminal is None:
            raise FailedPrecondition("the command has no terminal; start it with one")
        if self._input >= 0:
            packed = struct.pack("HHHH", size.rows, size.columns, 0, 0)
            fcntl.ioctl(self._input, termios.TIOCSWINSZ, packed)

    async def wait(self) -> ExecResult:
        """Wait for its end, within its time limit."""
        if self._job is None:
            raise RuntimeError("the command was not started")
        try:
            return await self._box.conclude(self._job, self._command.timeout_s)
        finally:
            self._ended = True
            self._close_input()


def _wake(room: "asyncio.Future[None]") -> None:
    if not room.done():
        room.set_result(None)

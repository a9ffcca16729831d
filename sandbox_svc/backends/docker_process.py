"""A command in a container, from its start to its end.

- It runs under a name of its own (`docker_marks.py`): whoever stops it ends all its processes,
  however they hide, and none of another command.
- The name goes back only when nobody is still to end what runs under it: it may be another's next.
- As with any command there, its own end is asked for: a daemon may hold the stream for ever.
- What it prints is always read on: an engine that cannot hand on the output of one command tells
  the end of no other in that container. What waits for a slow sink is bounded by what is kept.
- A signal that ended it is told by its exit code, as everywhere in this backend.
"""

import asyncio
import contextlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from regreen.rpc.errors import FailedPrecondition, InfraError
from sandbox_svc import metrics
from sandbox_svc.backends.base import (
    Command,
    EndReason,
    ExecResult,
    OutputSink,
    TerminalSize,
)
from sandbox_svc.backends.docker_engine import ContainerGone, EngineSilent
from sandbox_svc.backends.docker_exec import Exec, Wish, within
from sandbox_svc.backends.docker_marks import SIGNAL, Mark
from sandbox_svc.backends.docker_oom import Before
from sandbox_svc.backends.output import OutputLog, Pulse

if TYPE_CHECKING:
    from sandbox_svc.backends.docker_box import DockerBox
    from sandbox_svc.backends.docker_channel import Channel

_POLL_S = 0.1
_SLOWEST_POLL_S = 1.0
_QUIET_S = 0.3
_LAST_WORDS_S = 3.0
_FLOOD_PAUSE_S = 0.002
_KILLED = 137
_GONE = "the command's standard input is closed"


class DockerProcess:
    """See `backends.base.Process`."""

    def __init__(self, box: "DockerBox", command: Command, sink: OutputSink | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._box, self._command, self._sink = box, command, sink
        self.changed = Pulse()
        self.stdout = OutputLog(command.output_bytes, self.changed)
        self.stderr = OutputLog(command.output_bytes, self.changed)
        self._input_open = command.open_stdin or command.terminal is not None
        self._exec: Exec | None = None
        self._container = ""
        self._mark: Mark | None = None
        self._kills: Before | None = None
        self._channel: Channel | None = None
        self._queue: asyncio.Queue[tuple[str, bytes] | None] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._pump: asyncio.Task[None] | None = None
        self._ended = False
        self._began_s = time.monotonic()

    @classmethod
    async def begin(
        cls,
        box: "DockerBox",
        command: Command,
        sink: OutputSink | None = None,
        channel: "Channel | None" = None,
    ) -> "DockerProcess":
        """Start a command of a box; it ends with its caller until that has it."""
        self = cls(box, command, sink)
        self._channel = channel
        self._kills = await box.kills()
        mark = self._mark = await box.mark()
        container = self._container = box.container
        running = self._exec = Exec(box.engine, self._wish(mark), self._feed)
        opening = box.engine.task(running.open(container))
        try:
            await asyncio.shield(opening)
        except BaseException:
            box.engine.task(self._abandon(opening))
            raise
        self._began_s = time.monotonic()
        if sink is not None:
            self._pump = asyncio.create_task(self._deliver(sink))
        if not self._input_open and command.stdin:
            self._tasks.append(asyncio.create_task(self._exec.give(command.stdin)))
        if command.terminal is not None:
            await self._first_size(command.terminal)
        return self

    async def _abandon(self, opening: "asyncio.Task[None]") -> None:
        """End what comes of a start that nobody waits for, then give its name back."""
        try:
            with contextlib.suppress(EngineSilent):  # it may run, or be about to
                await opening
        except BaseException:  # it does not run
            self._close()
            raise
        await self._give_up()

    def _wish(self, mark: Mark) -> Wish:
        command, script = self._command, 'exec "$@"'
        env = self._box.env | dict(command.env)
        if command.terminal is not None:  # before it starts, so that it sees no change of size
            size = command.terminal
            script = f"stty rows {size.rows} cols {size.columns} 2>/dev/null; {script}"
            env = {"TERM": "xterm-256color"} | dict(command.env)
            env = self._box.env | env
        if self._channel is not None:
            env["REGREEN_CHANNEL_FD"] = "3"
            script = f"exec 3>{self._channel.path}; {script}"
        return Wish(
            ("/bin/sh", "-c", script, "-", *command.argv),
            mark.user,
            env,
            command.cwd,
            stdin=self._input_open or bool(command.stdin),
            terminal=command.terminal is not None,
        )

    async def _first_size(self, size: TerminalSize) -> None:
        try:
            await self.resize(size)
        except BaseException:
            await self._give_up()
            raise

    def _feed(self, name: str, data: bytes) -> float | None:
        """Take what was printed; how long to wait before more is read."""
        log = self.stderr if name == "stderr" else self.stdout
        kept = not log.over
        log.feed(data)
        if log.over:
            return _FLOOD_PAUSE_S
        if self._pump is not None and kept:
            self._queue.put_nowait((name, data))
        return None

    async def _deliver(self, sink: OutputSink) -> None:
        while (item := await self._queue.get()) is not None:
            await sink(*item)

    async def write(self, data: bytes) -> int:
        """Give it the first bytes of `data`, once there is room; returns how many."""
        if self._exec is None or not self._input_open:
            raise FailedPrecondition(_GONE)
        try:
            return await self._exec.write(data)
        except BrokenPipeError as error:
            self._input_open = False
            raise FailedPrecondition(_GONE) from error

    async def close_input(self) -> None:
        """Let it see the end of its input; on a terminal that is a character."""
        if self._exec is None or not self._input_open:
            return
        if self._command.terminal is not None:
            with contextlib.suppress(FailedPrecondition):
                await self.write(b"\x04")
            return
        self._input_open = False
        self._exec.end_input()

    async def signal(self, number: int) -> bool:
        """Send a signal to its process group; whether it still ran."""
        if self._ended or self._mark is None:
            return False
        if self._container != self._box.container:
            return False
        with contextlib.suppress(ContainerGone):
            return await self._box.root(SIGNAL, self._mark.gid, str(number)) == 0
        return False

    async def resize(self, size: TerminalSize) -> None:
        """Set the size of its terminal."""
        if self._command.terminal is None:
            raise FailedPrecondition("the command has no terminal; start it with one")
        if self._exec is None or self._ended:
            return
        engine, number = self._box.engine, self._exec.id
        try:
            await engine.blocking(engine.api.exec_resize, number, size.rows, size.columns)
        except EngineSilent:
            raise
        except InfraError:  # it has ended
            return

    async def wait(self) -> ExecResult:
        """Wait for its end, within its time limit."""
        running = self._exec
        if running is None:
            raise RuntimeError("the command was not started")
        stopped: EndReason | None = None
        found: dict[str, Any] = {}
        try:
            stopped = await self._until_end(running)
            found = await running.ended()
            await self._last_words(running)
        except BaseException:
            await self._give_up()
            raise
        try:
            if self._pump is not None:
                self._queue.put_nowait(None)
                await self._pump
            result = await self._result(found, stopped)
            metrics.count_limit(result.reason)
            return result
        finally:
            self._close()

    async def _give_up(self) -> None:
        """End all its processes, whatever becomes of the caller meanwhile."""
        mark, self._mark = self._mark, None
        try:
            if mark is not None:
                finishing = self._box.finish(self._container, mark, self._exec)
                ending = self._box.engine.task(finishing)
                with contextlib.suppress(InfraError):
                    await asyncio.shield(ending)
        finally:
            self._close()

    async def _until_end(self, running: Exec) -> EndReason | None:
        """Wait for the end of its main process; why it was brought about, if it was."""
        wall_s = self._box.limits.wall_s or self._command.timeout_s
        until_s = self._began_s + min(self._command.timeout_s, wall_s)
        most_bytes, pause_s = self._box.limits.output_bytes, 0.0
        while True:
            if pause_s and not (await running.look()).get("Running"):
                return None
            now = time.monotonic()
            if 0 < most_bytes < self.stdout.total_bytes + self.stderr.total_bytes:
                return await self._overrun(EndReason.OUTPUT)
            if now >= until_s:
                return await self._overrun(EndReason.TIMEOUT)
            silent = running.drained.is_set()  # it may have closed its output and go on
            pause_s = min(pause_s * 2 if silent and pause_s else _POLL_S, _SLOWEST_POLL_S)
            left_s = max(0.001, min(pause_s, until_s - now))
            if silent:
                await asyncio.sleep(left_s)
            else:
                await within(running.drained, left_s)

    async def _overrun(self, reason: EndReason) -> EndReason:
        assert self._mark is not None
        ending = self._box.end(self._container, self._mark, reason, self._exec)
        await asyncio.shield(self._box.engine.task(ending))  # or its program might outlive the name
        return reason

    async def _last_words(self, running: Exec) -> None:
        """Read what the command printed last; a daemon that holds the stream is not waited for."""
        self._ended = True
        began_s = self._loop.time()
        while not running.drained.is_set():
            now = self._loop.time()
            quiet_s = max(began_s, running.seen_s) + _QUIET_S - now
            if quiet_s <= 0 or now > began_s + _LAST_WORDS_S:
                return
            await within(running.drained, quiet_s)

    async def _result(self, found: dict[str, Any], stopped: EndReason | None) -> ExecResult:
        wall_s = time.monotonic() - self._began_s
        out, err = self.stdout.captured(), self.stderr.captured()
        code = found.get("ExitCode") if found else _KILLED
        if stopped is None and code in (126, 127) and not found.get("Pid"):
            ended = await self._box.not_started(self._container, self._command, out)
            return replace(ended, wall_s=wall_s)
        ending = None if stopped is None else (stopped, -9, 9)
        if ending is None:
            ending = await self._box.how(self._container, code, self._kills)
        reason, shown, number = ending
        channel = await self._channel.finish() if self._channel is not None else b""
        lost = reason is not EndReason.OOM and await self._box.lost_for_memory(
            self._container, self._kills
        )
        hit = (EndReason.OOM,) if lost else ()
        return ExecResult(reason, shown, number, out, err, wall_s, channel=channel, limits_hit=hit)

    def _close(self) -> None:
        self._ended, self._input_open = True, False
        if self._exec is not None:
            self._exec.close()
        for task in (*self._tasks, self._pump):
            if task is not None:
                task.cancel()
        mark, self._mark = self._mark, None
        if mark is not None:
            self._box.unmark(mark, empty=False)

"""Commands that outlive the call that started them.

- A command runs whether or not anyone reads; it ends by itself, by its time limit or with its
  sandbox: freezing, restoring and deleting a sandbox end its commands, by signal 9.
- While one runs its sandbox does not expire, and for a short while after, so that the result can
  be fetched.
- A request id starts one command, also when the caller is cut off in between and asks again.
- Input is taken in order, each byte once: a place in it tells what was taken before. Who writes
  waits until the bytes are in the command's pipe; cut short, what was taken counts.
- Output has places too: any number of readers take it up anywhere, and see what is missing.
- Of a sandbox's commands only so many are kept; the oldest that have ended are forgotten first,
  and one that runs is never forgotten.
"""

import asyncio
import contextlib
import signal as signals
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace

from regreen.ids import new_id
from regreen.rpc.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    RegreenError,
    ResourceExhausted,
    Unavailable,
)
from regreen.rpc.logging import get
from sandbox_svc import metrics
from sandbox_svc.backends.base import (
    Captured,
    Command,
    EndReason,
    ExecResult,
    Process,
    TerminalSize,
)
from sandbox_svc.sandbox import Sandbox
from sandbox_svc.sandboxes import Manager

MAX_INPUT_BYTES = 1 << 20
"""Of one write; more of a command's unread input is never held."""
_CHUNK_BYTES = 128 << 10
_KEPT_BYTES = 64 << 20
"""Output of a sandbox's ended commands; over it the oldest are forgotten."""
_LINGER_S = 60.0
_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of one stream of a command."""

    stream: str
    offset: int
    data: bytes


@dataclass(slots=True, eq=False)
class Execution:
    """One command that was started."""

    sandbox_id: str
    command: Command
    request_id: str
    created_s: float
    started: asyncio.Future[Process]
    input_bytes: int
    """Taken so far, the first bytes of the command included."""
    id: str = field(default_factory=lambda: new_id("exe"))
    result: ExecResult | None = None
    """How it ended, without what it printed: the logs of its process keep that."""
    input_closed: bool = False
    input_lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def kept_bytes(self) -> int:
        """Output that is held in memory for it."""
        if not self.started.done() or self.started.cancelled() or self.started.exception():
            return 0
        process = self.started.result()
        return process.stdout.kept_bytes + process.stderr.kept_bytes


class Executions:
    """Starts commands in sandboxes of one manager and speaks to them."""

    def __init__(
        self, manager: Manager, *, max_kept: int = 32, clock: Callable[[], float] = time.time
    ) -> None:
        self._manager, self._max_kept, self._clock = manager, max_kept, clock
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Kill what still runs."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def start(self, sandbox_id: str, command: Command, *, request_id: str = "") -> Execution:
        """Start a command.

        Raises:
            NotFound: no such sandbox.
            ResourceExhausted: too many run in it.
            InvalidArgument: the command makes no sense.
        """
        if command.open_stdin and len(command.stdin) > MAX_INPUT_BYTES:
            raise InvalidArgument(
                "command.stdin", f"{len(command.stdin)} bytes", f"give at most {MAX_INPUT_BYTES}"
            )
        sandbox = self._manager.get(sandbox_id)
        execution = self._known(sandbox, command, request_id)
        if execution is None:
            self._make_room(sandbox)
            started: asyncio.Future[Process] = asyncio.get_running_loop().create_future()
            execution = Execution(
                sandbox.id, command, request_id, self._clock(), started, len(command.stdin)
            )
            sandbox.executions[execution.id] = execution
            task = asyncio.create_task(self._run(execution))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await asyncio.shield(execution.started)
        return execution

    @staticmethod
    def _known(sandbox: Sandbox, command: Command, request_id: str) -> Execution | None:
        for execution in sandbox.executions.values():
            if request_id and execution.request_id == request_id:
                if execution.command != command:
                    problem = f"{request_id[:80]!r} was used for another command"
                    raise InvalidArgument("request_id", problem, "use a fresh id")
                return execution
        return None

    def _make_room(self, sandbox: Sandbox) -> None:
        kept = sandbox.executions
        ended = [execution for execution in kept.values() if execution.result is not None]
        if len(kept) - len(ended) >= self._max_kept:
            raise ResourceExhausted(
                f"{len(kept) - len(ended)} commands run in the sandbox",
                metadata={"limit": str(self._max_kept)},
                retry_after_s=_RETRY_S,
            )
        size_bytes = sum(execution.kept_bytes for execution in ended)
        for execution in ended:
            if len(kept) < self._max_kept and size_bytes <= _KEPT_BYTES:
                return
            size_bytes -= execution.kept_bytes
            del kept[execution.id]

    async def _run(self, execution: Execution) -> None:
        """Run a command to its end, in a sandbox that is held meanwhile."""
        try:
            with self._manager.using(execution.sandbox_id, linger_s=_LINGER_S) as sandbox:
                async with sandbox.lock:
                    process = await sandbox.box.start(execution.command)
                await self._attend(execution, process)
        except asyncio.CancelledError:
            self._not_started(execution, Unavailable("the service is stopping"))
            raise
        except Exception as error:  # noqa: BLE001  (whoever asked for the command raises it)
            if execution.started.done():
                told = {"error": error.message} if isinstance(error, RegreenError) else {}
                stack = None if told else error
                get().error("a command was lost", exec_id=execution.id, exc_info=stack, **told)
            self._not_started(execution, error)

    def _not_started(self, execution: Execution, error: Exception) -> None:
        if execution.started.done():
            return
        execution.started.set_exception(error)
        execution.started.exception()  # who asked may have gone
        with contextlib.suppress(NotFound):
            self._manager.get(execution.sandbox_id).executions.pop(execution.id, None)

    async def _attend(self, execution: Execution, process: Process) -> None:
        """Feed a command its first bytes and wait for its end, which is told in any case."""
        feeder = asyncio.create_task(self._feed(execution, process))
        execution.started.set_result(process)
        result = ExecResult(EndReason.INFRA, -9, 9)
        try:
            result = await process.wait()
        finally:
            feeder.cancel()
            execution.result = replace(
                result, stdout=_counted(result.stdout), stderr=_counted(result.stderr)
            )
            process.changed.beat()
            metrics.EXEC_SECONDS.labels(result.reason.value).observe(result.wall_s)

    @staticmethod
    async def _feed(execution: Execution, process: Process) -> None:
        """Give the first bytes, and an end where nothing may follow."""
        command = execution.command
        if not command.open_stdin and command.terminal is None:
            return
        rest = command.stdin
        async with execution.input_lock:
            with contextlib.suppress(FailedPrecondition):
                while rest:
                    rest = rest[await process.write(rest) :]
            if not command.open_stdin:
                await process.close_input()

    def get(self, sandbox_id: str, exec_id: str) -> Execution:
        """One command of a sandbox.

        Raises:
            NotFound: no such sandbox or command, or it is not kept any more.
        """
        execution = self._manager.get(sandbox_id).executions.get(exec_id)
        if execution is None:
            raise NotFound(
                f"no such command: {exec_id}; it may have been forgotten", metadata={"id": exec_id}
            )
        return execution

    def list(self, sandbox_id: str) -> Sequence[Execution]:
        """Commands of a sandbox that run or are kept, oldest first."""
        return list(self._manager.get(sandbox_id).executions.values())

    async def attach(
        self, sandbox_id: str, exec_id: str, *, stdout: int = 0, stderr: int = 0
    ) -> AsyncGenerator[Chunk | ExecResult, None]:
        """What a command prints from two places on, then how it ended.

        Raises:
            InvalidArgument: a place that was not written yet.
        """
        execution = self.get(sandbox_id, exec_id)
        process = await asyncio.shield(execution.started)
        logs = {"stdout": process.stdout, "stderr": process.stderr}
        places = {"stdout": stdout, "stderr": stderr}
        for stream, log in logs.items():
            if not 0 <= places[stream] <= log.total_bytes:
                raise InvalidArgument(
                    f"{stream}_offset",
                    f"is {places[stream]} of {log.total_bytes} bytes",
                    f"give 0 to {log.total_bytes}",
                )
        while True:
            changed, result, quiet = process.changed.next(), execution.result, True
            for stream, log in logs.items():
                offset, data = log.read(places[stream], _CHUNK_BYTES)
                if data:
                    quiet = False
                    places[stream] = offset + len(data)
                    yield Chunk(stream, offset, data)
            if quiet and result is not None:
                out, err = process.stdout.captured(), process.stderr.captured()
                yield replace(result, stdout=out, stderr=err)
                return
            if quiet:
                await changed.wait()

    async def write(
        self, sandbox_id: str, exec_id: str, offset: int, data: bytes, *, close: bool = False
    ) -> int:
        """Give a command input from a place on; the bytes taken so far.

        Cut short, it may be asked again: what was taken before is passed over.

        Raises:
            InvalidArgument: bytes before `offset` are missing.
            FailedPrecondition: the input is closed, or was never open.
        """
        if len(data) > MAX_INPUT_BYTES:
            raise InvalidArgument("data", f"{len(data)} bytes", f"give at most {MAX_INPUT_BYTES}")
        execution = self.get(sandbox_id, exec_id)
        if not execution.command.open_stdin:
            raise FailedPrecondition(
                "the command's standard input was never open; start it with open_stdin"
            )
        process = await asyncio.shield(execution.started)
        async with execution.input_lock:
            taken = execution.input_bytes
            if not 0 <= offset <= taken:
                raise InvalidArgument(
                    "offset",
                    f"is {offset} where {taken} bytes were taken",
                    f"go on from {taken}",
                    metadata={"stdin_bytes": str(taken)},
                )
            rest = data[taken - offset :]
            if rest and execution.input_closed:
                raise FailedPrecondition("the command's standard input is closed")
            while rest:
                given = await process.write(rest)
                execution.input_bytes += given
                rest = rest[given:]
            if close and not execution.input_closed:
                await process.close_input()
                execution.input_closed = True
            return execution.input_bytes

    async def signal(self, sandbox_id: str, exec_id: str, number: int) -> bool:
        """Send a signal to a command's process group; whether it still ran."""
        if number not in signals.valid_signals():
            raise InvalidArgument("signal", f"{number} is none", "give 1 to 64, for example 15")
        execution = self.get(sandbox_id, exec_id)
        process = await asyncio.shield(execution.started)
        return await process.signal(number)

    async def resize(self, sandbox_id: str, exec_id: str, size: TerminalSize) -> None:
        """Set the size of a command's terminal."""
        execution = self.get(sandbox_id, exec_id)
        process = await asyncio.shield(execution.started)
        await process.resize(size)


def _counted(captured: Captured) -> Captured:
    return Captured(total_bytes=captured.total_bytes)

"""Commands of the embedded runtime, as the service follows them.

- A job is known by its number to the first process of its sandbox; the exit message ends it.
- What could not be started is a result where the command is at fault, and else an error.
- Descriptors of a command that does not come to be are closed, also where there are no more.
"""

import asyncio
import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from regreen.rpc.errors import (
    FailedPrecondition,
    InfraError,
    InvalidArgument,
    RegreenError,
    SandboxLost,
    Unavailable,
)
from sandbox_svc.backends import fds, wire
from sandbox_svc.backends.base import Captured, Command, EndReason, ExecResult, OutputSink
from sandbox_svc.backends.cgroups import Counters
from sandbox_svc.backends.link import Link
from sandbox_svc.backends.output import Collector, PipeReader


@dataclass(slots=True)
class Job:
    """One running command."""

    id: int
    link: Link
    command: Command
    done: asyncio.Future[wire.Message]
    """What ended it, or what kept it from beginning."""
    readers: list[PipeReader] = field(default_factory=list)
    reason: EndReason | None = None
    """Set by whoever stops the command."""
    refused: ExecResult | None = None
    """How it ended before it began."""
    terminal: int = -1
    """A second descriptor of its terminal, for whoever writes to it and resizes it."""
    began_s: float = field(default_factory=time.monotonic)
    seen: Counters = field(default_factory=Counters)
    """What its sandbox had run into before."""
    disk_reached: int = 0
    """How often its sandbox had come to a limit of the disk before."""
    least_free_bytes: int = -1
    """The least room that the host was seen to have."""

    def request(self, env: Mapping[str, str], *, told: bool) -> Sequence[wire.Field]:
        """What the first process is asked; `told`: it shall say that the command has begun."""
        command, size = self.command, self.command.terminal
        variables = {**env, **command.env}
        if command.channel:
            variables["REGREEN_CHANNEL_FD"] = "3"
        return (
            int(told),
            *((size.rows, size.columns) if size is not None else (0, 0)),
            command.cwd,
            len(command.argv),
            *command.argv,
            len(variables),
            *(f"{name}={value}" for name, value in variables.items()),
        )

    def on_terminal(self, received: Sequence[int]) -> None:
        """Read the terminal instead of the first pipe.

        Raises:
            OSError: there are no descriptors for it.
        """
        if not received:  # it was sent, and there was none to receive it with
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        fd = received[0]
        try:
            self.terminal = os.dup(fd)
        except OSError:
            os.close(fd)
            raise
        unused, self.readers[0] = (
            self.readers[0],
            PipeReader("stdout", self.readers[0].collector, None, fd),
        )
        unused.close()


def refusal(reply: wire.Message, command: Command) -> ExecResult | None:
    """What is wrong with a command that did not start; None when it did."""
    if reply.get("cwd"):
        raise no_directory(command)
    if reply.get("no_terminal"):
        raise FailedPrecondition(
            f"the sandbox cannot be given a terminal ({reply['error']}); run it without one"
        )
    if "spawn" in reply:
        if reply["errno"] == errno.EAGAIN:
            return ExecResult(EndReason.PIDS, 126, stderr=_note(reply["error"]))
        code = 127 if reply["errno"] in (errno.ENOENT, errno.ENOTDIR) else 126
        return ExecResult(EndReason.EXIT, code, stderr=_note(reply["error"]))
    if "error" in reply:
        raise InvalidArgument(
            "command.argv", f"cannot be executed: {reply['error']}", "name another program"
        )
    return None


def no_directory(command: Command) -> InvalidArgument:
    """The error for a command whose directory is not there."""
    return InvalidArgument(
        "command.cwd",
        f"no such directory in the sandbox: {command.cwd[:200]}",
        "make it first, or leave it out",
    )


def _note(text: str) -> Captured:
    data = f"regreen: {text}\n".encode("utf-8", "replace")
    return Captured(data, b"", len(data))


async def first_of(go: asyncio.Event, job: Job) -> None:
    """Wait until a command may go on, or has ended; its time counts from there."""
    waiting = asyncio.create_task(go.wait())
    job.done.add_done_callback(lambda _: waiting.cancel())
    try:
        await asyncio.wait([waiting])
    finally:
        waiting.cancel()
    if go.is_set():
        job.began_s, job.least_free_bytes = time.monotonic(), -1


def prepared(
    outputs: Iterable[tuple[str, Collector, OutputSink | None]], stdin: Callable[[], int]
) -> tuple[list[PipeReader], int]:
    """A reader for each output and the descriptor of standard input: all of them, or none.

    Raises:
        ResourceExhausted: the service has no descriptors left.
    """
    with contextlib.ExitStack() as undo:
        try:
            readers = []
            for output in outputs:
                readers.append(PipeReader(*output))
                undo.callback(readers[-1].close)
            given = stdin()
        except OSError as error:
            if error.errno not in fds.NONE_LEFT:
                raise
            raise fds.exhausted("the command") from error
        undo.pop_all()
        return readers, given


async def all_ended(jobs: Sequence[Job], within_s: float) -> bool:
    """Whether all commands end within the time that a kill may take."""
    waiting = [job.done for job in jobs if not job.done.done()]
    if waiting:
        await asyncio.wait(waiting, timeout=within_s)
    return all(job.done.done() for job in jobs)


def not_ready(message: wire.Message) -> RegreenError:
    """What a first process said, or did not say, when it ended before it was ready."""
    step, error = message.get("step", "clone"), message.get("error", "it ended")
    failure = f"sandbox set-up failed at {step}: {error}"
    return fds.no_space(failure) if message.get("errno") in fds.FULL else InfraError(failure)


def lost(overrun: EndReason | None, *, passing: bool) -> RegreenError:
    """What it means that a sandbox has no first process: whose doing it was.

    `passing`: it is being frozen, restored or deleted; who asks again learns what came of it.
    """
    remedy = "restore it or create a new one"
    if passing:
        return Unavailable("the sandbox is being frozen or ended; try again")
    if overrun is not None:
        return FailedPrecondition(
            f"the sandbox was ended: it went over a limit ({overrun.value}); {remedy}",
            metadata={"overrun": overrun.value},
        )
    return SandboxLost(f"the sandbox has lost its processes; {remedy}")


def name_end(jobs: Iterable[Job]) -> None:
    """Say of commands that still run that the caller's wish ends them."""
    for job in jobs:
        if not job.done.done():
            job.reason = job.reason or EndReason.SIGNAL

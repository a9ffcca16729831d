"""A sandbox of the embedded runtime.

- A command ends when its main process ends; descendants may live on until freeze or delete.
- Whoever stops a command (timeout, watchdog, cancellation) names the reason first, then kills.
- File operations run in the sandbox's own first process; the service reads from descriptors that
  it has checked to be regular files.
- Freezing and file operations exclude each other: no descriptor may pin the old mounts.
- A box whose first process has died refuses everything but `delete`.
- Ending a box is never left half done: a caller that goes away leaves it to finish.
"""

import asyncio
import contextlib
import errno
import os
import signal
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from regreen.rpc.errors import (
    DiskFull,
    FailedPrecondition,
    InfraError,
    InvalidArgument,
    NoSuchFile,
    NotFound,
)
from sandbox_svc.backends import uppers, wire
from sandbox_svc.backends.base import (
    Captured,
    Command,
    EndReason,
    ExecResult,
    FileStat,
    Limits,
    OutputSink,
)
from sandbox_svc.backends.cgroups import Counters
from sandbox_svc.backends.commands import ENVIRONMENT, absolute, check_command
from sandbox_svc.backends.layers import writing
from sandbox_svc.backends.link import Link, LinkClosed
from sandbox_svc.backends.output import Collector, PipeReader
from sandbox_svc.backends.seats import Seat
from sandbox_svc.backends.watchdog import Watch

if TYPE_CHECKING:
    from sandbox_svc.backends.embedded import EmbeddedRuntime

_KILL_GRACE_S = 2.0
_END_S = 10.0
_READY_S = 30.0
_INLINE_READ_BYTES = 1 << 20


@dataclass(slots=True)
class Job:
    """One running command."""

    id: int
    done: asyncio.Future[wire.Message]
    readers: list[PipeReader] = field(default_factory=list)
    reason: EndReason | None = None
    """Set by whoever stops the command."""


class EmbeddedBox:
    """See `backends.base.Box`."""

    def __init__(
        self,
        runtime: "EmbeddedRuntime",
        box: str,
        layers: Sequence[str],
        limits: Limits,
        env: Mapping[str, str],
    ) -> None:
        self.id, self.limits = box, limits
        self._env = ENVIRONMENT | dict(env)
        self._runtime = runtime
        self._base_layers = list(layers)
        self._own_layers: list[str] = []
        self._link: Link | None = None
        self._seat: Seat | None = None
        self._ready: asyncio.Future[None] | None = None
        self._jobs: dict[int, Job] = {}
        self._ended = False
        self._deleted = False
        self._files = asyncio.Lock()
        self._seen = Counters()
        self._watch: Watch | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._deleting: asyncio.Task[None] | None = None

    @property
    def layers(self) -> list[str]:
        """All layers below the upper, lowest first."""
        return [*self._base_layers, *self._own_layers]

    async def launch(self) -> None:
        """Start the first process over the present layers; used at birth and after a freeze."""
        self._ready = asyncio.get_running_loop().create_future()
        self._ended, self._seen = False, Counters()
        if self._watch is not None:
            self._watch.close()
        self._watch = Watch(self, self._jobs)
        seat = self._seat = await self._runtime.seat_for(self)
        self._link = Link(seat.sock, self._on_event)
        try:
            async with asyncio.timeout(_READY_S):
                await self._link.post(self._runtime.specification(self))
                await self._ready
        except LinkClosed as error:
            raise InfraError("a warm sandbox process died") from error
        except TimeoutError as error:
            raise InfraError("the sandbox did not get ready in time") from error

    def _on_event(self, message: wire.Message) -> None:
        if "ready" in message or "closed" in message:
            self._on_life(message)
            return
        job = self._jobs.get(message["id"])
        if job is not None and not job.done.done():
            job.done.set_result(message)

    def _on_life(self, message: wire.Message) -> None:
        ready = self._ready
        if ready is not None and not ready.done():
            if message.get("ready"):
                ready.set_result(None)
                return
            step, error = message.get("step", "clone"), message.get("error", "it ended")
            ready.set_exception(InfraError(f"sandbox set-up failed at {step}: {error}"))
        if "closed" in message:
            self._ended = True
            for job in self._jobs.values():
                if not job.done.done():
                    job.done.set_exception(LinkClosed())

    async def run(self, command: Command, sink: OutputSink | None = None) -> ExecResult:
        """Run one command to its end."""
        check_command(command)
        link = self._require()
        job = Job(link.next_id(), asyncio.get_running_loop().create_future())
        channel = Collector(command.channel_bytes, head_only=True)
        job.readers = [
            PipeReader("stdout", Collector(command.output_bytes), sink),
            PipeReader("stderr", Collector(command.output_bytes), sink),
        ]
        if command.channel:
            heard = command.later.on_channel if command.later is not None else None
            job.readers.append(PipeReader("channel", channel, heard))
        self._jobs[job.id] = job
        began = time.monotonic()
        try:
            if self._watch is not None:
                self._watch.wake()
            refused = await self._start(link, job, command)
            if refused is not None:
                return refused
            timeout_s = command.timeout_s
            if command.later is not None:
                await _first(command.later.go, job.done)
                timeout_s = command.later.timeout_s or timeout_s
            ended = await self._wait(link, job, timeout_s)
            return await self._result(job, ended, time.monotonic() - began)
        except asyncio.CancelledError:
            job.reason = job.reason or EndReason.SIGNAL
            await asyncio.shield(self._stop(link, job))
            raise
        finally:
            self._jobs.pop(job.id, None)
            for reader in job.readers:
                reader.close()

    async def _start(self, link: Link, job: Job, command: Command) -> ExecResult | None:
        env = self._env | dict(command.env)
        if command.channel:
            env["REGREEN_CHANNEL_FD"] = "3"
        request: wire.Message = {
            "id": job.id,
            "op": "run",
            "argv": list(command.argv),
            "env": env,
            "cwd": command.cwd,
        }
        later = command.later
        stdin = wire.bytes_fd(command.stdin) if later is None else os.dup(later.stdin_fd)
        try:
            fds = (stdin, *(reader.write_fd for reader in job.readers))
            reply, _ = await link.request(request, fds)
        except (LinkClosed, TimeoutError) as error:
            raise self._lost() from error
        finally:
            os.close(stdin)
            for reader in job.readers:
                reader.handed_over()
        if reply.get("cwd"):
            raise InvalidArgument("cwd", f"no such directory in the sandbox: {command.cwd}")
        if "spawn" in reply:
            if reply["errno"] == errno.EAGAIN:
                return ExecResult(EndReason.PIDS, 126, stderr=_note(reply["error"]))
            code = 127 if reply["errno"] in (errno.ENOENT, errno.ENOTDIR) else 126
            return ExecResult(EndReason.EXIT, code, stderr=_note(reply["error"]))
        if "error" in reply:
            raise InvalidArgument("argv", f"cannot be executed: {reply['error']}")
        return None

    async def _wait(self, link: Link, job: Job, timeout_s: float) -> wire.Message | None:
        """The exit message, or None when the whole sandbox died under the command."""
        limit = timeout_s
        if self.limits.wall_s:
            limit = min(limit, self.limits.wall_s)
        try:
            async with asyncio.timeout(limit):
                return await asyncio.shield(job.done)
        except TimeoutError:
            job.reason = job.reason or EndReason.TIMEOUT
            await self._stop(link, job)
            with contextlib.suppress(LinkClosed, TimeoutError):
                async with asyncio.timeout(_END_S):
                    return await asyncio.shield(job.done)
            return None
        except LinkClosed:
            return None

    async def stop(self, job: Job, reason: EndReason) -> None:
        """Stop a command for a reason that is not its own."""
        if job.reason is None and not job.done.done() and self._link is not None:
            job.reason = reason
            await self._stop(self._link, job)

    async def stop_all(self, reason: EndReason) -> None:
        """Stop all commands for a reason, and kill whatever earlier commands have left behind."""
        jobs = list(self._jobs.values())
        for job in jobs:
            job.reason = job.reason or reason
        if self._link is not None:
            await self._kill(self._link, {"op": "kill_all"}, jobs)

    async def _stop(self, link: Link, job: Job) -> None:
        """Kill a command's processes."""
        await self._kill(link, {"op": "kill", "job": job.id}, [job])

    async def _kill(self, link: Link, request: wire.Message, jobs: Sequence[Job]) -> None:
        """Kill by the first process, politely attributed; then the group; then the sandbox."""
        with contextlib.suppress(LinkClosed, TimeoutError):
            await link.request(request, timeout_s=_KILL_GRACE_S)
        if await _ended(jobs):
            return
        if self._seat is not None:
            self._runtime.cgroups.kill(self._seat.group, self._seat.pid)
        if not await _ended(jobs):
            await self._end()

    async def _result(self, job: Job, ended: wire.Message | None, wall_s: float) -> ExecResult:
        out = await job.readers[0].finish()
        err = await job.readers[1].finish()
        channel = (await job.readers[2].finish()).head if len(job.readers) > 2 else b""
        before, self._seen = self._seen, self.counters()
        if ended is None:
            oom = self._seen.oom_kills > before.oom_kills
            killed = EndReason.SIGNAL if self._deleted or self._files.locked() else EndReason.INFRA
            reason = job.reason or (EndReason.OOM if oom else killed)
            return ExecResult(reason, -9, 9, out, err, wall_s, channel=channel)
        status = int(ended["status"])
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        code = -number if number else os.waitstatus_to_exitcode(status)
        reason = EndReason.SIGNAL if number else EndReason.EXIT
        if code != 0:
            if self._seen.oom_kills > before.oom_kills:
                reason = EndReason.OOM
            elif self._seen.pid_refusals > before.pid_refusals:
                reason = EndReason.PIDS
            elif number == signal.SIGXFSZ:
                reason = EndReason.DISK
        cpu_s, peak = float(ended["cpu_s"]), int(ended["peak_bytes"])
        return ExecResult(
            job.reason or reason, code, number, out, err, wall_s, cpu_s, peak, channel
        )

    def counters(self) -> Counters:
        """Events of the sandbox's control group."""
        group = self._seat.group if self._seat is not None else ""
        return self._runtime.cgroups.counters(group) if group else Counters()

    async def usage(self) -> wire.Message:
        """Memory, processes and unlinked bytes, as the first process sees them."""
        return (await self._require().request({"op": "usage"}))[0]

    @property
    def upper_path(self) -> str:
        """Host path of the upper directory."""
        return str(self._runtime.layout.box(self.id) / "u")

    @property
    def soft_memory(self) -> bool:
        """Whether memory is watched by the service instead of a cgroup."""
        return self._runtime.cgroups.name == "rlimit"

    async def measure(self) -> uppers.Usage:
        """Bytes and inodes in the upper."""
        return await self._runtime.blocking(uppers.usage, Path(self.upper_path))

    async def read_file(self, path: str, max_bytes: int) -> bytes:
        """Read a regular file, resolved inside the sandbox's root; links never leave it."""
        content, info = await self.read_range(path, max_bytes=max_bytes)
        if info.size_bytes > max_bytes:
            raise FailedPrecondition(
                f"{path} has {info.size_bytes} bytes, more than the {max_bytes} asked for",
                metadata={"size_bytes": str(info.size_bytes)},
            )
        return content

    async def read_range(
        self, path: str, *, offset: int = 0, max_bytes: int
    ) -> tuple[bytes, FileStat]:
        """Read part of a regular file; the stat tells the size of the whole."""
        async with self._files:
            _, fd = await self._open({"op": "open", "path": absolute(path)})
            try:
                info = os.fstat(fd)
                if not stat.S_ISREG(info.st_mode):
                    raise InvalidArgument("path", f"not a regular file: {path}")
                wanted = max(0, min(max_bytes, info.st_size - offset))
                if wanted <= _INLINE_READ_BYTES:
                    content = _read_upto(fd, offset, wanted)
                else:
                    content = await self._runtime.blocking(_read_upto, fd, offset, wanted)
            finally:
                os.close(fd)
            return content, FileStat(info.st_size, stat.S_IMODE(info.st_mode))

    async def write_file(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Write a regular file, creating parent directories."""
        if self.limits.disk_bytes and len(content) > self.limits.disk_bytes:
            raise InvalidArgument("content", "larger than the sandbox's disk limit")
        async with self._files:
            request = {"op": "create", "path": absolute(path), "mode": mode}
            _, fd = await self._open(request)
            with os.fdopen(fd, "wb", buffering=0):
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise InvalidArgument("path", f"not a regular file: {path}")
                with writing():
                    if len(content) <= _INLINE_READ_BYTES:
                        _write_all(fd, content)
                    else:
                        await self._runtime.blocking(_write_all, fd, content)

    async def _open(self, request: wire.Message) -> tuple[wire.Message, int]:
        try:
            reply, fds = await self._require().request(request)
        except (LinkClosed, TimeoutError) as error:
            raise self._lost() from error
        if fds:
            return reply, fds[0]
        path, problem = request["path"], str(reply.get("error", "refused"))
        match reply.get("errno"):
            case errno.ENOENT | errno.ENOTDIR:
                raise NoSuchFile(f"no such file in the sandbox: {path}", metadata={"path": path})
            case errno.EACCES | errno.EPERM | errno.EROFS:
                raise FailedPrecondition(
                    f"not permitted inside the sandbox: {path}: {problem}", metadata={"path": path}
                )
            case errno.ENOSPC | errno.EDQUOT:
                raise DiskFull(f"no space left where the sandbox writes {path}: {problem}")
            case _:
                raise InvalidArgument("path", f"{problem}: {path}")

    async def freeze(self) -> str:
        """Stop every process, turn the upper into a layer, go on over it; return its id."""
        self._require()
        async with self._files:
            await self._end()
            with writing():
                layer = self._runtime.layout.freeze(self.id)
            self._own_layers.append(layer)
            await self.launch()
            self._runtime.tidy()
            return layer

    async def changed_paths(self, under: str, *, since: int | None = None) -> Sequence[str]:
        """Absolute paths touched since creation, or above the first `since` layers, sorted."""
        layout, layers = self._runtime.layout, [*self._base_layers, *self._own_layers]
        split = len(self._base_layers) if since is None else since
        lowers = [layout.layer(layer) for layer in layers[:split]]
        tops = [layout.layer(layer) for layer in layers[split:]]
        tops.append(Path(self.upper_path))
        found = await self._runtime.blocking(uppers.changed, tops, lowers, absolute(under))
        return sorted(found)

    async def delete(self) -> None:
        """Kill all processes and remove everything; safe to call twice and after a failure."""
        self._deleted = True
        task = self._deleting
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            task = self._deleting = asyncio.create_task(self._delete())
        await asyncio.shield(task)

    async def _delete(self) -> None:
        if self._watch is not None:
            self._watch.close()
        async with self._files:
            await self._end()
            await self._runtime.forget(self)

    async def _end(self) -> None:
        """Kill the first process and wait until the kernel has ended the whole sandbox."""
        self._ended = True
        seat, self._seat = self._seat, None
        if seat is not None:
            self._leaving = asyncio.create_task(self._runtime.leave(seat))
        leaving = self._leaving
        if leaving is not None:
            await asyncio.wait([leaving])
            self._leaving = None if self._leaving is leaving else self._leaving
            leaving.result()
        if self._link is not None:
            self._link.close()

    def _require(self) -> Link:
        if self._deleted:
            raise NotFound(f"sandbox {self.id} was deleted")
        if self._link is None or self._ended:
            raise self._lost()
        return self._link

    def _lost(self) -> FailedPrecondition:
        return FailedPrecondition(
            f"sandbox {self.id} has lost its processes (out of memory or killed); "
            "restore it or create a new one"
        )


async def _first(go: asyncio.Event, done: asyncio.Future[wire.Message]) -> None:
    """Wait until a command may go on, or has ended."""
    waiting = asyncio.create_task(go.wait())
    done.add_done_callback(lambda _: waiting.cancel())
    try:
        await asyncio.wait([waiting])
    finally:
        waiting.cancel()


async def _ended(jobs: Sequence[Job]) -> bool:
    """Whether all commands end within the time that a kill may take."""
    waiting = [job.done for job in jobs if not job.done.done()]
    if waiting:
        await asyncio.wait(waiting, timeout=_KILL_GRACE_S)
    return all(job.done.done() for job in jobs)


def _note(text: str) -> Captured:
    data = f"regreen: {text}\n".encode("utf-8", "replace")
    return Captured(data, b"", len(data))


def _read_upto(fd: int, offset: int, limit: int) -> bytes:
    chunks, end = [], offset + limit
    while offset < end:
        chunk = os.pread(fd, min(end - offset, 1 << 20), offset)
        if not chunk:
            break
        chunks.append(chunk)
        offset += len(chunk)
    return b"".join(chunks)


def _write_all(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]

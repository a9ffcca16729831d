"""A sandbox of the embedded runtime: its life and its commands; its files are `embedded_files`.

- A command ends when its main process ends; descendants may live on until freeze or delete.
- Whoever stops a command (timeout, watchdog, cancellation) names the reason first, then kills.
- A box whose first process has died refuses everything but `delete`, and says whose doing it was:
  a limit that the sandbox went over, or trouble of the platform.
- Ending a box is never left half done: a caller that goes away leaves it to finish.
"""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from regreen.rpc.errors import (
    InfraError,
    NotFound,
    RegreenError,
    ResourceExhausted,
    SandboxLost,
)
from sandbox_svc import metrics
from sandbox_svc.backends import jobs, wire
from sandbox_svc.backends.base import (
    NO_ENV,
    OVERRUNS,
    PROXY_PORT,
    Command,
    Door,
    EndReason,
    ExecResult,
    Gate,
    Later,
    Limits,
    OutputSink,
)
from sandbox_svc.backends.cgroups import Counters
from sandbox_svc.backends.commands import ENVIRONMENT, check_command
from sandbox_svc.backends.embedded_files import BoxFiles
from sandbox_svc.backends.embedded_process import EmbeddedProcess
from sandbox_svc.backends.fds import exhausted, writing
from sandbox_svc.backends.jobs import Job, all_ended, first_of, name_end, prepared
from sandbox_svc.backends.link import Link, LinkClosed, close_all
from sandbox_svc.backends.output import Collector, PipeReader
from sandbox_svc.backends.seats import Part, Seat
from sandbox_svc.backends.watchdog import Watch

if TYPE_CHECKING:
    from sandbox_svc.backends.embedded import EmbeddedRuntime

_KILL_GRACE_S, _END_S, _READY_S = 2.0, 10.0, 30.0


class EmbeddedBox(BoxFiles):
    """See `backends.base.Box`."""

    def __init__(
        self,
        runtime: "EmbeddedRuntime",
        box: str,
        layers: Sequence[str],
        limits: Limits,
        env: Mapping[str, str],
        door: Door | None = None,
    ) -> None:
        super().__init__(runtime, box, limits)
        self._env = ENVIRONMENT | dict(env) | dict(door.environment if door else NO_ENV)
        self._door = door
        self._gate: Gate | None = None
        self._base_layers = list(layers)
        self._link: Link | None = None
        self._seat: Seat | None = None
        self._network = -1
        """Descriptor of its network namespace."""
        self._ready: asyncio.Future[None] | None = None
        self._jobs: dict[int, Job] = {}
        self._ended = False
        self._overrun: EndReason | None = None
        """The limit that the sandbox went over when it was ended as a whole."""
        self._seen = Counters()
        self._watch: Watch | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._deleting: asyncio.Task[None] | None = None

    @property
    def seat(self) -> Seat | None:
        """The first process, while there is one."""
        return self._seat

    async def launch(self, seat: Seat | None = None) -> None:
        """Start the first process over the present layers; used at birth and after a freeze."""
        self._ready = asyncio.get_running_loop().create_future()
        self._ready.add_done_callback(_heard)
        self._ended, self._seen, self._overrun = False, Counters(), None
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        seat = self._seat = seat or await self._runtime.seat_for(self)
        self.place = seat.name
        self._link = Link(seat.sock, self._on_event)
        try:
            async with asyncio.timeout(_READY_S):
                with contextlib.suppress(LinkClosed):  # why it ended, the next line says
                    await self._link.post(*self._runtime.specification(self, seat))
                await self._ready
                soft = self._runtime.cgroups.name == "rlimit"
                self._watch = Watch(self, self._jobs, memory=soft)
                if self._jobs:  # one came while the first process got ready
                    self._watch.wake()
                    self._watch.look()
                if self._door is not None:
                    self._gate = self._door.open(await self._listener(self._link))
        except LinkClosed as error:
            raise SandboxLost("a warm sandbox process died") from error
        except TimeoutError as error:
            raise InfraError("the sandbox did not get ready in time") from error

    async def _listener(self, link: Link) -> socket.socket:
        """A socket of the sandbox's loopback, made before any command of it runs."""
        reply, fds = await link.request("listen", PROXY_PORT)
        if not fds and "error" in reply:
            raise InfraError(f"the sandbox cannot listen: {reply['error']}")
        if not fds:
            raise exhausted("the sandbox's way out")
        return socket.socket(fileno=fds[0])

    def _close_gate(self) -> None:
        if self._gate is not None:
            self._gate.close()

    def _on_event(self, message: wire.Message, fds: list[int]) -> None:
        expected = self._seat is not None and self._network < 0
        if message.get("ready") and len(fds) == 1 and expected:
            self._network = fds.pop()
        close_all(fds)
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
            ready.set_exception(jobs.not_ready(message))
        if "closed" in message:
            if not self._ended and self.counters().oom_kills > self._seen.oom_kills:
                self._overrun = EndReason.OOM
            self._ended = True
            self._close_gate()
            for job in self._jobs.values():
                if not job.done.done():
                    job.done.set_exception(LinkClosed())

    async def run(self, command: Command, sink: OutputSink | None = None) -> ExecResult:
        """Run one command to its end."""
        check_command(command)
        self._require()
        later, sizes = command.later, (command.output_bytes, command.channel_bytes)
        outputs = [(name, Collector(sizes[0]), sink) for name in ("stdout", "stderr")]
        if command.channel:
            heard = later.on_channel if later is not None else None
            outputs.append(("channel", Collector(sizes[1], head_only=True), heard))
        readers, stdin = prepared(
            outputs,
            lambda: os.dup(later.stdin_fd) if later else wire.bytes_fd(command.stdin),
        )
        job = await self.begin(command, readers, stdin, told=later is not None)
        return await self.conclude(job, command.timeout_s, later)

    async def start(self, command: Command) -> EmbeddedProcess:
        """Start a command that is spoken to while it runs."""
        check_command(command)
        self._require()
        return await EmbeddedProcess.begin(self, command)

    async def begin(
        self, command: Command, readers: list[PipeReader], stdin: int, *, told: bool = True
    ) -> Job:
        """Start a command with these descriptors, which it closes; `conclude` must follow.

        With a terminal, `stdin` and the pipe of the first reader are not used. Unless `told`, only
        the end says whether it began: one message less for whoever waits for nothing else.
        """
        loop, link = asyncio.get_running_loop(), self._require()
        job = Job(link.next_id(), link, command, loop.create_future(), readers)
        job.seen = self._seen
        self._jobs[job.id] = job
        try:
            if self._watch is not None:
                self._watch.wake()
                self._watch.look()
                job.disk_reached = self._watch.disk_reached
            job.refused = await self._start(job, stdin, told=told)
        except BaseException as error:
            await self._abandon(job, error)
            raise
        return job

    async def conclude(self, job: Job, timeout_s: float, later: Later | None = None) -> ExecResult:
        """Wait for the end of a command that was begun; cancelling kills it."""
        try:
            refused, ended = job.refused, None
            if refused is None:
                if later is not None:
                    await first_of(later.go, job)
                    timeout_s = later.timeout_s or timeout_s
                ended = await self._wait(job.link, job, timeout_s)
                refused = jobs.refusal(ended or {}, job.command)
            if refused is not None:
                self._seen = self.counters()  # what its attempt counted is no later command's
            result = refused or await self._result(job, ended, time.monotonic() - job.began_s)
            metrics.count_limit(result.reason)
            return result
        except asyncio.CancelledError as error:
            await self._abandon(job, error)
            raise
        finally:
            self._forget(job)

    async def _abandon(self, job: Job, error: BaseException) -> None:
        try:
            if isinstance(error, asyncio.CancelledError):
                job.reason = job.reason or EndReason.SIGNAL
                await asyncio.shield(self._stop(job.link, job))
        finally:
            self._forget(job)

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job.id, None)
        for reader in job.readers:
            reader.close()

    async def _start(self, job: Job, stdin: int, *, told: bool) -> ExecResult | None:
        request = job.request(self._env, told=told)
        fds = (stdin, *(reader.write_fd for reader in job.readers))
        try:
            if not told:
                await job.link.post(job.id, "run", *request, fds=fds)
                return None
            given = () if job.command.terminal else fds
            reply, received = await job.link.request("run", *request, fds=given, number=job.id)
        except (LinkClosed, TimeoutError) as error:
            raise self._lost() from error
        finally:
            os.close(stdin)
            for reader in job.readers:
                reader.handed_over()
        refused = jobs.refusal(reply, job.command)
        if refused is None and job.command.terminal is not None:
            try:
                with writing("a terminal"):
                    job.on_terminal(received)
            except ResourceExhausted:
                job.reason = EndReason.SIGNAL
                await asyncio.shield(self._stop(job.link, job))
                raise
        return refused

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
        doomed = list(self._jobs.values())
        for job in doomed:
            job.reason = job.reason or reason
        if self._link is not None:
            await self._kill(self._link, doomed, reason, "kill_all")

    async def _stop(self, link: Link, job: Job) -> None:
        """Kill a command's processes."""
        await self._kill(link, [job], job.reason, "kill", job.id)

    async def _kill(
        self, link: Link, doomed: Sequence[Job], reason: EndReason | None, what: str, *job: int
    ) -> None:
        """Kill by the first process, politely attributed; then the group; then the sandbox."""
        with contextlib.suppress(LinkClosed, TimeoutError):
            await link.request(what, *job, timeout_s=_KILL_GRACE_S)
        if await all_ended(doomed, _KILL_GRACE_S):
            return
        if self._seat is not None:
            self._runtime.cgroups.kill(self._seat.name, self._seat.pid)
        if not await all_ended(doomed, _KILL_GRACE_S):
            self._overrun = reason if reason in OVERRUNS else None
            await self._end()

    async def _result(self, job: Job, ended: wire.Message | None, wall_s: float) -> ExecResult:
        out = await job.readers[0].finish()
        err = await job.readers[1].finish()
        channel = (await job.readers[2].finish()).head if len(job.readers) > 2 else b""
        before, self._seen = self._seen, self.counters()
        if ended is None:
            oom = self._seen.oom_kills > before.oom_kills
            reason = job.reason or (EndReason.OOM if oom else EndReason.INFRA)
            return ExecResult(reason, -9, 9, out, err, wall_s, channel=channel)
        status = int(ended["status"])
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        code = -number if number else os.waitstatus_to_exitcode(status)
        reason = EndReason.SIGNAL if number else EndReason.EXIT
        full = await self._is_full(job, int(ended["wrote_bytes"]), number)
        if code != 0:
            if self._seen.oom_kills > before.oom_kills:
                reason = EndReason.OOM
            elif self._seen.pid_refusals > before.pid_refusals:
                reason = EndReason.PIDS
            elif full:
                reason = EndReason.DISK
        return ExecResult(
            job.reason or reason, code, number, out, err, wall_s,
            float(ended["cpu_s"]), int(ended["peak_bytes"]), channel,
            limits_hit=self._hit(job, full=full), least_free_bytes=job.least_free_bytes,
        )  # fmt: skip

    async def _is_full(self, job: Job, wrote_bytes: int, number: int) -> bool:
        """Whether a command that has ended, by this signal, has come to a limit of the disk."""
        if self._watch is None:
            return False
        self._watch.look()
        await self._watch.measure(wrote_bytes, anyway=job.command.measured)
        return self._watch.disk_reached > job.disk_reached or number == signal.SIGXFSZ

    def _hit(self, job: Job, *, full: bool) -> tuple[EndReason, ...]:
        """What the sandbox ran into since a command began."""
        events = (
            (EndReason.OOM, self._seen.oom_kills > job.seen.oom_kills),
            (EndReason.PIDS, self._seen.pid_refusals > job.seen.pid_refusals),
            (EndReason.DISK, full),
        )
        return tuple(reason for reason, happened in events if happened)

    def counters(self) -> Counters:
        """Events of the sandbox's control group."""
        group = self._seat.name if self._seat is not None else ""
        return self._runtime.cgroups.counters(group) if group else Counters()

    def throttled(self) -> int:
        """How often the sandbox was stopped for its use of cores."""
        return self._runtime.cgroups.throttled(self._seat.name) if self._seat is not None else 0

    async def ended_itself(self) -> bool:
        """Whether it has lost its processes, and by what ran in it; see `spawner/main.c`."""
        seat = self._seat if self._ended else None
        return seat is not None and await self._runtime.ended_itself(seat)

    async def usage(self) -> wire.Message:
        """Memory, processes and unlinked bytes, as the first process sees them."""
        try:
            return (await self._require().request("usage"))[0]
        except LinkClosed as error:
            raise self._lost() from error

    async def _admit(self, path: str, size_bytes: int) -> None:
        self._require()
        if self._watch is not None:
            try:
                await self._watch.admit(path, size_bytes)
            except (TimeoutError, FileNotFoundError) as error:
                raise self._lost() from error

    async def freeze(self) -> str:
        """Stop every process, turn the upper into a layer, go on over it; return its id."""
        self._require()
        async with self._files:
            # Had before anything ends: where it cannot be made, the sandbox goes on as it was.
            seat: Seat | None = await self._runtime.seat_for(self)
            self._freezing = True
            name_end(self._jobs.values())
            try:
                await self._end()
                with writing():
                    layer = self._runtime.layout.freeze(self.place)
                self.place = ""
                self._own_layers.append(layer)
                last, seat = seat, None
                await self.launch(last)
            except BaseException as error:
                await self._end()  # half a start is none, or the next freeze would lack this layer
                if isinstance(error, InfraError):
                    self._runtime.layout.require(self.layers)
                raise
            finally:
                self._freezing = False
                if seat is not None:
                    self._runtime.give_up(seat)
                self._runtime.tidy()
            return layer

    def rebase(self, count: int, layers: Sequence[str]) -> None:
        """Stand on `layers` in place of the lowest `count` from the next start on."""
        below = max(0, len(self._base_layers) - count) + len(layers)
        every = [*layers, *self.layers[count:]]
        self._base_layers, self._own_layers = every[:below], every[below:]

    async def delete(self) -> None:
        """Kill all processes and remove everything; safe to call twice and after a failure."""
        self._deleted = True
        name_end(self._jobs.values())
        task = self._deleting
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            task = self._deleting = asyncio.create_task(self._delete())
        await asyncio.shield(task)

    async def _delete(self) -> None:
        if self._watch is not None:
            self._watch.close()
        async with self._files:
            name_end(self._jobs.values())
            await self._end(for_good=True)
            await self._runtime.forget(self)

    async def _end(self, *, for_good: bool = False) -> None:
        """Kill the first process and wait until the kernel has ended the whole sandbox."""
        self._ended = True
        self._close_gate()
        seat, self._seat = self._seat, None
        if for_good and self._link is not None:
            self._link.close()  # nobody is to hear what it said last
        if seat is not None:
            part = Part.GROUP
            if for_good and seat.name == self.place:
                usual = self.limits == seat.limits and self._network >= 0  # it was once ready
                part = Part.USUAL if usual else Part.BOTH
                self.place = ""
            network, self._network = self._network, -1
            self._leaving = asyncio.create_task(self._runtime.leave(seat, part, network))
        leaving = self._leaving
        if leaving is not None:
            await asyncio.wait([leaving])
            self._leaving = None if self._leaving is leaving else self._leaving
            leaving.result()
        if self._link is not None:
            self._link.close()

    def _require(self) -> Link:
        if self._deleted:
            raise NotFound("the sandbox was deleted")
        if self._link is None or self._ended:
            raise self._lost()
        return self._link

    def _lost(self) -> RegreenError:
        return jobs.lost(self._overrun, passing=self._freezing or self._deleted)


def _heard(ready: "asyncio.Future[None]") -> None:
    """Take the failure of a set-up that was cancelled meanwhile, for which nobody waits."""
    if not ready.cancelled():
        ready.exception()

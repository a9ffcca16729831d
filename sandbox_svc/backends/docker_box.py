"""A sandbox in a container of a Docker engine.

- The container's first process belongs to root; commands run as user 1000 and cannot end it. Root
  there has one capability, to signal; commands have none.
- Files are read and written by commands inside the container, so every path resolves there.
- Freezing kills everything, commits, and goes on in a fresh container over the new image.
- Where the processes of a command cannot be ended alone, the whole sandbox ends: none of them runs
  on in a sandbox that is still used.
- A box whose container has ended refuses everything but `delete`, and says whose doing it was.
- Starting, freezing and deleting are never left half done: a caller that goes away leaves them to
  finish.
- A signal is recognised by the shell's convention (128 + number); the engine tells no more.
"""

import asyncio
import json
import secrets
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from regreen.rpc.errors import (
    FailedPrecondition,
    InfraError,
    InvalidArgument,
    NotFound,
    RegreenError,
    ResourceExhausted,
)
from sandbox_svc.backends.base import (
    OVERRUNS,
    Captured,
    Command,
    EndReason,
    ExecResult,
    FileStat,
    Limits,
    OutputSink,
    read_whole,
)
from sandbox_svc.backends.commands import ENVIRONMENT, absolute, check_command
from sandbox_svc.backends.docker_channel import Channel
from sandbox_svc.backends.docker_engine import ContainerGone, Engine, EngineSilent
from sandbox_svc.backends.docker_exec import ROOT, Answer, Exec, Helper, ask
from sandbox_svc.backends.docker_files import (
    LISTING,
    READ,
    READ_ITSELF,
    TOLD,
    WRITE,
    WRITE_ITSELF,
    parse_listing,
    raise_for,
)
from sandbox_svc.backends.docker_marks import COUNT, END, GROUPS, Mark, Marks
from sandbox_svc.backends.docker_oom import Before, OomKills
from sandbox_svc.backends.docker_process import DockerProcess
from sandbox_svc.backends.jobs import lost, no_directory

if TYPE_CHECKING:
    from sandbox_svc.backends.docker import DockerRuntime

_LISTING_BYTES = 256 << 20
_END_TRIES = 6
_END_S = 20.0
_AGAIN_S = 0.2
_KILLED = 137
_START_ROOM = 8
"""Threads that the engine's starter needs in a container."""


class DockerBox:
    """See `backends.base.Box`."""

    def __init__(
        self,
        runtime: "DockerRuntime",
        layers: Sequence[str],
        limits: Limits,
        env: Mapping[str, str],
    ) -> None:
        self.id, self.limits = secrets.token_hex(6), limits
        self._runtime = runtime
        self.engine: Engine = runtime.engine
        self.below = len(layers)
        self.layers = list(layers)
        self.env = ENVIRONMENT | dict(env)
        self.container = ""
        self.deleted = False
        self._freezing = self._ended = False
        self._overrun: EndReason | None = None
        """The limit that the sandbox went over when it was ended as a whole."""
        self._marks = Marks()
        self._kills = OomKills(self.engine, "")
        self._known: set[str] = set()
        """Directories that were seen since the container started."""
        self._life, self._ending = asyncio.Lock(), asyncio.Lock()
        self._deleting: asyncio.Task[None] | None = None

    async def launch(self) -> None:
        """Start a container over the present layers."""
        async with self._life:
            await self._launch()

    async def _launch(self) -> None:
        if self.deleted:
            raise self._lost()
        self._marks, self._known = Marks(), set()
        self.container = await self._runtime.start_container(self)
        self._kills = OomKills(self.engine, self.container)

    async def run(self, command: Command, sink: OutputSink | None = None) -> ExecResult:
        """Run one command to its end."""
        check_command(command)
        self._require()
        channel: Channel | None = None
        try:
            if command.channel:
                channel = Channel(self, command.channel_bytes)
                await channel.open()
            process = await self._begin(command, sink, channel)
            return await process.wait()
        except ContainerGone as error:
            raise await self._why() from error
        finally:
            if channel is not None:
                await asyncio.shield(self.engine.task(channel.close()))

    async def start(self, command: Command) -> DockerProcess:
        """Start a command that is spoken to while it runs."""
        check_command(command)
        self._require()
        try:
            return await self._begin(command)
        except ContainerGone as error:
            raise await self._why() from error

    async def _begin(
        self, command: Command, sink: OutputSink | None = None, channel: Channel | None = None
    ) -> DockerProcess:
        if command.cwd not in self._known and not await self._is_directory(command.cwd):
            raise no_directory(command)
        self._known.add(command.cwd)
        return await DockerProcess.begin(self, command, sink, channel)

    async def _is_directory(self, path: str) -> bool:
        return (await self._user(["test", "-d", path])).code != 1

    async def mark(self) -> Mark:
        """A name for one command, which must be given back; waits while another is being ended."""
        while self._ending.locked():
            async with self._ending:
                pass
        self._require()
        mark = self._marks.take()
        if mark is None:
            answer = await ask(self.engine, self.container, _sh(GROUPS), user=ROOT)
            if answer.code == 0:
                self._marks.renew(answer.out.text.split())
            mark = self._marks.take()
        if mark is None:
            raise ResourceExhausted(
                f"{COUNT} commands have processes in the sandbox", retry_after_s=1.0
            )
        return mark

    def unmark(self, mark: Mark, *, empty: bool) -> None:
        """Give a name back; `empty`: for certain none of its processes is left."""
        self._marks.give_back(mark, empty=empty)

    async def end(
        self, container: str, mark: Mark, reason: EndReason, running: Exec | None = None
    ) -> None:
        """End every process of one command; the whole sandbox, if there is no other way.

        `container`: in which it was started; one that was left has no processes any more.
        `running`: of which the engine may have yet to make the process.

        Raises:
            InfraError: the engine does not answer.
        """
        if running is not None and not await self._has_begun(running):
            await self._put_down(container, reason)  # it might begin when nobody looks any more
            return
        async with self._ending:
            if container != self.container:
                return
            for number in range(_END_TRIES):
                if number:
                    await asyncio.sleep(_AGAIN_S)
                try:
                    if await self._sh_root(container, END, mark.gid) == 0:
                        return
                except ContainerGone:
                    return
                except EngineSilent:
                    self._ended = True  # nobody knows what still runs there
                    raise
                except InfraError:
                    continue
            await self._put_down(container, reason)

    async def _has_begun(self, running: Exec) -> bool:
        try:
            return await running.begun()
        except EngineSilent:
            self._ended = True  # nobody knows what will run there
            raise
        except InfraError:
            return True  # the engine knows it no more

    async def finish(self, container: str, mark: Mark, running: Exec | None = None) -> None:
        """End every process of one command, and only then give its name back.

        Raises:
            InfraError: the engine does not answer.
        """
        try:
            await self.end(container, mark, EndReason.SIGNAL, running)
        finally:
            self.unmark(mark, empty=False)

    async def _put_down(self, container: str, reason: EndReason) -> None:
        if container != self.container:
            return
        self._ended = True
        self._overrun = reason if reason in OVERRUNS else None
        try:
            await self.engine.blocking(self.engine.api.kill, container)
        except ContainerGone:
            return

    async def root(self, script: str, *arguments: str) -> int:
        """Run a short shell script as the container's root; its exit code, -1 if unknown."""
        return await self._sh_root(self.container, script, *arguments)

    async def _sh_root(self, container: str, script: str, *arguments: str) -> int:
        argv = _sh(script, *arguments)
        return (await ask(self.engine, container, argv, user=ROOT, timeout_s=_END_S)).code

    async def _user(
        self, argv: Sequence[str], *, stdin: bytes = b"", limit_bytes: int = 1024
    ) -> Answer:
        """Run a helper as the sandbox's user; one that does not end is ended."""
        mark, answer = await self.mark(), None
        container = self.container
        helper = Helper(self.engine, argv, user=mark.user, stdin=stdin, limit_bytes=limit_bytes)
        try:
            answer = await helper.answer(container)
            return answer
        finally:
            if answer is None or not answer.ended:
                self.engine.task(self._end_helper(container, mark, helper))
            else:
                self.unmark(mark, empty=True)

    async def _end_helper(self, container: str, mark: Mark, helper: Helper) -> None:
        """End a helper that nobody waits for, which may have yet to begin."""
        if await helper.may_run():
            await self.finish(container, mark, helper.exec)
        else:
            self.unmark(mark, empty=False)

    async def kills(self) -> Before:
        """What was counted of kills for want of memory before a command began."""
        return await self._kills.before()

    async def how(
        self, container: str, code: int | None, before: Before | None = None
    ) -> tuple[EndReason, int, int]:
        """How a command ended, from its exit code: reason, code and signal to show."""
        if code is None:
            reason, number = EndReason.INFRA, 9
        elif code == _KILLED and await self._for_memory(container, before):
            reason, number = EndReason.OOM, 9
        elif 128 < code < 160:
            reason, number = EndReason.SIGNAL, code - 128
        else:
            reason, number = EndReason.EXIT, 0
        return reason, -number if number else code or 0, number

    async def _for_memory(self, container: str, before: Before | None) -> bool:
        """Whether signal 9 came from the kernel, for want of memory."""
        if before is not None and container == self.container:
            return await self._kills.since(before)
        return bool((await self.engine.state(container)).get("OOMKilled"))

    async def lost_for_memory(self, container: str, before: Before | None) -> bool:
        """Whether any process was killed for want of memory; asked only where that is cheap."""
        return self._kills.counted and await self._for_memory(container, before)

    async def not_started(self, container: str, command: Command, told: Captured) -> ExecResult:
        """What it means that the engine did not get a command to run."""
        self._known.discard(command.cwd)
        try:
            if self._freezing or self.deleted or container != self.container:
                raise ContainerGone(told.text)
            if await self._is_full(container):
                return ExecResult(EndReason.PIDS, 126, stderr=told)
            if not await self._is_directory(command.cwd):
                raise no_directory(command)
        except (ContainerGone, NotFound):  # its container ended before it began
            reason, shown, number = await self.how(container, _KILLED)
            return ExecResult(reason, shown, number)
        raise InfraError(f"the engine did not start the command: {told.text[:500]}")

    async def _is_full(self, container: str) -> bool:
        """Whether there is no room for another process."""
        pids = await self.engine.pids(container)
        return pids.get("current", 0) + _START_ROOM >= pids.get("limit", 1 << 30)

    async def read_file(self, path: str, max_bytes: int) -> bytes:
        """Read a regular file, resolved inside the sandbox's root; links never leave it."""
        return await read_whole(self, path, max_bytes)

    async def read_range(
        self, path: str, *, offset: int = 0, max_bytes: int, follow: bool = True
    ) -> tuple[bytes, FileStat]:
        """Read part of a regular file; the stat tells the size of the whole."""
        arguments = [absolute(path), str(offset + 1), str(max_bytes)]
        script = READ if follow else READ_ITSELF + READ
        answer = await self._script(script, arguments, limit_bytes=max_bytes + 4200)
        raise_for(answer.code, path, answer.out.head)
        first, _, content = answer.out.head.partition(b"\n")
        size, _, mode = first.partition(b" ")
        if not (size.isdigit() and mode.isdigit()):
            raise InfraError(f"the container did not answer for {path}")
        return content, FileStat(int(size), int(mode, 8) & 0o777)

    async def write_file(
        self, path: str, content: bytes, mode: int = 0o644, *, follow: bool = True
    ) -> None:
        """Write a regular file, creating parent directories."""
        if self.limits.disk_bytes and len(content) > self.limits.disk_bytes:
            raise InvalidArgument(
                "content", "is larger than the sandbox's disk limit", "give it more disk_bytes"
            )
        arguments = [absolute(path), f"{mode & 0o777:o}"]
        script = WRITE if follow else WRITE_ITSELF + WRITE
        raise_for((await self._script(script, arguments, stdin=content)).code, path)

    async def _script(
        self, script: str, arguments: Sequence[str], *, stdin: bytes = b"", limit_bytes: int = 1024
    ) -> Answer:
        self._require()
        if not stdin:
            script = f"exec < /dev/null\n{script}"
        argv = _sh(script, *arguments)
        try:
            async with self._life:
                answer = await self._user(argv, stdin=stdin, limit_bytes=limit_bytes)
                if answer.code not in TOLD and await self._is_full(self.container):
                    raise FailedPrecondition(
                        "the sandbox is at its limit of processes; end some or restore it"
                    )
                return answer
        except ContainerGone as error:
            raise await self._why() from error

    async def ended_itself(self) -> bool:
        """Nobody can tell of a container."""
        return False

    async def freeze(self) -> str:
        """Stop every process, turn the changes into a layer, go on over it; return its id."""
        self._require()
        return await asyncio.shield(self.engine.task(self._freeze()))

    async def _freeze(self) -> str:
        async with self._life:
            self._require()
            self._runtime.check_depth(self)
            self._freezing = True
            try:
                layer = await self._runtime.commit(self)
                self.layers.append(layer)
                await self.engine.discard(self.container)
                await self._launch()
            except BaseException:
                self._ended = True  # half a start is none
                raise
            finally:
                self._freezing = False
            return layer

    async def changed_paths(self, under: str, *, since: int | None = None) -> Sequence[str]:
        """Absolute paths touched since creation, or above the first `since` layers, sorted."""
        self._require()
        below = self.layers[: self.below if since is None else since]
        script = LISTING.format(shlex.quote(absolute(under)))
        untouched = await self._runtime.create(below, limits=Limits())
        try:
            old = await untouched.listed(script)
        finally:
            await self.engine.task(untouched.delete())
        new = await self.listed(script)
        blind = {path for path in new if path.endswith("/")}
        return sorted({path for path in {*old, *new} if old.get(path) != new.get(path)} | blind)

    async def listed(self, script: str) -> dict[str, bytes]:
        """What a script lists: path to everything else that it prints about it."""
        answer = await self._script(script, [], limit_bytes=_LISTING_BYTES)
        if answer.code != 0:
            raise InfraError(f"the container did not list its files (code {answer.code})")
        if answer.out.truncated:
            raise FailedPrecondition("the sandbox has more files than can be compared")
        return parse_listing(answer.out.head)

    async def delete(self) -> None:
        """Kill all processes and remove everything; safe to call twice and after a failure."""
        self.deleted = True
        task = self._deleting
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            task = self._deleting = self.engine.task(self._delete())
        await asyncio.shield(task)

    async def _delete(self) -> None:
        async with self._life:
            await self._runtime.forget(self)

    def _require(self) -> None:
        if self.deleted:
            raise NotFound("the sandbox was deleted")
        if self._ended:
            raise self._lost()

    def _lost(self) -> RegreenError:
        return lost(self._overrun, passing=self._freezing or self.deleted)

    async def _why(self) -> RegreenError:
        """What it means that the container does not run."""
        if self._freezing or self.deleted or self._ended:
            return self._lost()
        state = await self.engine.state(self.container)
        if state.get("Running"):  # it is another one by now
            return lost(None, passing=True)
        self._ended = True
        self._overrun = EndReason.OOM if state.get("OOMKilled") else None
        return self._lost()


def _sh(script: str, *arguments: str) -> list[str]:
    return ["/bin/sh", "-c", script, "-", *arguments]


def layer_record(layers: Sequence[str], size_bytes: int) -> str:
    """What is remembered of a layer beside its image."""
    return json.dumps({"below": list(layers), "size_bytes": size_bytes, "names": COUNT})

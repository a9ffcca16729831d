"""A sandbox in a container of a Docker engine.

- The container's first process belongs to root without capabilities; commands run as user 1000
  and cannot end it.
- Files are read and written by commands inside the container, so every path resolves there.
- Freezing kills everything, commits, and goes on in a fresh container over the new image.
- A signal is recognised by the shell's convention (128 + number); the engine tells no more.
"""

import asyncio
import json
import secrets
import shlex
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from regreen.rpc.errors import FailedPrecondition, InfraError, InvalidArgument, NoSuchFile, NotFound
from sandbox_svc import metrics
from sandbox_svc.backends.base import (
    Command,
    EndReason,
    ExecResult,
    FileStat,
    Limits,
    OutputSink,
)
from sandbox_svc.backends.commands import ENVIRONMENT, absolute, check_command
from sandbox_svc.backends.docker_exec import MARK, ContainerExec, capture
from sandbox_svc.backends.docker_process import DockerProcess
from sandbox_svc.backends.output import Collector

if TYPE_CHECKING:
    from sandbox_svc.backends.docker import DockerRuntime

_T = TypeVar("_T")
USER = "1000:1000"
_ROOT = "0:0"
_READ = """
p=$1
[ -e "$p" ] || exit 44
r=$(readlink -f -- "$p")
case "$r" in /proc/*|/sys/*|/dev/*) exit 45;; esac
[ -f "$r" ] || exit 45
[ -r "$r" ] || exit 46
stat -L -c '%s %a' -- "$r"
tail -c +"$2" -- "$r" | head -c "$3"
"""
_WRITE = """
p=$1
r=$(readlink -m -- "$p")
case "$r" in /proc/*|/sys/*|/dev/*) exit 45;; esac
[ ! -e "$r" ] || [ -f "$r" ] || exit 45
mkdir -p -- "$(dirname -- "$r")" || exit 46
cat > "$r" || exit 46
chmod "$2" -- "$r"
"""
_LISTING = "find {} -xdev ! -type d -printf '%y %s %m %T@ %C@ %p\\0' 2>/dev/null; true"
_LISTING_BYTES = 256 << 20


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
        self.below = len(layers)
        self.layers = list(layers)
        self.env = ENVIRONMENT | dict(env)
        self.container = ""
        self.deleted = False
        self._life = asyncio.Lock()

    async def launch(self) -> None:
        """Start a container over the present layers."""
        self.container = await self._runtime.start_container(self)

    async def run(self, command: Command, sink: OutputSink | None = None) -> ExecResult:
        """Run one command to its end."""
        check_command(command)
        self._require()
        loop, stop = asyncio.get_running_loop(), threading.Event()

        def deliver(stream: str, data: bytes) -> None:
            if sink is not None:
                asyncio.run_coroutine_threadsafe(_call(sink, stream, data), loop).result()

        work = asyncio.ensure_future(
            self._runtime.blocking(self._run, command, deliver if sink else None, stop)
        )
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            stop.set()
            await asyncio.gather(work, return_exceptions=True)
            raise

    async def start(self, command: Command) -> DockerProcess:
        """Start a command that is spoken to while it runs."""
        check_command(command)
        self._require()
        return await DockerProcess.begin(self, command)

    @property
    def api(self) -> Any:
        """The engine's client."""
        return self._runtime.api

    @property
    def user(self) -> str:
        """Who commands run as."""
        return USER

    async def blocking(self, call: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Run a blocking call in the runtime's own threads."""
        return await self._runtime.blocking(call, *args, **kwargs)

    def _run(self, command: Command, sink: Any, stop: threading.Event) -> ExecResult:
        api, began = self._runtime.api, time.monotonic()
        code, _, _ = capture(api, self.container, ["test", "-d", command.cwd], user=USER)
        if code != 0:
            raise InvalidArgument("cwd", f"no such directory in the sandbox: {command.cwd}")
        mark = secrets.token_hex(8)
        env = self.env | dict(command.env) | {MARK: mark}
        script, channel = 'exec "$@"', None
        if command.channel:
            channel = _Channel(api, self.container, mark, command.channel_bytes)
            env["REGREEN_CHANNEL_FD"] = "3"
            script = f"exec 3>{shlex.quote(channel.path)}; {script}"
        argv = ["/bin/sh", "-c", script, "-", *command.argv]
        out, err = Collector(command.output_bytes), Collector(command.output_bytes)
        limit = min(command.timeout_s, self.limits.wall_s or command.timeout_s)
        running = ContainerExec(
            api, self.container, argv, env=env, cwd=command.cwd, user=USER, stdin=command.stdin
        )
        exit_code, timed_out = running.run(out, err, timeout_s=limit, sink=sink, stop=stop)
        result = self.result(exit_code, timed_out, out, err, time.monotonic() - began)
        if channel is None:
            return result
        return _with_channel(result, channel.finish())

    def result(
        self, code: int | None, timed_out: bool, out: Collector, err: Collector, wall_s: float
    ) -> ExecResult:
        """How a command ended, from its exit code; asks the engine, so for worker threads."""
        if timed_out:
            reason, number = EndReason.TIMEOUT, 9
        elif code is None:
            reason, number = EndReason.INFRA, 0
        elif code == 137 and self._out_of_memory():
            reason, number = EndReason.OOM, 9
        elif 128 < code < 160:
            reason, number = EndReason.SIGNAL, code - 128
        else:
            reason, number = EndReason.EXIT, 0
        metrics.count_limit(reason)
        shown = -number if number else code or 0
        return ExecResult(reason, shown, number, out.captured(), err.captured(), wall_s)

    def _out_of_memory(self) -> bool:
        from docker.errors import APIError

        try:
            state = self._runtime.api.inspect_container(self.container)["State"]
        except APIError:  # it was removed under the command
            return False
        return bool(state.get("OOMKilled"))

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
        arguments = [absolute(path), str(offset + 1), str(max_bytes)]
        code, out, _ = await self._script(_READ, arguments, limit_bytes=max_bytes + 64)
        _raise_for(code, path)
        first, _, content = out.head.partition(b"\n")
        size, mode = first.split()
        return content, FileStat(int(size), int(mode, 8) & 0o777)

    async def write_file(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Write a regular file, creating parent directories."""
        if self.limits.disk_bytes and len(content) > self.limits.disk_bytes:
            raise InvalidArgument("content", "larger than the sandbox's disk limit")
        arguments = [absolute(path), f"{mode & 0o777:o}"]
        code, _, _ = await self._script(_WRITE, arguments, stdin=content)
        _raise_for(code, path)

    async def _script(
        self, script: str, arguments: Sequence[str], *, stdin: bytes = b"", limit_bytes: int = 1024
    ) -> tuple[int, Any, Any]:
        self._require()
        if not stdin:
            script = f"exec < /dev/null\n{script}"
        async with self._life:
            return await self._runtime.blocking(
                capture,
                self._runtime.api,
                self.container,
                ["/bin/sh", "-c", script, "-", *arguments],
                user=USER,
                stdin=stdin,
                limit_bytes=limit_bytes,
            )

    async def freeze(self) -> str:
        """Stop every process, turn the changes into a layer, go on over it; return its id."""
        self._require()
        async with self._life:
            layer = await self._runtime.commit(self)
            self.layers.append(layer)
            await self._runtime.remove_container(self.container)
            await self.launch()
            return layer

    async def changed_paths(self, under: str, *, since: int | None = None) -> Sequence[str]:
        """Absolute paths touched since creation, or above the first `since` layers, sorted."""
        self._require()
        below = self.layers[: self.below if since is None else since]
        script = _LISTING.format(shlex.quote(absolute(under)))
        old = await self._runtime.listing(below, script, _LISTING_BYTES)
        _, out, _ = await self._script(script, [], limit_bytes=_LISTING_BYTES)
        new = parse_listing(out.head)
        return sorted(path for path in {*old, *new} if old.get(path) != new.get(path))

    async def delete(self) -> None:
        """Kill all processes and remove everything; safe to call twice."""
        if self.deleted:
            return
        self.deleted = True
        async with self._life:
            await self._runtime.remove_container(self.container)

    def _require(self) -> None:
        if self.deleted:
            raise NotFound(f"sandbox {self.id} was deleted")


class _Channel:
    """A pipe into which one command may write: named for a moment, read by root."""

    def __init__(self, api: Any, container: str, mark: str, limit_bytes: int) -> None:
        self.path = f"/run/regreen/{mark}"
        self._out = Collector(limit_bytes, head_only=True)
        self._stop = threading.Event()
        script = f"mkdir -p -m 711 /run/regreen; mkfifo -m 622 {self.path}"
        code, _, err = capture(api, container, ["/bin/sh", "-c", script], user=_ROOT)
        if code != 0:
            raise InfraError(f"cannot make a result channel: {err.text}")
        reader = ["/bin/sh", "-c", f"exec 3<{self.path}; rm {self.path}; exec cat <&3"]
        self._reader = ContainerExec(
            api, container, reader, env={MARK: mark + "r"}, cwd="/", user=_ROOT
        )
        self._thread = threading.Thread(target=self._read, name="sandbox-docker-channel")
        self._thread.start()

    def _read(self) -> None:
        self._reader.run(self._out, Collector(1024), timeout_s=86_400, sink=None, stop=self._stop)

    def finish(self) -> bytes:
        """What was written until now."""
        self._thread.join(1.0)
        self._stop.set()
        self._thread.join()
        return self._out.captured().head


async def _call(sink: OutputSink, stream: str, data: bytes) -> None:
    await sink(stream, data)


def _with_channel(result: ExecResult, channel: bytes) -> ExecResult:
    return replace(result, channel=channel)


def _raise_for(code: int, path: str) -> None:
    match code:
        case 0:
            return
        case 44:
            raise NoSuchFile(f"no such file in the sandbox: {path}", metadata={"path": path})
        case 45:
            raise InvalidArgument("path", f"not a regular file: {path}")
        case 46:
            raise FailedPrecondition(
                f"not permitted inside the sandbox: {path}", metadata={"path": path}
            )
        case _:
            raise InfraError(f"the container did not answer for {path} (code {code})")


def parse_listing(data: bytes) -> dict[str, bytes]:
    """Path to everything else that was listed about it."""
    found = {}
    for record in data.split(b"\0")[:-1]:
        *facts, path = record.split(b" ", 5)
        found[path.decode("utf-8", "surrogateescape")] = b" ".join(facts)
    return found


def layer_record(layers: Sequence[str], size_bytes: int) -> str:
    """What is remembered of a layer beside its image."""
    return json.dumps({"below": list(layers), "size_bytes": size_bytes})

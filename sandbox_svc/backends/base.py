"""The interface every sandbox runtime implements, and the values that cross it.

- A runtime knows layers, limits and processes; it knows nothing of tasks, tests or diffs.
- A layer, once frozen, never changes; a sandbox writes only to its own upper layer.
- `run` returns when the main process has ended, whatever its descendants hold open.
- A failing command is an `ExecResult`; only the runtime's own trouble is an exception
  (`regreen.rpc.errors.InfraError` or a more specific class).
- No limit is reported as enforced that a probe on this host has not proven.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Limits:
    """Resource bounds of one sandbox; zero means the service's default."""

    memory_bytes: int = 0
    pids: int = 0
    cpus: float = 0.0
    disk_bytes: int = 0
    inodes: int = 0
    output_bytes: int = 0
    wall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Mount:
    """A host directory or file shown inside a sandbox at an absolute path."""

    source: Path
    target: str
    read_only: bool = True


class EndReason(StrEnum):
    """Why a command ended."""

    EXIT = "exit"
    SIGNAL = "signal"
    TIMEOUT = "timeout"
    OOM = "oom"
    PIDS = "pids"
    DISK = "disk"
    OUTPUT = "output"
    INFRA = "infra"


@dataclass(slots=True)
class Later:
    """Lets a command start ahead of what it is to do; only the embedded runtime can."""

    stdin_fd: int
    """Its standard input instead of `Command.stdin`; the caller keeps its own copy."""
    on_channel: "OutputSink"
    """Gets what the command writes to its result pipe while it runs."""
    go: asyncio.Event
    """Its time limits count from when this is set."""
    timeout_s: float = 0.0
    """Replaces that of the command if it is set by then."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command to run inside a sandbox."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the sandbox's small default environment (PATH, HOME, LANG, TZ)."""
    cwd: str = "/work/repo"
    stdin: bytes = b""
    timeout_s: float = 600.0
    output_bytes: int = 1 << 20
    """Kept of stdout and of stderr each: half head, half tail; the rest is counted and dropped."""
    channel: bool = False
    """Open a result pipe for this command; its fd number is in REGREEN_CHANNEL_FD."""
    channel_bytes: int = 64 << 20
    later: Later | None = None


@dataclass(frozen=True, slots=True)
class Captured:
    """The kept head and tail of one output stream."""

    head: bytes = b""
    tail: bytes = b""
    total_bytes: int = 0

    @property
    def truncated(self) -> bool:
        return self.total_bytes > len(self.head) + len(self.tail)

    @property
    def text(self) -> str:
        """Head and tail as text, with a line that says what was dropped."""
        dropped = self.total_bytes - len(self.head) - len(self.tail)
        middle = f"\n[... {dropped} bytes dropped ...]\n".encode() if dropped > 0 else b""
        return (self.head + middle + self.tail).decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class ExecResult:
    """How a command ended and what it printed."""

    reason: EndReason
    exit_code: int = 0
    signal: int = 0
    stdout: Captured = Captured()
    stderr: Captured = Captured()
    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_memory_bytes: int = 0
    channel: bytes = b""
    """What the command wrote to its result pipe, if one was asked for."""

    @property
    def ok(self) -> bool:
        return self.reason is EndReason.EXIT and self.exit_code == 0


@dataclass(frozen=True, slots=True)
class FileStat:
    """What is known of a regular file."""

    size_bytes: int
    mode: int


OutputSink = Callable[[str, bytes], Awaitable[None]]
"""Called with ("stdout" or "stderr", chunk) while the command runs."""


@dataclass(frozen=True, slots=True)
class Capability:
    """One limit or protection and whether a probe has proven it on this host."""

    name: str
    proven: bool
    driver: str
    detail: str = ""


class Box(Protocol):
    """A running sandbox as its runtime sees it."""

    id: str
    limits: Limits
    """The limits in force."""

    async def run(self, command: Command, sink: OutputSink | None = None) -> ExecResult:
        """Run one command to its end."""
        ...

    async def read_file(self, path: str, max_bytes: int) -> bytes:
        """Read a regular file, resolved inside the sandbox's root; links never leave it."""
        ...

    async def read_range(
        self, path: str, *, offset: int = 0, max_bytes: int
    ) -> tuple[bytes, FileStat]:
        """Read part of a regular file; the stat tells the size of the whole."""
        ...

    async def write_file(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Write a regular file, creating parent directories."""
        ...

    async def freeze(self) -> str:
        """Stop every process, turn the upper into a new layer, go on over it; return the layer id.

        An unchanged upper still gives a layer. The sandbox stays usable afterwards.
        """
        ...

    async def changed_paths(self, under: str, *, since: int | None = None) -> Sequence[str]:
        """Absolute paths touched since creation, or above the first `since` layers, sorted.

        May name a path that turns out equal; never leaves out one that differs. A directory that
        cannot be looked into is named with a slash at its end.
        """
        ...

    async def delete(self) -> None:
        """Kill all processes and remove everything; safe to call twice."""
        ...


NO_ENV: Mapping[str, str] = MappingProxyType({})


class Runtime(Protocol):
    """Makes boxes from ordered layers."""

    name: str

    async def start(self) -> None:
        """Probe the host, sweep what a crashed predecessor left, get ready."""
        ...

    async def close(self) -> None:
        """Delete every box and stop helpers."""
        ...

    async def create(
        self,
        layers: Sequence[str],
        *,
        limits: Limits,
        mounts: Sequence[Mount] = (),
        network: bool = False,
        env: Mapping[str, str] = NO_ENV,
    ) -> Box:
        """Start a box over `layers` (lowest first); an empty sequence is the bare base.

        `env` goes below every command's own variables.
        """
        ...

    async def layers(self) -> Sequence[str]:
        """Ids of all layers that this host holds."""
        ...

    async def layer_size(self, layer: str) -> int:
        """Bytes of one layer."""
        ...

    async def make_durable(self) -> None:
        """Write all frozen layers to the disk."""
        ...

    async def drop_layer(self, layer: str) -> None:
        """Remove a layer that no state uses; unknown ids are ignored."""
        ...

    def capabilities(self) -> Sequence[Capability]:
        """What this host was proven to enforce."""
        ...

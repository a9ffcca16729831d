"""The interface every sandbox runtime implements, and the values that cross it.

- A runtime knows layers, limits and processes; it knows nothing of tasks, tests or diffs.
- A layer, once frozen, never changes; a sandbox writes only to its own upper layer.
- `run` returns when the main process has ended, whatever its descendants hold open.
- A failing command is an `ExecResult`; only the runtime's own trouble is an exception
  (`regreen.rpc.errors.InfraError` or a more specific class).
- No limit is reported as enforced that a probe on this host has not proven.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from regreen.rpc.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from sandbox_svc.backends.output import OutputLog, Pulse


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


LEAST: Mapping[str, float] = MappingProxyType({"memory_bytes": 16 << 20, "cpus": 0.01})
"""Below these the kernel keeps no limit (a millisecond in a period), or nothing starts."""


def check_kept(limits: Limits, unkept: Mapping[str, str]) -> None:
    """Refuse limits of a request that nothing would keep; `unkept` is the runtime's.

    Raises:
        FailedPrecondition: names the limit and the remedy.
    """
    for name, remedy in unkept.items():
        if value := getattr(limits, name):
            raise FailedPrecondition(
                f"limits.{name}: is {value:g}, which nothing would keep here; leave it out, or "
                f"{remedy}",
                metadata={"limit": name},
            )


def kept(limits: Limits, unkept: Mapping[str, str]) -> Limits:
    """The limits that are in force: zero for those that nothing keeps."""
    return replace(limits, **dict.fromkeys(unkept, 0))


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


OVERRUNS = frozenset(
    {EndReason.TIMEOUT, EndReason.OOM, EndReason.PIDS, EndReason.DISK, EndReason.OUTPUT}
)
"""Ends that a command brings about by going over a limit."""


@dataclass(frozen=True, slots=True)
class TerminalSize:
    """Size of a terminal in characters."""

    rows: int = 24
    columns: int = 80


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
    open_stdin: bool = False
    """Leave standard input open; then all of it comes by `Process.write`, and `stdin` is not read.
    Only `Box.start` looks at it."""
    terminal: TerminalSize | None = None
    """Give it a terminal: what it prints is stdout, its input as if left open. Only `Box.start`
    looks at it."""
    later: Later | None = None
    measured: bool = False
    """Measure at its end what there is on the disk, not only where the host has lost as much."""


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
    limits_hit: tuple[EndReason, ...] = ()
    """Limits that its sandbox ran into meanwhile, whichever process did and whatever came of it;
    as far as the runtime can tell."""
    least_free_bytes: int = -1
    """The least room that the host was seen to have meanwhile; below zero where nobody looked."""

    @property
    def overruns(self) -> frozenset[EndReason]:
        """Every limit that it ran into, the one that ended it included."""
        return frozenset({*self.limits_hit, self.reason}) & OVERRUNS

    @property
    def ok(self) -> bool:
        return self.reason is EndReason.EXIT and self.exit_code == 0


FULL_BYTES = 32 << 20
"""With less room than this a disk is as good as full."""
ROOM_BYTES = 1 << 30
"""With less room than this it may be filled, and empty again, between two looks at it."""


def short_of_room(least_free_bytes: int, limits: Limits) -> bool:
    """Whether the host may have been full where a sandbox's limit would have let it go on."""
    return 0 <= least_free_bytes < min(limits.disk_bytes or ROOM_BYTES, ROOM_BYTES)


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


class Process(Protocol):
    """A command that was started and is spoken to while it runs.

    One caller at a time writes; everything else may be called at any time, also after the end.
    """

    stdout: "OutputLog"
    """What is kept of its output."""
    stderr: "OutputLog"
    changed: "Pulse"
    """Beats when there is more output."""

    async def write(self, data: bytes) -> int:
        """Give it the first bytes of `data`, once there is room; returns how many, at least one.

        Cancelled, it has given nothing.

        Raises:
            FailedPrecondition: its input is closed.
        """
        ...

    async def close_input(self) -> None:
        """Let it see the end of its input; with a terminal, as if Ctrl-D was typed."""
        ...

    async def signal(self, number: int) -> bool:
        """Send a signal to its process group; whether it still ran."""
        ...

    async def resize(self, size: TerminalSize) -> None:
        """Set the size of its terminal.

        Raises:
            FailedPrecondition: it has none.
        """
        ...

    async def wait(self) -> ExecResult:
        """Wait for its end, within its time limit; called once. Cancelling kills the command."""
        ...


class Odd(StrEnum):
    """What may be in the place of a regular file."""

    LINK = "a symbolic link"
    DIRECTORY = "a directory"
    OTHER = "a pipe, a socket or a device"


class NotAFile(InvalidArgument):
    """There is something else than a regular file at a path."""

    def __init__(self, path: str, kind: Odd, target: str = "") -> None:
        super().__init__("path", f"not a regular file but {kind.value}: {path}")
        self.kind, self.target = kind, target
        """Where a link leads, as it says."""


class Readable(Protocol):
    """What files can be read of."""

    async def read_range(
        self, path: str, *, offset: int = 0, max_bytes: int, follow: bool = True
    ) -> tuple[bytes, FileStat]:
        """Read part of a regular file; the stat tells the size of the whole.

        Unless links are followed, there is nothing below one, and one itself is a `NotAFile`.
        """
        ...


class Box(Readable, Protocol):
    """A running sandbox as its runtime sees it."""

    id: str
    limits: Limits
    """The limits in force."""

    @property
    def layers(self) -> Sequence[str]:
        """All layers below what the box wrote itself, lowest first."""
        ...

    async def run(self, command: Command, sink: OutputSink | None = None) -> ExecResult:
        """Run one command to its end."""
        ...

    async def start(self, command: Command) -> Process:
        """Start a command that is spoken to while it runs; whoever starts it must wait for it."""
        ...

    async def read_file(self, path: str, max_bytes: int) -> bytes:
        """Read a regular file, resolved inside the sandbox's root; links never leave it."""
        ...

    async def write_file(
        self, path: str, content: bytes, mode: int = 0o644, *, follow: bool = True
    ) -> None:
        """Write a regular file, creating parent directories.

        Unless links are followed, one is replaced, and one on the way is a `NoSuchFile`.
        """
        ...

    async def ended_itself(self) -> bool:
        """Whether the box has lost its processes, and by what ran in it.

        False where it lives, where it was ended from outside, or where nobody can tell.
        """
        ...

    async def freeze(self) -> str:
        """Stop every process, turn the upper into a new layer, go on over it; return the layer id.

        An unchanged upper still gives a layer. The sandbox stays usable afterwards.
        """
        ...

    async def changed_paths(self, under: str, *, since: int | None = None) -> Sequence[str]:
        """Absolute paths touched since creation, or above the first `since` layers, sorted.

        May name a path that turns out equal; never leaves out one that differs. A directory that
        cannot be looked into is named with a slash at its end, one that may be empty with `/.`.
        """
        ...

    async def delete(self) -> None:
        """Kill all processes and remove everything; safe to call twice."""
        ...


NO_ENV: Mapping[str, str] = MappingProxyType({})
PROXY_PORT = 3128
"""Port of the proxy on the loopback of a sandbox that has a door."""


async def read_whole(box: Readable, path: str, max_bytes: int) -> bytes:
    """The content of a regular file.

    Raises:
        FailedPrecondition: it is larger than `max_bytes`.
    """
    content, info = await box.read_range(path, max_bytes=max_bytes)
    if info.size_bytes > max_bytes:
        raise FailedPrecondition(
            f"{path} has {info.size_bytes} bytes, more than the {max_bytes} asked for",
            metadata={"size_bytes": str(info.size_bytes)},
        )
    return content


class Gate(Protocol):
    """A door as one box has it."""

    def close(self) -> None:
        """Stop accepting and end every connection now; safe to call twice."""
        ...


class Door(Protocol):
    """A way out of a sandbox: something of the service's that accepts its connections."""

    environment: Mapping[str, str]
    """Of commands, so that programs find it."""

    def open(self, listener: socket.socket) -> Gate:
        """Begin to accept on a socket that listens on `PROXY_PORT` inside; the gate owns it."""
        ...


HOST_BASE = "host"
"""Base of sandboxes that run the programs of this host; any other brings its own in its layers."""


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
        env: Mapping[str, str] = NO_ENV,
        door: Door | None = None,
        base: str = HOST_BASE,
    ) -> Box:
        """Start a box over `layers` (lowest first); an empty sequence is the bare base.

        `env` goes below every command's own variables. A door is the only way out; without one
        there is none. Unless `base` is `HOST_BASE`, no program of the host is shown: the layers are
        a whole system.

        Raises:
            FailedPrecondition: this runtime has no doors, or no imported images.
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

    def disk_is_full(self) -> bool:
        """Whether the disk that boxes write to is as good as full, whoever filled it."""
        ...

    async def drop_layer(self, layer: str) -> None:
        """Remove a layer that no state uses; unknown ids are ignored."""
        ...

    def capabilities(self) -> Sequence[Capability]:
        """What this host was proven to enforce."""
        ...

    def unkept(self) -> Mapping[str, str]:
        """Names of `Limits` that nothing here keeps, each with what the operator can do."""
        ...

    def identity(self) -> str:
        """What of the runtime itself may decide a command's result: its program and its rules."""
        ...


@runtime_checkable
class Inspectable(Protocol):
    """A runtime that can look for what it should have removed."""

    async def orphans(self) -> Mapping[str, frozenset[str]]:
        """By kind, what is there of this instance and belongs to no live box.

        What is being removed right now may be among it; what stays there is a leak.
        """
        ...

"""The services that `regreen.rollout.bench` drives, and what each process costs.

- They are the services that users run, each a process of its own, on unix sockets in a home that
  goes afterwards; what differs from the defaults is how much each lets in at once.
- Processor time of a service is that of its process and of all that it has started, those that
  have ended included; Postgres, a child of the dataset service, is told apart from it, and so is
  what the sandbox service starts (`builds`: spawners, sandboxes, and what runs in them).
- A spawner does not learn what its children took, so `builds` is read from a control group of
  version 1 (`cpuacct`), where this process may make one; else it is only what still lives.
- Calls are timed by their client, from their beginning to their end, whatever came of them.
"""

import asyncio
import contextlib
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import grpc

from regreen.client.access import Access
from regreen.client.stack import Endpoints, Stack
from regreen.stack.follow import following

_START_S = 120.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")
DRIVER, POSTGRES, BUILDS = "driver", "postgres", "builds"
_LOOK_S = 1.0
_ACCOUNTS = Path("/sys/fs/cgroup/cpuacct")


class Services:
    """Dataset, sandbox, policy and judge services for so many episodes at a time."""

    def __init__(self, home: Path, model: Path, script: Path, episodes: int) -> None:
        self._home, self._processes = home, dict[str, asyncio.subprocess.Process]()
        room = str(episodes + 64)
        self._flags: Mapping[str, tuple[str, ...]] = {
            "dataset": (),
            "sandbox": ("--max-sandboxes", room),
            "policy": (
                *("--engine", "scripted", "--script", str(script), "--model", str(model)),
                *("--max-running", room, "--max-waiting", room, "--http", ""),
            ),
            "judge": (),
        }
        self._account: Path | None = None
        self._calls = str(4 * int(room))
        self.calls_s = defaultdict[str, list[float]](list)
        """Seconds of each call since it was last cleared, by method."""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Stack]:
        """Clients of the started services; all are ended on the way out."""
        try:
            found = {name: await self._start(name) for name in self._flags}
            endpoints = Endpoints(**found, learner="", access=Access())
            async with Stack(endpoints, patience_s=_START_S, wrap=self._timed) as stack:
                await stack.policy.get_policy()  # a stream is not tried again; these calls are
                await stack.sandbox.get_capabilities()
                yield stack
        finally:
            for process in reversed(self._processes.values()):
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                await process.wait()
            if self._account is not None:
                with contextlib.suppress(OSError):  # a process of a sandbox has not ended yet
                    self._account.rmdir()

    @property
    def counts_builds(self) -> bool:
        """Whether the processor time of what ended in sandboxes is known."""
        return self._account is not None

    def _enter(self, pid: int) -> None:
        """Have a process, and all that it will start, counted by the kernel."""
        if _ACCOUNTS.is_symlink():  # one hierarchy with `cpu`, in which sandboxes have groups
            return
        place = _ACCOUNTS / f"regreen-load-{pid}"
        with contextlib.suppress(OSError):
            place.mkdir()
            (place / "cgroup.procs").write_text(str(pid))
            self._account = place

    def _timed(self, channel: grpc.aio.Channel) -> grpc.aio.Channel:
        return cast("grpc.aio.Channel", _Timed(channel, self.calls_s))

    async def _start(self, name: str) -> str:
        address = f"unix:{self._home}/{name}.sock"
        flags = ["--listen", address, "--metrics", "127.0.0.1:0", "--home", str(self._home)]
        flags += ["--max-rpcs", self._calls, "--log-level", "warning", *self._flags[name]]
        command = [sys.executable, "-m", f"{name}_svc", *flags]
        with (self._home / f"{name}.log").open("wb") as log:
            self._processes[name] = await asyncio.create_subprocess_exec(
                *following(command), stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )
        if name == "sandbox":
            self._enter(self._processes[name].pid)
        return address

    def cpu_s(self) -> dict[str, float]:
        """Processor seconds so far, by process."""
        spent_s = time.process_time()
        found = {DRIVER: spent_s, POSTGRES: 0.0, BUILDS: 0.0}
        for name, process in self._processes.items():
            tree, database = tree_cpu_s(process.pid)
            if name == "sandbox" and self._account is not None:
                tree = int((self._account / "cpuacct.usage").read_text()) / 1e9
            found[name] = own = own_cpu_s(process.pid) if name == "sandbox" else tree
            found[BUILDS] += tree - own
            found[POSTGRES] += database
        return found

    def memory(self) -> dict[str, int]:
        """Resident bytes of each service's own process."""
        return {name: resident_bytes(process.pid) for name, process in self._processes.items()}


class _Timed:
    """A channel that notes how long its calls take."""

    def __init__(self, channel: grpc.aio.Channel, calls_s: Mapping[str, list[float]]) -> None:
        self._channel, self._calls_s = channel, calls_s

    def __getattr__(self, name: str) -> Any:
        if name not in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            return getattr(self._channel, name)
        return lambda method, *codecs, **options: self._method(name, method, codecs, options)

    def _method(
        self, kind: str, method: str, codecs: tuple[Any, ...], options: Mapping[str, Any]
    ) -> Callable[..., Any]:
        begin = getattr(self._channel, kind)(method, *codecs, **options)
        shown = method.rpartition(".")[2]  # /regreen.policy.v1.PolicyService/Generate

        def call(*args: Any, **given: Any) -> Any:
            began_s = time.perf_counter()
            found = begin(*args, **given)
            found.add_done_callback(
                lambda _: self._calls_s[shown].append(time.perf_counter() - began_s)
            )
            return found

        return call


def own_cpu_s(pid: int) -> float:
    """Processor seconds of a process without those of its children."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text("utf-8", "replace")
    except OSError:
        return 0.0
    return sum(map(int, stat[stat.rindex(")") + 2 :].split()[11:13])) / _TICKS_PER_S


def tree_cpu_s(pid: int) -> tuple[float, float]:
    """Processor seconds of a process and its descendants, and of the Postgres among them."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text("utf-8", "replace")
        children = [
            int(child)
            for task in (_PROC / str(pid) / "task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return 0.0, 0.0  # it has just ended; its parent has its time when it has reaped it
    name = stat[stat.index("(") + 1 : stat.rindex(")")]
    fields: list[Any] = stat[stat.rindex(")") + 2 :].split()
    own = sum(map(int, fields[11:15])) / _TICKS_PER_S  # its own, and of those that it reaped
    below = [tree_cpu_s(child) for child in children]
    database = sum(part[1] for part in below)
    rest = sum(part[0] for part in below)
    if name.startswith("postgres"):
        return 0.0, own + rest + database
    return own + rest, database


@dataclass(slots=True)
class Seen:
    """What was seen of the machine, second by second."""

    busy: list[float] = field(default_factory=list)
    """Cores that were busy, whoever kept them so."""
    memory: dict[str, int] = field(default_factory=dict)
    """The most resident bytes of each service."""


@contextlib.asynccontextmanager
async def watching(services: Services) -> AsyncIterator[Seen]:
    """Look at machine and services each second."""
    seen = Seen()

    async def watch() -> None:
        cores = os.cpu_count() or 1
        before = _machine()
        while True:
            for name, size_bytes in services.memory().items():
                seen.memory[name] = max(size_bytes, seen.memory.get(name, 0))
            await asyncio.sleep(_LOOK_S)
            after = _machine()
            idle, every = after[0] - before[0], after[1] - before[1]
            seen.busy.append(cores * (1 - idle / max(1, every)))
            before = after

    task = asyncio.create_task(watch())
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _machine() -> tuple[int, int]:
    """Ticks of all cores so far: idle or waiting for a disk, and in all."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return fields[3] + fields[4], sum(fields)


def resident_bytes(pid: int = 0) -> int:
    """Resident memory of a process, or of this one; 0 when it is gone."""
    try:
        pages = (_PROC / str(pid or "self") / "statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(*, reset: bool = False) -> int:
    """The largest resident memory of this process since it was last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) << 10 if found else 0

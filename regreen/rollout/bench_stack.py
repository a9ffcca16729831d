"""The services that `regreen.rollout.bench` drives, and what each process costs.

- They are the services that users run, each a process of its own, on unix sockets in a home that
  goes afterwards; what differs from the defaults is how much each lets in at once.
- Processor time of a service is that of its process and of all that it has started, those that
  have ended included; Postgres, a child of the dataset service, is told apart from it.
"""

import asyncio
import contextlib
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from regreen.client.access import Access
from regreen.client.stack import Endpoints, Stack
from regreen.stack.follow import following

_START_S = 120.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")
DRIVER, POSTGRES = "driver", "postgres"


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
        self._calls = str(4 * int(room))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Stack]:
        """Clients of the started services; all are ended on the way out."""
        try:
            found = {name: await self._start(name) for name in self._flags}
            endpoints = Endpoints(**found, learner="", access=Access())
            async with Stack(endpoints, patience_s=_START_S) as stack:
                await stack.policy.get_policy()  # a stream is not tried again; these calls are
                await stack.sandbox.get_capabilities()
                yield stack
        finally:
            for process in reversed(self._processes.values()):
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                await process.wait()

    async def _start(self, name: str) -> str:
        address = f"unix:{self._home}/{name}.sock"
        flags = ["--listen", address, "--metrics", "127.0.0.1:0", "--home", str(self._home)]
        flags += ["--max-rpcs", self._calls, "--log-level", "warning", *self._flags[name]]
        command = [sys.executable, "-m", f"{name}_svc", *flags]
        with (self._home / f"{name}.log").open("wb") as log:
            self._processes[name] = await asyncio.create_subprocess_exec(
                *following(command), stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )
        return address

    def cpu_s(self) -> dict[str, float]:
        """Processor seconds so far, by process."""
        spent_s = time.process_time()
        found = {DRIVER: spent_s, POSTGRES: 0.0}
        for name, process in self._processes.items():
            own, database = tree_cpu_s(process.pid)
            found[name] = own
            found[POSTGRES] += database
        return found


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


@contextlib.asynccontextmanager
async def watching_cores() -> AsyncIterator[list[float]]:
    """How many cores of the machine were busy in each second, whoever kept them so."""
    found: list[float] = []

    async def watch() -> None:
        cores = os.cpu_count() or 1
        before = _machine()
        while True:
            await asyncio.sleep(1.0)
            after = _machine()
            idle, every = after[0] - before[0], after[1] - before[1]
            found.append(cores * (1 - idle / max(1, every)))
            before = after

    task = asyncio.create_task(watch())
    try:
        yield found
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _machine() -> tuple[int, int]:
    """Ticks of all cores so far: idle or waiting for a disk, and in all."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return fields[3] + fields[4], sum(fields)


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(*, reset: bool = False) -> int:
    """The largest resident memory of this process since it was last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) << 10 if found else 0

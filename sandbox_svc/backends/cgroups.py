"""Hard limits by cgroup: version 2 where it is delegated, else version 1, else none.

- One group per sandbox, below one group per runtime instance, so leftovers can be found by name.
- A driver only writes limits; whether the kernel enforces them is proven by `probe.py`.
- `destroy` kills what is still inside; it is called after the sandbox's first process has ended.
- Nothing outside the instance's own group is ever changed, except enabling controllers in a
  delegated version 2 group.
"""

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sandbox_svc.backends.base import Limits

_ROOT = Path("/sys/fs/cgroup")
_PERIOD_US = 100_000
_GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class Counters:
    """Events since the group was made."""

    oom_kills: int = 0
    pid_refusals: int = 0


class CgroupDriver(Protocol):
    """Makes and removes the group of a sandbox."""

    name: str

    def create(self, box: str) -> list[str]:
        """Make the group; returns the files into which its first process writes "0"."""
        ...

    def limit(self, box: str, limits: Limits) -> None:
        """Set the limits of a group."""
        ...

    def counters(self, box: str) -> Counters:
        """Read the group's event counters; asked after every command, so it is kept cheap."""
        ...

    def throttled(self, box: str) -> int:
        """How often the group was stopped for its use of cores."""
        ...

    def kill(self, box: str, keep: int) -> None:
        """Kill every process of the group but the host pid `keep`."""
        ...

    def destroy(self, box: str) -> None:
        """Kill what is left and remove the group; unknown boxes are ignored."""
        ...

    def sweep(self) -> None:
        """Remove the groups of a crashed predecessor."""
        ...

    def members(self) -> frozenset[str]:
        """Names of the groups that are there."""
        ...


def _counter(path: str, name: bytes) -> int:
    """The number after `name` in a file of lines `name number`; 0 where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        text = b"\n" + os.read(fd, 4096)
    except OSError:
        return 0
    finally:
        os.close(fd)
    _, found, rest = text.partition(b"\n" + name + b" ")
    return int(rest.split(b"\n", 1)[0]) if found else 0


def _kill_members(group: Path, keep: int = 0) -> None:
    try:
        members = (group / "cgroup.procs").read_text(encoding="ascii").split()
    except OSError:
        return
    for member in members:
        if int(member) != keep and int(member) > 1:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(member), signal.SIGKILL)


def _remove(group: Path) -> None:
    """Kill and remove a leaf group; the kernel refuses while a process is still ending."""
    until = time.monotonic() + _GRACE_S
    while group.is_dir():
        try:
            group.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            _kill_members(group)
            if time.monotonic() > until:
                return
            time.sleep(0.002)


class _Base:
    def __init__(self, groups: dict[str, Path], instance: str) -> None:
        self._groups = {kind: path / f"regreen-{instance}" for kind, path in groups.items()}

    def _prepare(self) -> None:
        for path in set(self._groups.values()):
            path.mkdir(exist_ok=True)

    def _of(self, kind: str, box: str) -> Path:
        return self._groups[kind] / box

    def kill(self, box: str, keep: int) -> None:
        _kill_members(self._of("pids", box), keep)

    def destroy(self, box: str) -> None:
        for path in set(self._groups.values()):
            _remove(path / box)

    def sweep(self) -> None:
        for path in set(self._groups.values()):
            if path.is_dir():
                for leftover in path.iterdir():
                    if leftover.is_dir():
                        _remove(leftover)

    def members(self) -> frozenset[str]:
        found: set[str] = set()
        for path in set(self._groups.values()):
            with contextlib.suppress(FileNotFoundError):
                found.update(entry.name for entry in path.iterdir() if entry.is_dir())
        return frozenset(found)

    def close(self) -> None:
        self.sweep()
        for path in set(self._groups.values()):
            with contextlib.suppress(OSError):
                path.rmdir()


class CgroupV1(_Base):
    """memory, pids and cpu hierarchies of version 1 (needs root)."""

    name = "cgroup-v1"

    def create(self, box: str) -> list[str]:
        for path in self._groups.values():
            (path / box).mkdir()
        return [str(path / box / "cgroup.procs") for path in self._groups.values()]

    def limit(self, box: str, limits: Limits) -> None:
        if limits.memory_bytes:
            memory = self._of("memory", box)
            (memory / "memory.limit_in_bytes").write_text(str(limits.memory_bytes))
            with contextlib.suppress(OSError):
                (memory / "memory.memsw.limit_in_bytes").write_text(str(limits.memory_bytes))
        if limits.pids:
            (self._of("pids", box) / "pids.max").write_text(str(limits.pids + 1))
        if limits.cpus:
            cpu = self._of("cpu", box)
            (cpu / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (cpu / "cpu.cfs_quota_us").write_text(str(max(1000, int(limits.cpus * _PERIOD_US))))

    def counters(self, box: str) -> Counters:
        return Counters(
            _counter(f"{self._groups['memory']}/{box}/memory.oom_control", b"oom_kill"),
            _counter(f"{self._groups['pids']}/{box}/pids.events", b"max"),
        )

    def throttled(self, box: str) -> int:
        return _counter(f"{self._groups['cpu']}/{box}/cpu.stat", b"nr_throttled")


class CgroupV2(_Base):
    """A delegated version 2 subtree."""

    name = "cgroup-v2"

    def create(self, box: str) -> list[str]:
        group = self._of("pids", box)
        group.mkdir()
        return [str(group / "cgroup.procs")]

    def limit(self, box: str, limits: Limits) -> None:
        group = self._of("pids", box)
        if limits.memory_bytes:
            (group / "memory.max").write_text(str(limits.memory_bytes))
            with contextlib.suppress(OSError):
                (group / "memory.swap.max").write_text("0")
        if limits.pids:
            (group / "pids.max").write_text(str(limits.pids + 1))
        if limits.cpus:
            quota = max(1000, int(limits.cpus * _PERIOD_US))
            (group / "cpu.max").write_text(f"{quota} {_PERIOD_US}")

    def counters(self, box: str) -> Counters:
        group = self._of("pids", box)
        return Counters(
            _counter(f"{group}/memory.events", b"oom_kill"),
            _counter(f"{group}/pids.events", b"max"),
        )

    def throttled(self, box: str) -> int:
        return _counter(f"{self._of('pids', box)}/cpu.stat", b"nr_throttled")


class NoCgroup:
    """No group at all: resource limits and the watchdog must do."""

    name = "rlimit"

    def create(self, box: str) -> list[str]:
        return []

    def limit(self, box: str, limits: Limits) -> None:
        return

    def counters(self, box: str) -> Counters:
        return Counters()

    def throttled(self, box: str) -> int:
        return 0

    def kill(self, box: str, keep: int) -> None:
        return

    def destroy(self, box: str) -> None:
        return

    def sweep(self) -> None:
        return

    def members(self) -> frozenset[str]:
        return frozenset()

    def close(self) -> None:
        return


def _own_groups() -> dict[str, str]:
    groups = {}
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            groups[controller] = path
    return groups


def _try_v1(instance: str) -> CgroupV1 | None:
    own, found = _own_groups(), {}
    for kind in ("memory", "pids", "cpu"):
        hierarchy = _ROOT / kind
        inside = hierarchy / own.get(kind, "/").strip("/")
        found[kind] = inside if inside.is_dir() else hierarchy
        if not os.access(found[kind] / "cgroup.procs", os.W_OK):
            return None
    driver = CgroupV1(found, instance)
    driver._prepare()
    return driver


def _try_v2(instance: str) -> CgroupV2 | None:
    own = _own_groups().get("")
    if own is None or not (_ROOT / "cgroup.controllers").exists():
        return None
    group = _ROOT / own.strip("/")
    needed = {"memory", "pids", "cpu"}
    if not needed <= set((group / "cgroup.controllers").read_text(encoding="ascii").split()):
        return None
    enabled = set((group / "cgroup.subtree_control").read_text(encoding="ascii").split())
    if not needed <= enabled:
        leaf = group / "regreen-service"
        leaf.mkdir(exist_ok=True)
        for member in (group / "cgroup.procs").read_text(encoding="ascii").split():
            (leaf / "cgroup.procs").write_text(member)
        (group / "cgroup.subtree_control").write_text("+memory +pids +cpu")
    driver = CgroupV2({"pids": group}, instance)
    driver._prepare()
    (group / f"regreen-{instance}" / "cgroup.subtree_control").write_text("+memory +pids +cpu")
    return driver


def choose(instance: str) -> CgroupV1 | CgroupV2 | NoCgroup:
    """The strongest driver that this process may use."""
    for attempt in (_try_v2, _try_v1):
        with contextlib.suppress(OSError):
            driver = attempt(instance)
            if driver is not None:
                return driver
    return NoCgroup()

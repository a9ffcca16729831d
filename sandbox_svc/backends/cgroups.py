"""Hard limits by cgroup: version 2 where it is delegated, else version 1, else none.

- One group per sandbox, below one group per runtime instance, so leftovers can be found by name.
- A sandbox's first process makes its group itself, before it has anything of the sandbox: the
  kernel changes one group at a time, and the service must not wait for that.
- A driver only writes limits; whether the kernel enforces them is proven by `probe.py`.
- `destroy` kills what is still inside; it is called after the sandbox's first process has ended.
- The group of an instance is locked as long as the instance lives. `sweep` removes the empty groups
  of others that are locked no more, whatever home they had; what is not empty stays.
- Nothing else outside the instance's own group is ever changed, except enabling controllers in a
  delegated version 2 group.
"""

import contextlib
import fcntl
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol

from regreen.rpc.errors import FailedPrecondition
from sandbox_svc.backends.base import Limits

_ROOT, _PREFIX = Path("/sys/fs/cgroup"), "regreen-"
_PERIOD_US, _LEAST_QUOTA_US = 100_000, 1000
_GRACE_S = 2.0
_KEPT_BYTES = 8 << 20
"""Of files in the kernel's cache that a kept group may still be charged with."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Events since the group was made."""

    oom_kills: int = 0
    pid_refusals: int = 0


class Write(NamedTuple):
    """A value for a file of a group; one that is not needed may be refused."""

    path: str
    value: str
    needed: bool = True


class Sign(NamedTuple):
    """What shows that a group is as new: a number of one of its files is at most so much.

    It stands after `key` at the start of a line, or first of all where that is empty; no number
    is 0.
    """

    place: str
    file: str
    key: str
    most: int


class Plan(NamedTuple):
    """Directories to make, then what to write."""

    directories: Sequence[str] = ()
    writes: Sequence[Write] = ()


def fields(writes: Sequence[Write]) -> list[str | int]:
    """Writes as a request's fields: how many, then path, value and whether it is needed of each."""
    found: list[str | int] = [len(writes)]
    for write in writes:
        found += [write.path, write.value, int(write.needed)]
    return found


class CgroupDriver(Protocol):
    """Makes and removes the group of a sandbox."""

    name: str
    places: Sequence[str]
    """Directories in which each sandbox's group lies, by its name."""

    signs: Sequence[Sign]
    """By which a group that a sandbox has left can be another's."""
    unkept: Mapping[str, str]
    """See `base.Runtime.unkept`."""

    def plan(self, box: str, limits: Limits, *, kept: bool = False) -> Plan:
        """What the first process of a sandbox does to make and to enter its group.

        A `kept` one is there, with these limits.
        """
        ...

    def writes(self, box: str, limits: Limits) -> Sequence[Write]:
        """What to write for other limits than a group was made with."""
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

    def destroy(self, box: str) -> bool:
        """Kill what is left and remove the group; whether it is gone."""
        ...

    def sweep(self) -> None:
        """Remove the groups of a crashed predecessor."""
        ...

    def members(self) -> frozenset[str]:
        """Names of the groups that are there."""
        ...


def in_force(limits: Limits) -> Limits:
    """The limits as the kernel keeps them: whole pages, and whole microseconds of a period."""
    page = os.sysconf("SC_PAGE_SIZE")
    return replace(
        limits,
        memory_bytes=limits.memory_bytes // page * page,
        cpus=_quota_us(limits) / _PERIOD_US if limits.cpus else 0.0,
    )


def _quota_us(limits: Limits) -> int:
    return max(_LEAST_QUOTA_US, round(limits.cpus * _PERIOD_US))


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


def _kill_members(group: str, keep: int = 0) -> None:
    try:
        members = Path(group, "cgroup.procs").read_text(encoding="ascii").split()
    except OSError:
        return
    for member in members:
        if int(member) != keep and int(member) > 1:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(member), signal.SIGKILL)


def _remove(group: str) -> bool:
    """Kill and remove a leaf group, which the kernel refuses while a process is still ending."""
    until = time.monotonic() + _GRACE_S
    while not _removed(group):
        _kill_members(group)
        if time.monotonic() > until:
            return False
        time.sleep(0.002)
    return True


def _removed(group: str) -> bool:
    """Remove a leaf group; False while something is in it."""
    try:
        os.rmdir(group)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _instances(root: Path) -> Iterator[str]:
    """Groups of all instances below a root, wherever their services were."""
    for folder, names, _ in os.walk(root):
        for name in [name for name in names if name.startswith(_PREFIX)]:
            names.remove(name)
            yield f"{folder}/{name}"


@contextlib.contextmanager
def _opened(group: str) -> Iterator[int]:
    fd = os.open(group, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _locked(group: str) -> int:
    """A descriptor that locks an instance's group, which is made.

    Raises:
        FailedPrecondition: another service has it.
    """
    until = time.monotonic() + _GRACE_S
    while time.monotonic() < until:
        os.makedirs(group, exist_ok=True)
        with contextlib.suppress(FileNotFoundError, BlockingIOError), _opened(group) as fd:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(group), os.fstat(fd)):  # else it was just swept
                return os.dup(fd)
        time.sleep(0.01)  # who sweeps holds it only for a moment
    raise FailedPrecondition(
        f"another sandbox service has the control group {group}; stop it or choose another home"
    )


def _sweep_dead(group: str) -> None:
    """Remove what is empty of another instance's group, if nobody holds its lock."""
    with contextlib.suppress(OSError), _opened(group) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for entry in os.scandir(group):
            if entry.is_dir(follow_symlinks=False):
                _removed(entry.path)
        _removed(group)


class _Base(ABC):
    roots: Sequence[Path]
    """Of the hierarchies in which groups are made."""
    unkept: Mapping[str, str] = MappingProxyType({})
    entrance: str
    """The file of a group into which a process writes "0" to enter it."""

    _as_new: Sequence[tuple[str, str, str, int]]
    """See `Sign`; by the kind of the group."""

    def __init__(self, groups: dict[str, Path], instance: str) -> None:
        self._groups = {kind: path / f"{_PREFIX}{instance}" for kind, path in groups.items()}
        self.places = tuple(dict.fromkeys(map(str, self._groups.values())))
        self._locks: list[int] = []

    def _prepare(self) -> None:
        """Make and lock the instance's groups.

        Raises:
            FailedPrecondition: another service has them.
        """
        try:
            for path in self.places:
                self._locks.append(_locked(path))
        except BaseException:
            self._unlock()
            raise

    def _unlock(self) -> None:
        while self._locks:
            os.close(self._locks.pop())

    @abstractmethod
    def writes(self, box: str, limits: Limits) -> list[Write]: ...

    def plan(self, box: str, limits: Limits, *, kept: bool = False) -> Plan:
        places = [f"{path}/{box}" for path in self.places]
        joins = [Write(f"{place}/{self.entrance}", "0") for place in places]
        return Plan((), joins) if kept else Plan(places, [*self.writes(box, limits), *joins])

    @property
    def signs(self) -> Sequence[Sign]:
        found = self._as_new
        return [Sign(str(self._groups[kind]), file, key, most) for kind, file, key, most in found]

    def _of(self, kind: str, box: str) -> str:
        return f"{self._groups[kind]}/{box}"

    def kill(self, box: str, keep: int) -> None:
        _kill_members(self._of("pids", box), keep)

    def destroy(self, box: str) -> bool:
        gone = [_remove(f"{path}/{box}") for path in self.places]
        return all(gone)

    def sweep(self) -> None:
        for box in self.members():
            self.destroy(box)
        for root in self.roots:
            for other in _instances(root):
                if other not in self.places:
                    _sweep_dead(other)

    def members(self) -> frozenset[str]:
        found: set[str] = set()
        for path in self.places:
            with contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
                found.update(entry.name for entry in entries if entry.is_dir())
        return frozenset(found)

    def close(self) -> None:
        self.sweep()
        for path in self.places:
            with contextlib.suppress(OSError):
                os.rmdir(path)
        self._unlock()


class CgroupV1(_Base):
    """memory, pids and cpu hierarchies of version 1 (needs root)."""

    name = "cgroup-v1"
    roots = tuple(_ROOT / kind for kind in ("memory", "pids", "cpu"))
    entrance = "tasks"
    """For one thread, the caller's own: `cgroup.procs` would stop every fork and exit of the host
    for an RCU grace period (cgroup_procs_write_start)."""
    _as_new = (
        ("pids", "cgroup.procs", "", 0),
        ("pids", "pids.events", "max", 0),
        ("memory", "memory.oom_control", "oom_kill", 0),
        ("memory", "memory.usage_in_bytes", "", _KEPT_BYTES),
        ("cpu", "cpu.stat", "nr_throttled", 0),
    )

    def writes(self, box: str, limits: Limits) -> list[Write]:
        found = []
        if limits.memory_bytes:
            memory, size = self._of("memory", box), str(limits.memory_bytes)
            both = Write(f"{memory}/memory.memsw.limit_in_bytes", size, needed=False)
            # never below the other: first where the limit rises, last where it falls
            found += [both, Write(f"{memory}/memory.limit_in_bytes", size), both]
        if limits.pids:
            found.append(Write(f"{self._of('pids', box)}/pids.max", str(limits.pids + 1)))
        if limits.cpus:
            cpu, quota = self._of("cpu", box), _quota_us(limits)
            found.append(Write(f"{cpu}/cpu.cfs_period_us", str(_PERIOD_US)))
            found.append(Write(f"{cpu}/cpu.cfs_quota_us", str(quota)))
        return found

    def counters(self, box: str) -> Counters:
        return Counters(
            _counter(f"{self._of('memory', box)}/memory.oom_control", b"oom_kill"),
            _counter(f"{self._of('pids', box)}/pids.events", b"max"),
        )

    def throttled(self, box: str) -> int:
        return _counter(f"{self._of('cpu', box)}/cpu.stat", b"nr_throttled")


class CgroupV2(_Base):
    """A delegated version 2 subtree."""

    name = "cgroup-v2"
    roots = (_ROOT,)
    entrance = "cgroup.procs"
    _as_new = (
        ("pids", "cgroup.procs", "", 0),
        ("pids", "pids.events", "max", 0),
        ("pids", "memory.events", "oom_kill", 0),
        ("pids", "memory.current", "", _KEPT_BYTES),
        ("pids", "cpu.stat", "nr_throttled", 0),
    )

    def writes(self, box: str, limits: Limits) -> list[Write]:
        group, found = self._of("pids", box), []
        if limits.memory_bytes:
            found.append(Write(f"{group}/memory.max", str(limits.memory_bytes)))
            found.append(Write(f"{group}/memory.swap.max", "0", needed=False))
        if limits.pids:
            found.append(Write(f"{group}/pids.max", str(limits.pids + 1)))
        if limits.cpus:
            found.append(Write(f"{group}/cpu.max", f"{_quota_us(limits)} {_PERIOD_US}"))
        return found

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
    places: Sequence[str] = ()
    signs: Sequence[Sign] = ()
    unkept: Mapping[str, str] = MappingProxyType(
        {
            "cpus": "run the service as root or in a control group of its own with memory, pids "
            "and cpu (systemd-run --user --scope -p Delegate=yes ...)"
        }
    )

    def plan(self, box: str, limits: Limits, *, kept: bool = False) -> Plan:
        return Plan()

    def writes(self, box: str, limits: Limits) -> Sequence[Write]:
        return ()

    def counters(self, box: str) -> Counters:
        return Counters()

    def throttled(self, box: str) -> int:
        return 0

    def kill(self, box: str, keep: int) -> None:
        return

    def destroy(self, box: str) -> bool:
        return True

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

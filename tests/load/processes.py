"""Processes of one instance of the embedded runtime, found again after their service has ended.

- A spawner is started with an empty environment and no argument that names its home: it is known
  as a child of its service, by process id and start time, which no other process has.
- First processes and what they have started are known by their control group; where there is none,
  a process of the spawner's program is known by the mounts that it sees.
- A process that has ended and waits to be reaped is still there.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

Lived = tuple[int, int]
"""Process id and start time."""
_PROC = Path("/proc")
_PROGRAM = "spawner-"


def children(pid: int) -> list[int]:
    """Process ids of a process's children, of all its threads."""
    found: list[int] = []
    for path in _PROC.glob(f"{pid}/task/[0-9]*/children"):
        found += [int(child) for child in _read(path).split()]
    return found


def start_time(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot; None when there is none."""
    fields = _read(_PROC / str(pid) / "stat").rpartition(b")")[2].split()
    return int(fields[19]) if len(fields) > 19 else None  # field 22; two stand before


def state(pid: int) -> str:
    """The state letter of a process, `Z` for one that has ended; empty when there is none."""
    fields = _read(_PROC / str(pid) / "stat").rpartition(b")")[2].split()
    return fields[0].decode("ascii") if fields else ""


def family(service: int) -> dict[Lived, str]:
    """A service, its spawners and their first processes, by process id and start time."""
    found: dict[Lived, str] = {}
    pids = [(service, "service")]
    for spawner in children(service):
        pids.append((spawner, "spawner"))
        pids += [(first, "first process") for first in children(spawner)]
    for pid, role in pids:
        if (start := start_time(pid)) is not None:
            found[pid, start] = role
    return found


def still(seen: Mapping[Lived, str]) -> dict[Lived, str]:
    """Those of `seen` that still live, and not another process of the same id."""
    return {lived: role for lived, role in seen.items() if start_time(lived[0]) == lived[1]}


def of_instance(home: Path, instance: str) -> dict[int, str]:
    """Processes that the instance's control groups or, for the spawner's program, mounts name."""
    group, place = f"/regreen-{instance}/".encode(), os.fsencode(home)
    found: dict[int, str] = {}
    for pid in _all():
        process = _PROC / str(pid)
        if group in _read(process / "cgroup"):
            found[pid] = "in a control group of the instance"
        elif _program(process).startswith(_PROGRAM) and place in _read(process / "mountinfo"):
            found[pid] = "a spawner's, with mounts of the instance"
    return found


def mounts(home: Path) -> dict[str, int]:
    """Mount points below `home` in any process's view, and one process that sees each."""
    below = os.fsencode(home.resolve()) + b"/"
    views: set[str] = set()
    found: dict[str, int] = {}
    for pid in _all():
        with contextlib.suppress(OSError):
            view = os.readlink(_PROC / str(pid) / "ns/mnt")
            if view in views:
                continue
            for line in _read(_PROC / str(pid) / "mountinfo").splitlines():
                point = line.split()[4]
                if point.startswith(below):
                    found.setdefault(os.fsdecode(point), pid)
            views.add(view)
    return found


def _all() -> Iterator[int]:
    return (int(name) for name in os.listdir(_PROC) if name.isdigit())


def _program(process: Path) -> str:
    with contextlib.suppress(OSError):
        return os.path.basename(os.readlink(process / "exe"))
    return ""


def _read(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""

"""What of one instance of the embedded runtime is on this host, whether or not it should be.

- Only names of this instance are looked at; nothing is touched.
- A look is not atomic: what is being made or removed may be seen. Whoever asks compares two looks.
"""

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path


def look(
    home: Path, *, groups: Callable[[], frozenset[str]], spawner: int
) -> Mapping[str, frozenset[str]]:
    """Names of what is there, by kind; blocking, for worker threads."""
    return {
        "process": _children(spawner),
        "cgroup": groups(),
        "directory": _directories(home),
        "mount": _mounts(home),
    }


def _children(parent: int) -> frozenset[str]:
    """Process ids of the children of a process, those that ended and were not reaped included.

    Its own list where the kernel has one: a look at every process of a host costs each the more,
    the more there are.
    """
    if not parent:
        return frozenset()
    with contextlib.suppress(OSError):  # a spawner has one thread
        return frozenset(Path(f"/proc/{parent}/task/{parent}/children").read_text("ascii").split())
    found: set[str] = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                fields = Path(f"/proc/{name}/stat").read_bytes().rsplit(b")", 1)[1].split()
                if int(fields[1]) == parent:
                    found.add(name)
    return frozenset(found)


def _directories(home: Path) -> frozenset[str]:
    """Directories of boxes, and what was put out of sight and is not removed yet; no drafts."""
    found: set[str] = set()
    for kind in ("run", "trash"):
        with contextlib.suppress(FileNotFoundError):
            names = os.listdir(home / kind)
            found.update(f"{kind}/{name}" for name in names if not name.startswith("draft-"))
    return frozenset(found)


def _mounts(home: Path) -> frozenset[str]:
    """Mount points below `home` in this process's own view: a sandbox's are in views of its own."""
    below = os.fsencode(home.resolve()) + b"/"
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    points = (line.split()[4] for line in lines)
    return frozenset(os.fsdecode(point) for point in points if point.startswith(below))

"""What an overlay's upper directory says: changed paths, bytes, inodes.

- Only names, types and extended attributes are read; no file content, no link is followed.
- A whiteout is a character device 0/0; an opaque directory carries `user.overlay.opaque`.
- `changed` may name a path that turns out equal; it never leaves out one that differs.
"""

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from regreen.rpc.errors import FailedPrecondition

_MAX_PATHS = 200_000


@dataclass(frozen=True, slots=True)
class Usage:
    """Disk space taken by a directory tree."""

    size_bytes: int
    inodes: int


def usage(top: Path) -> Usage:
    """Allocated bytes and inodes below `top`; entries that vanish meanwhile do not count."""
    size = inodes = 0
    stack = [str(top)]
    while stack:
        with contextlib.suppress(OSError), os.scandir(stack.pop()) as entries:
            for entry in entries:
                inodes += 1
                with contextlib.suppress(OSError):
                    info = entry.stat(follow_symlinks=False)
                    size += info.st_blocks * 512
                    if stat.S_ISDIR(info.st_mode):
                        stack.append(entry.path)
    return Usage(size, inodes)


def changed(tops: Sequence[Path], lowers: Sequence[Path], under: str) -> set[str]:
    """Paths below `under` touched in any of `tops` (lowest first), absolute inside the sandbox."""
    found: set[str] = set()
    relative = under.strip("/")
    for index, top in enumerate(tops):
        beneath = [*lowers, *tops[:index]]
        if relative and _hides_lower(top, relative):
            found.update(_all_files(beneath, relative))
        for path in _touched(top, relative, beneath):
            found.add("/" + path)
            if len(found) > _MAX_PATHS:
                raise FailedPrecondition(f"more than {_MAX_PATHS} paths changed under {under}")
    return {path if path.startswith("/") else "/" + path for path in found}


def _hides_lower(top: Path, relative: str) -> bool:
    """Whether `relative` or a parent of it is a whiteout, a non-directory or opaque in `top`."""
    here = top
    for part in relative.split("/"):
        here = here / part
        try:
            mode = here.lstat().st_mode
        except OSError:
            return False
        if not stat.S_ISDIR(mode) or _is_opaque(str(here)):
            return True
    return False


def _touched(top: Path, relative: str, beneath: Sequence[Path]) -> Iterator[str]:
    if not _plain_directory(top, relative):
        return
    stack = [relative]
    while stack:
        here = stack.pop()
        try:
            with os.scandir(top / here) as entries:
                listed = list(entries)
        except PermissionError as error:
            raise FailedPrecondition(f"/{here} cannot be listed: {error.strerror}") from error
        for entry in listed:
            path = f"{here}/{entry.name}" if here else entry.name
            info = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(info.st_mode):
                stack.append(path)
                if _is_opaque(entry.path):
                    yield from _all_files(beneath, path)
                continue
            yield path
            if _shadows_directory(beneath, path):
                yield from _all_files(beneath, path)


def _plain_directory(top: Path, relative: str) -> bool:
    here = top
    for part in (part for part in relative.split("/") if part):
        here = here / part
        try:
            if not stat.S_ISDIR(here.lstat().st_mode):
                return False
        except OSError:
            return False
    return True


def _shadows_directory(beneath: Sequence[Path], relative: str) -> bool:
    return any(_plain_directory(lower, relative) for lower in beneath)


def _is_opaque(path: str) -> bool:
    try:
        return os.getxattr(path, "user.overlay.opaque", follow_symlinks=False) == b"y"
    except OSError:
        return False


def _all_files(layers: Sequence[Path], relative: str) -> Iterator[str]:
    """Every path that any layer holds below `relative`, whiteouts included."""
    for layer in layers:
        if not _plain_directory(layer, relative):
            continue
        stack = [relative]
        while stack:
            here = stack.pop()
            with os.scandir(layer / here) as entries:
                for entry in entries:
                    path = f"{here}/{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        stack.append(path)
                    else:
                        yield path

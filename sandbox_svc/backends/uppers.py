"""What an overlay's upper directory says: changed paths, bytes, inodes.

- Only names, types and extended attributes are read; no file content, no link is followed.
- Directories are opened from the top's descriptor, so that none can be swapped for a link, and a
  tree deeper than the kernel's longest path is told, not skipped.
- A whiteout is a character device 0/0; an opaque directory carries `user.overlay.opaque`.
- `changed` may name a path that turns out equal; it never leaves out one that differs. What it
  cannot look into (no permission, or too long a path) it names with a slash at the end, and a
  directory in which it sees nothing with `/.`.
- Entries that vanish meanwhile are no error.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from regreen.rpc.errors import ResourceExhausted
from sandbox_svc.backends import linux
from sandbox_svc.backends.fds import writing

_MAX_PATHS = 200_000
_PATH_BYTES = 4000
"""Below PATH_MAX; who goes deeper does so to hide."""
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


@dataclass(frozen=True, slots=True)
class Usage:
    """Disk space taken by a directory tree."""

    size_bytes: int
    inodes: int
    largest_bytes: int = 0
    """Length of the longest file, holes counted."""
    whole: bool = True
    """Whether everything could be looked at."""


def usage(top: Path, *, shared: bool = False) -> Usage:
    """Allocated bytes and inodes below `top`; entries that vanish meanwhile do not count.

    With `shared`, a file with several names counts in equal parts wherever it has one.
    """
    size = inodes = largest = 0
    whole = True
    with _opened(top) as top_fd:
        stack = [""]
        while stack:
            here = stack.pop()
            try:
                for entry in _scan(top_fd, here):
                    inodes += 1
                    with contextlib.suppress(FileNotFoundError):
                        info = entry.stat(follow_symlinks=False)
                        directory = stat.S_ISDIR(info.st_mode)
                        names = info.st_nlink if shared and not directory else 1
                        size += info.st_blocks * 512 // max(1, names)
                        if stat.S_ISREG(info.st_mode):
                            largest = max(largest, info.st_size)
                        if directory:
                            stack.append(_join(here, entry.name))
            except OSError as error:
                whole = whole and error.errno in _GONE
    return Usage(size, inodes, largest, whole)


def room_of(top: Path, path: str) -> tuple[int, int]:
    """Bytes that a file written at a path would give back, and entries that it would add."""
    parts, here = path.strip("/").split("/"), ""
    if ".." in parts:
        return 0, len(parts)
    with _opened(top) as top_fd:
        for number, part in enumerate(parts):
            here = _join(here, part)
            try:
                info = os.stat(here, dir_fd=top_fd, follow_symlinks=False)
            except OSError:
                return 0, len(parts) - number
            if not stat.S_ISDIR(info.st_mode):
                there = stat.S_ISREG(info.st_mode) and number == len(parts) - 1
                return (info.st_blocks * 512 if there else 0), len(parts) - number - there
    return 0, 0


def changed(tops: Sequence[Path], lowers: Sequence[Path], under: str) -> set[str]:
    """Paths below `under` touched in any of `tops` (lowest first), absolute inside the sandbox.

    Raises:
        ResourceExhausted: more paths than anyone can compare.
    """
    found: set[str] = set()
    relative = under.strip("/")
    with contextlib.ExitStack() as opened:
        beneath = [opened.enter_context(_opened(lower)) for lower in lowers]
        for top in tops:
            top_fd = opened.enter_context(_opened(top))
            for path in _touched(top_fd, relative, list(beneath)):
                found.add("/" + path)
                if len(found) > _MAX_PATHS:
                    raise ResourceExhausted(f"more than {_MAX_PATHS} paths changed under {under}")
            beneath.append(top_fd)
    return found


@contextlib.contextmanager
def _opened(top: Path) -> Iterator[int]:
    fd = os.open(top, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _join(here: str, name: str) -> str:
    return f"{here}/{name}" if here else name


def _open_directory(top_fd: int, relative: str) -> int:
    """A directory below a top, reached through real directories alone."""
    if len(os.fsencode(relative)) > _PATH_BYTES:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    resolve = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS
    with writing("the files of a sandbox"):  # no descriptors: nothing is known of what is there
        return linux.openat2(top_fd, relative or ".", os.O_RDONLY | os.O_DIRECTORY, resolve)


def _scan(top_fd: int, relative: str) -> Iterator[os.DirEntry[str]]:
    fd = _open_directory(top_fd, relative)
    try:
        with writing("the files of a sandbox"):
            found = os.scandir(fd)
        with found as entries:
            yield from entries
    finally:
        os.close(fd)


def _hides_lower(top_fd: int, relative: str) -> bool:
    """Whether `relative` or a parent of it is a whiteout, a non-directory or opaque in a top."""
    here = ""
    for part in relative.split("/"):
        here = _join(here, part)
        try:
            mode = os.stat(here, dir_fd=top_fd, follow_symlinks=False).st_mode
        except OSError:
            return False
        if not stat.S_ISDIR(mode) or _is_opaque(top_fd, here):
            return True
    return False


def _touched(top_fd: int, relative: str, beneath: Sequence[int]) -> Iterator[str]:
    if relative and _hides_lower(top_fd, relative):
        yield from _all_files(beneath, relative)
    stack = [relative] if _is_directory(top_fd, relative) else []
    while stack:
        here, holds = stack.pop(), False
        try:
            for entry in _scan(top_fd, here):
                path = _join(here, entry.name)
                holds = holds or not _is_whiteout(entry)
                if not entry.is_dir(follow_symlinks=False):
                    yield path
                    if any(_is_directory(lower, path) for lower in beneath):
                        yield from _all_files(beneath, path)
                    continue
                stack.append(path)
                if _stands_for_a_file(beneath, path):
                    yield path
                if _is_opaque(top_fd, path):
                    yield from _all_files(beneath, path)
            if not holds and here != relative:
                yield f"{here}/."
        except OSError as error:
            if error.errno not in _GONE:
                yield f"{here}/"


def _stands_for_a_file(beneath: Sequence[int], path: str) -> bool:
    """Whether what a folder hides or continues below it is something else than a folder."""
    for lower in reversed(beneath):
        try:
            info = os.stat(path, dir_fd=lower, follow_symlinks=False)
        except OSError as error:
            if error.errno == errno.ENOTDIR:
                return False
            continue
        return not (stat.S_ISDIR(info.st_mode) or (stat.S_ISCHR(info.st_mode) and not info.st_rdev))
    return False


def _is_whiteout(entry: os.DirEntry[str]) -> bool:
    if entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False):
        return False
    with contextlib.suppress(FileNotFoundError):
        info = entry.stat(follow_symlinks=False)
        return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0
    return True


def _is_directory(top_fd: int, relative: str) -> bool:
    try:
        os.close(_open_directory(top_fd, relative))
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def _is_opaque(top_fd: int, relative: str) -> bool:
    try:
        fd = _open_directory(top_fd, relative)
    except OSError:
        return False
    try:
        return os.getxattr(fd, "user.overlay.opaque") == b"y"
    except OSError:
        return False
    finally:
        os.close(fd)


def _all_files(layers: Sequence[int], relative: str) -> Iterator[str]:
    """Every path that any layer holds below `relative`, whiteouts included."""
    for layer in layers:
        stack = [relative] if _is_directory(layer, relative) else []
        while stack:
            here = stack.pop()
            try:
                for entry in _scan(layer, here):
                    path = _join(here, entry.name)
                    if entry.is_dir(follow_symlinks=False):
                        stack.append(path)
                    else:
                        yield path
            except OSError as error:
                if error.errno not in _GONE:
                    yield f"{here}/"

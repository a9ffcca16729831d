"""Several overlay layers as one that shows the same files.

- Over the layers beneath, the result shows exactly what the chain showed: content, types, modes,
  owners, times, extended attributes, hard links inside the chain.
- Files are linked, not copied: no content moves, and a layer's files never change. Until the old
  layers go, a link count says one more than before.
- A whiteout stays only where a directory beneath has the name; in a directory that nothing beneath
  shares it would show as an entry.
- A directory that hid what lies beneath, by its mark or because a file or a whiteout lay between,
  is marked opaque.
- Only frozen layers are read; on any error the draft is the caller's to remove.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_OVERLAY = "user.overlay."
_OPAQUE = "user.overlay.opaque"
_COPY_INSTEAD = (errno.EMLINK, errno.EXDEV, errno.EPERM)


@dataclass(frozen=True, slots=True)
class _Folder:
    """One directory of the result."""

    target: str
    sources: tuple[str, ...]
    """Directories of the chain that it is made of, topmost first."""
    beneath: tuple[str, ...]
    """Directories beneath the chain that still show through, topmost first."""


@dataclass(slots=True)
class _Merge:
    pending: list[_Folder]
    finished: list[tuple[str, str]] = field(default_factory=list)
    """Directories and where their attributes come from, parents first."""
    copies: dict[tuple[int, int], str] = field(default_factory=dict)
    """Files that could not be linked, by device and inode."""


def merge_layers(layers: Sequence[Path], beneath: Sequence[Path], target: Path) -> None:
    """Fill the empty directory `target` with what `layers` (lowest first) show over `beneath`.

    Raises:
        OSError: a directory cannot be read, or the disk is full; `target` is half filled.
    """
    top = _Folder(str(target), _topmost_first(layers), _topmost_first(beneath))
    work = _Merge([top])
    work.finished.append((top.target, top.sources[0]))
    while work.pending:
        _fill(work, work.pending.pop())
    for made, source in reversed(work.finished):
        _finish(made, source)


def _topmost_first(layers: Sequence[Path]) -> tuple[str, ...]:
    return tuple(str(layer) for layer in reversed(layers))


def _fill(work: _Merge, folder: _Folder) -> None:
    for name, found in _entries(folder.sources).items():
        first = os.lstat(found[0])
        target = f"{folder.target}/{name}"
        if stat.S_ISDIR(first.st_mode):
            child = _child(folder, name, found)
            os.mkdir(target, 0o700)
            work.finished.append((target, found[0]))
            if child.beneath != _shown(folder.beneath, name):
                os.setxattr(target, _OPAQUE, b"y")
            work.pending.append(child)
        elif not is_whiteout(first) or any(os.path.lexists(f"{b}/{name}") for b in folder.beneath):
            _link(work, found[0], first, target)


def _entries(sources: Sequence[str]) -> dict[str, list[str]]:
    """Names in any of the directories, each with its paths, topmost first."""
    found: dict[str, list[str]] = {}
    for source in sources:
        for name in sorted(os.listdir(source)):
            found.setdefault(name, []).append(f"{source}/{name}")
    return found


def _child(folder: _Folder, name: str, found: Sequence[str]) -> _Folder:
    """What the directory `name` is made of: down to what hides the rest."""
    sources, hidden = [], False
    for path in found:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            hidden = True
            break
        sources.append(path)
        if is_opaque(path):
            hidden = True
            break
    beneath = () if hidden else _shown(folder.beneath, name)
    return _Folder(f"{folder.target}/{name}", tuple(sources), beneath)


def _shown(beneath: Sequence[str], name: str) -> tuple[str, ...]:
    """Directories `name` beneath that one would see, topmost first."""
    return tuple(_directories(beneath, name))


def _directories(beneath: Sequence[str], name: str) -> Iterator[str]:
    for parent in beneath:
        path = f"{parent}/{name}"
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            continue
        if not stat.S_ISDIR(mode):
            return
        yield path
        if is_opaque(path):
            return


def _link(work: _Merge, source: str, info: os.stat_result, target: str) -> None:
    """The same file under a new name; a copy where the file has too many names."""
    copied = work.copies.get((info.st_dev, info.st_ino))
    try:
        os.link(copied or source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _COPY_INSTEAD or not stat.S_ISREG(info.st_mode):
            raise
        shutil.copyfile(source, target, follow_symlinks=False)
        os.lchown(target, info.st_uid, info.st_gid)
        shutil.copystat(source, target, follow_symlinks=False)
        work.copies[info.st_dev, info.st_ino] = target


def _finish(made: str, source: str) -> None:
    """Give a directory the attributes of the topmost that it is made of."""
    info = os.lstat(source)
    for name in os.listxattr(source, follow_symlinks=False):
        if not name.startswith(_OVERLAY):
            value = os.getxattr(source, name, follow_symlinks=False)
            os.setxattr(made, name, value, follow_symlinks=False)
    if (info.st_uid, info.st_gid) != (os.geteuid(), os.getegid()):
        os.lchown(made, info.st_uid, info.st_gid)
    os.chmod(made, stat.S_IMODE(info.st_mode))
    os.utime(made, ns=(info.st_atime_ns, info.st_mtime_ns), follow_symlinks=False)


def is_whiteout(info: os.stat_result) -> bool:
    """Whether an entry of a layer says that the name is gone."""
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0


def is_opaque(path: str) -> bool:
    """Whether a directory of a layer hides the ones beneath it."""
    try:
        return os.getxattr(path, _OPAQUE, follow_symlinks=False) == b"y"
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return False
        raise

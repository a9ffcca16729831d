"""A layer as tar entries, and back, with nothing trusted on the way back.

- Kept: regular files, directories, symbolic links, whiteouts, opaque marks, permission bits, mtime.
  Left out: owners, set-id bits, sockets, pipes, other devices.
- Writing takes a bound on the bytes of files, holes counted, and no file is read that goes over it.
- Reading refuses absolute paths, `..`, duplicates, entries below a link, unknown types, and more
  entries or bytes than it was told to take; it writes only below one fresh directory.
"""

import contextlib
import errno
import os
import stat
import struct
import tarfile
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from regreen.rpc.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from sandbox_svc.backends import linux

_OPAQUE = "REGREEN.opaque"
_XATTR = "user.overlay.opaque"
_MAX_PATH = 4096
_MAX_PART = 255
_REFUSED = (errno.EINVAL, errno.EILSEQ, errno.ENAMETOOLONG, errno.EMLINK, errno.EFBIG)
"""What the file system says of an entry that cannot be, whoever unpacks it."""
_MISPLACED = (errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_WAITING = struct.Struct("=IIQ")
"""Of a directory that gets its mode and time later: length of its path, mode, time."""
_UNREADABLE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


def write_tree(archive: tarfile.TarFile, top: Path, prefix: str, max_bytes: int) -> int:
    """Add the layer at `top` to an archive below `prefix`; the bytes of its files.

    Raises:
        FailedPrecondition: an entry cannot be read; its mode or the length of its path forbids it.
            Or its files, with holes filled, are over `max_bytes`.
    """
    taken = 0
    try:
        for path, relative in _walk(top):
            taken += _write_entry(archive, path, f"{prefix}/{relative}", max_bytes - taken)
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
        raise _unfit(error.filename or str(top), top, os.strerror(error.errno)) from None
    except _TooLargeError as error:
        raise _unfit(error.args[0], top, OVER_BOUND.format("archive")) from None
    return taken


OVER_BOUND = "with it the {} is larger than this service takes, which import_bytes says"
"""What is wrong with a file that an archive has no room for."""


class _TooLargeError(Exception):
    """A file is larger than what an archive may still take."""


def _unfit(path: str, top: Path, problem: str) -> FailedPrecondition:
    shown = os.path.relpath(path, top)[:120].encode("utf-8", "replace").decode()
    return FailedPrecondition(
        f"the state cannot be exported because of {shown!r}: {problem};"
        " remove it and take another snapshot",
        metadata={"path": shown},
    )


def _write_entry(archive: tarfile.TarFile, path: Path, name: str, max_bytes: int) -> int:
    """Add one entry, unless it is over the bound; the bytes of its content."""
    info = path.lstat()
    member = tarfile.TarInfo(name)
    member.mode, member.mtime = stat.S_IMODE(info.st_mode) & 0o777, int(info.st_mtime)
    if stat.S_ISDIR(info.st_mode):
        member.type = tarfile.DIRTYPE
        if _is_opaque(path):
            member.pax_headers = {_OPAQUE: "y"}
        archive.addfile(member)
    elif stat.S_ISLNK(info.st_mode):
        member.type, member.linkname = tarfile.SYMTYPE, os.readlink(path)
        archive.addfile(member)
    elif stat.S_ISCHR(info.st_mode) and info.st_rdev == 0:
        member.type = tarfile.CHRTYPE
        archive.addfile(member)
    elif stat.S_ISREG(info.st_mode):
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags), "rb") as source:
            member.size = os.fstat(source.fileno()).st_size
            if member.size > max_bytes:
                raise _TooLargeError(str(path))
            archive.addfile(member, source)
    return member.size


def _walk(top: Path) -> Iterator[tuple[Path, str]]:
    stack = [""]
    while stack:
        here = stack.pop()
        for name in sorted(os.listdir(top / here)):
            relative = f"{here}/{name}" if here else name
            path = top / relative
            yield path, relative
            if stat.S_ISDIR(path.lstat().st_mode):
                stack.append(relative)


def _is_opaque(path: Path) -> bool:
    try:
        return os.getxattr(path, _XATTR, follow_symlinks=False) == b"y"
    except OSError:
        return False


@dataclass(slots=True)
class Quota:
    """What an archive may still bring."""

    size_bytes: int
    entries: int = 2_000_000

    def take(self, size_bytes: int) -> None:
        """Count one entry.

        Raises:
            ResourceExhausted: the archive is over its bound.
        """
        self.entries -= 1
        self.take_bytes(size_bytes)

    def take_bytes(self, size_bytes: int) -> None:
        """Count bytes alone.

        Raises:
            ResourceExhausted: the archive is over its bound.
        """
        self.size_bytes -= size_bytes
        if self.size_bytes < 0 or self.entries < 0:
            raise ResourceExhausted("the archive is larger than this service takes (import_bytes)")


class TreeReader:
    """Unpacks the entries of one layer below a fresh directory; use as a context manager.

    What is there is the record of what came: nothing is held of an entry that was unpacked. Modes
    and times of directories wait in a file without a name beside the layer.
    """

    def __init__(self, top: Path, owner: int | None, quota: Quota) -> None:
        self._owner, self._quota = owner, quota
        self._parts = contextlib.ExitStack()
        self._top_fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._parts.callback(os.close, self._top_fd)
        nameless = tempfile.TemporaryFile(dir=top.parent)  # noqa: SIM115 - closed with the parts
        self._waiting = self._parts.enter_context(nameless)
        self._starts = array("Q")
        """Where in that file a directory begins."""
        self._parent, self._parent_fd = "", os.dup(self._top_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._parent_fd)
        self._parts.close()

    def add(self, member: tarfile.TarInfo, relative: str, content: Iterable[bytes]) -> None:
        """Unpack one entry.

        Raises:
            InvalidArgument: the entry is hostile or damaged.
            ResourceExhausted: the archive is over its bound.
        """
        relative = _checked(relative.rstrip("/"))
        self._quota.take(max(0, member.size))
        parent, _, name = relative.rpartition("/")
        try:
            self._enter(parent)
            self._make(member, relative, name, content)
        except OSError as error:
            if error.errno in _MISPLACED:
                raise _bad(relative, "twice, or not below a directory of the archive") from None
            if error.errno not in _REFUSED:
                raise
            raise _bad(relative, f"cannot be made: {os.strerror(error.errno)}") from None

    def _enter(self, parent: str) -> None:
        if parent != self._parent:
            fd = self._directory(parent)
            os.close(self._parent_fd)
            self._parent, self._parent_fd = parent, fd

    def _directory(self, relative: str) -> int:
        """A directory of the layer, reached through real directories alone."""
        resolve = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS
        flags = os.O_RDONLY | os.O_DIRECTORY
        return linux.openat2(self._top_fd, relative or ".", flags, resolve)

    def _make(
        self, member: tarfile.TarInfo, relative: str, name: str, content: Iterable[bytes]
    ) -> None:
        here = self._parent_fd
        if member.isdir():
            os.mkdir(name, 0o755, dir_fd=here)
            self._wait(member, relative)
            return
        if member.issym():
            if len(member.linkname) > _MAX_PATH or "\0" in member.linkname or not member.linkname:
                raise _bad(relative, "has a malformed link")
            os.symlink(member.linkname, name, dir_fd=here)
        elif member.ischr() and member.devmajor == member.devminor == 0:
            os.mknod(name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=here)
        elif member.isreg() and not member.issparse():
            self._file(member, name, content)
            return
        else:
            raise _bad(relative, "is of a type that layers do not have")
        if self._owner is not None:
            os.chown(name, self._owner, self._owner, dir_fd=here, follow_symlinks=False)
        when = _when(member)
        os.utime(name, (when, when), dir_fd=here, follow_symlinks=False)

    def _wait(self, member: tarfile.TarInfo, relative: str) -> None:
        """Mark a directory that was made, and remember what it gets at the end."""
        if member.pax_headers.get(_OPAQUE) == "y":
            fd = self._directory(relative)
            try:
                os.setxattr(fd, _XATTR, b"y")
            finally:
                os.close(fd)
        self._starts.append(self._waiting.tell())
        path = os.fsencode(relative)
        self._waiting.write(_WAITING.pack(len(path), member.mode & 0o777, _when(member)) + path)

    def _file(self, member: tarfile.TarInfo, name: str, content: Iterable[bytes]) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(name, flags, 0o600, dir_fd=self._parent_fd), "wb") as target:
            for piece in content:
                target.write(piece)
            target.flush()
            self._finish(target.fileno(), member.mode & 0o777, _when(member))

    def finish(self) -> None:
        """Give directories their modes and times, which entries below would not bear or change."""
        while self._starts:
            self._waiting.seek(self._starts.pop())
            length, mode, when = _WAITING.unpack(self._waiting.read(_WAITING.size))
            fd = self._directory(os.fsdecode(self._waiting.read(length)))
            try:
                self._finish(fd, mode, when)
            finally:
                os.close(fd)

    def _finish(self, fd: int, mode: int, when: int) -> None:
        if self._owner is not None:
            os.fchown(fd, self._owner, self._owner)
        os.fchmod(fd, mode)
        os.utime(fd, (when, when))


def _when(member: tarfile.TarInfo) -> int:
    return max(0, min(int(member.mtime), 1 << 33))


def _checked(relative: str) -> str:
    parts = relative.split("/")
    if len(relative) > _MAX_PATH or "\0" in relative:
        raise _bad(relative, "is too long")
    if any(part in ("", ".", "..") or len(os.fsencode(part)) > _MAX_PART for part in parts):
        raise _bad(relative, "is not a plain relative path")
    return relative


def _bad(path: str, problem: str) -> InvalidArgument:
    return InvalidArgument(
        "archive", f"entry {path[:120]!r} {problem}", "send an archive as it was written"
    )

"""A layer as tar entries, and back, with nothing trusted on the way back.

- Kept: regular files, directories, symbolic links, whiteouts, opaque marks, permission bits, mtime.
  Left out: owners, set-id bits, sockets, pipes, other devices.
- Writing takes a bound on the bytes of files, holes counted, and no file is read that goes over it.
- Reading refuses absolute paths, `..`, duplicates, entries below a link, unknown types, and more
  entries or bytes than it was told to take; it writes only below one fresh directory.
"""

import errno
import os
import shutil
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from regreen.rpc.errors import FailedPrecondition, InvalidArgument, ResourceExhausted

_OPAQUE = "REGREEN.opaque"
_XATTR = "user.overlay.opaque"
_MAX_PATH = 4096
_MAX_PART = 255
_REFUSED = (errno.EINVAL, errno.EILSEQ, errno.ENAMETOOLONG, errno.EMLINK, errno.EFBIG)
"""What the file system says of an entry that cannot be, whoever unpacks it."""
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


@dataclass(slots=True)
class TreeReader:
    """Unpacks the entries of one layer below a fresh directory."""

    top: Path
    owner: int | None
    quota: Quota
    _directories: set[str] = field(default_factory=lambda: {""})
    _seen: set[str] = field(default_factory=set)
    _open: list[tuple[tarfile.TarInfo, Path]] = field(default_factory=list)

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo, relative: str) -> None:
        """Unpack one entry.

        Raises:
            InvalidArgument: the entry is hostile or damaged.
            ResourceExhausted: the archive is over its bound.
        """
        relative = _checked(relative.rstrip("/"))
        parent = relative.rpartition("/")[0]
        if relative in self._seen or parent not in self._directories:
            raise _bad(relative, "twice, or not below a directory of the archive")
        self._seen.add(relative)
        self.quota.take(max(0, member.size))
        try:
            self._make(archive, member, relative)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            raise _bad(relative, f"cannot be made: {os.strerror(error.errno)}") from None

    def _make(self, archive: tarfile.TarFile, member: tarfile.TarInfo, relative: str) -> None:
        path = self.top / relative
        if member.isdir():
            path.mkdir(mode=0o755)
            self._directories.add(relative)
            if member.pax_headers.get(_OPAQUE) == "y":
                os.setxattr(path, _XATTR, b"y")
        elif member.issym():
            if len(member.linkname) > _MAX_PATH or "\0" in member.linkname or not member.linkname:
                raise _bad(relative, "has a malformed link")
            path.symlink_to(member.linkname)
        elif member.ischr() and member.devmajor == member.devminor == 0:
            os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))
        elif member.isreg() and not member.issparse():
            self._file(archive, member, path)
        else:
            raise _bad(relative, "is of a type that layers do not have")
        if member.isdir():
            self._open.append((member, path))
        else:
            self._finish(member, path)

    def close(self) -> None:
        """Give directories their modes and times, which entries below would not bear or change."""
        while self._open:
            self._finish(*self._open.pop())

    def _file(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
        source = archive.extractfile(member)
        if source is None:
            raise _bad(member.name, "has no content")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o600), "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)

    def _finish(self, member: tarfile.TarInfo, path: Path) -> None:
        if self.owner is not None:
            os.lchown(path, self.owner, self.owner)
        if member.isreg() or member.isdir():
            path.chmod(member.mode & 0o777)
        when = max(0, min(int(member.mtime), 1 << 33))
        os.utime(path, (when, when), follow_symlinks=False)


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

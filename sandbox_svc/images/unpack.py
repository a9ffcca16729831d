"""One layer of an image as a directory that overlayfs takes, with nothing trusted on the way.

- Kept: files, directories, symbolic and hard links, permission bits, times, `user.` attributes,
  holes. Dropped and counted: set-id bits, devices, pipes, other attributes, owners.
- `.wh.NAME` becomes a whiteout and `.wh..wh..opq` an opaque mark; they hide what is below the
  layer, never what is in it.
- Later entries replace earlier ones as in any tar, but a directory never becomes something else,
  nor something else a directory.
- A path is a place below the layer: leading slashes go, `..` is refused, and nothing is ever
  written or linked through a link.
- All calls are relative to the layer's descriptor; modes and times of directories come last.
"""

import contextlib
import errno
import os
import stat
import tarfile
from collections.abc import Iterator, Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path

from regreen.rpc.errors import InvalidArgument
from sandbox_svc.backends.tree_archive import Quota
from sandbox_svc.images.streams import TarStream, damaged

OPAQUE = "user.overlay.opaque"
WHITEOUT, OPAQUE_ENTRY = ".wh.", ".wh..wh..opq"
_AUFS = ".wh..wh."
_ATTRIBUTE = "SCHILY.xattr."
_PATH_BYTES = 4000
_PART_BYTES = 255
_ALL_PATHS_BYTES = 128 << 20
_MAX_TIME_S = 1 << 33
_DIRECTORY, _FILE, _LINK, _HIDDEN = "d", "f", "l", "w"
_REFUSED = (errno.EINVAL, errno.EILSEQ, errno.ENAMETOOLONG, errno.EMLINK, errno.EFBIG)
NOTES = {
    "set-id": "{count} set-id bits are dropped, for example of {example}",
    "device": "{count} devices or pipes are left out, for example {example}",
    "attribute": "{count} extended attributes are dropped (capabilities, labels), for example of "
    "{example}",
    "owner": "{count} entries belong to other users than root, for example {example}; inside a "
    "sandbox everything belongs to its one user",
}
Counts = Mapping[str, tuple[int, str]]
"""Per kind of note how often, and one example."""


class LayerUnpacker:
    """Unpacks one layer into a fresh directory; use as a context manager."""

    def __init__(self, top: Path, owner: int | None, quota: Quota) -> None:
        self._top, self._owner, self._quota = top, owner, quota
        self._fd = -1
        self._kinds: dict[str, str] = {"": _DIRECTORY}
        self._opaque: set[str] = set()
        self._hidden: set[str] = set()
        self._directories: dict[str, tuple[int, int]] = {}
        self._room = _ALL_PATHS_BYTES
        self._counts: dict[str, tuple[int, str]] = {}

    def __enter__(self) -> "LayerUnpacker":
        self._fd = os.open(self._top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)

    @property
    def counts(self) -> Counts:
        """What was dropped."""
        return self._counts

    def take(self, stream: TarStream) -> None:
        """Unpack every member of a layer, then finish its directories.

        Raises:
            InvalidArgument: the layer is hostile or damaged.
            ResourceExhausted: it is over its bound.
        """
        for member in stream.members():
            try:
                self._add(stream, member)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                raise _bad(member.name, f"cannot be made: {os.strerror(error.errno)}") from None
        self._finish()

    def _add(self, stream: TarStream, member: tarfile.TarInfo) -> None:
        name = _normal(member.name)
        self._room -= len(name)
        if self._room < 0:
            raise damaged("has more or longer names than this service takes")
        parent, _, leaf = name.rpartition("/")
        if not name and not member.isdir():
            raise _bad(member.name, "names the layer itself")
        self._note(member, name)
        self._enter(parent)
        if leaf.startswith(WHITEOUT):
            self._hide(parent, leaf)
        elif member.isdir():
            self._directory(member, name)
        elif member.isreg():
            self._file(stream, member, name)
        elif member.issym():
            self._symlink(member, name)
        elif member.islnk():
            self._hard_link(member, name)
        elif member.ischr() or member.isblk() or member.isfifo():
            self._count("device", name)
        else:
            raise _bad(name, "is of a type that images do not have")

    def _note(self, member: tarfile.TarInfo, name: str) -> None:
        if member.uid:
            self._count("owner", name)
        if member.mode & 0o6000 and (member.isreg() or member.isdir()):
            self._count("set-id", name)

    def _count(self, kind: str, name: str) -> None:
        count, example = self._counts.get(kind, (0, _shown(name)))
        self._counts[kind] = count + 1, example

    def _enter(self, directory: str) -> None:
        """Make sure that a parent is a real directory of this layer."""
        if self._kinds.get(directory) == _DIRECTORY:
            return
        here = ""
        for part in directory.split("/"):
            here = f"{here}/{part}" if here else part
            if self._kinds.get(here) != _DIRECTORY:
                self._make_directory(here)

    def _make_directory(self, name: str) -> None:
        hidden = self._kinds.get(name) == _HIDDEN
        self._clear(name, directory=True)
        os.mkdir(name, 0o755, dir_fd=self._fd)
        self._kinds[name] = _DIRECTORY
        if self._owner is not None:
            os.chown(name, self._owner, self._owner, dir_fd=self._fd, follow_symlinks=False)
        if hidden:
            self._mark_opaque(name)

    def _clear(self, name: str, *, directory: bool = False) -> None:
        """Take away what an earlier entry left at a place."""
        kind = self._kinds.get(name)
        if kind is None:
            return
        if kind == _DIRECTORY or (directory and kind != _HIDDEN):
            raise _bad(name, "is below or in the place of an entry of another type")
        os.unlink(name, dir_fd=self._fd)
        self._hidden.discard(name)
        del self._kinds[name]

    def _hide(self, parent: str, leaf: str) -> None:
        """A whiteout, or the opaque mark of its directory."""
        if leaf == OPAQUE_ENTRY:
            self._mark_opaque(parent)
            return
        if leaf.startswith(_AUFS):
            return  # bookkeeping of a file system that engines once used
        leaf = leaf.removeprefix(WHITEOUT)
        if leaf in ("", ".", ".."):
            raise _bad(f"{parent}/{WHITEOUT}{leaf}", "hides nothing")
        name = f"{parent}/{leaf}" if parent else leaf
        kind = self._kinds.get(name)
        if kind == _DIRECTORY:
            self._mark_opaque(name)
        elif kind is None:
            os.mknod(name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=self._fd)
            self._kinds[name] = _HIDDEN
            self._hidden.add(name)

    def _mark_opaque(self, name: str) -> None:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name or ".", flags, dir_fd=self._fd)
        try:
            os.setxattr(fd, OPAQUE, b"y")
        finally:
            os.close(fd)
        self._opaque.add(name)

    def _directory(self, member: tarfile.TarInfo, name: str) -> None:
        if self._kinds.get(name) != _DIRECTORY:
            self._make_directory(name)
        self._directories[name] = member.mode & 0o1777, _time_ns(member)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        if any(key.startswith(_ATTRIBUTE) for key in member.pax_headers):
            fd = os.open(name or ".", flags, dir_fd=self._fd)
            try:
                self._attributes(fd, member, name)
            finally:
                os.close(fd)

    def _file(self, stream: TarStream, member: tarfile.TarInfo, name: str) -> None:
        self._clear(name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=self._fd)
        self._kinds[name] = _FILE
        try:
            stream.seek(member.offset_data)
            if member.issparse():
                self._holes(stream, member, fd)
            else:
                for piece in stream.content(member.size):
                    _write(fd, piece)
            if self._owner is not None:
                os.fchown(fd, self._owner, self._owner)
            self._attributes(fd, member, name)
            os.fchmod(fd, member.mode & 0o1777)
            when = _time_ns(member)
            os.utime(fd, ns=(when, when))
        finally:
            os.close(fd)

    def _holes(self, stream: TarStream, member: tarfile.TarInfo, fd: int) -> None:
        """A file with holes: what is written counts twice, what is not counts once."""
        self._quota.take_bytes(max(0, member.size))
        at = 0
        parts: list[tuple[int, int]] = list(member.sparse or ())  # type: ignore[arg-type]
        for offset, size in parts:
            if size == 0:
                continue  # marks the end
            if offset < at or size < 0 or offset + size > member.size:
                raise _bad(member.name, "has parts out of order")
            os.lseek(fd, offset, os.SEEK_SET)
            for piece in stream.content(size):
                _write(fd, piece)
            at = offset + size
        os.ftruncate(fd, member.size)

    def _symlink(self, member: tarfile.TarInfo, name: str) -> None:
        target = member.linkname
        if not target or "\0" in target or len(os.fsencode(target)) > _PATH_BYTES:
            raise _bad(name, "has a malformed link")
        self._clear(name)
        os.symlink(target, name, dir_fd=self._fd)
        self._kinds[name] = _LINK
        if self._owner is not None:
            os.chown(name, self._owner, self._owner, dir_fd=self._fd, follow_symlinks=False)
        when = _time_ns(member)
        os.utime(name, ns=(when, when), dir_fd=self._fd, follow_symlinks=False)

    def _hard_link(self, member: tarfile.TarInfo, name: str) -> None:
        target = _normal(member.linkname)
        if self._kinds.get(target) not in (_FILE, _LINK) or target == name:
            raise _bad(name, f"is a link to {_shown(target)!r}, which is no file of its layer")
        self._clear(name)
        os.link(target, name, src_dir_fd=self._fd, dst_dir_fd=self._fd, follow_symlinks=False)
        self._kinds[name] = self._kinds[target]

    def _attributes(self, fd: int, member: tarfile.TarInfo, name: str) -> None:
        for key, text in member.pax_headers.items():
            attribute = key.removeprefix(_ATTRIBUTE)
            if attribute == key:
                continue
            ours = attribute.startswith("user.") and not attribute.startswith("user.overlay.")
            try:
                if ours:
                    os.setxattr(fd, attribute, text.encode("utf-8", "surrogateescape"))
                    continue
            except (OSError, ValueError):
                pass  # too many, too large, or a name that cannot be: it is counted
            self._count("attribute", name)

    def _finish(self) -> None:
        """Whiteouts that nothing can be below go; directories get their modes, deepest first."""
        for name in self._hidden:
            if any(above in self._opaque for above in _above(name)):
                os.unlink(name, dir_fd=self._fd)
        for name in sorted(self._directories, key=lambda path: path.count("/"), reverse=True):
            if name:
                self._set_directory(name)
        if "" in self._directories:
            self._set_directory("")

    def _set_directory(self, name: str) -> None:
        mode, when = self._directories[name]
        os.chmod(name or ".", mode, dir_fd=self._fd)
        os.utime(name or ".", ns=(when, when), dir_fd=self._fd)


def _above(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition("/")[0]
        yield name


def _normal(name: str) -> str:
    """A path below the layer.

    Raises:
        InvalidArgument: it leads out of the layer or is malformed.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    found = "/".join(parts)
    if ".." in parts or "\0" in found:
        raise _bad(name, "leads out of the layer")
    if len(os.fsencode(found)) > _PATH_BYTES or any(
        len(part) > 60 and len(os.fsencode(part)) > _PART_BYTES for part in parts
    ):
        raise _bad(name, "has too long a name")
    return found


def _time_ns(member: tarfile.TarInfo) -> int:
    if not 0 <= member.mtime < _MAX_TIME_S:  # nor where it is no number
        return 0
    with contextlib.suppress(InvalidOperation):
        return int(Decimal(member.pax_headers.get("mtime", str(member.mtime))) * 10**9)
    return 0


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _shown(name: str) -> str:
    return name[:120].encode("utf-8", "replace").decode()


def _bad(path: str, problem: str) -> InvalidArgument:
    return damaged(f"entry {path[:120]!r} {problem}")

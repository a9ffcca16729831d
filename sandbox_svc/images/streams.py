"""Archives as streams that are read once, forwards, within bounds.

- Bytes are counted where they are unpacked: what a small file expands to is never held, and never
  written, beyond the quota.
- `read` is what `tarfile` reads headers with, and has little room between two members; `content`
  is for what a member holds.
- Nothing seeks backwards: a header with a negative size cannot make a reader go in circles.
- An archive ends with two blocks of zeros, as the standard asks and every tool that makes images
  writes; one that was cut between two members lacks them. What may follow them is bounded, so that
  a small file that unpacks to nothing but zeros is refused at once.
- Damaged input of any kind is an `InvalidArgument`.
"""

import gzip
import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Protocol

import zstandard

from regreen.rpc.errors import InvalidArgument
from sandbox_svc.backends.tree_archive import Quota

CHUNK_BYTES = 1 << 20
_HEADER_BYTES = 1 << 20
_GLOBALS = 64
BLOCK_BYTES = 512
_PADDING_BYTES = 16 << 20
"""May follow the end: tools fill up a record, which is 10 KiB unless they were told otherwise."""
_WINDOW_BYTES = 128 << 20
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
_DAMAGE = (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError)


def damaged(what: str) -> InvalidArgument:
    """The error for an archive that is not what it should be."""
    return InvalidArgument("archive", what, "send an archive as it was written")


class Slice(io.RawIOBase):
    """A part of an open file as a file of its own; the file's position is not used."""

    def __init__(self, fd: int, start: int, size: int) -> None:
        super().__init__()
        self._fd, self._start, self._size, self._at = fd, start, size, 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to a place from the beginning, or from here."""
        self._at = max(0, offset + (self._at if whence == 1 else 0))
        return self._at

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill a buffer from here on."""
        wanted = min(len(buffer), self._size - self._at)
        data = os.pread(self._fd, wanted, self._start + self._at) if wanted > 0 else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def unpacked(raw: io.RawIOBase) -> BinaryIO:
    """What a stream holds once its compression, if any, is undone.

    Raises:
        InvalidArgument: a compression that images do not have.
    """
    source = io.BufferedReader(raw, CHUNK_BYTES)
    head = source.peek(8)[:8]
    if head.startswith(_GZIP):
        return gzip.GzipFile(fileobj=source)  # type: ignore[return-value]
    if head.startswith(_ZSTD):
        unpacker = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
        found: BinaryIO = unpacker.stream_reader(source, read_across_frames=True)
        return found
    for magic, name in _OTHERS.items():
        if head.startswith(magic):
            raise damaged(f"is compressed with {name}, and images use gzip or zstd")
    return source


def check_start(head: bytes) -> None:
    """Refuse what cannot be an archive by its first block, before the rest of it is kept.

    Raises:
        InvalidArgument: it is compressed as images are not, or no tar archive.
    """
    source = unpacked(io.BytesIO(head))  # type: ignore[arg-type]
    if isinstance(source, io.BufferedReader):
        try:
            tarfile.TarInfo.frombuf(head[:BLOCK_BYTES], "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise damaged(f"is no tar archive, or a damaged one: {error}") from None


class Readable(Protocol):
    """What an archive is read from."""

    def read(self, size: int, /) -> bytes:
        """At most so many bytes; none at the end."""
        ...


class TarStream:
    """A tar archive that is read once: what `tarfile` needs of a file, bounded and hashed."""

    def __init__(self, source: Readable, quota: Quota, *, skip: bool = False) -> None:
        self._source, self._quota = source, quota
        self._skipped = source if skip and isinstance(source, io.BufferedReader) else None
        """Whose contents are skipped unread; then there is no digest."""
        self._at = 0
        self._digest = hashlib.sha256()
        self._room = _HEADER_BYTES
        self._last = b""
        self._ended = False

    def members(self) -> Iterator[tarfile.TarInfo]:
        """The members in order, each to be read before the next is asked for.

        Raises:
            InvalidArgument: the archive is damaged or cut short.
            ResourceExhausted: it is over its bound.
        """
        try:
            with tarfile.open(fileobj=self, mode="r:", encoding="utf-8") as archive:  # type: ignore[call-overload]
                while (member := archive.next()) is not None:
                    if member.size < 0:
                        raise damaged(f"has an entry of {member.size} bytes")
                    if len(archive.pax_headers) > _GLOBALS:
                        raise damaged("has too many headers that hold for all that follows")
                    self._quota.take(0)
                    self._room = _HEADER_BYTES
                    yield member
                    archive.members = []  # tarfile keeps all that it has seen
                    self._room = _HEADER_BYTES
        except (tarfile.TarError, ValueError, UnicodeError, RecursionError, OverflowError) as error:
            raise damaged(f"is no tar archive, or a damaged one: {error}") from None
        if self._last != bytes(BLOCK_BYTES) or self._take(BLOCK_BYTES) != bytes(BLOCK_BYTES):
            raise damaged("is damaged, or cut short: it lacks the two blocks of zeros at its end")
        self._ended = True

    def tell(self) -> int:
        """Bytes read so far."""
        return self._at

    def seek(self, position: int, whence: int = 0) -> int:
        """Skip forwards."""
        if whence or position < self._at:
            raise damaged("has a header that points backwards")
        if self._skipped is not None:
            self._at = self._skipped.seek(position)
        while self._at < position:
            if not self._take(min(CHUNK_BYTES, position - self._at)):
                break
        return self._at

    def read(self, size: int = -1) -> bytes:
        """A header, or part of one."""
        if not 0 <= size <= self._room:
            raise damaged("has a header that is too large")
        self._room -= size
        self._last = self._take(size)
        return self._last

    def content(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes in pieces.

        Raises:
            InvalidArgument: there are fewer.
        """
        while size > 0:
            piece = self._take(min(CHUNK_BYTES, size))
            if not piece:
                raise damaged("is cut short")
            size -= len(piece)
            yield piece

    def digest(self) -> str:
        """The SHA-256 of all that was read so far."""
        return self._digest.copy().hexdigest()

    def finish(self) -> str:
        """Read to the end; the SHA-256 of everything.

        Raises:
            InvalidArgument: after the end of the archive there is more than a tool would add.
        """
        room = _PADDING_BYTES
        while piece := self._take(CHUNK_BYTES):
            room -= len(piece)
            if self._ended and room < 0:
                raise damaged(f"goes on for more than {_PADDING_BYTES} bytes after its end")
        return self._digest.hexdigest()

    def _take(self, size: int) -> bytes:
        pieces: list[bytes] = []
        missing = size
        while missing:
            try:
                piece = self._source.read(missing)
            except _DAMAGE as error:
                raise damaged(f"holds data that cannot be unpacked: {error}") from None
            if not piece:
                break
            pieces.append(piece)
            missing -= len(piece)
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._at += len(data)
        self._quota.take_bytes(len(data))
        self._digest.update(data)
        return data

"""The archive that a client sent: one file on disk, and where in it each of its blobs lies.

- Names of the archive are keys of a table and never paths of this host; links between them are
  followed in the table alone.
- Small documents are read whole and bounded; everything else is read as a stream.
"""

import hashlib
import io
import json
import os
import posixpath
from pathlib import Path
from typing import Any, BinaryIO

from sandbox_svc.backends.tree_archive import Quota
from sandbox_svc.images.streams import CHUNK_BYTES, Slice, TarStream, damaged

_DOCUMENT_BYTES = 4 << 20
_INDEXED = 100_000
_LINKS = 16


class Archive:
    """An archive on disk, indexed; use as a context manager."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._size = os.fstat(self._fd).st_size
        self._places: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        self._digests: dict[str, str] = {}

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)

    def index(self, quota: Quota) -> None:
        """Find the members; a very long archive is not of blobs, and its tail is not looked at.

        Raises:
            InvalidArgument: it is no tar archive, or one of nothing.
        """
        stream, count = TarStream(self.whole(), quota, skip=True), -1
        for count, member in enumerate(stream.members()):
            name = posixpath.normpath("/" + member.name)[1:]
            if count >= _INDEXED:
                return
            if member.isreg() and not member.issparse():
                self._places[name] = member.offset_data, member.size
            elif member.issym():
                folder = posixpath.dirname(name)
                self._links[name] = posixpath.normpath(f"/{folder}/{member.linkname}")[1:]
            elif member.islnk():
                self._links[name] = posixpath.normpath("/" + member.linkname)[1:]
        if count < 0:
            raise damaged("holds nothing")

    def whole(self) -> BinaryIO:
        """The archive itself, from its beginning."""
        return io.BufferedReader(Slice(self._fd, 0, self._size), CHUNK_BYTES)

    def holds(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return self._place(name) is not None

    def _place(self, name: str) -> tuple[int, int] | None:
        name = posixpath.normpath("/" + name)[1:]
        for _ in range(_LINKS):
            if name in self._places:
                return self._places[name]
            if name not in self._links:
                return None
            name = self._links[name]
        return None

    def open(self, name: str) -> Slice:
        """A file of the archive.

        Raises:
            InvalidArgument: there is none.
        """
        place = self._place(name)
        if place is None:
            raise damaged(f"lacks {name[:200]!r}")
        return Slice(self._fd, *place)

    def size(self, name: str) -> int:
        """Bytes of a file of the archive, or -1."""
        place = self._place(name)
        return -1 if place is None else place[1]

    def read(self, name: str) -> bytes:
        """A document of the archive.

        Raises:
            InvalidArgument: there is none, or it is too large.
        """
        if self.size(name) > _DOCUMENT_BYTES:
            raise damaged(f"has a document of more than {_DOCUMENT_BYTES} bytes: {name[:200]!r}")
        return self.open(name).readall()

    def sha256(self, name: str) -> str:
        """Digest of a file of the archive, compressed as it is."""
        if name not in self._digests:
            digest, source = hashlib.sha256(), self.open(name)
            while piece := source.read(CHUNK_BYTES):
                digest.update(piece)
            self._digests[name] = digest.hexdigest()
        return self._digests[name]


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def parsed(data: bytes, what: str) -> Any:
    """A JSON document.

    Raises:
        InvalidArgument: it is none.
    """
    try:
        return json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise damaged(f"has a {what} that is no JSON: {error}") from None

"""States in the blob store: one blob per layer, a manifest over them, the state's id as its name.

- A layer is stored under its digest, so a child stores only what its parent has not.
- The pieces together are the very bytes that ExportState gave; cutting decides what is shared,
  never what is restored.
- Reading verifies every piece by its digest; a damaged archive is an error, never a state.
- A name appears after everything that it needs: a state is there whole or not at all. Pieces that a
  store has lost since are damage too.
- The event loop never waits for the disk: a slow or full one costs a transfer, not the front.
"""

import asyncio
import base64
import binascii
import json
import re
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from google.protobuf.message import DecodeError

from regreen.blobs import Digest, ObjectBlobs
from regreen.rpc.errors import DataLoss, NotFound
from regreen.sandbox import v1 as pb
from sandbox_svc.backends.fds import writing

_BLOCK = 512
_MOST_PARTS = 1000
"""More than a state has layers; content that looks like headers does not make more."""
_FORMAT = 1
_LAYER = re.compile(rb"layers/\d+/?")


@dataclass(frozen=True, slots=True)
class Archived:
    """A state as it lies in the blob store."""

    state: bytes
    """The `State` message as its worker gave it."""
    key: str
    """What its line of descent is placed by."""
    parts: tuple[Digest, ...]

    @property
    def tenants(self) -> tuple[str, ...]:
        """Whose it was when it was stored."""
        return tuple(pb.State.FromString(self.state).tenants) or ("",)


class Archive:
    """The states of one blob store."""

    def __init__(self, blobs: ObjectBlobs, scratch: Path) -> None:
        self._blobs, self._scratch = blobs, scratch

    async def find(self, state_id: str) -> Archived | None:
        """A state of this id, if one was stored.

        Raises:
            DataLoss: its manifest is damaged.
        """
        digest = await self._blobs.named(state_id)
        if digest is None:
            return None
        try:
            return _decode(await self._blobs.get(digest), state_id)
        except NotFound as error:
            raise DataLoss(f"the archive of state {state_id} is damaged: {error}") from error

    async def store(
        self,
        state_id: str,
        state: bytes,
        key: str,
        chunks: AsyncIterator[bytes],
        *,
        replace: bool = False,
    ) -> None:
        """Keep what ExportState gave of a state, unless the state is kept already."""
        parts = await self._store_parts(chunks)
        digest = await self._blobs.put(_encode(Archived(state, key, tuple(parts))))
        await self._blobs.name(state_id, digest, replace=replace)

    async def _store_parts(self, chunks: AsyncIterator[bytes]) -> Sequence[Digest]:
        """Cut a stream and store its parts.

        Raises:
            DiskFull: there is no room for them here, or in the store.
        """
        parts: list[Digest] = []
        with writing():
            self._scratch.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._scratch) as scratch:
                part = _Part(Path(scratch) / "part")
                cutter = Cutter()
                try:
                    async for chunk in chunks:
                        for begins, piece in await asyncio.to_thread(cutter.cut, chunk):
                            begins = begins and len(parts) < _MOST_PARTS
                            if begins and part.close():
                                parts.append(await self._blobs.put_file(part.path))
                            await asyncio.to_thread(part.write, piece)
                    if part.close():
                        parts.append(await self._blobs.put_file(part.path))
                finally:
                    part.close()
        return parts

    async def read(self, archived: Archived) -> AsyncGenerator[bytes, None]:
        """The bytes for ImportState, verified.

        Raises:
            DataLoss: a piece is gone or damaged.
        """
        for part in archived.parts:
            try:
                async for chunk in self._blobs.stream(part):
                    yield chunk
            except NotFound as error:
                raise DataLoss(error.message) from error

    async def forget(self, state_id: str) -> None:
        """Have the id stand for nothing; layers stay, others may use them."""
        await self._blobs.unname(state_id)


class _Part:
    """The file of one piece."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._target: IO[bytes] | None = None

    def write(self, data: bytes) -> None:
        """Add bytes to the piece, or begin one."""
        if self._target is None:
            self._target = self.path.open("wb")
        self._target.write(data)

    def close(self) -> bool:
        """End the piece; whether there was one."""
        target, self._target = self._target, None
        if target is not None:
            target.close()
        return target is not None


class Cutter:
    """Cuts a tar stream where a layer, or the end mark, begins."""

    def __init__(self) -> None:
        self._header = b""
        self._skip = 0
        self._extended = False

    def cut(self, chunk: bytes) -> Sequence[tuple[bool, bytes]]:
        """What `feed` gives, in as few pieces as there are parts."""
        joined: list[tuple[bool, list[bytes]]] = []
        for begins, piece in self.feed(chunk):
            if begins or not joined:
                joined.append((begins, []))
            joined[-1][1].append(piece)
        return [(begins, b"".join(pieces)) for begins, pieces in joined]

    def feed(self, chunk: bytes) -> Sequence[tuple[bool, bytes]]:
        """The bytes of `chunk` in pieces, each with whether it begins a part.

        Bytes of a header that is not complete yet are kept for the next call, and the last
        header of a stream is always followed by more, so none stays behind.
        """
        pieces: list[tuple[bool, bytes]] = []
        view = memoryview(chunk)
        while view:
            if self._skip:
                taken, view = view[: self._skip], view[self._skip :]
                self._skip -= len(taken)
                pieces.append((False, bytes(taken)))
                continue
            missing = _BLOCK - len(self._header)
            self._header += bytes(view[:missing])
            view = view[missing:]
            if len(self._header) == _BLOCK:
                pieces.append((self._begins(), self._header))
                self._header = b""
        return pieces

    def _begins(self) -> bool:
        """Look at a whole header: skip its content, say whether it begins a part."""
        name, kind = self._header[:100].rstrip(b"\0"), self._header[156:157]
        self._skip = -(-_number(self._header[124:136]) // _BLOCK) * _BLOCK
        extended, self._extended = self._extended, kind in (b"x", b"g", b"L", b"K")
        layer = kind == b"5" and _LAYER.fullmatch(name) is not None
        return not extended and (layer or name == b"end")


def _number(field: bytes) -> int:
    """A size of a tar header: octal text, or base 256 where it is large."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    text = field.strip(b" \0")
    return int(text, 8) if text.isdigit() else 0


def _encode(archived: Archived) -> bytes:
    fields = {
        "format": _FORMAT,
        "state": base64.b64encode(archived.state).decode("ascii"),
        "key": archived.key,
        "parts": [[part.sha256, part.size_bytes] for part in archived.parts],
    }
    return json.dumps(fields, sort_keys=True).encode()


def _decode(data: bytes, state_id: str) -> Archived:
    try:
        fields = json.loads(data)
        if fields["format"] != _FORMAT:
            raise ValueError("of another format")
        parts = tuple(Digest(str(sha256), int(size)) for sha256, size in fields["parts"])
        state = base64.b64decode(fields["state"], validate=True)
        if pb.State.FromString(state).id != state_id:
            raise ValueError("of another state")
        return Archived(state, str(fields["key"]), parts)
    except (ValueError, KeyError, TypeError, binascii.Error, DecodeError) as error:
        raise DataLoss(f"the archive of state {state_id} is damaged: {error}") from None

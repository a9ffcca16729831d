"""Sparse deltas of weights: the elements of a safetensors file that differ from those of a base.

- Applying a delta to its base gives the result's file byte for byte, header and notes too. Elements
  are compared and carried as bits, so that NaNs and signs of zero are as good as any.
- Names, shapes and types of tensors are those of the base, or there is no delta.
- What is applied is checked: the delta by a checksum of its own before anything is made of it, what
  came out by the digest of the result. A file that is damaged, cut short or of another base ends in
  a `DeltaError`, never in other weights.
- A tensor whose changes would take more room than its bytes is carried whole.
- One tensor is in memory at a time.

Layout, little endian: magic; digests (SHA-256 and size) of base and result; length of the packed
header of the result, and it; for each tensor in the order of its bytes a record, which is its kind,
the bytes of one gap, how many elements changed, two lengths and two payloads; SHA-256 of all that.
Payloads are zstd frames of byte planes: all lowest bytes, then those above. Of a sparse record they
are the gaps between changed elements, and by how much the bits of each differ as a signed number,
folded to be positive: most changed elements of a training step are the next number up or down.

Source: the safetensors format (huggingface/safetensors, README "Format"); that few elements of bf16
weights change in a step of reinforcement learning: arXiv:2605.07330.
"""

import hashlib
import json
import math
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import zstandard

MAGIC = b"RGDELTA1"
_DIGESTS = struct.Struct("<32sQ32sQI")
_RECORD = struct.Struct("<BBQQQ")
_SAME, _SPARSE, _WHOLE = 0, 1, 2
_CHECKSUM_BYTES = 32
_LEVEL = 3
_MAX_HEADER_BYTES = 100 << 20
_MEASURED = 8
"""Changes that take more than this part of a tensor's bytes are measured against it, packed."""
_PIECE = 1 << 20
"""Elements that are rounded at once: what a processor's cache holds."""
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}

_UNREADABLE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    struct.error,
)

Buffer = bytes | bytearray | memoryview | mmap.mmap
Bits = npt.NDArray[np.unsignedinteger[Any]]
Write = Callable[[bytes], object]


class DeltaError(ValueError):
    """A delta cannot be made or applied."""


class DeltaMismatch(DeltaError):
    """Two files have no delta between them, or a delta is not of this base."""


class DeltaDamaged(DeltaError):
    """The bytes of a delta or of a weights file are not what they should be."""


@dataclass(frozen=True, slots=True)
class FileDigest:
    """SHA-256 (hexadecimal) and size of a file."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Entry:
    """Where the bits of a tensor lie in its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return _ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Layout:
    """The header of a safetensors file, and its tensors in the order of their bytes."""

    header: bytes
    """With the length in front of it."""
    tensors: tuple[Entry, ...]

    @property
    def size_bytes(self) -> int:
        """Size of the whole file."""
        return self.tensors[-1].end if self.tensors else len(self.header)


@dataclass(frozen=True, slots=True)
class Made:
    """What a delta came to."""

    elements: int
    changed: int
    whole_tensors: int
    """Tensors that are carried whole."""
    size_bytes: int


def layout(data: Buffer) -> Layout:
    """The layout of a safetensors file.

    Raises:
        DeltaDamaged: it is none, or its tensors do not fill it without gap or overlap.
    """
    found = _layout(data)
    if found.size_bytes != len(data):
        raise DeltaDamaged(f"{len(data)} bytes are there, of {found.size_bytes}")
    return found


def _layout(data: Buffer) -> Layout:
    try:
        (length,) = struct.unpack_from("<Q", data, 0)
        if not 2 <= length <= min(_MAX_HEADER_BYTES, len(data) - 8):
            raise ValueError("no header")
        header = bytes(data[: 8 + length])
        listed: dict[str, Any] = json.loads(header[8:])
        listed.pop("__metadata__", None)
        tensors = [_entry(name, item, len(header)) for name, item in listed.items()]
    except _UNREADABLE as error:
        raise DeltaDamaged(f"no safetensors file: {error}") from error
    tensors.sort(key=lambda entry: (entry.start, entry.end))
    end = len(header)
    for entry in tensors:
        if entry.start != end:
            raise DeltaDamaged(f"no safetensors file: {entry.name} does not begin at {end}")
        end = entry.end
    return Layout(header, tuple(tensors))


def _entry(name: str, item: dict[str, Any], after: int) -> Entry:
    shape = tuple(int(size) for size in item["shape"])
    start, end = (after + int(offset) for offset in item["data_offsets"])
    if min((0, *shape)) < 0 or end - start != math.prod(shape) * _ITEM_BYTES[item["dtype"]]:
        raise ValueError(f"{name} has a size that is not that of its shape")
    return Entry(name, str(item["dtype"]), shape, start, end)


def encode(
    base: Buffer, result: Buffer, digests: tuple[FileDigest, FileDigest], write: Write
) -> Made:
    """Write the delta between two safetensors files, whose digests are given.

    Raises:
        DeltaMismatch: they have other tensors.
        DeltaDamaged: one of them is no safetensors file.
    """
    old, new = layout(base), layout(result)
    before = _pairs(old, new)
    checksum, size_bytes = hashlib.sha256(), 0

    def put(part: bytes) -> None:
        nonlocal size_bytes
        size_bytes += len(part)
        checksum.update(part)
        write(part)

    header = zstandard.ZstdCompressor(level=_LEVEL).compress(new.header)
    of_base, of_result = digests
    put(MAGIC)
    put(
        _DIGESTS.pack(
            bytes.fromhex(of_base.sha256),
            of_base.size_bytes,
            bytes.fromhex(of_result.sha256),
            of_result.size_bytes,
            len(header),
        )
    )
    put(header)
    changed = whole = elements = 0
    for entry in new.tensors:
        record = _record(_bits(base, before[entry.name]), _bits(result, entry))
        for part in record.parts():
            put(part)
        elements += (entry.end - entry.start) // entry.item_bytes
        changed += record.changed
        whole += record.kind == _WHOLE
    write(checksum.digest())
    return Made(elements, changed, whole, size_bytes + _CHECKSUM_BYTES)


@dataclass(frozen=True, slots=True)
class _Record:
    kind: int
    changed: int
    gap_bytes: int = 1
    places: bytes = b""
    values: bytes = b""

    def parts(self) -> tuple[bytes, bytes, bytes]:
        head = _RECORD.pack(
            self.kind, self.gap_bytes, self.changed, len(self.places), len(self.values)
        )
        return head, self.places, self.values


def _record(old: Bits, new: Bits) -> _Record:
    where = np.flatnonzero(old != new)
    if not where.size:
        return _Record(_SAME, 0)
    gaps = np.diff(where, prepend=-1) - 1
    gap_bytes = _bytes_for(int(gaps.max()))
    steps = _folded(new[where] - old[where])
    sparse = _Record(
        _SPARSE,
        int(where.size),
        gap_bytes,
        _packed(gaps.astype(f"<u{gap_bytes}")),
        _packed(steps),
    )
    if _MEASURED * (len(sparse.places) + len(sparse.values)) <= new.nbytes:
        return sparse
    whole = _Record(_WHOLE, int(where.size), values=_packed(new))
    fits = len(sparse.places) + len(sparse.values) <= len(whole.values)
    return sparse if fits else whole


class Delta:
    """A delta that is whole: its checksum was compared.

    Raises:
        DeltaDamaged: it is cut short or changed, or none.
    """

    def __init__(self, data: Buffer) -> None:
        view = memoryview(data)
        if len(view) < len(MAGIC) + _DIGESTS.size + _CHECKSUM_BYTES or view[:8] != MAGIC:
            raise DeltaDamaged("no delta of weights")
        self._body = view[:-_CHECKSUM_BYTES]
        if hashlib.sha256(self._body).digest() != view[-_CHECKSUM_BYTES:]:
            raise DeltaDamaged("a delta of weights does not match its checksum")
        base, base_bytes, result, result_bytes, length = _DIGESTS.unpack_from(view, len(MAGIC))
        self.base = FileDigest(base.hex(), base_bytes)
        self.result = FileDigest(result.hex(), result_bytes)
        self._at = len(MAGIC) + _DIGESTS.size
        self._layout = _layout(_unpacked(self._take(length), _MAX_HEADER_BYTES + 8))

    def apply(self, base: Buffer, write: Write) -> None:
        """Write the result's file.

        What was written is to be thrown away if this raises.

        Raises:
            DeltaMismatch: the base has other tensors, or bytes.
            DeltaDamaged: the delta was made wrong.
        """
        start, hashed = self._at, hashlib.sha256()
        old = layout(base)
        before = _pairs(old, self._layout)

        def put(part: bytes) -> None:
            hashed.update(part)
            write(part)

        try:
            put(self._layout.header)
            for entry in self._layout.tensors:
                put(self._tensor(_bits(base, before[entry.name]), entry).tobytes())
            if self._at != len(self._body):
                raise DeltaDamaged("bytes follow the last tensor of a delta")
        finally:
            self._at = start
        if hashed.hexdigest() != self.result.sha256:
            raise DeltaMismatch(
                f"weights came out as {hashed.hexdigest()}, not {self.result.sha256}: the base is "
                f"not {self.base.sha256}, or the delta was made wrong"
            )

    def _tensor(self, old: Bits, entry: Entry) -> Bits:
        kind, gap_bytes, changed, *lengths = _RECORD.unpack(self._take(_RECORD.size))
        places, values = (self._take(length) for length in lengths)
        if kind == _SAME and not changed:
            return old
        if kind not in (_SPARSE, _WHOLE) or changed > old.size or gap_bytes not in (1, 2, 4, 8):
            raise DeltaDamaged(f"a delta says of {entry.name} what cannot be")
        if kind == _WHOLE:
            return _plain(values, old.size, entry.item_bytes)
        gaps = _plain(places, changed, gap_bytes).astype(np.uint64)
        steps = _unfolded(_plain(values, changed, entry.item_bytes))
        # Gaps below the size cannot make their sum wrap before it is found to be too large.
        if changed and int(gaps.max()) >= old.size:
            raise DeltaDamaged(f"a delta changes what {entry.name} has not")
        where = np.cumsum(gaps + np.uint64(1)) - np.uint64(1)
        if changed and (int(where[-1]) >= old.size or bool((where[1:] <= where[:-1]).any())):
            raise DeltaDamaged(f"a delta changes what {entry.name} has not")
        found = old.copy()
        found[where] += steps
        return found

    def _take(self, length: int) -> memoryview:
        part = self._body[self._at : self._at + length]
        if len(part) != length:
            raise DeltaDamaged("a delta ends early")
        self._at += length
        return part


def _pairs(old: Layout, new: Layout) -> dict[str, Entry]:
    """The tensors of the base by name.

    Raises:
        DeltaMismatch: they are not those of the result.
    """
    found = {entry.name: entry for entry in old.tensors}
    if others := sorted(found.keys() ^ {entry.name for entry in new.tensors}):
        raise DeltaMismatch(f"only one of base and result has {others[0]}")
    for entry in new.tensors:
        before = found[entry.name]
        if (before.dtype, before.shape) != (entry.dtype, entry.shape):
            raise DeltaMismatch(
                f"{entry.name} is {before.dtype} {list(before.shape)} in the base, "
                f"{entry.dtype} {list(entry.shape)} in the result"
            )
    return found


def _bits(data: Buffer, entry: Entry) -> Bits:
    """The elements of a tensor as unsigned numbers; nothing is copied."""
    count = (entry.end - entry.start) // entry.item_bytes
    if not count:
        return np.empty(0, f"<u{entry.item_bytes}")
    return np.frombuffer(data, f"<u{entry.item_bytes}", count, entry.start)


def _bytes_for(largest: int) -> int:
    return next(size for size in (1, 2, 4, 8) if largest < 1 << (8 * size))


def _folded(steps: Bits) -> Bits:
    """0, -1, 1, -2, ... as 0, 1, 2, 3, ...; as many bits."""
    signed = steps.view(f"<i{steps.itemsize}")
    return (signed << 1 ^ signed >> (8 * steps.itemsize - 1)).view(steps.dtype)


def _unfolded(folded: Bits) -> Bits:
    one = folded.dtype.type(1)
    return folded >> one ^ (~(folded & one) + one)


def _packed(values: Bits) -> bytes:
    planes = values.view(np.uint8).reshape(-1, values.itemsize).T
    return zstandard.ZstdCompressor(level=_LEVEL).compress(planes.tobytes())


def _plain(frame: memoryview, count: int, item_bytes: int) -> Bits:
    planes = _unpacked(frame, count * item_bytes)
    if len(planes) != count * item_bytes:
        raise DeltaDamaged(f"a delta has {len(planes)} bytes where {count * item_bytes} belong")
    return (
        np.frombuffer(planes, np.uint8).reshape(item_bytes, count).T.copy().view(f"<u{item_bytes}")
    ).reshape(-1)


def _unpacked(frame: memoryview, max_bytes: int) -> bytes:
    try:
        if not 0 <= (size := zstandard.frame_content_size(frame)) <= max_bytes:
            raise DeltaDamaged(f"a part of a delta would unpack to {size} bytes of {max_bytes}")
        return zstandard.ZstdDecompressor().decompress(frame, max_output_size=max(size, 1))
    except zstandard.ZstdError as error:
        raise DeltaDamaged(f"a part of a delta cannot be unpacked: {error}") from error


def mapped(path: Path) -> mmap.mmap:
    """A file's bytes, read as they are used.

    Raises:
        DeltaDamaged: it is empty.
    """
    with path.open("rb") as source:
        try:
            return mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise DeltaDamaged(f"{path} is empty") from error


def form_of(source: Buffer, notes: Mapping[str, str], *, bf16: bool) -> Iterator[bytes]:
    """A safetensors file with notes added, in pieces; with `bf16` its F32 tensors are rounded.

    Ties go to the even neighbour, as torch and processors round; a NaN becomes a quiet one.

    Raises:
        DeltaDamaged: it is no safetensors file.
    """
    found = layout(source)
    header: dict[str, Any] = json.loads(found.header[8:])
    header["__metadata__"] = header.get("__metadata__", {}) | notes
    offset = 0
    for entry in found.tensors:
        rounded = bf16 and entry.dtype == "F32"
        size_bytes = (entry.end - entry.start) // (2 if rounded else 1)
        item = {"dtype": "BF16" if rounded else entry.dtype, "shape": entry.shape}
        header[entry.name] = item | {"data_offsets": [offset, offset + size_bytes]}
        offset += size_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for entry in found.tensors:
        bits = _bits(source, entry)
        for start in range(0, bits.size, _PIECE):
            piece = bits[start : start + _PIECE]
            yield (_rounded(piece) if bf16 and entry.dtype == "F32" else piece).tobytes()


def _rounded(bits: Bits) -> Bits:
    upper = (bits >> np.uint32(16)).astype(np.uint16)
    half = (bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))) >> np.uint32(16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if nan.any():
        return np.where(nan, upper & np.uint16(0x8000) | np.uint16(0x7FC0), half).astype("<u2")
    return half.astype("<u2")


def write_pieces(target: BinaryIO, pieces: Iterator[bytes]) -> FileDigest:
    """Write pieces to a file; its digest."""
    hashed, size_bytes = hashlib.sha256(), 0
    for piece in pieces:
        target.write(piece)
        hashed.update(piece)
        size_bytes += len(piece)
    return FileDigest(hashed.hexdigest(), size_bytes)

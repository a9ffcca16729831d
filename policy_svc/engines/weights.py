"""Reads checkpoints by reference: a safetensors file, or a folder with one or with shards.

- Reading is lazy and copies nothing but BF16 (which numpy lacks; it is widened to float32).
- Every tensor that is asked for exists, or the checkpoint is refused with its name.

Source: the safetensors format (huggingface/safetensors, README "Format").
"""

import json
import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from policy_svc.engines.stepper import WeightsError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
_MAX_HEADER_BYTES = 100 << 20
_DAMAGED = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError),
    struct.error,
)
_PART = 1 << 20
"""Values that are cast at once: they stay in the processor's cache until they are taken."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Entry:
    data: mmap.mmap
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Checkpoint:
    """The tensors of a checkpoint, by Hugging Face name.

    Raises:
        WeightsError: nothing is there, or a file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, _Entry] = {}
        try:
            for file in _files(path):
                self._entries |= _read_header(file)
        except _DAMAGED as error:
            raise WeightsError(f"{path}: {error}") from error

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def tensor(self, name: str) -> Array:
        """Return a tensor as F16, F32 or F64. Raises: WeightsError when it is missing."""
        values, entry = self._values(name)
        return _widened(values, entry.dtype).reshape(entry.shape)

    def float32(self, name: str, shape: tuple[int, ...]) -> Iterator[Array]:
        """A tensor's values in order as float32, some MB at a time; an array lasts till the next.

        Raises:
            WeightsError: it is missing, has another shape, or holds a value that is not finite.
        """
        values, entry = self._values(name)
        if entry.shape != shape:
            raise WeightsError(f"{name} has shape {entry.shape}, not {shape}")
        room = np.empty(min(_PART, len(values)), np.float32)
        for start in range(0, len(values), _PART):
            out = values[start : start + _PART]
            if entry.dtype != "F32":
                part, out = out, room[: len(out)]
                with np.errstate(over="ignore"):
                    np.copyto(out, _widened(part, entry.dtype), casting="same_kind")
            if not _all_finite(out):
                raise WeightsError(f"{name} holds a value that is not finite in float32")
            yield out

    def _values(self, name: str) -> tuple[Array, _Entry]:
        entry = self._entries.get(name)
        if entry is None:
            raise WeightsError(f"{self._path} has no tensor {name}")
        form = np.dtype(_DTYPES[entry.dtype])
        count = (entry.end - entry.start) // form.itemsize
        return np.frombuffer(entry.data, form, count, entry.start), entry


def _widened(values: Array, dtype: str) -> Array:
    """BF16, which numpy lacks, as float32; others as they are."""
    return (values.astype("<u4") << 16).view("<f4") if dtype == "BF16" else values


def _all_finite(values: Array) -> bool:
    """Whether none is infinite or NaN: their sum tells at once, unless it overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(values.sum()) or np.isfinite(values).all())


def identity_of(path: Path) -> tuple[int, ...]:
    """What tells the files of a checkpoint from others in their place, or from themselves changed.

    Raises:
        WeightsError: they cannot be looked at.
    """
    try:
        found = [file.stat() for file in _files(path)]
    except _DAMAGED as error:
        raise WeightsError(f"{path}: {error}") from error
    return tuple(n for one in found for n in (one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns))


def metadata_of(file: Path) -> dict[str, str]:
    """The notes in the header of a safetensors file.

    Raises:
        WeightsError: it is none.
    """
    try:
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if not 2 <= length <= _MAX_HEADER_BYTES:
                raise ValueError(f"{file.name} is no safetensors file")
            return {**json.loads(handle.read(length)).get("__metadata__", {})}
    except (OSError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise WeightsError(f"{file}: {error}") from error


def _read_header(file: Path) -> dict[str, _Entry]:
    with file.open("rb") as handle:
        data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    (length,) = struct.unpack_from("<Q", data, 0)
    if not 2 <= length <= min(_MAX_HEADER_BYTES, len(data) - 8):
        raise ValueError(f"{file.name} is no safetensors file")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    entries = {}
    for name, item in header.items():
        start, end = (8 + length + offset for offset in item["data_offsets"])
        shape, dtype = tuple(item["shape"]), item["dtype"]
        if dtype not in _DTYPES:
            continue
        if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
            raise ValueError(f"{file.name} has no numbers where those of {name} are")
        size_bytes = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
        if end - start != size_bytes or not 8 + length <= start <= end <= len(data):
            raise ValueError(f"{file.name} is cut short at {name}")
        entries[name] = _Entry(data, dtype, shape, start, end)
    return entries


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / INDEX
    if index.is_file():
        shards = json.loads(index.read_bytes())["weight_map"].values()
        return [path / shard for shard in sorted(set(shards))]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    raise ValueError(f"no {SINGLE} and no {INDEX} there")

"""Reads GGUF v3 files, with numpy alone.

- Nothing is copied twice: tensors are read through a memory map.
- Names and rotary layout are llama's: `attn_q`/`attn_k` rows are interleaved in GGUF and half-split
  in Hugging Face folders.

Source: the GGUF specification (ggml-org/ggml, docs/gguf.md); ggml's blocks of Q4_1 and Q8_0.
"""

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MAGIC = b"GGUF"
ALIGNMENT = 32
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_F32, _F16, _Q4_1, _Q8_0 = 0, 1, 3, 8
_BLOCK_VALUES = 32
_BYTES_PER_BLOCK = {_F32: 4 * 32, _F16: 2 * 32, _Q4_1: 20, _Q8_0: 34}

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

FloatArray = npt.NDArray[np.floating[Any]]


class GgufError(ValueError):
    """A GGUF file does not have the form that is needed here."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file; `shape` is row-major (rows first), as in Hugging Face folders."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data, without padding."""
        count = int(np.prod(self.shape))
        return count * _BYTES_PER_BLOCK[self.kind] // _BLOCK_VALUES


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A parsed file: metadata values, tensors, memory map."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data_offset: int
    data: mmap.mmap

    def read_tensor(self, name: str) -> FloatArray:
        """Return a tensor dequantised to float32, or as it lies for F16; shape as in `TensorInfo`.

        Raises: GgufError when its block type is none of F32, F16, Q4_1, Q8_0.
        """
        info = self.tensors[name]
        start = self.data_offset + info.offset
        raw = np.frombuffer(self.data, np.uint8, info.size_bytes, start)
        return _DECODERS[info.kind](raw).reshape(info.shape)


def _decode_q4_1(raw: npt.NDArray[np.uint8]) -> FloatArray:
    blocks = raw.reshape(-1, 20)
    scale = blocks[:, 0:2].copy().view("<f2").astype(np.float32)
    low = blocks[:, 2:4].copy().view("<f2").astype(np.float32)
    nibbles = blocks[:, 4:]
    values = np.concatenate((nibbles & 0x0F, nibbles >> 4), axis=1).astype(np.float32)
    values *= scale
    values += low
    return values


def _decode_q8_0(raw: npt.NDArray[np.uint8]) -> FloatArray:
    blocks = raw.reshape(-1, 34)
    scale = blocks[:, 0:2].copy().view("<f2").astype(np.float32)
    values = blocks[:, 2:].copy().view(np.int8).astype(np.float32)
    values *= scale
    return values


_DECODERS: dict[int, Callable[[npt.NDArray[np.uint8]], FloatArray]] = {
    _F32: lambda raw: raw.view("<f4"),
    _F16: lambda raw: raw.view("<f2"),
    _Q4_1: _decode_q4_1,
    _Q8_0: _decode_q8_0,
}


class _Cursor:
    """Reads little-endian values off a memory map, front to back."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data = data
        self.at = at

    def scalar(self, form: str) -> Any:
        value = struct.unpack_from(form, self.data, self.at)[0]
        self.at += struct.calcsize(form)
        return value

    def string(self) -> str:
        length = self.scalar("<Q")
        if self.at + length > len(self.data):
            raise GgufError("a string runs past the end of the file")
        value = self.data[self.at : self.at + length].decode("utf-8")
        self.at += length
        return value

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise GgufError(f"metadata has the unknown value type {kind}")
        inner, count = self.scalar("<I"), self.scalar("<Q")
        if inner in _SCALARS:
            form = np.dtype(_SCALARS[inner])
            items = np.frombuffer(self.data, form, count, self.at).tolist()
            self.at += count * form.itemsize
            return items
        return [self.value(inner) for _ in range(count)]


def read(path: Path) -> GgufFile:
    """Parse the header of a GGUF v3 file and map its data.

    Raises: GgufError when the file is not GGUF v3, is cut short, or holds unknown types.
    """
    with path.open("rb") as handle:
        data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _parse(data)
    except (struct.error, UnicodeDecodeError) as error:
        raise GgufError(f"{path.name} is cut short or damaged: {error}") from error


def _parse(data: mmap.mmap) -> GgufFile:
    if data[:4] != MAGIC:
        raise GgufError("not a GGUF file")
    cursor = _Cursor(data, 4)
    version, tensor_count, kv_count = cursor.scalar("<I"), cursor.scalar("<Q"), cursor.scalar("<Q")
    if version != 3:
        raise GgufError(f"GGUF version {version} is not read here; version 3 is")
    metadata: dict[str, Any] = {}
    for _ in range(kv_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("<I"))
    tensors: dict[str, TensorInfo] = {}
    for _ in range(tensor_count):
        name = cursor.string()
        dims = [cursor.scalar("<Q") for _ in range(cursor.scalar("<I"))]
        kind, offset = cursor.scalar("<I"), cursor.scalar("<Q")
        if kind not in _DECODERS:
            raise GgufError(f"tensor {name} has the block type {kind}, which is not read here")
        tensors[name] = TensorInfo(name, tuple(reversed(dims)), kind, offset)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    data_offset = -(-cursor.at // alignment) * alignment
    last = max(data_offset + t.offset + t.size_bytes for t in tensors.values())
    if last > len(data):
        raise GgufError("the tensor data is cut short")
    return GgufFile(metadata, tensors, data_offset, data)


def hf_name(gguf_name: str) -> str:
    """Return the Hugging Face name of a llama tensor. Raises: GgufError for an unknown name."""
    if gguf_name in _TOP_NAMES:
        return _TOP_NAMES[gguf_name]
    parts = gguf_name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.weight"
    raise GgufError(f"no Hugging Face name is known for the tensor {gguf_name}")


def to_half_split(rows: FloatArray, heads: int) -> FloatArray:
    """Turn GGUF's interleaved rotary rows [heads*d, ...] into Hugging Face's half-split order."""
    d = rows.shape[0] // heads
    return rows.reshape(heads, d // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def heads_of(gguf_name: str, heads: int, kv_heads: int) -> int | None:
    """Return how many heads a tensor's rotary rows have, or None when it has none."""
    if gguf_name.endswith(".attn_q.weight"):
        return heads
    return kv_heads if gguf_name.endswith(".attn_k.weight") else None

"""How a Batch lies in a safetensors blob; `regreen.batch` is the public face of this module.

- Arrays are checked against each other (type, axes, lengths, offsets) before anything is cut out.
- One metadata entry only: safetensors writes several in hash order, which would vary the digest.

Layout: one metadata entry `regreen.batch` holding JSON with `format_version`, `kind`, `group_ids`,
`sample_ids` and `metrics`, and flat arrays, of which sample i owns `[offsets[i], offsets[i+1])`:

| tensor | dtype, shape | meaning |
| --- | --- | --- |
| offsets | i64 [n+1] | first token of every sample, then the total |
| token_ids | i32 [tokens] | prompt, sampled tokens and tool output, in order |
| loss_mask | u8 [tokens] | 1 = sampled by the policy and trained on |
| logprobs | f32 [tokens] | natural log, behaviour policy at sampling; 0 where the mask is 0 |
| rewards | f32 [n] | composed scalar reward |
| advantages | f32 [n] or absent | when absent the learner computes them from rewards |
| groups | i32 [n] | index into `group_ids` |
| prompt_lens | i32 [n] | length of the prefix that all members of the group share |
| weights | f32 [n] | sample weight in the loss, >= 0 |
| truncated | u8 [n] | 1 = the rollout hit a limit (context, turns, wall clock) |
| span_offsets | i64 [n+1] | first version span of every sample, then the total |
| span_bounds | i32 [spans, 2] | half-open token range, relative to the sample |
| span_versions | i64 [spans] | policy version that sampled the range |
| turn_scores | f32 [tokens] or absent | own score of the token's turn; 0 where the mask is 0 |

A blob with `turn_scores` has format version 2, which a release that would pass over them refuses;
any other has version 1.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as _load_tensors
from safetensors.numpy import save as _save_tensors

FORMAT_VERSION = 2
"""The newest that is read; written is the oldest that says all there is to say."""
_WITHOUT_TURN_SCORES = 1
BatchKind = Literal["grpo", "sft"]
_METADATA_KEY = "regreen.batch"
_MAX_HEADER_BYTES = 100 * 1024 * 1024
Tensors = Mapping[str, NDArray[Any]]


class BatchError(ValueError):
    """A Batch breaks its format.

    `field` is the offending field (`samples[3].loss_mask`), `problem` says what is wrong and what
    would be right.
    """

    def __init__(self, field_name: str, problem: str) -> None:
        super().__init__(f"batch field {field_name!r}: {problem}")
        self.field = field_name
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Header:
    """What the metadata of a blob says."""

    kind: BatchKind
    group_ids: list[str]
    sample_ids: list[str]
    metrics: dict[str, float]


def _read_header(blob: bytes) -> Header:
    size = int.from_bytes(blob[:8], "little")
    if len(blob) < 8 or size > min(len(blob) - 8, _MAX_HEADER_BYTES):
        raise BatchError("blob", "is not a safetensors blob; build it with Batch.to_bytes")
    try:
        metadata = json.loads(blob[8 : 8 + size]).get("__metadata__") or {}
        raw = json.loads(metadata[_METADATA_KEY])
        version = int(raw["format_version"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BatchError("blob", f"has no {_METADATA_KEY!r} metadata; it is not a Batch") from None
    if not _WITHOUT_TURN_SCORES <= version <= FORMAT_VERSION:
        raise BatchError(
            "format_version",
            f"is {version}, this release reads {_WITHOUT_TURN_SCORES} to {FORMAT_VERSION}; "
            "upgrade the older side",
        )
    try:
        kind = raw["kind"]
        group_ids, sample_ids = _strings(raw["group_ids"]), _strings(raw["sample_ids"])
        metrics = {str(name): float(value) for name, value in raw["metrics"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BatchError("metadata", "lacks kind, group_ids, sample_ids or metrics") from None
    if kind not in get_args(BatchKind):
        raise BatchError("kind", f"is {kind!r}, must be one of {get_args(BatchKind)}")
    return Header(kind, group_ids, sample_ids, metrics)


def _strings(values: object) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("not a list of strings")
    return values


_DTYPES: dict[str, tuple[type[np.generic], int]] = {
    "offsets": (np.int64, 1),
    "token_ids": (np.int32, 1),
    "loss_mask": (np.uint8, 1),
    "logprobs": (np.float32, 1),
    "rewards": (np.float32, 1),
    "groups": (np.int32, 1),
    "prompt_lens": (np.int32, 1),
    "weights": (np.float32, 1),
    "truncated": (np.uint8, 1),
    "span_offsets": (np.int64, 1),
    "span_bounds": (np.int32, 2),
    "span_versions": (np.int64, 1),
}


class Arrays:
    """The flat arrays of a blob, checked against each other before they are cut into samples."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors
        for name, (dtype, ndim) in _DTYPES.items():
            self._check_array(name, dtype, ndim)
        for name in ("advantages", "turn_scores"):
            if name in tensors:
                self._check_array(name, np.float32, 1)
        self.size = int(tensors["offsets"].size) - 1
        self._check_lengths()

    def _check_array(self, name: str, dtype: type[np.generic], ndim: int) -> None:
        array = self.tensors.get(name)
        if array is None:
            raise BatchError(name, "is missing from the blob")
        if array.dtype != np.dtype(dtype) or array.ndim != ndim:
            raise BatchError(
                name,
                f"is {array.dtype} with {array.ndim} axes, must be {np.dtype(dtype)}, {ndim}",
            )

    def _check_lengths(self) -> None:
        tensors = self.tensors
        _check_offsets("offsets", tensors["offsets"], tensors["token_ids"].shape[0])
        _check_offsets("span_offsets", tensors["span_offsets"], tensors["span_versions"].shape[0])
        tokens = tensors["token_ids"].shape[0]
        spans = tensors["span_versions"].shape[0]
        per_sample = (
            "rewards",
            "groups",
            "prompt_lens",
            "weights",
            "truncated",
            "advantages",
        )
        wanted = dict.fromkeys(per_sample, self.size)
        wanted |= {"loss_mask": tokens, "logprobs": tokens, "span_bounds": spans}
        wanted["turn_scores"] = tokens
        wanted["span_offsets"] = self.size + 1
        for name, length in wanted.items():
            array = tensors.get(name)
            if array is not None and array.shape[0] != length:
                raise BatchError(name, f"has {array.shape[0]} entries, must have {length}")
        if spans and tensors["span_bounds"].shape[1] != 2:
            raise BatchError("span_bounds", "must hold two columns: start, end")
        if tensors["truncated"].size and int(np.asarray(tensors["truncated"]).max()) > 1:
            raise BatchError("truncated", "must be 0 or 1 for every sample")


def offsets_of(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _check_offsets(name: str, offsets: NDArray[Any], total: int) -> None:
    values = np.asarray(offsets, dtype=np.int64)
    if values.size < 1 or int(values[0]) != 0 or int(values[-1]) != total:
        raise BatchError(name, f"must start at 0 and end at {total}")
    if np.any(np.diff(values) < 0):
        raise BatchError(name, "must not decrease")


def write_blob(tensors: Tensors, header: Header) -> bytes:
    """Encode arrays and header; the same input gives the same bytes."""
    fields = {
        "format_version": FORMAT_VERSION if "turn_scores" in tensors else _WITHOUT_TURN_SCORES,
        "kind": header.kind,
        "group_ids": header.group_ids,
        "sample_ids": header.sample_ids,
        "metrics": header.metrics,
    }
    metadata = {_METADATA_KEY: json.dumps(fields, sort_keys=True)}
    return bytes(_save_tensors(dict(tensors), metadata))


def read_blob(blob: bytes) -> tuple[Header, Arrays]:
    """Decode a blob and check that its arrays fit each other and its header.

    Raises:
        BatchError: when the blob is damaged, of another version, or inconsistent.
    """
    header = _read_header(blob)
    try:
        arrays = Arrays(_load_tensors(blob))
    except SafetensorError as error:
        raise BatchError("blob", f"is not a readable safetensors blob: {error}") from None
    if len(header.sample_ids) != arrays.size:
        raise BatchError(
            "sample_ids", f"has {len(header.sample_ids)} entries, must have {arrays.size}"
        )
    groups = arrays.tensors["groups"]
    for index in np.flatnonzero((groups < 0) | (groups >= len(header.group_ids))):
        raise BatchError(
            f"samples[{index}].group",
            f"is {groups[index]}, but group_ids has {len(header.group_ids)} entries",
        )
    return header, arrays

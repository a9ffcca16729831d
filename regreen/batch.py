"""The wire format of a training Batch: token ids, masks and logprobs in one safetensors blob.

- A Batch holds exactly the ids the policy sampled; nothing here tokenizes or re-tokenizes text.
- `loss_mask` is 1 only on tokens sampled by the policy that are to be trained on; prompts and tool
  output are 0, and a token with mask 0 carries logprob 0.
- Encoding is deterministic: the same Batch always yields the same bytes, hence the same digest.
- A Batch is validated whole when it is read; an invalid one never reaches a learner. Errors name
  the field and the remedy.
- numpy and safetensors only: any client may build Batches without torch.
The blob layout is written down in `regreen._batch_blob`.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from regreen._batch_blob import (
    FORMAT_VERSION,
    Arrays,
    BatchError,
    BatchKind,
    Header,
    offsets_of,
    read_blob,
    write_blob,
)

__all__ = [
    "FORMAT_VERSION",
    "Batch",
    "BatchError",
    "BatchKind",
    "Sample",
    "VersionSpan",
    "digest_of",
]


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens `[start, end)` of a sample were sampled under policy `version`."""

    start: int
    end: int
    version: int


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One unbroken context of a trajectory as the learner sees it; build it with `Sample.make`."""

    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]
    logprobs: NDArray[np.float32]
    group_id: str
    prompt_len: int
    reward: float = 0.0
    advantage: float | None = None
    """None lets the learner compute it from the rewards of the group; all samples or none."""
    weight: float = 1.0
    truncated: bool = False
    spans: tuple[VersionSpan, ...] = ()
    turn_scores: NDArray[np.float32] | None = None
    """Of each token the own score of its turn, beside the reward of the trajectory; 0 wherever
    `loss_mask` is 0. None: no turn has one."""
    sample_id: str = ""
    """The trajectory id: samples of one group with one id are parts of one trajectory, and share
    reward and `truncated`. Empty: the sample is a trajectory of its own."""

    @classmethod
    def make(
        cls,
        token_ids: ArrayLike,
        loss_mask: ArrayLike,
        *,
        logprobs: ArrayLike | None = None,
        group_id: str = "",
        prompt_len: int | None = None,
        reward: float = 0.0,
        advantage: float | None = None,
        weight: float = 1.0,
        truncated: bool = False,
        spans: Sequence[VersionSpan] = (),
        turn_scores: ArrayLike | None = None,
        sample_id: str = "",
    ) -> "Sample":
        """Convert plain lists to the dtypes of the format.

        `prompt_len` defaults to the number of tokens before the first trained one.
        """
        ids = _as_ints(token_ids, "token_ids", np.int32)
        mask = _as_ints(loss_mask, "loss_mask", np.uint8)
        behaviour = np.zeros(ids.shape, np.float32)
        if logprobs is not None:
            behaviour = np.asarray(logprobs, dtype=np.float32)
        if prompt_len is None:
            trained = np.flatnonzero(mask)
            prompt_len = int(trained[0]) if trained.size else int(ids.size)
        return cls(
            token_ids=ids,
            loss_mask=mask,
            logprobs=behaviour,
            group_id=group_id,
            prompt_len=prompt_len,
            reward=float(reward),
            advantage=None if advantage is None else float(advantage),
            weight=float(weight),
            truncated=bool(truncated),
            spans=tuple(spans),
            turn_scores=None if turn_scores is None else np.asarray(turn_scores, np.float32),
            sample_id=sample_id,
        )

    @property
    def trained_tokens(self) -> int:
        """How many tokens the loss sees."""
        return int(self.loss_mask.sum())

    def check(self, where: str = "sample", *, vocab_size: int | None = None) -> None:
        """Check every field of this sample.

        Raises:
            BatchError: naming `where.<field>` and the remedy.
        """
        size = int(self.token_ids.size)
        if self.token_ids.ndim != 1 or size < 2:
            raise BatchError(f"{where}.token_ids", "needs a flat list of at least 2 tokens")
        arrays: dict[str, NDArray[Any]] = {"loss_mask": self.loss_mask, "logprobs": self.logprobs}
        if self.turn_scores is not None:
            arrays["turn_scores"] = self.turn_scores
        for name, array in arrays.items():
            if array.shape != self.token_ids.shape:
                raise BatchError(
                    f"{where}.{name}",
                    f"has {array.size} entries, but token_ids has {size}; give one per token",
                )
        self._check_tokens(where, vocab_size)
        self._check_scalars(where, size)
        _check_spans(self.spans, size, f"{where}.spans")

    def _check_tokens(self, where: str, vocab_size: int | None) -> None:
        lowest, highest = int(self.token_ids.min()), int(self.token_ids.max())
        if lowest < 0 or (vocab_size is not None and highest >= vocab_size):
            bad = lowest if lowest < 0 else highest
            bound = "the vocabulary" if vocab_size is None else f"[0, {vocab_size})"
            raise BatchError(
                f"{where}.token_ids",
                f"token id {bad} is outside {bound}; send ids of the model's own tokenizer",
            )
        if int(self.loss_mask.max()) > 1:
            raise BatchError(f"{where}.loss_mask", "must be 0 or 1 for every token")
        if self.loss_mask[0]:
            raise BatchError(
                f"{where}.loss_mask",
                "is 1 on the first token, which nothing predicts; set it to 0",
            )
        if not np.isfinite(self.logprobs).all():
            raise BatchError(f"{where}.logprobs", "must be finite; send 0 for unsampled tokens")
        if float(self.logprobs.max()) > 1e-3:
            raise BatchError(
                f"{where}.logprobs",
                "must be natural-log probabilities, hence not above 0",
            )
        if np.any(self.logprobs[self.loss_mask == 0] != 0):
            raise BatchError(
                f"{where}.logprobs",
                "must be 0 wherever loss_mask is 0 (prompt and tool output)",
            )
        if self.turn_scores is None:
            return
        if not np.isfinite(self.turn_scores).all():
            raise BatchError(f"{where}.turn_scores", "must be finite; give 0 for turns without one")
        if np.any(self.turn_scores[self.loss_mask == 0] != 0):
            raise BatchError(
                f"{where}.turn_scores", "must be 0 wherever loss_mask is 0: nothing learns there"
            )

    def _check_scalars(self, where: str, size: int) -> None:
        if not 0 < self.prompt_len <= size:
            raise BatchError(
                f"{where}.prompt_len", f"is {self.prompt_len}, must lie in [1, {size}]"
            )
        if self.loss_mask[: self.prompt_len].any():
            raise BatchError(
                f"{where}.prompt_len",
                "covers trained tokens; it is the length of the prefix shared by the group, "
                "which is never trained on",
            )
        for name, value in (("reward", self.reward), ("weight", self.weight)):
            if not math.isfinite(value):
                raise BatchError(f"{where}.{name}", f"is {value}, must be finite")
        if self.advantage is not None and not math.isfinite(self.advantage):
            raise BatchError(f"{where}.advantage", f"is {self.advantage}, must be finite")
        if self.weight < 0:
            raise BatchError(f"{where}.weight", f"is {self.weight}, must be >= 0")


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Samples of one learner step; groups are contiguous or not, as the caller likes.

    `metrics` are scalars passed through to the step's record (hack rate, solve rate, staleness).
    """

    samples: tuple[Sample, ...]
    kind: BatchKind = "grpo"
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    @property
    def group_ids(self) -> tuple[str, ...]:
        """Distinct group ids in order of first appearance."""
        return tuple(dict.fromkeys(sample.group_id for sample in self.samples))

    @property
    def trajectories(self) -> tuple[int, ...]:
        """For each sample the number of its trajectory, in order of first appearance."""
        numbers: dict[tuple[str, str | int], int] = {}
        return tuple(
            numbers.setdefault((sample.group_id, sample.sample_id or index), len(numbers))
            for index, sample in enumerate(self.samples)
        )

    @property
    def one_per_trajectory(self) -> tuple[Sample, ...]:
        """The first sample of each trajectory."""
        first: dict[int, Sample] = {}
        for number, sample in zip(self.trajectories, self.samples, strict=True):
            first.setdefault(number, sample)
        return tuple(first.values())

    @property
    def tokens(self) -> int:
        """All tokens, prompts included."""
        return sum(int(sample.token_ids.size) for sample in self.samples)

    @property
    def trained_tokens(self) -> int:
        """Tokens with loss mask 1."""
        return sum(sample.trained_tokens for sample in self.samples)

    def check(self, *, vocab_size: int | None = None) -> None:
        """Check the whole Batch.

        Raises:
            BatchError: naming the first offending field.
        """
        if not self.samples:
            raise BatchError("samples", "is empty; send at least one sample")
        if self.kind not in get_args(BatchKind):
            raise BatchError("kind", f"is {self.kind!r}, must be one of {get_args(BatchKind)}")
        for index, sample in enumerate(self.samples):
            sample.check(f"samples[{index}]", vocab_size=vocab_size)
        with_advantage = sum(sample.advantage is not None for sample in self.samples)
        if with_advantage not in (0, len(self.samples)):
            raise BatchError(
                "advantages",
                f"are given for {with_advantage} of {len(self.samples)} samples; give all or none",
            )
        for name, value in self.metrics.items():
            if not math.isfinite(value):
                raise BatchError(f"metrics.{name}", f"is {value}, must be finite")
        self._check_shared_prompts()
        if self.kind == "grpo":
            self._check_trajectories()

    def _check_trajectories(self) -> None:
        first: dict[int, int] = {}
        for index, number in enumerate(self.trajectories):
            leader = self.samples[first.setdefault(number, index)]
            for name in ("reward", "truncated"):
                if getattr(self.samples[index], name) != getattr(leader, name):
                    raise BatchError(
                        f"samples[{index}].{name}",
                        f"differs from samples[{first[number]}] of the same sample_id "
                        f"{leader.sample_id!r}; a trajectory has one",
                    )

    def _check_shared_prompts(self) -> None:
        first: dict[str, tuple[int, Sample]] = {}
        for index, sample in enumerate(self.samples):
            if not sample.group_id:
                continue
            leader_index, leader = first.setdefault(sample.group_id, (index, sample))
            shared = leader.token_ids[: leader.prompt_len]
            if sample.prompt_len != leader.prompt_len or not np.array_equal(
                shared, sample.token_ids[: sample.prompt_len]
            ):
                raise BatchError(
                    f"samples[{index}].prompt_len",
                    f"its prompt differs from samples[{leader_index}] of the same group "
                    f"{sample.group_id!r}; members of a group start from one prompt",
                )

    def to_bytes(self) -> bytes:
        """Validate and encode.

        Raises:
            BatchError: when the Batch breaks the format.
        """
        self.check()
        names = {group_id: index for index, group_id in enumerate(self.group_ids)}
        samples = self.samples
        spans = [span for sample in samples for span in sample.spans]
        tensors: dict[str, NDArray[Any]] = {
            "offsets": offsets_of([sample.token_ids.size for sample in samples]),
            "token_ids": np.concatenate([s.token_ids for s in samples]).astype(np.int32),
            "loss_mask": np.concatenate([s.loss_mask for s in samples]).astype(np.uint8),
            "logprobs": np.concatenate([s.logprobs for s in samples]).astype(np.float32),
            "rewards": np.array([s.reward for s in samples], np.float32),
            "groups": np.array([names[s.group_id] for s in samples], np.int32),
            "prompt_lens": np.array([s.prompt_len for s in samples], np.int32),
            "weights": np.array([s.weight for s in samples], np.float32),
            "truncated": np.array([s.truncated for s in samples], np.uint8),
            "span_offsets": offsets_of([len(sample.spans) for sample in samples]),
            "span_bounds": np.array([(s.start, s.end) for s in spans], np.int32).reshape(-1, 2),
            "span_versions": np.array([s.version for s in spans], np.int64),
        }
        if samples[0].advantage is not None:
            tensors["advantages"] = np.array([s.advantage for s in samples], np.float32)
        if any(sample.turn_scores is not None for sample in samples):
            parts = [
                np.zeros(sample.token_ids.size)
                if sample.turn_scores is None
                else sample.turn_scores
                for sample in samples
            ]
            tensors["turn_scores"] = np.concatenate(parts).astype(np.float32)
        header = Header(
            kind=self.kind,
            group_ids=list(names),
            sample_ids=[sample.sample_id for sample in samples],
            metrics=dict(self.metrics),
        )
        return write_blob(tensors, header)

    @classmethod
    def from_bytes(cls, blob: bytes, *, vocab_size: int | None = None) -> "Batch":
        """Decode and validate.

        Raises:
            BatchError: when the blob is damaged, of another version, or breaks the format.
        """
        header, arrays = read_blob(blob)
        batch = cls(
            samples=tuple(_sample(index, header, arrays) for index in range(arrays.size)),
            kind=header.kind,
            metrics=header.metrics,
        )
        batch.check(vocab_size=vocab_size)
        return batch

    @property
    def digest(self) -> str:
        """`sha256:<hex>` of the encoded bytes."""
        return digest_of(self.to_bytes())


def digest_of(blob: bytes) -> str:
    """`sha256:<hex>` of an encoded Batch, as `Batch.digest` gives it."""
    return "sha256:" + hashlib.sha256(blob).hexdigest()


def _sample(index: int, header: Header, arrays: Arrays) -> Sample:
    tensors = arrays.tensors
    start, end = (int(value) for value in tensors["offsets"][index : index + 2])
    first, last = (int(value) for value in tensors["span_offsets"][index : index + 2])
    advantages, scores = tensors.get("advantages"), tensors.get("turn_scores")
    bounds, versions = tensors["span_bounds"][first:last], tensors["span_versions"][first:last]
    return Sample(
        token_ids=tensors["token_ids"][start:end],
        loss_mask=tensors["loss_mask"][start:end],
        logprobs=tensors["logprobs"][start:end],
        group_id=header.group_ids[int(tensors["groups"][index])],
        prompt_len=int(tensors["prompt_lens"][index]),
        reward=float(tensors["rewards"][index]),
        advantage=None if advantages is None else float(advantages[index]),
        weight=float(tensors["weights"][index]),
        truncated=bool(tensors["truncated"][index]),
        spans=tuple(
            VersionSpan(int(bound[0]), int(bound[1]), int(version))
            for bound, version in zip(bounds, versions, strict=True)
        ),
        turn_scores=None if scores is None else scores[start:end],
        sample_id=header.sample_ids[index],
    )


def _as_ints(values: ArrayLike, name: str, dtype: type[np.int32] | type[np.uint8]) -> NDArray[Any]:
    array = np.asarray(values)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise BatchError(name, f"must hold integers, not {array.dtype}")
    bounds = np.iinfo(dtype)
    if array.size and (int(array.min()) < bounds.min or int(array.max()) > bounds.max):
        raise BatchError(name, f"must fit {bounds.dtype}")
    return array.astype(dtype)


def _check_spans(spans: Sequence[VersionSpan], size: int, where: str) -> None:
    end = 0
    for span in spans:
        if not (end <= span.start < span.end <= size):
            raise BatchError(
                where,
                f"[{span.start}, {span.end}) must lie in [0, {size}], in order, without overlap",
            )
        if span.version < 0:
            raise BatchError(where, f"version {span.version} must be >= 0")
        end = span.end

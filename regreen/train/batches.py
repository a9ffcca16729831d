"""Training batches from trajectories: copies of what was sampled, nothing else.

- Token ids, masks, logprobs and version spans are taken over unchanged; no text is looked at.
- A group's baseline includes its truncated members; the learner masks their loss
  (`KEEP_BASELINE` in its `algo.advantages`), so they carry `truncated` and their reward.
- Members whose ids are not exactly what was sampled are left out, never repaired.
- The same trajectories always give the same bytes, whatever order they come in.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from regreen.batch import Batch, Sample, VersionSpan
from regreen.dataset import v1 as dataset_pb
from regreen.rpc.errors import InvalidArgument

_TRUNCATED = frozenset(
    {
        dataset_pb.EPISODE_END_TURN_LIMIT,
        dataset_pb.EPISODE_END_TOKEN_LIMIT,
        dataset_pb.EPISODE_END_TIME_LIMIT,
    }
)


def is_truncated(trajectory: dataset_pb.Trajectory) -> bool:
    """Whether a limit ended the episode."""
    return trajectory.end in _TRUNCATED


def trainable(trajectory: dataset_pb.Trajectory) -> bool:
    """Whether the learner may see it: exact ids and at least one sampled token."""
    return trajectory.token_exact and any(trajectory.loss_mask)


def grpo_batch(
    groups: Sequence[dataset_pb.CompleteGroup], metrics: Mapping[str, float] | None = None
) -> Batch:
    """The batch of one policy step; advantages are left to the learner.

    Raises:
        InvalidArgument: no group has a trainable member.
    """
    samples: list[Sample] = []
    for group in sorted(groups, key=lambda g: g.group.id):
        members = sorted(filter(trainable, group.trajectories), key=lambda t: t.group_index)
        prompt_len = shared_prompt_len(members)
        samples.extend(_sampled(member, group.group.id, prompt_len) for member in members)
    if not samples:
        raise InvalidArgument("groups", "hold no trainable trajectory", "check `token_exact`")
    batch = Batch(samples=tuple(samples), kind="grpo", metrics=dict(metrics or {}))
    batch.check()
    return batch


def sft_batch(
    trajectories: Sequence[dataset_pb.Trajectory], metrics: Mapping[str, float] | None = None
) -> Batch:
    """The batch of one supervised step; the order of samples is that of the arguments."""
    samples = [
        Sample.make(
            np.array(t.token_ids, np.int32), mask_of(t), reward=t.reward.value, sample_id=t.id
        )
        for t in trajectories
    ]
    batch = Batch(samples=tuple(samples), kind="sft", metrics=dict(metrics or {}))
    batch.check()
    return batch


def mask_of(trajectory: dataset_pb.Trajectory) -> NDArray[np.uint8]:
    """The loss mask, one entry per token."""
    return np.frombuffer(trajectory.loss_mask, dtype=np.uint8)


def shared_prompt_len(members: Sequence[dataset_pb.Trajectory]) -> int:
    """Length of the prefix that all members share and none is trained on; at least 1."""
    if not members:
        return 1
    lengths = [_untrained_prefix(member) for member in members]
    lengths += [m.prompt_tokens for m in members if m.prompt_tokens > 0]
    shared = min(lengths)
    first = np.array(members[0].token_ids[:shared], np.int32)
    for member in members[1:]:
        other = np.array(member.token_ids[:shared], np.int32)
        different = np.flatnonzero(first[: other.size] != other[: first.size])
        shared = min(shared, int(different[0]) if different.size else other.size)
    return max(shared, 1)


def _untrained_prefix(trajectory: dataset_pb.Trajectory) -> int:
    trained = np.flatnonzero(mask_of(trajectory))
    return int(trained[0]) if trained.size else len(trajectory.token_ids)


def _sampled(trajectory: dataset_pb.Trajectory, group_id: str, prompt_len: int) -> Sample:
    mask = mask_of(trajectory)
    logprobs = np.array(trajectory.logprobs, np.float32)
    if logprobs.shape == mask.shape:
        # Sampled tokens that are not trained on keep their logprob in the record, not in a batch.
        logprobs = np.where(mask == 1, logprobs, np.float32(0))
    return Sample.make(
        np.array(trajectory.token_ids, np.int32),
        mask,
        logprobs=logprobs,
        group_id=group_id,
        prompt_len=prompt_len,
        reward=trajectory.reward.value,
        truncated=is_truncated(trajectory),
        spans=[VersionSpan(s.start, s.end, s.version) for s in trajectory.versions],
        sample_id=trajectory.id,
    )

"""Training batches from trajectories: copies of what was sampled, nothing else.

- Token ids, masks, logprobs and version spans are taken over unchanged; no text is looked at.
- One sample is one unbroken context: a trajectory whose context was reset gives several, which all
  carry its id and reward and weigh together as much as one.
- Scores of turns travel where the run wants them; of a flagged trajectory only those below 0: a
  turn that led to a hack is never praised.
- Rewards travel, never advantages: baseline, scale and what becomes of truncated members are the
  learner's settings, the same for every batch.
- Members whose ids are not exactly what was sampled are left out, never repaired.
- The same trajectories always give the same bytes, whatever order they come in.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from regreen.batch import Batch, Sample, VersionSpan
from regreen.dataset import v1 as dataset_pb
from regreen.rollout.record import Segment, segments
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
    groups: Sequence[dataset_pb.CompleteGroup],
    metrics: Mapping[str, float] | None = None,
    *,
    turn_scores: bool = False,
) -> Batch:
    """The batch of one policy step; `turn_scores`: with the turns' own scores.

    Raises:
        InvalidArgument: no group has a trainable member.
    """
    samples: list[Sample] = []
    for group in sorted(groups, key=lambda group: group.group.id):
        members = sorted(filter(trainable, group.trajectories), key=lambda t: t.group_index)
        samples.extend(_group_samples(group.group.id, members, turn_scores=turn_scores))
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
            np.array(segment.token_ids, np.int32),
            _mask(segment),
            reward=trajectory.reward.value,
            sample_id=trajectory.id,
        )
        for trajectory in trajectories
        for segment in _trained_segments(trajectory)
    ]
    batch = Batch(samples=tuple(samples), kind="sft", metrics=dict(metrics or {}))
    batch.check()
    return batch


def _group_samples(
    group_id: str, members: Sequence[dataset_pb.Trajectory], *, turn_scores: bool
) -> list[Sample]:
    parts = [_trained_segments(member) for member in members]
    prompt_len = shared_prompt_len([segment for found in parts for segment in found])
    return [
        Sample.make(
            np.array(segment.token_ids, np.int32),
            _mask(segment),
            logprobs=np.array(segment.logprobs, np.float32),
            group_id=group_id,
            prompt_len=prompt_len,
            reward=member.reward.value,
            weight=1.0 / len(found),
            truncated=is_truncated(member),
            spans=[VersionSpan(start, end, v) for v, start, end in segment.versions],
            turn_scores=_turn_scores(member, segment) if turn_scores else None,
            sample_id=member.id,
        )
        for member, found in zip(members, parts, strict=True)
        for segment in found
    ]


def _turn_scores(member: dataset_pb.Trajectory, segment: Segment) -> NDArray[np.float32]:
    scores = np.array(segment.turn_scores(member), np.float32)
    return np.minimum(scores, 0.0) if member.reward.hacks else scores


def shared_prompt_len(found: Sequence[Segment]) -> int:
    """Length of the prefix that all samples share and none is trained on; at least 1."""
    if not found:
        return 1
    shared = min(_untrained_prefix(segment) for segment in found)
    first = np.array(found[0].token_ids[:shared], np.int32)
    for segment in found[1:]:
        other = np.array(segment.token_ids[:shared], np.int32)
        different = np.flatnonzero(first[:shared] != other)
        if different.size:
            shared = min(shared, int(different[0]))
    return max(shared, 1)


def _trained_segments(trajectory: dataset_pb.Trajectory) -> list[Segment]:
    return [segment for segment in segments(trajectory) if any(segment.loss_mask)]


def _mask(segment: Segment) -> NDArray[np.uint8]:
    return np.frombuffer(segment.loss_mask, dtype=np.uint8)


def _untrained_prefix(segment: Segment) -> int:
    return min(int(np.flatnonzero(_mask(segment))[0]), segment.prompt_tokens)

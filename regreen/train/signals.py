"""What complete groups say: which of them teach, and the metrics of a step.

- Every group gets exactly one fate: "trained", "zero_variance", "stale" or "thin".
- Metrics are taken over *all* groups of a step, not only those that are trained on, so that
  dropping easy or hopeless groups never makes a curve look better.
- Names are a fixed set plus `tool_share/<tool>` and `hack/<class>` of classes that are bounded.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from regreen.dataset import v1 as dataset_pb
from regreen.evals.markov import tool_sequence, tool_shares
from regreen.train.batches import is_truncated, trainable

TRAINED, ZERO_VARIANCE, STALE, THIN = "trained", "zero_variance", "stale", "thin"
FAIL, MASK_LOSS, KEEP_BASELINE = "fail", "mask_loss", "keep_baseline"
TRUNCATED_POLICIES = (FAIL, MASK_LOSS, KEEP_BASELINE)
"""Values of the hyperparameter `truncated`: members that hit a limit are trained on like others,
are dropped, or are out of the loss and in the baseline (the default)."""


def fate(
    group: dataset_pb.CompleteGroup,
    *,
    version: int,
    max_staleness: int,
    truncated: str = KEEP_BASELINE,
) -> str:
    """What becomes of a group when the policy is at `version`.

    `truncated` is the learner's hyperparameter of that name: a group whose members are all out of
    the loss under it teaches nothing, one that they enter does.
    """
    members = [member for member in group.trajectories if trainable(member)]
    if len(members) < 2:
        return THIN
    whole = [member for member in members if not is_truncated(member)]
    in_loss = members if truncated == FAIL else whole
    compared = whole if truncated == MASK_LOSS else members
    if not in_loss or len({member.reward.value for member in compared}) < 2:
        return ZERO_VARIANCE
    if max(_oldest_lag(member, version) for member in members) > max_staleness:
        return STALE
    return TRAINED


def step_metrics(
    groups: Sequence[dataset_pb.CompleteGroup], fates: Mapping[str, str], *, version: int
) -> dict[str, float]:
    """Metrics of one step over all its groups; `fates` is by group id."""
    members = [member for group in groups for member in group.trajectories]
    counts = Counter(fates[group.group.id] for group in groups)
    found = {
        "groups": float(len(groups)),
        "trajectories": float(len(members)),
        "lost": float(sum(group.lost for group in groups)),
        "zero_variance_share": counts[ZERO_VARIANCE] / max(1, len(groups)),
        "stale_groups": float(counts[STALE]),
        "thin_groups": float(counts[THIN]),
    }
    if members:
        found |= _member_metrics(members, version)
    return found


def _member_metrics(members: Sequence[dataset_pb.Trajectory], version: int) -> dict[str, float]:
    sampled = [sum(member.loss_mask) for member in members]
    found = {
        "reward_mean": _mean(member.reward.value for member in members),
        "reward_std": float(np.std([member.reward.value for member in members])),
        "solve_rate": _mean(member.reward.solved for member in members),
        "hack_rate": _mean(bool(member.reward.hacks) for member in members),
        "truncated_share": _mean(is_truncated(member) for member in members),
        "gave_up_share": _mean(m.end == dataset_pb.EPISODE_END_GAVE_UP for m in members),
        "sampled_tokens": float(sum(sampled)),
        "sampled_tokens_mean": _mean(sampled),
        "tokens": float(sum(len(member.token_ids) for member in members)),
        "turns_mean": _mean(len(tool_sequence(member)) for member in members),
        "staleness_mean": _mean(_mean_lag(member, version) for member in members),
    }
    stages = {stage for member in members for stage in member.stage_seconds}
    for stage in sorted(stages):
        found[f"seconds/{stage}"] = sum(m.stage_seconds[stage] for m in members)
    for tool, share in tool_shares(map(tool_sequence, members)).items():
        found[f"tool_share/{tool}"] = share
    for hack, count in Counter(h for m in members for h in set(m.reward.hacks)).items():
        found[f"hack/{hack}"] = count / len(members)
    return found


def _oldest_lag(member: dataset_pb.Trajectory, version: int) -> int:
    return max((version - span.version for span in member.versions), default=0)


def _mean_lag(member: dataset_pb.Trajectory, version: int) -> float:
    tokens = sum(span.end - span.start for span in member.versions)
    lag = sum((version - span.version) * (span.end - span.start) for span in member.versions)
    return lag / tokens if tokens else 0.0


def _mean(values: Iterable[float]) -> float:
    found = [float(value) for value in values]
    return sum(found) / len(found) if found else 0.0

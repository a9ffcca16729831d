"""Advantages of the members of a group from their rewards.

- A row that is dropped (`MASK_LOSS` on a truncated row) touches neither baseline nor loss.
- A row that is only silenced (`KEEP_BASELINE`) counts in the baseline and has loss weight 0.
- A group whose counted rewards are all equal teaches nothing: its advantages are exactly 0.
- Rewards of different groups never mix, except in the scale `BATCH`.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor


class Baseline(StrEnum):
    """What is subtracted from a member's reward."""

    LEAVE_ONE_OUT = "leave_one_out"
    """Mean of the *other* members (RLOO, arXiv:2402.14740; used by DeepSWE)."""
    GROUP_MEAN = "group_mean"
    """Mean of all members (GRPO, arXiv:2402.03300)."""


class Scale(StrEnum):
    """What the centred reward is divided by."""

    NONE = "none"
    """Nothing: the deviation favours easy and hard tasks (Dr. GRPO, arXiv:2503.20783)."""
    GROUP = "group"
    """Sample deviation of the group (GRPO, arXiv:2402.03300)."""
    BATCH = "batch"
    """Sample deviation of all rewards of the batch."""


class Truncated(StrEnum):
    """What becomes of rollouts that hit a limit (context, turns, wall clock)."""

    FAIL = "fail"
    """Keep them with the reward they carry; the rollout scored them as failures."""
    MASK_LOSS = "mask_loss"
    """Drop them from baseline and loss (overlong filtering, DAPO, arXiv:2503.14476)."""
    KEEP_BASELINE = "keep_baseline"
    """Silence their loss, keep their reward in the baseline (compact filtering, DeepSWE)."""


@dataclass(frozen=True, slots=True)
class Advantages:
    """Result of `group_advantages`, one entry per row."""

    values: Tensor
    """f32 [n]; 0 for rows without loss."""
    in_loss: Tensor
    """bool [n]; False = the row is out of the loss and out of its denominator."""
    zero_variance: Tensor
    """bool [n]; True = the row's group has no spread of rewards, or fewer than two counted rows."""


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    truncated: Tensor,
    *,
    baseline: Baseline = Baseline.LEAVE_ONE_OUT,
    scale: Scale = Scale.NONE,
    truncated_policy: Truncated = Truncated.KEEP_BASELINE,
    epsilon: float = 1e-4,
) -> Advantages:
    """Advantages of n rows.

    `rewards` f32 [n], `groups` i64 [n] (any labels), `truncated` bool [n]. `epsilon` is added to
    deviations, as in TRL.
    """
    rewards = rewards.double()
    counted = torch.ones_like(truncated, dtype=torch.bool)
    in_loss = counted.clone()
    if truncated_policy is Truncated.MASK_LOSS:
        counted, in_loss = ~truncated, ~truncated
    elif truncated_policy is Truncated.KEEP_BASELINE:
        in_loss = ~truncated
    _, label = torch.unique(groups, return_inverse=True)
    size = int(label.max()) + 1 if label.numel() else 0
    weight = counted.double()
    count = torch.zeros(size, dtype=torch.double).index_add_(0, label, weight)
    total = torch.zeros(size, dtype=torch.double).index_add_(0, label, weight * rewards)
    mean = total / count.clamp(min=1)
    centred = rewards - mean[label]
    square = torch.zeros(size, dtype=torch.double).index_add_(0, label, weight * centred**2)
    spread = _spread(rewards, label, counted, size)
    flat = (spread[label] == 0) | (count[label] < 2)
    values = centred
    if baseline is Baseline.LEAVE_ONE_OUT:
        # r - mean of the others = (r - mean of all) * n / (n - 1); a silenced row is unaffected.
        values = centred * (count / (count - 1).clamp(min=1))[label]
    if scale is Scale.GROUP:
        deviation = (square / (count - 1).clamp(min=1)).sqrt()
        values = values / (deviation[label] + epsilon)
    elif scale is Scale.BATCH and int(counted.sum()) > 1:
        values = values / (rewards[counted].std() + epsilon)
    values = torch.where(flat | ~in_loss, torch.zeros_like(values), values)
    return Advantages(values.float(), in_loss, flat)


def _spread(rewards: Tensor, label: Tensor, counted: Tensor, size: int) -> Tensor:
    low = torch.full((size,), torch.inf, dtype=rewards.dtype)
    high = torch.full((size,), -torch.inf, dtype=rewards.dtype)
    low = low.scatter_reduce(0, label[counted], rewards[counted], "amin")
    high = high.scatter_reduce(0, label[counted], rewards[counted], "amax")
    return torch.where(high >= low, high - low, torch.zeros_like(high))

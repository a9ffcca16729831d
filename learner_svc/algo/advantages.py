"""Advantages of the members of a group from their rewards.

- A row that is dropped (`MASK_LOSS` on a truncated row) touches neither baseline nor loss.
- A row that is only silenced (`KEEP_BASELINE`) counts in the baseline and has loss weight 0.
- A group whose counted rewards are all equal teaches nothing: its advantages are exactly 0.
- Rewards of different groups never mix, except in the scales `BATCH` and `WHITEN` and the baseline
  `BATCH_MEAN`; with that one, it is a batch of equal rewards that teaches nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from learner_svc.algo.choices import Baseline, Scale, Truncated


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
    k: int = 2,
) -> Advantages:
    """Advantages of n rows.

    `rewards` f32 [n], `groups` i64 [n] (any labels), `truncated` bool [n]. `epsilon` is added to
    deviations, as in TRL. `k` is that of `PASS_AT_K`.
    """
    rewards = rewards.double()
    counted = torch.ones_like(truncated, dtype=torch.bool)
    in_loss = counted.clone()
    if truncated_policy is Truncated.MASK_LOSS:
        counted, in_loss = ~truncated, ~truncated
    elif truncated_policy is Truncated.KEEP_BASELINE:
        in_loss = ~truncated
    if baseline is Baseline.BATCH_MEAN:
        groups = torch.zeros_like(groups)
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
    elif baseline is Baseline.PASS_AT_K:
        values = _by_group(lambda own: pass_at_k(own, k), rewards, label, counted)
    elif baseline is Baseline.RANK:
        values = _by_group(centred_ranks, rewards, label, counted)
    if scale is Scale.GROUP:
        deviation = (square / (count - 1).clamp(min=1)).sqrt()
        values = values / (deviation[label] + epsilon)
    elif scale is Scale.BATCH and int(counted.sum()) > 1:
        values = values / (rewards[counted].std() + epsilon)
    elif scale is Scale.WHITEN and int(counted.sum()) > 1:
        known = values[counted]
        values = (values - known.mean()) / (known.std() + epsilon)
    values = torch.where(flat | ~in_loss, torch.zeros_like(values), values)
    return Advantages(values.float(), in_loss, flat)


def pass_at_k(rewards: Tensor, k: int) -> Tensor:
    """Advantages f64 [n] of one group for the objective E[best reward of k samples].

    k times (the mean best of k over subsets with the member, less that over subsets without it): an
    unbiased gradient with a leave-one-out baseline, for binary and other rewards (arXiv:2505.15201,
    "maxg@k"). k = 1 is `LEAVE_ONE_OUT`; above n - 1, where no subset is without a member, it is
    n - 1.
    """
    size = int(rewards.numel())
    k = min(k, size - 1)
    if k < 1:
        return torch.zeros(size, dtype=torch.double)
    ordered, order = torch.sort(rewards.double())
    values = torch.zeros(size, dtype=torch.double)
    for place in range(size):
        others = torch.cat([ordered[:place], ordered[place + 1 :]])
        with_member = _mean_best(torch.maximum(others, ordered[place]), k - 1, ordered[place])
        values[order[place]] = k * (with_member - _mean_best(others, k, ordered[place]))
    return values


def _mean_best(ordered: Tensor, k: int, nothing: Tensor) -> Tensor:
    """Mean over all subsets of size k of their maximum; `ordered` ascends. k = 0: `nothing`."""
    if k == 0:
        return nothing
    ways = [math.comb(below, k - 1) for below in range(int(ordered.numel()))]
    return (ordered * torch.tensor(ways, dtype=torch.double)).sum() / sum(ways)


def centred_ranks(rewards: Tensor) -> Tensor:
    """Ranks f64 [n] of one group, evenly over [-1, 1]; equal rewards share the mean of theirs."""
    size = int(rewards.numel())
    above = (rewards[:, None] > rewards[None, :]).double().sum(1)
    below = (rewards[:, None] < rewards[None, :]).double().sum(1)
    return (above - below) / max(size - 1, 1)


def add_turn_scores(advantages: Tensor, scores: Tensor, coefficient: float = 1.0) -> Tensor:
    """Advantages f32 [T] of tokens: those of their trajectories, and their turns' own scores.

    The scores are added after the group was compared and scaled: a good turn of a bad trajectory is
    credited as such, and no score of a turn moves another member's baseline ("step scores outside
    group normalisation", arXiv:2605.07276).
    """
    return advantages + coefficient * scores


def _by_group(
    change: Callable[[Tensor], Tensor], rewards: Tensor, label: Tensor, counted: Tensor
) -> Tensor:
    """f64 [n]: `change` of the counted rewards of each group; 0 for the others."""
    values = torch.zeros_like(rewards)
    for group in torch.unique(label[counted]).tolist():
        own = counted & (label == group)
        values[own] = change(rewards[own])
    return values


def _spread(rewards: Tensor, label: Tensor, counted: Tensor, size: int) -> Tensor:
    low = torch.full((size,), torch.inf, dtype=rewards.dtype)
    high = torch.full((size,), -torch.inf, dtype=rewards.dtype)
    low = low.scatter_reduce(0, label[counted], rewards[counted], "amin")
    high = high.scatter_reduce(0, label[counted], rewards[counted], "amax")
    return torch.where(high >= low, high - low, torch.zeros_like(high))

"""Ratios of policies: per token or per sequence, as weights and as reasons to leave tokens out.

- `sample` i64 [T] names the sequence of each token; a sequence's tokens are all present.
- Weights and masks are constants: no gradient flows through them.
- What is rejected is told as a mask, so that the caller can take it out of the denominator too.
"""

import torch
from torch import Tensor

from learner_svc.algo.choices import Correction


def sequence_sum(values: Tensor, sample: Tensor) -> Tensor:
    """[T]: for each token the sum of `values` [T] over its sequence; keeps the gradient."""
    label, size = _labels(sample)
    return values.new_zeros(size).index_add(0, label, values)[label]


def sequence_mean(values: Tensor, sample: Tensor) -> Tensor:
    """[T]: for each token the mean of `values` [T] over its sequence; keeps the gradient."""
    return sequence_sum(values, sample) / sequence_sum(torch.ones_like(values), sample)


def importance_weight(
    proximal: Tensor,
    sampled: Tensor,
    sample: Tensor,
    *,
    correction: Correction = Correction.TOKEN_TRUNCATE,
    cap: float,
    floor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Weight pi_trainer / pi_engine of T tokens, clamped to [floor, cap]; and what exceeds the cap.

    Tokens that `rejected` names get a weight too: it is their share of the denominator that is 0.
    """
    weight = _weight(proximal, sampled, sample, correction)
    return torch.clamp(weight, min=floor, max=cap), weight > cap


def rejected(
    proximal: Tensor,
    sampled: Tensor,
    sample: Tensor,
    *,
    correction: Correction,
    cap: float,
    floor: float | None = None,
) -> Tensor:
    """bool [T]: tokens whose weight is out of [floor, cap], where the correction rejects any."""
    if not correction.rejects:
        return torch.zeros_like(sample, dtype=torch.bool)
    weight = _weight(proximal, sampled, sample, correction)
    return (weight > cap) | (weight < (floor or 0.0))


def off_policy(
    current: Tensor, sampled: Tensor, advantages: Tensor, sample: Tensor, *, threshold: float
) -> Tensor:
    """bool [T]: tokens of bad sequences that the policy has moved away from.

    Bad: negative advantage; moved away: mean of sampled - current above the threshold
    (DeepSeek-V3.2, arXiv:2512.02556, equation 9). As there, they keep their share of the
    denominator.
    """
    return (advantages < 0) & (sequence_mean(sampled - current.detach(), sample) > threshold)


def high_entropy(entropies: Tensor, share: float) -> Tensor:
    """bool [T]: the `share` of tokens with the highest entropy, at least (arXiv:2506.01939).

    The threshold is a quantile over all T tokens; as in TRL, tokens at it are in.
    """
    if not entropies.numel():
        return torch.zeros_like(entropies, dtype=torch.bool)
    return entropies >= torch.quantile(entropies, 1 - share)


def _weight(proximal: Tensor, sampled: Tensor, sample: Tensor, correction: Correction) -> Tensor:
    difference = proximal - sampled
    if correction.by_sequence:
        difference = sequence_sum(difference, sample)
    return torch.exp(difference).detach()


def _labels(sample: Tensor) -> tuple[Tensor, int]:
    names, label = torch.unique(sample, return_inverse=True)
    return label, int(names.numel())

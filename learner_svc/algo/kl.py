"""Estimates of KL(policy || reference) from sampled tokens (http://joschu.net/blog/kl-approx.html).

- All three are per token and exact zeros where the policies agree.
- As a loss, differentiated on samples of the policy: k1 has an expected gradient of zero, k2 the
  gradient of the KL, k3 that of the reverse KL to first order. Multiplied by the ratio to the
  policy that sampled (`correction`), k1 and k3 have the gradient of the KL (DeepSeek-V3.2,
  arXiv:2512.02556; TRL's `use_bias_correction_kl`).
"""

import torch
from torch import Tensor

from learner_svc.algo.choices import KlEstimator


def k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Unbiased estimate of KL(policy || reference) per token, of either sign."""
    return logprobs - reference


def k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Biased estimate of KL(policy || reference) per token, never negative."""
    return (logprobs - reference) ** 2 / 2


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(policy || reference) per token."""
    difference = reference - logprobs
    return torch.exp(difference) - difference - 1


def kl_estimate(kind: KlEstimator, logprobs: Tensor, reference: Tensor) -> Tensor:
    """The estimate of that kind, f32 [T]."""
    return {KlEstimator.K1: k1, KlEstimator.K2: k2, KlEstimator.K3: k3}[kind](logprobs, reference)


def kl_penalties(
    kind: KlEstimator, logprobs: Tensor, reference: Tensor, sample: Tensor, samples: int
) -> Tensor:
    """f64 [samples]: the estimate summed over each sequence, to be taken off its reward."""
    kl = kl_estimate(kind, logprobs, reference).detach().double()
    return torch.zeros(samples, dtype=torch.double).index_add_(0, sample, kl)

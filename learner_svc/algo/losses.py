"""Losses over the trained tokens of a batch, flat: one entry per token the policy sampled.

What differs from GRPO as published (arXiv:2402.03300), and from the paper (arXiv:2510.22075, which
names GRPO and leaves every setting below open):

1. Normalisation is over the global batch, whatever the micro-batches: every token carries its share
   of the denominator (`token_scales`), so that micro-batch losses simply add up.
2. Default `dapo` (arXiv:2503.14476): every token weighs the same; long answers are not diluted.
   `dr_grpo` (arXiv:2503.20783) divides by a constant; `bnpo` (arXiv:2506.02864, as in TRL) by the
   tokens of each micro-batch; `grpo` averages within a sequence first.
3. Clip-higher (arXiv:2503.14476): the ratio is bounded by [1 - 0.2, 1 + 0.28].
4. Optional second bound `delta` on the ratio of bad tokens (INTELLECT-2, arXiv:2505.07291).
5. Truncated importance weight per token, cap 2: the engine that sampled is not bit-equal to the one
   that trains, and it may be some versions behind. It is a constant weight, never a mask: a masked
   token would have to leave the denominator too.
6. No KL by default; k3 (http://joschu.net/blog/kl-approx.html) when asked for.
7. Dropped rows (truncated, zero weight, flat groups) are out of the denominator.
8. No reward scaling by the deviation by default: see `advantages`.

- Pure functions of tensors; nothing here knows models, files or time.
- A metric is a sum over tokens, so that sums of micro-batches add up; divide by the token count.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor


class LossKind(StrEnum):
    """How token losses become one number."""

    DAPO = "dapo"
    GRPO = "grpo"
    DR_GRPO = "dr_grpo"
    BNPO = "bnpo"


@dataclass(frozen=True, slots=True)
class LossSpec:
    """Hyperparameters of the policy loss."""

    kind: LossKind = LossKind.DAPO
    clip_low: float = 0.2
    clip_high: float = 0.28
    delta: float | None = None
    """Upper bound of the ratio on tokens of negative advantage; must exceed 1 + clip_high."""
    importance_cap: float | None = 2.0
    """Upper bound of the truncated importance weight; None turns the weight off."""
    kl_coefficient: float = 0.0
    max_completion_tokens: int = 0
    """The constant of `dr_grpo`; 0 takes the longest sample of the batch."""


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """What the loss needs to know of T trained tokens; all f32 [T]."""

    sampled: Tensor
    """Logprobs of the behaviour policy, recorded while sampling."""
    advantages: Tensor
    scale: Tensor
    """Share of the denominator: `token_scales`."""
    proximal: Tensor | None = None
    """Logprobs at the start of this step's updates; None = those of the forward pass itself."""
    reference: Tensor | None = None
    """Logprobs of the reference policy, for the KL term."""

    def take(self, index: Tensor) -> "TokenTerms":
        """The terms of the tokens in `index` i64 [K]."""
        return TokenTerms(
            self.sampled[index],
            self.advantages[index],
            self.scale[index],
            None if self.proximal is None else self.proximal[index],
            None if self.reference is None else self.reference[index],
        )

    def to(self, device: torch.device) -> "TokenTerms":
        """The terms on a device."""
        proximal, reference = self.proximal, self.reference
        return TokenTerms(
            self.sampled.to(device),
            self.advantages.to(device),
            self.scale.to(device),
            None if proximal is None else proximal.to(device),
            None if reference is None else reference.to(device),
        )


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Loss to differentiate, and metrics as sums over tokens."""

    loss: Tensor
    sums: Mapping[str, Tensor]


def token_scales(
    kind: LossKind,
    sample: Tensor,
    weights: Tensor,
    *,
    max_completion_tokens: int = 0,
    micro_batch: Tensor | None = None,
) -> Tensor:
    """Share of the denominator of each of T tokens; multiply token losses by it and add up.

    `sample` i64 [T] is the row of each token, `weights` f32 [n] the weight of each row (0 = dropped
    from numerator and denominator), `micro_batch` i64 [T] the micro-batch of each token (`bnpo`).
    """
    weights = weights.double()
    lengths = torch.bincount(sample, minlength=weights.numel()).double()
    kept = (weights * (lengths > 0)).sum().clamp(min=1e-12)
    own = weights[sample]
    if kind is LossKind.DAPO:
        scale = own / (weights * lengths).sum().clamp(min=1e-12)
    elif kind is LossKind.GRPO:
        scale = own / lengths[sample] / kept
    elif kind is LossKind.DR_GRPO:
        constant = float(max_completion_tokens or lengths.max())
        scale = own / (kept * max(constant, 1.0))
    else:
        label = torch.zeros_like(sample) if micro_batch is None else micro_batch
        totals = torch.zeros(int(label.max()) + 1 if label.numel() else 0, dtype=torch.double)
        totals.index_add_(0, label, own)
        live = int((totals > 0).sum())
        scale = own / totals.clamp(min=1e-12)[label] / max(live, 1)
    return scale.float()


def policy_loss(logprobs: Tensor, terms: TokenTerms, spec: LossSpec) -> LossOutput:
    """Clipped policy-gradient loss of T tokens; `logprobs` f32 [T] carries the gradient."""
    fixed = logprobs.detach()
    proximal = fixed if terms.proximal is None else terms.proximal
    ratio = torch.exp(logprobs - proximal)
    bounded = torch.clamp(ratio, 1 - spec.clip_low, 1 + spec.clip_high)
    free = ratio if spec.delta is None else torch.clamp(ratio, max=spec.delta)
    token_loss = -torch.minimum(free * terms.advantages, bounded * terms.advantages)
    weight, capped = _importance(proximal, terms.sampled, spec.importance_cap)
    token_loss = token_loss * weight
    sums = _ratio_sums(ratio.detach(), terms, spec) | {"importance_capped_fraction": capped}
    sums |= _mismatch_sums(fixed, terms.sampled) | {"importance_weight": weight.sum()}
    if terms.reference is not None:
        kl = k3(logprobs, terms.reference)
        token_loss = token_loss + spec.kl_coefficient * kl
        sums["kl"] = kl.detach().sum()
    return LossOutput((token_loss * terms.scale).sum(), sums)


def sft_loss(logprobs: Tensor, scale: Tensor) -> LossOutput:
    """Negative log likelihood of T trained tokens; `scale` as of `token_scales(DAPO)`."""
    return LossOutput(-(logprobs * scale).sum(), {"nll": -logprobs.detach().sum()})


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(policy || reference) per token."""
    difference = reference - logprobs
    return torch.exp(difference) - difference - 1


def _importance(proximal: Tensor, sampled: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """Truncated importance weight f32 [T] and the number of capped tokens."""
    if cap is None:
        return torch.ones_like(proximal), torch.zeros((), device=proximal.device)
    weight = torch.exp(proximal - sampled)
    return torch.clamp(weight, max=cap), (weight > cap).float().sum()


def _ratio_sums(ratio: Tensor, terms: TokenTerms, spec: LossSpec) -> dict[str, Tensor]:
    low = (ratio < 1 - spec.clip_low) & (terms.advantages < 0)
    high = (ratio > 1 + spec.clip_high) & (terms.advantages > 0)
    sums = {
        "clip_low_fraction": low.float().sum(),
        "clip_high_fraction": high.float().sum(),
        "clip_fraction": (low | high).float().sum(),
        "ratio": ratio.sum(),
    }
    if spec.delta is not None:
        sums["delta_fraction"] = ((ratio > spec.delta) & (terms.advantages < 0)).float().sum()
    return sums


def _mismatch_sums(current: Tensor, sampled: Tensor) -> dict[str, Tensor]:
    """Distance between the policy that trains and the one that sampled."""
    return {
        "mismatch_k1": (sampled - current).sum(),
        "mismatch_k3": k3(sampled, current).sum(),
        "entropy": -sampled.sum(),
    }

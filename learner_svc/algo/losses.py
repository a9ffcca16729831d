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
   that trains, and it may be some versions behind. By sequence, or as a mask, when asked for
   (`ratios`); a masked token leaves the denominator too (`token_scales`).
6. No KL by default; k3 (http://joschu.net/blog/kl-approx.html) when asked for (`kl`).
7. Dropped rows (truncated, zero weight, flat groups) are out of the denominator.
8. No reward scaling by the deviation by default: see `advantages`.
9. Other ratios and other bounds, each with its paper: `choices.LossKind`.

- Pure functions of tensors; nothing here knows models, files or time.
- A metric is a sum over tokens, so that sums of micro-batches add up; divide by the token count.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from learner_svc.algo.choices import KlPlace, LossKind, LossSpec
from learner_svc.algo.kl import k3, kl_estimate
from learner_svc.algo.ratios import (
    importance_weight,
    off_policy,
    sequence_mean,
    sequence_sum,
)

_PER_TOKEN = (LossKind.DAPO, LossKind.CISPO, LossKind.REINFORCE_PP)
_PER_SEQUENCE = (
    LossKind.GRPO,
    LossKind.GSPO,
    LossKind.GSPO_TOKEN,
    LossKind.SAPO,
    LossKind.RLOO,
)


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """What the loss needs to know of T trained tokens; f32 [T] where nothing else is said."""

    sampled: Tensor
    """Logprobs of the behaviour policy, recorded while sampling."""
    advantages: Tensor
    scale: Tensor
    """Share of the denominator: `token_scales`."""
    proximal: Tensor | None = None
    """Logprobs at the start of this step's updates; None = those of the forward pass itself."""
    reference: Tensor | None = None
    """Logprobs of the reference policy, for the KL term."""
    sample: Tensor | None = None
    """i64 [T]: sequence of each token; None = one sequence."""
    selected: Tensor | None = None
    """bool [T]: tokens with a policy loss (`high_entropy`); the others keep their share of the
    denominator (arXiv:2506.01939). None = all."""

    def take(self, index: Tensor) -> "TokenTerms":
        """The terms of the tokens in `index` i64 [K]."""
        return self._each(lambda tensor: tensor[index])

    def to(self, device: torch.device) -> "TokenTerms":
        """The terms on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "TokenTerms":
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        for name, value in values.items():
            values[name] = None if value is None else change(value)
        return TokenTerms(**values)


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
    kept: Tensor | None = None,
) -> Tensor:
    """Share of the denominator of each of T tokens; multiply token losses by it and add up.

    `sample` i64 [T] is the row of each token, `weights` f32 [n] the weight of each row (0 = dropped
    from numerator and denominator), `micro_batch` i64 [T] the micro-batch of each token (`bnpo`),
    `kept` bool [T] False for tokens that are rejected: their share is 0 and the others' grow.
    """
    weights = weights.double()
    own = weights[sample]
    counted = sample
    if kept is not None:
        own, counted = own * kept, sample[kept]
    lengths = torch.bincount(counted, minlength=weights.numel()).double()
    rows = (weights * (lengths > 0)).sum().clamp(min=1e-12)
    if kind in _PER_TOKEN:
        scale = own / (weights * lengths).sum().clamp(min=1e-12)
    elif kind in _PER_SEQUENCE:
        scale = own / lengths[sample].clamp(min=1) / rows
    elif kind is LossKind.DR_GRPO:
        longest = torch.bincount(sample, minlength=1).max()
        scale = own / (rows * max(float(max_completion_tokens or longest), 1.0))
    else:
        label = torch.zeros_like(sample) if micro_batch is None else micro_batch
        totals = torch.zeros(int(label.max()) + 1 if label.numel() else 0, dtype=torch.double)
        totals.index_add_(0, label, own)
        live = int((totals > 0).sum())
        scale = own / totals.clamp(min=1e-12)[label] / max(live, 1)
    return scale.float()


def policy_loss(logprobs: Tensor, terms: TokenTerms, spec: LossSpec) -> LossOutput:
    """Policy-gradient loss of T tokens; `logprobs` f32 [T] carries the gradient."""
    fixed = logprobs.detach()
    proximal = fixed if terms.proximal is None else terms.proximal
    sample = terms.sample
    if sample is None:
        sample = torch.zeros(logprobs.shape, dtype=torch.long, device=logprobs.device)
    ratio = _ratio(logprobs, proximal, sample, spec.kind)
    token_loss = _objective(logprobs, ratio, terms.advantages, spec)
    sums = _ratio_sums(ratio.detach(), terms, spec)
    if spec.importance_cap is not None:
        weight, capped = importance_weight(
            proximal,
            terms.sampled,
            sample,
            correction=spec.correction,
            cap=spec.importance_cap,
            floor=spec.importance_floor,
        )
    else:
        weight, capped = torch.ones_like(proximal), torch.zeros_like(sample, dtype=torch.bool)
    token_loss = token_loss * weight
    sums |= {"importance_capped_fraction": capped.float().sum()}
    sums |= _mismatch_sums(fixed, terms.sampled) | {"importance_weight": weight.sum()}
    if spec.off_policy_threshold is not None:
        far = off_policy(
            fixed, terms.sampled, terms.advantages, sample, threshold=spec.off_policy_threshold
        )
        token_loss = token_loss.masked_fill(far, 0.0)
        sums["off_policy_fraction"] = far.float().sum()
    if terms.selected is not None:
        token_loss = token_loss.masked_fill(~terms.selected, 0.0)
        sums["selected_fraction"] = terms.selected.float().sum()
    if terms.reference is not None:
        kl = kl_estimate(spec.kl_estimator, logprobs, terms.reference)
        sums["kl"] = kl.detach().sum()
        if spec.kl_place is KlPlace.LOSS:
            kl = kl * ratio if spec.kl_correction else kl
            token_loss = token_loss + spec.kl_coefficient * kl
    return LossOutput((token_loss * terms.scale).sum(), sums)


def _ratio(logprobs: Tensor, proximal: Tensor, sample: Tensor, kind: LossKind) -> Tensor:
    """f32 [T]: policy / proximal policy, of the token or of its sequence."""
    log_ratio = logprobs - proximal
    if kind is LossKind.GSPO:
        log_ratio = sequence_mean(log_ratio, sample)
    elif kind is LossKind.GSPO_TOKEN:
        # The value is the sequence's, the gradient the token's own.
        log_ratio = sequence_mean(log_ratio.detach(), sample) + (logprobs - logprobs.detach())
    elif kind is LossKind.RLOO:
        log_ratio = sequence_sum(log_ratio, sample)
    return torch.exp(log_ratio)


def _objective(logprobs: Tensor, ratio: Tensor, advantages: Tensor, spec: LossSpec) -> Tensor:
    """f32 [T]: what is minimised, before weights and masks."""
    if spec.kind is LossKind.CISPO:
        return -torch.clamp(ratio, max=1 + spec.clip_high).detach() * advantages * logprobs
    if spec.kind is LossKind.SAPO:
        steepness = torch.where(
            advantages > 0, spec.sapo_temperature_good, spec.sapo_temperature_bad
        )
        return -torch.sigmoid(steepness * (ratio - 1)) * 4 / steepness * advantages
    bounded = torch.clamp(ratio, 1 - spec.clip_low, 1 + spec.clip_high)
    free = ratio if spec.delta is None else torch.clamp(ratio, max=spec.delta)
    return -torch.minimum(free * advantages, bounded * advantages)


def sft_loss(logprobs: Tensor, scale: Tensor) -> LossOutput:
    """Negative log likelihood of T trained tokens; `scale` as of `token_scales(DAPO)`."""
    return LossOutput(-(logprobs * scale).sum(), {"nll": -logprobs.detach().sum()})


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

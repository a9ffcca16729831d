"""Losses against a float64 reference written out by hand, values and gradients."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from learner_svc.algo.choices import Correction, KlEstimator, KlPlace, LossKind, LossSpec
from learner_svc.algo.losses import TokenTerms, policy_loss, token_scales
from tests.unit.learner.loss_terms import LENGTHS, TOKENS, our_loss, tokens

KINDS = list(LossKind)
PER_TOKEN = (LossKind.DAPO, LossKind.CISPO, LossKind.REINFORCE_PP, LossKind.BNPO)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"importance_cap": None},
    {"delta": 1.2, "clip_low": 0.1, "clip_high": 0.1},
    {"kl_coefficient": 0.3, "max_completion_tokens": 20},
    {"kl_coefficient": 0.3, "kl_estimator": KlEstimator.K1, "kl_correction": True},
    {"kl_coefficient": 0.3, "kl_estimator": KlEstimator.K2},
    {"kl_coefficient": 0.3, "kl_correction": True},
    {"kl_coefficient": 0.3, "kl_place": KlPlace.REWARD},
    {"importance_floor": 0.7, "importance_cap": 1.3},
    {"correction": Correction.SEQUENCE_TRUNCATE, "importance_floor": 0.5},
    {"correction": Correction.TOKEN_MASK, "importance_floor": 0.6},
    {"correction": Correction.SEQUENCE_MASK, "importance_cap": 3.0},
    {"off_policy_threshold": 0.05},
    {"sapo_temperature_good": 2.0, "sapo_temperature_bad": 0.7},
]


def reference_rows(
    data: dict[str, Tensor], spec: LossSpec, moved: Sequence[float]
) -> list[list[float]]:
    """Losses of the tokens of each sample, in plain Python floats.

    `moved` stands wherever a gradient flows, `data["current"]` where none does.
    """
    now, owners = data["current"].tolist(), data["sample"].tolist()
    proximal = data["proximal"].tolist() if "proximal" in data else now
    sampled, anchor = data["sampled"].tolist(), data["reference"].tolist()
    rows: list[list[float]] = [[] for _ in LENGTHS]
    for owner, advantage in enumerate(data["advantages"].tolist()):
        own = [t for t, other in enumerate(owners) if other == owner]
        logs = [moved[t] - proximal[t] for t in own]
        still = sum(now[t] - proximal[t] for t in own) / max(len(own), 1)
        gap = sum(sampled[t] - now[t] for t in own) / max(len(own), 1)
        drift = sum(proximal[t] - sampled[t] for t in own)
        for t in own:
            ratio = math.exp(
                {
                    LossKind.GSPO: sum(logs) / len(own),
                    LossKind.GSPO_TOKEN: still + moved[t] - now[t],
                    LossKind.RLOO: sum(logs),
                }.get(spec.kind, moved[t] - proximal[t])
            )
            bounded = min(max(ratio, 1 - spec.clip_low), 1 + spec.clip_high)
            free = ratio if spec.delta is None else min(ratio, spec.delta)
            value = -min(free * advantage, bounded * advantage)
            if spec.kind is LossKind.CISPO:
                fixed = min(math.exp(now[t] - proximal[t]), 1 + spec.clip_high)
                value = -fixed * advantage * moved[t]
            if spec.kind is LossKind.SAPO:
                steep = spec.sapo_temperature_good if advantage > 0 else spec.sapo_temperature_bad
                value = -advantage * 4 / steep / (1 + math.exp(-steep * (ratio - 1)))
            if spec.importance_cap is not None:
                floor = spec.importance_floor or 0.0
                weight = math.exp(
                    drift if spec.correction.by_sequence else proximal[t] - sampled[t]
                )
                if spec.correction.rejects and not floor <= weight <= spec.importance_cap:
                    continue
                value *= min(max(weight, floor), spec.importance_cap)
            threshold = spec.off_policy_threshold
            if threshold is not None and advantage < 0 and gap > threshold:
                value = 0.0
            log = moved[t] - anchor[t]
            kl = {"k1": log, "k2": log * log / 2, "k3": math.exp(-log) + log - 1}[spec.kl_estimator]
            if spec.kl_place is KlPlace.LOSS:
                value += spec.kl_coefficient * kl * (ratio if spec.kl_correction else 1)
            rows[owner].append(value)
    return rows


def reference_loss(
    data: dict[str, Tensor],
    spec: LossSpec,
    weights: list[float],
    moved: Sequence[float] | None = None,
) -> float:
    """The objective: the rows above, over the denominator of the kind."""
    rows = reference_rows(data, spec, data["current"].tolist() if moved is None else moved)
    pairs = [(w, row) for w, row in zip(weights, rows, strict=True) if w > 0 and row]
    if spec.kind in PER_TOKEN:
        return sum(w * sum(row) for w, row in pairs) / sum(w * len(row) for w, row in pairs)
    total = sum(w for w, _ in pairs)
    if spec.kind is LossKind.DR_GRPO:
        constant = spec.max_completion_tokens or max(LENGTHS)
        return sum(w * sum(row) for w, row in pairs) / (total * constant)
    return sum(w * sum(row) / len(row) for w, row in pairs) / total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("updates", "weights"), [(1, [1.0] * 4), (2, [1.0, 2.0, 0.0, 0.5])])
def test_loss_and_gradient_are_those_written_out(
    kind: LossKind, options: dict[str, Any], weights: list[float], updates: int
) -> None:
    spec, data = LossSpec(kind=kind, **options), tokens()
    if updates == 1:
        del data["proximal"]
    current = data["current"].clone().requires_grad_()
    loss = our_loss(data | {"current": current}, spec, weights)
    found = float(loss.detach())
    assert found == pytest.approx(reference_loss(data, spec, weights), rel=1e-6, abs=1e-7)
    loss.backward()
    step, base = 1e-6, data["current"].tolist()
    assert current.grad is not None
    for t in range(TOKENS):
        up, down = [[*base[:t], base[t] + s, *base[t + 1 :]] for s in (step, -step)]
        slope = reference_loss(data, spec, weights, up) - reference_loss(data, spec, weights, down)
        assert float(current.grad[t]) == pytest.approx(slope / (2 * step), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_downhill_makes_good_tokens_likelier(kind: LossKind) -> None:
    """The sign, on the policy that sampled: good tokens up, bad tokens down, all of them."""
    data = tokens()
    current = data["sampled"].clone().requires_grad_()
    our_loss(
        data | {"current": current, "proximal": data["sampled"]}, LossSpec(kind=kind), [1.0] * 4
    ).backward()
    assert current.grad is not None
    assert torch.equal(-current.grad.sign(), data["advantages"][data["sample"]].sign())


@pytest.mark.parametrize("kind", KINDS)
def test_rejected_samples_leave_the_denominator(kind: LossKind) -> None:
    data = tokens()
    spec = LossSpec(kind=kind, max_completion_tokens=7)
    keep = data["sample"] != 2
    smaller = {name: value[keep] for name, value in data.items() if name != "advantages"}
    smaller |= {"advantages": data["advantages"]}
    dropped = our_loss(data, spec, [1, 1, 0, 1])
    assert float(dropped) == pytest.approx(float(our_loss(smaller, spec, [1, 1, 1, 1])), rel=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not LossKind.RLOO])
@pytest.mark.parametrize("correction", [Correction.TOKEN_MASK, Correction.SEQUENCE_MASK])
def test_rejected_tokens_change_nothing(kind: LossKind, correction: Correction) -> None:
    """A token that no sane ratio has: with it rejected, its values are of no account."""
    data = tokens()
    # Two of its tokens are moved against each other, so that ratios of the sequence stay.
    for name in ("sampled", "current", "proximal"):
        data[name] = data[name].clone()
    data["sampled"][5] = -40.0
    spec = LossSpec(kind=kind, correction=correction, importance_cap=50.0)
    losses = []
    for moved in (-1.0, -1.5):
        data["sampled"][6] = moved
        data["current"][5], data["current"][6] = moved, -2 - moved
        losses.append(float(our_loss(data, spec, [1.0] * 4)))
    if correction is Correction.SEQUENCE_MASK:
        assert losses[0] == losses[1]
    assert all(math.isfinite(loss) for loss in losses)
    kept = data["sample"] != 1
    small = {name: value if name == "advantages" else value[kept] for name, value in data.items()}
    whole = our_loss(small, spec, [1.0, 0.0, 1.0, 1.0])
    if correction is Correction.SEQUENCE_MASK:
        assert losses[0] == pytest.approx(float(whole), rel=1e-6)


def test_selected_tokens_alone_have_a_loss_and_all_share_the_denominator() -> None:
    data, spec = tokens(), LossSpec()
    selected = torch.arange(TOKENS) % 3 == 0
    rows = [value for row in reference_rows(data, spec, data["current"].tolist()) for value in row]
    expected = sum(v for v, s in zip(rows, selected.tolist(), strict=True) if s) / TOKENS
    scale = token_scales(spec.kind, data["sample"], torch.ones(4)).double()
    terms = TokenTerms(
        data["sampled"],
        data["advantages"][data["sample"]],
        scale,
        data["proximal"],
        sample=data["sample"],
        selected=selected,
    )
    output = policy_loss(data["current"], terms, spec)
    assert float(output.loss) == pytest.approx(expected, rel=1e-6)
    assert float(output.sums["selected_fraction"]) == float(selected.sum())


@pytest.mark.parametrize("kind", [LossKind.DAPO, LossKind.GSPO_TOKEN])
def test_every_token_is_moved_by_its_own_advantage(kind: LossKind) -> None:
    data = tokens()
    current = data["sampled"].clone().requires_grad_()
    advantages = torch.linspace(-1, 1.5, TOKENS, dtype=torch.double)
    scale = token_scales(LossKind.DAPO, data["sample"], torch.ones(4)).double()
    terms = TokenTerms(data["sampled"], advantages, scale, data["sampled"], sample=data["sample"])
    policy_loss(current, terms, LossSpec(kind=kind)).loss.backward()
    assert current.grad is not None
    torch.testing.assert_close(current.grad, -advantages * scale)


def test_the_default_loss_is_bit_equal_to_what_it_was() -> None:
    """The operations of the first release in their order, in f32."""
    data = {k: v.float() if v.is_floating_point() else v for k, v in tokens(5).items()}
    sample, spec = data["sample"], LossSpec()
    weights = torch.tensor([1.0, 0.5, 1.0, 2.0])
    lengths = torch.bincount(sample, minlength=4).double()
    wide = weights.double()
    scale = (wide[sample] / (wide * lengths).sum().clamp(min=1e-12)).float()
    advantages = data["advantages"][sample]
    for proximal in (None, data["proximal"]):
        current = data["current"].clone().requires_grad_()
        start = current.detach() if proximal is None else proximal
        ratio = torch.exp(current - start)
        bounded = torch.clamp(ratio, 1 - 0.2, 1 + 0.28)
        weight = torch.clamp(torch.exp(start - data["sampled"]), max=2.0)
        loss = -torch.minimum(ratio * advantages, bounded * advantages) * weight
        expected = (loss * scale).sum()
        expected.backward()
        ours = data["current"].clone().requires_grad_()
        terms = TokenTerms(
            data["sampled"],
            advantages,
            token_scales(spec.kind, sample, weights),
            proximal,
            sample=sample,
        )
        found = policy_loss(ours, terms, spec).loss
        found.backward()
        assert torch.equal(found, expected)
        assert current.grad is not None
        assert ours.grad is not None
        assert torch.equal(ours.grad, current.grad)

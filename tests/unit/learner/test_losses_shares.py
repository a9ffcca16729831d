"""Shares of the denominator, metrics, and what the terms of a loss are."""

from dataclasses import asdict, replace

import pytest
import torch

from learner_svc.algo.choices import LossKind, LossSpec
from learner_svc.algo.losses import TokenTerms, policy_loss, sft_loss, token_scales
from tests.unit.learner.loss_terms import LENGTHS, TOKENS, tokens

KINDS = list(LossKind)


def test_metrics_are_sums_over_tokens() -> None:
    data = tokens()
    spec = LossSpec(importance_cap=1.2, delta=1.4, off_policy_threshold=0.05)
    terms = TokenTerms(
        data["sampled"],
        data["advantages"][data["sample"]],
        torch.ones(TOKENS, dtype=torch.double),
        data["proximal"],
        data["reference"],
        data["sample"],
        data["current"] < -1,
    )
    whole = policy_loss(data["current"].clone().requires_grad_(), terms, spec)
    assert not any(value.requires_grad for value in whole.sums.values())
    parts = [
        policy_loss(data["current"][half], terms.take(half), spec)
        for half in (torch.arange(7), torch.arange(7, TOKENS))
    ]
    for name, value in whole.sums.items():
        assert float(value) == pytest.approx(sum(float(part.sums[name]) for part in parts))
    sums = {name: float(value) for name, value in whole.sums.items()}
    ratio = torch.exp(data["current"] - data["proximal"])
    advantages, drift = terms.advantages, data["proximal"] - data["sampled"]
    low, high = (ratio < 0.8) & (advantages < 0), (ratio > 1.28) & (advantages > 0)
    assert sums["clip_low_fraction"] == float(low.sum()) > 0
    assert sums["clip_high_fraction"] == float(high.sum()) > 0
    assert sums["clip_fraction"] == float((low | high).sum())
    assert sums["delta_fraction"] == float(((ratio > 1.4) & (advantages < 0)).sum()) > 0
    assert sums["importance_capped_fraction"] == float((torch.exp(drift) > 1.2).sum()) > 0
    gap = data["sampled"] - data["current"]
    means = torch.stack([part.mean() for part in gap.split(LENGTHS)])[data["sample"]]
    far = (means > 0.05) & (advantages < 0)
    assert sums["off_policy_fraction"] == float(far.sum()) > 0
    expected = {
        "importance_weight": torch.exp(drift).clamp(max=1.2).sum(),
        "ratio": ratio.sum(),
        "mismatch_k1": gap.sum(),
        "mismatch_k3": (torch.exp(-gap) + gap - 1).sum(),
        "entropy": -data["sampled"].sum(),
        "kl": (
            torch.exp(data["reference"] - data["current"]) + data["current"] - data["reference"] - 1
        ).sum(),
    }
    for name, value in expected.items():
        assert sums[name] == pytest.approx(float(value)), name
    off = policy_loss(data["current"], terms, replace(spec, importance_cap=None))
    assert float(off.sums["importance_weight"]) == TOKENS
    assert float(off.sums["importance_capped_fraction"]) == 0


def test_bnpo_averages_micro_batches() -> None:
    sample, micro = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 1, 1])
    scale = token_scales(LossKind.BNPO, sample, torch.ones(3), micro_batch=micro)
    assert scale.tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 8, 1 / 8, 1 / 8, 1 / 8])
    # A micro-batch without weight is none.
    scale = token_scales(LossKind.BNPO, sample, torch.tensor([0.0, 1, 1]), micro_batch=micro)
    assert scale.tolist() == pytest.approx([0, 0, 1 / 4, 1 / 4, 1 / 4, 1 / 4])


@pytest.mark.parametrize("kind", KINDS)
def test_shares_without_tokens_or_weight_are_none(kind: LossKind) -> None:
    none = torch.zeros(0, dtype=torch.long)
    assert token_scales(kind, none, torch.ones(0)).shape == (0,)
    assert token_scales(kind, torch.tensor([0, 1]), torch.zeros(2)).tolist() == [0, 0]
    kept = torch.tensor([False, False])
    assert token_scales(kind, torch.tensor([0, 1]), torch.ones(2), kept=kept).tolist() == [0, 0]
    assert token_scales(kind, torch.tensor([0, 1]), torch.ones(2)).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_shares_of_rejected_tokens_go_to_the_others(kind: LossKind) -> None:
    sample, weights = tokens()["sample"], torch.tensor([1.0, 2.0, 1.0, 0.5])
    kept = torch.ones(TOKENS, dtype=torch.bool)
    kept[[0, 3, 5, 6, 9]] = False
    found = token_scales(kind, sample, weights, kept=kept, max_completion_tokens=9)
    alone = token_scales(kind, sample[kept], weights, max_completion_tokens=9)
    assert torch.equal(found[kept], alone)
    assert not found[~kept].any()


def test_dr_grpo_divides_by_the_longest_sample_rejected_or_not() -> None:
    sample, kept = torch.tensor([0, 0, 0, 1]), torch.tensor([True, False, False, True])
    scale = token_scales(LossKind.DR_GRPO, sample, torch.ones(2), kept=kept)
    assert scale.tolist() == pytest.approx([1 / 6, 0, 0, 1 / 6])


def test_sft_is_the_mean_negative_log_likelihood() -> None:
    data = tokens()
    scale = token_scales(LossKind.DAPO, data["sample"], torch.ones(4)).double()
    output = sft_loss(data["current"], scale)
    assert float(output.loss) == pytest.approx(-float(data["current"].mean()))
    assert float(output.sums["nll"]) == pytest.approx(-float(data["current"].sum()))


def test_terms_are_taken_and_moved_with_what_they_have() -> None:
    data = tokens()
    terms = TokenTerms(data["sampled"], data["reference"], data["current"], sample=data["sample"])
    some = terms.take(torch.tensor([3, 1])).to(torch.device("cpu"))
    assert torch.equal(some.sampled, data["sampled"][[3, 1]])
    assert torch.equal(some.scale, data["current"][[3, 1]])
    assert some.sample is not None
    assert torch.equal(some.sample, data["sample"][[3, 1]])
    assert some.proximal is None
    assert some.reference is None
    assert some.selected is None


def test_tokens_without_a_sequence_are_one_sequence() -> None:
    data = tokens()
    ones = torch.ones(TOKENS, dtype=torch.double)
    spec = LossSpec(kind=LossKind.GSPO)
    terms = TokenTerms(data["sampled"], ones, ones / TOKENS, data["proximal"])
    same = replace(terms, sample=torch.zeros(TOKENS, dtype=torch.long))
    assert float(policy_loss(data["current"], terms, spec).loss) == float(
        policy_loss(data["current"], same, spec).loss
    )


def test_the_defaults_are_dapo_with_truncated_token_weights() -> None:
    assert asdict(LossSpec()) == {
        "kind": "dapo",
        "clip_low": 0.2,
        "clip_high": 0.28,
        "delta": None,
        "importance_cap": 2.0,
        "importance_floor": None,
        "correction": "token_truncate",
        "off_policy_threshold": None,
        "kl_coefficient": 0.0,
        "kl_estimator": "k3",
        "kl_place": "loss",
        "kl_correction": False,
        "sapo_temperature_good": 1.0,
        "sapo_temperature_bad": 1.05,
        "max_completion_tokens": 0,
    }


def test_what_counts_as_clipped() -> None:
    ratios = torch.tensor([0.7, 1.0, 1.3, 0.7, 1.0, 1.3])
    advantages = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0])
    terms = TokenTerms(torch.zeros(6), advantages, torch.ones(6), torch.zeros(6))
    sums = policy_loss(ratios.log(), terms, LossSpec(delta=1.29)).sums
    names = ("clip_low_fraction", "clip_high_fraction", "clip_fraction", "delta_fraction")
    assert [float(sums[name]) for name in names] == [1, 1, 2, 1]
    # The bad token at 1.3 counts as 1.29, the good one as 1.28.
    loss = policy_loss(ratios.log(), terms, LossSpec(delta=1.29)).loss
    assert float(loss) == pytest.approx((0.8 + 1.0 + 1.29) - (0.7 + 1.0 + 1.28))

"""Sequence ratios, bounds and masks on numbers small enough to see; KL estimates on a known law."""

import math

import pytest
import torch

from learner_svc.algo.choices import Correction, KlEstimator
from learner_svc.algo.kl import kl_estimate, kl_penalties
from learner_svc.algo.ratios import (
    high_entropy,
    importance_weight,
    off_policy,
    rejected,
    sequence_mean,
    sequence_sum,
)

SAMPLE = torch.tensor([4, 4, 1, 1, 1])
ZERO = torch.zeros(5)


def test_sequences_are_summed_by_name_wherever_their_tokens_are() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 6.0], requires_grad=True)
    mixed = torch.tensor([4, 1, 4, 1, 1])
    assert sequence_sum(values, mixed).tolist() == [4, 12, 4, 12, 12]
    mean = sequence_mean(values, mixed)
    assert mean.tolist() == [2, 4, 2, 4, 4]
    mean[0].backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.5, 0, 0.5, 0, 0]


LOGS = torch.tensor([2.0, 4.0, 0.5, 0.25, 2.0]).log()


@pytest.mark.parametrize(
    ("correction", "weights", "out"),
    [
        (Correction.TOKEN_TRUNCATE, [2, 2, 0.5, 0.5, 2], [0, 0, 0, 0, 0]),
        (Correction.TOKEN_MASK, [2, 2, 0.5, 0.5, 2], [0, 1, 0, 1, 0]),
        (Correction.SEQUENCE_TRUNCATE, [2, 2, 0.5, 0.5, 0.5], [0, 0, 0, 0, 0]),
        (Correction.SEQUENCE_MASK, [2, 2, 0.5, 0.5, 0.5], [1, 1, 1, 1, 1]),
    ],
)
def test_bounds_clamp_or_reject(
    correction: Correction, weights: list[float], out: list[int]
) -> None:
    """Bounds 0.5 and 2: tokens at them are in. The sequences' products are 8 and 0.25."""
    proximal = LOGS.double().requires_grad_()
    weight, capped = importance_weight(
        proximal, ZERO, SAMPLE, correction=correction, cap=2.0 + 1e-6, floor=0.5 - 1e-6
    )
    assert not weight.requires_grad
    assert weight.tolist() == pytest.approx(weights, rel=1e-5)
    over = [True, True, False, False, False]
    assert capped.tolist() == (over if correction.by_sequence else [False, True, *[False] * 3])
    found = rejected(
        proximal, ZERO, SAMPLE, correction=correction, cap=2.0 + 1e-6, floor=0.5 - 1e-6
    )
    assert found.tolist() == [bool(item) for item in out]


def test_weights_at_a_bound_are_in() -> None:
    one = torch.zeros(2)
    sample = torch.tensor([0, 1])
    for cap, floor in ((1.0, None), (2.0, 1.0)):
        found = rejected(one, one, sample, correction=Correction.TOKEN_MASK, cap=cap, floor=floor)
        assert not found.any()
    _, capped = importance_weight(one, one, sample, cap=1.0)
    assert not capped.any()
    low = torch.tensor([-200.0, 0.0])
    found = rejected(low, one, sample, correction=Correction.TOKEN_MASK, cap=2.0)
    assert not found.any()


def test_bad_sequences_that_moved_away_are_silenced() -> None:
    sampled = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0])
    current = torch.tensor([-1.5, -2.5, -1.0, -1.5, -1.0], requires_grad=True)
    bad = torch.full((5,), -1.0)
    far = off_policy(current, sampled, bad, SAMPLE, threshold=0.9)
    assert far.tolist() == [True, True, False, False, False]
    assert not off_policy(current, sampled, bad, SAMPLE, threshold=1.0).any()
    assert not off_policy(current, sampled, ZERO, SAMPLE, threshold=0.9).any()
    assert not off_policy(current, sampled, -bad, SAMPLE, threshold=0.9).any()


def test_the_highest_entropies_are_selected() -> None:
    entropies = torch.tensor([0.1, 3.0, 2.0, 0.2, 1.0])
    assert high_entropy(entropies, 0.4).tolist() == [False, True, True, False, False]
    assert high_entropy(entropies, 1.0).all()
    assert high_entropy(torch.zeros(0), 0.5).shape == (0,)
    assert high_entropy(torch.zeros(0), 0.5).dtype == torch.bool


POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.double)
REFERENCE = torch.tensor([0.2, 0.2, 0.6], dtype=torch.double)


@pytest.mark.parametrize("kind", list(KlEstimator))
def test_estimates_of_a_known_divergence(kind: KlEstimator) -> None:
    """Expectations over the whole law: k1 and k3 are unbiased; k2 and k3 are never negative."""
    estimate = kl_estimate(kind, POLICY.log(), REFERENCE.log())
    true = float((POLICY * (POLICY / REFERENCE).log()).sum())
    expected = float((POLICY * estimate).sum())
    if kind is KlEstimator.K2:
        logs = [math.log(p / q) for p, q in zip(POLICY.tolist(), REFERENCE.tolist(), strict=True)]
        assert estimate.tolist() == pytest.approx([log * log / 2 for log in logs])
    else:
        assert expected == pytest.approx(true)
    assert bool((estimate >= 0).all()) is (kind is not KlEstimator.K1)
    assert not kl_estimate(kind, POLICY.log(), POLICY.log()).any()


@pytest.mark.parametrize("kind", [KlEstimator.K1, KlEstimator.K3])
def test_estimates_times_the_ratio_have_the_gradient_of_the_divergence(kind: KlEstimator) -> None:
    logits = POLICY.log().requires_grad_()
    logprobs = torch.log_softmax(logits, 0)
    divergence = (logprobs.exp() * (logprobs - REFERENCE.log())).sum()
    (expected,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    ratio = torch.exp(logprobs - POLICY.log())
    estimate = (POLICY * ratio * kl_estimate(kind, logprobs, REFERENCE.log())).sum()
    (found,) = torch.autograd.grad(estimate, logits, retain_graph=True)
    torch.testing.assert_close(found, expected)
    alone = (POLICY * kl_estimate(kind, logprobs, REFERENCE.log())).sum()
    (wrong,) = torch.autograd.grad(alone, logits)
    assert not torch.allclose(wrong, expected)


def test_k2_has_the_gradient_of_the_divergence_by_itself() -> None:
    logits = POLICY.log().requires_grad_()
    logprobs = torch.log_softmax(logits, 0)
    divergence = (logprobs.exp() * (logprobs - REFERENCE.log())).sum()
    (expected,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    estimate = (POLICY * kl_estimate(KlEstimator.K2, logprobs, REFERENCE.log())).sum()
    (found,) = torch.autograd.grad(estimate, logits)
    torch.testing.assert_close(found, expected)


def test_penalties_are_sums_over_sequences() -> None:
    current = torch.tensor([-1.0, -2.0, -1.0], requires_grad=True)
    found = kl_penalties(
        KlEstimator.K1, current, torch.tensor([-1.5, -2.25, -4.0]), torch.tensor([2, 2, 0]), 3
    )
    assert found.tolist() == [3.0, 0.0, 0.75]
    assert not found.requires_grad

"""Advantages against their definitions, enumerated, and against TRL's arithmetic."""

from collections.abc import Sequence
from itertools import combinations, product

import pytest
import torch

from learner_svc.algo.advantages import add_turn_scores, centred_ranks, group_advantages, pass_at_k
from learner_svc.algo.choices import Baseline, Scale, Truncated


def test_leave_one_out_subtracts_the_others() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, 3.0])
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    result = group_advantages(rewards, groups, torch.zeros(6, dtype=torch.bool))
    assert result.values.tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3, 2.0, -2.0])
    mean = group_advantages(
        rewards, groups, torch.zeros(6, dtype=torch.bool), baseline=Baseline.GROUP_MEAN
    )
    assert mean.values.tolist() == pytest.approx([0.5, -0.5, -0.5, 0.5, 1.0, -1.0])


def test_flat_and_lonely_groups_have_no_advantage() -> None:
    result = group_advantages(
        torch.tensor([1.0, 1.0, 0.1, 0.1, 0.1, 7.0]),
        torch.tensor([3, 3, 5, 5, 5, 9]),
        torch.zeros(6, dtype=torch.bool),
    )
    assert result.values.tolist() == [0.0] * 6
    assert result.zero_variance.all()


@pytest.mark.parametrize(
    ("policy", "values", "in_loss"),
    [
        (Truncated.FAIL, [1.0, -0.5, -0.5], [True, True, True]),
        (Truncated.MASK_LOSS, [1.0, -1.0, 0.0], [True, True, False]),
        (Truncated.KEEP_BASELINE, [1.0, -0.5, 0.0], [True, True, False]),
    ],
)
def test_truncated_rollouts(policy: Truncated, values: list[float], in_loss: list[bool]) -> None:
    result = group_advantages(
        torch.tensor([1.0, 0.0, 0.0]),
        torch.zeros(3, dtype=torch.long),
        torch.tensor([False, False, True]),
        truncated_policy=policy,
    )
    assert result.values.tolist() == pytest.approx(values)
    assert result.in_loss.tolist() == in_loss


@pytest.mark.parametrize("scale", [Scale.GROUP, Scale.BATCH])
def test_scaled_advantages_are_those_of_trl(scale: Scale) -> None:
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0, 5.0, 4.0, 4.5, 4.0])
    result = group_advantages(
        rewards,
        torch.arange(8) // 4,
        torch.zeros(8, dtype=torch.bool),
        baseline=Baseline.GROUP_MEAN,
        scale=scale,
    )
    grouped = rewards.view(2, 4)
    deviation = grouped.std(1, keepdim=True) if scale is Scale.GROUP else rewards.std()
    expected = (grouped - grouped.mean(1, keepdim=True)) / (deviation + 1e-4)
    torch.testing.assert_close(result.values, expected.flatten())


def mean_best(rewards: Sequence[float], k: int) -> float:
    chosen = list(combinations(rewards, k))
    return sum(max(subset) for subset in chosen) / len(chosen)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("rewards", [[0.0, 1.0, 0.0, 0.0, 1.0], [0.3, -2.0, 5.0, 0.3, 1.0]])
def test_pass_at_k_is_the_best_of_subsets_with_less_the_best_without(
    rewards: list[float], k: int
) -> None:
    found = pass_at_k(torch.tensor(rewards, dtype=torch.double), k)
    for i, reward in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1 :]
        pairs = list(combinations(others, k - 1))
        with_member = sum(max([reward, *pair]) for pair in pairs) / len(pairs)
        assert float(found[i]) == pytest.approx(k * (with_member - mean_best(others, k)))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_pass_at_k_gives_the_gradient_of_the_best_of_k(k: int) -> None:
    """Exactly, in expectation over every possible group of 4 from a policy with one parameter."""
    rewards, size = [0.0, 1.0, 3.0], 4
    theta = torch.tensor(0.4, dtype=torch.double, requires_grad=True)

    def policy() -> torch.Tensor:
        return torch.softmax(torch.stack([theta, 0.3 - theta, 2 * theta]), 0)

    objective = sum(
        torch.stack([policy()[i] for i in draw]).prod() * max(rewards[i] for i in draw)
        for draw in product(range(3), repeat=k)
    )
    (expected,) = torch.autograd.grad(objective, theta)
    scores = [torch.autograd.grad(policy()[i].log(), theta)[0] for i in range(3)]
    found = torch.zeros((), dtype=torch.double)
    for draw in product(range(3), repeat=size):
        advantages = pass_at_k(torch.tensor([rewards[i] for i in draw]), k)
        chance = torch.stack([policy()[i] for i in draw]).prod().detach()
        terms = [scores[i] * a for i, a in zip(draw, advantages, strict=True)]
        found += chance * torch.stack(terms).sum() / size
    assert float(found) == pytest.approx(float(expected), rel=1e-9)


def test_pass_at_1_is_leave_one_out_and_k_is_bounded_by_the_group() -> None:
    rewards, groups = torch.tensor([1.0, 0.0, 0.5, 2.0, 3.0, 3.5]), torch.tensor([7, 7, 7, 7, 2, 2])
    whole = torch.zeros(6, dtype=torch.bool)
    one = group_advantages(rewards, groups, whole, baseline=Baseline.PASS_AT_K, k=1)
    torch.testing.assert_close(one.values, group_advantages(rewards, groups, whole).values)
    three = group_advantages(rewards, groups, whole, baseline=Baseline.PASS_AT_K, k=3)
    many = group_advantages(rewards, groups, whole, baseline=Baseline.PASS_AT_K, k=50)
    assert torch.equal(three.values, many.values)
    two = group_advantages(rewards, groups, whole, baseline=Baseline.PASS_AT_K)
    assert torch.equal(two.values[:4], pass_at_k(rewards[:4], 2).float())
    assert pass_at_k(torch.tensor([3.0]), 2).tolist() == [0.0]
    assert pass_at_k(torch.zeros(0), 2).shape == (0,)


def test_ranks_are_spread_evenly_and_ties_share() -> None:
    assert centred_ranks(torch.tensor([5.0, -1.0, 900.0])).tolist() == [0.0, -1.0, 1.0]
    tied = centred_ranks(torch.tensor([1.0, 0.0, 1.0, 1.0, 7.0]))
    assert tied.tolist() == [0.0, -1.0, 0.0, 0.0, 1.0]
    assert centred_ranks(torch.tensor([4.0])).tolist() == [0.0]
    result = group_advantages(
        torch.tensor([5.0, 1.0, 2.0, -3.0, -4.0, 9.0]),
        torch.tensor([0, 0, 0, 1, 1, 1]),
        torch.tensor([False, False, False, False, False, True]),
        baseline=Baseline.RANK,
        truncated_policy=Truncated.MASK_LOSS,
    )
    assert result.values.tolist() == [1.0, -1.0, 0.0, 1.0, -1.0, 0.0]


def test_members_are_compared_within_their_group_alone() -> None:
    rewards = torch.tensor([5.0, 1.0, 2.0, -3.0, -4.0, 9.0])
    groups = torch.tensor([0, 1, 2, 0, 1, 2])
    whole = torch.zeros(6, dtype=torch.bool)
    ranked = group_advantages(rewards, groups, whole, baseline=Baseline.RANK)
    assert ranked.values.tolist() == [1.0, 1.0, -1.0, -1.0, -1.0, 1.0]
    best = group_advantages(rewards, groups, whole, baseline=Baseline.PASS_AT_K, k=1)
    assert best.values.tolist() == [8.0, 5.0, -7.0, -8.0, -5.0, 7.0]


def test_reinforce_plus_plus_normalises_over_the_batch() -> None:
    rewards, groups = torch.tensor([1.0, 1.0, 0.0, 4.0]), torch.tensor([0, 0, 1, 1])
    whole = torch.zeros(4, dtype=torch.bool)
    result = group_advantages(
        rewards, groups, whole, baseline=Baseline.BATCH_MEAN, scale=Scale.BATCH
    )
    torch.testing.assert_close(result.values, (rewards - rewards.mean()) / (rewards.std() + 1e-4))
    assert not result.zero_variance.any()
    flat = group_advantages(torch.ones(4), groups, whole, baseline=Baseline.BATCH_MEAN)
    assert flat.zero_variance.all()


def test_whitened_advantages_are_those_of_trl_rloo() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0, 5.0, 4.0, 4.5, 9.0])
    whole = torch.zeros(8, dtype=torch.bool)
    result = group_advantages(rewards, torch.arange(8) // 4, whole, scale=Scale.WHITEN)
    grouped = rewards.view(2, 4)
    centred = (grouped - (grouped.sum(1, keepdim=True) - grouped) / 3).flatten()
    expected = (centred - centred.mean()) / (centred.std() + 1e-4)
    torch.testing.assert_close(result.values, expected)
    # Rows that are not counted do not shift the others.
    masked = torch.tensor([False] * 7 + [True])
    part = group_advantages(
        rewards,
        torch.arange(8) // 4,
        masked,
        scale=Scale.WHITEN,
        truncated_policy=Truncated.MASK_LOSS,
    )
    alone = group_advantages(rewards[:7], torch.arange(7) // 4, whole[:7], scale=Scale.WHITEN)
    torch.testing.assert_close(part.values[:7], alone.values)
    assert float(part.values.sum()) == pytest.approx(0, abs=1e-5)


def test_batches_of_one_counted_row_are_not_scaled() -> None:
    for scale in (Scale.BATCH, Scale.WHITEN):
        result = group_advantages(
            torch.tensor([1.0, 2.0]),
            torch.zeros(2, dtype=torch.long),
            torch.tensor([False, True]),
            scale=scale,
            truncated_policy=Truncated.MASK_LOSS,
        )
        assert result.values.tolist() == [0.0, 0.0]
        assert result.zero_variance.all()


def test_no_rows_have_no_advantages() -> None:
    none = torch.zeros(0)
    result = group_advantages(none, none.long(), none.bool())
    assert result.values.shape == (0,)


def test_turn_scores_are_added_outside_the_group() -> None:
    advantages, scores = torch.tensor([0.5, 0.5, -0.5]), torch.tensor([0.0, 0.2, 0.4])
    assert add_turn_scores(advantages, scores).tolist() == pytest.approx([0.5, 0.7, -0.1])
    assert add_turn_scores(advantages, scores, 0.5).tolist() == pytest.approx([0.5, 0.6, -0.3])

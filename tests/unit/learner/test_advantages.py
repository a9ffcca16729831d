"""Advantages against their definitions, enumerated, and against TRL's arithmetic."""

import pytest
import torch

from learner_svc.algo.advantages import Baseline, Scale, Truncated, group_advantages


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

"""Losses against a float64 reference written out by hand, and against TRL on the same tensors."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from learner_svc.algo.advantages import Baseline, Scale, Truncated, group_advantages
from learner_svc.algo.losses import (
    LossKind,
    LossSpec,
    TokenTerms,
    policy_loss,
    sft_loss,
    token_scales,
)

LENGTHS = [5, 2, 7, 3]
KINDS = list(LossKind)


def tokens(seed: int = 0) -> dict[str, Tensor]:
    """Flat random terms of four samples; double precision."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return -torch.rand(sum(LENGTHS), generator=generator, dtype=torch.double) * 2 - 0.1

    return {
        "current": draw(),
        "proximal": draw(),
        "sampled": draw(),
        "reference": draw(),
        "advantages": torch.tensor([0.7, -1.1, 0.4, -0.2], dtype=torch.double),
        "sample": torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS)),
    }


def reference_loss(data: dict[str, Tensor], spec: LossSpec, weights: list[float]) -> float:
    """The objective, token by token, in plain Python floats."""
    rows: list[list[float]] = [[] for _ in LENGTHS]
    for t, owner in enumerate(data["sample"].tolist()):
        current, proximal = float(data["current"][t]), float(data["proximal"][t])
        ratio, advantage = math.exp(current - proximal), float(data["advantages"][owner])
        bounded = min(max(ratio, 1 - spec.clip_low), 1 + spec.clip_high)
        free = ratio if spec.delta is None else min(ratio, spec.delta)
        value = -min(free * advantage, bounded * advantage)
        if spec.importance_cap is not None:
            value *= min(math.exp(proximal - float(data["sampled"][t])), spec.importance_cap)
        gap = float(data["reference"][t]) - current
        rows[owner].append(value + spec.kl_coefficient * (math.exp(gap) - gap - 1))
    pairs = [(w, row) for w, row in zip(weights, rows, strict=True) if w > 0]
    if spec.kind in (LossKind.DAPO, LossKind.BNPO):
        return sum(w * sum(row) for w, row in pairs) / sum(w * len(row) for w, row in pairs)
    total = sum(w for w, _ in pairs)
    if spec.kind is LossKind.GRPO:
        return sum(w * sum(row) / len(row) for w, row in pairs) / total
    constant = spec.max_completion_tokens or max(LENGTHS)
    return sum(w * sum(row) for w, row in pairs) / (total * constant)


def our_loss(data: dict[str, Tensor], spec: LossSpec, weights: list[float]) -> Tensor:
    sample = data["sample"]
    scale = token_scales(
        spec.kind, sample, torch.tensor(weights), max_completion_tokens=spec.max_completion_tokens
    )
    terms = TokenTerms(
        data["sampled"],
        data["advantages"][sample],
        scale.double(),
        data["proximal"],
        data["reference"] if spec.kl_coefficient else None,
    )
    return policy_loss(data["current"], terms, spec).loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [[1.0] * 4, [1.0, 0.0, 2.0, 0.5]])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"importance_cap": None},
        {"delta": 1.5, "clip_low": 0.1, "clip_high": 0.1},
        {"kl_coefficient": 0.3, "max_completion_tokens": 20},
    ],
)
def test_the_loss_is_the_written_out_sum(
    kind: LossKind, weights: list[float], options: dict[str, Any]
) -> None:
    spec, data = LossSpec(kind=kind, **options), tokens()
    expected = reference_loss(data, spec, weights)
    assert float(our_loss(data, spec, weights)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rejected_samples_leave_the_denominator(kind: LossKind) -> None:
    data = tokens()
    spec = LossSpec(kind=kind, max_completion_tokens=7)
    keep = data["sample"] != 2
    smaller = {name: value[keep] for name, value in data.items() if name != "advantages"}
    smaller |= {"advantages": data["advantages"]}
    dropped = our_loss(data, spec, [1, 1, 0, 1])
    assert float(dropped) == pytest.approx(float(our_loss(smaller, spec, [1, 1, 1, 1])), rel=1e-6)


def test_metrics_are_sums_over_tokens() -> None:
    data = tokens()
    spec = LossSpec(importance_cap=1.2)
    terms = TokenTerms(
        data["sampled"],
        data["advantages"][data["sample"]],
        torch.ones(sum(LENGTHS), dtype=torch.double),
        data["proximal"],
    )
    whole = policy_loss(data["current"], terms, spec)
    parts = [
        policy_loss(data["current"][half], terms.take(half), spec)
        for half in (torch.arange(6), torch.arange(6, sum(LENGTHS)))
    ]
    for name, value in whole.sums.items():
        assert float(value) == pytest.approx(sum(float(part.sums[name]) for part in parts))
    ratio = torch.exp(data["current"] - data["proximal"])
    advantages = terms.advantages
    clipped = ((ratio < 0.8) & (advantages < 0)) | ((ratio > 1.28) & (advantages > 0))
    assert float(whole.sums["clip_fraction"]) == float(clipped.sum()) > 0
    capped = torch.exp(data["proximal"] - data["sampled"]) > 1.2
    assert float(whole.sums["importance_capped_fraction"]) == float(capped.sum()) > 0


def test_bnpo_averages_micro_batches() -> None:
    sample, micro = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 1, 1])
    scale = token_scales(LossKind.BNPO, sample, torch.ones(3), micro_batch=micro)
    assert scale.tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 8, 1 / 8, 1 / 8, 1 / 8])


def test_sft_is_the_mean_negative_log_likelihood() -> None:
    data = tokens()
    scale = token_scales(LossKind.DAPO, data["sample"], torch.ones(4)).double()
    assert float(sft_loss(data["current"], scale).loss) == pytest.approx(
        -float(data["current"].mean())
    )


# ---- advantages


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


# ---- TRL


def trl_loss(kind: LossKind, data: dict[str, Tensor], spec: LossSpec) -> tuple[float, Tensor]:
    """Loss and gradient that TRL's own `_compute_loss` gives for the same numbers."""
    grpo = pytest.importorskip(
        "trl.trainer.grpo_trainer",
        reason="TRL is not installed: pip install regreen[peer]",
        exc_type=ImportError,
    )
    width = max(LENGTHS)

    def padded(flat: Tensor) -> Tensor:
        rows = torch.split(flat, LENGTHS)
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)

    current = data["current"].clone().requires_grad_()
    mask = padded(torch.ones_like(current)).float()
    logps = padded(current)
    noted: dict[str, list[Any]] = {}
    stand_in = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.zeros_like(logps), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=spec.kl_coefficient,
        loss_type=kind.value,
        epsilon_low=spec.clip_low,
        epsilon_high=spec.clip_high,
        args=SimpleNamespace(
            delta=spec.delta, use_bias_correction_kl=False, steps_per_generation=1
        ),
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=spec.max_completion_tokens or width,
        accelerator=SimpleNamespace(
            num_processes=1, reduce=lambda value, reduction: value, gather=lambda value: value
        ),
        _entropy_bonus_enabled=False,
        _metrics={"train": _Lists(noted)},
    )
    weight = torch.exp(data["proximal"] - data["sampled"]).clamp(max=spec.importance_cap)
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.long),
        "prompt_mask": torch.ones(4, 1, dtype=torch.long),
        "completion_ids": torch.zeros(4, width, dtype=torch.long),
        "completion_mask": mask,
        "advantages": data["advantages"],
        "old_per_token_logps": padded(data["proximal"]),
        "ref_per_token_logps": padded(data["reference"]),
        "importance_sampling_ratio": padded(weight),
        "num_items_in_batch": mask.sum(),
    }
    loss = grpo.GRPOTrainer._compute_loss(stand_in, None, inputs)
    loss.backward()
    assert current.grad is not None
    return float(loss), current.grad


class _Lists(dict[str, list[Any]]):
    def __missing__(self, key: str) -> list[Any]:
        return self.setdefault(key, [])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"delta": 1.5}, {"kl_coefficient": 0.3}, {"max_completion_tokens": 11}]
)
def test_loss_and_gradient_equal_trl(kind: LossKind, options: dict[str, Any]) -> None:
    spec, data = LossSpec(kind=kind, **options), tokens(3)
    expected, gradient = trl_loss(kind, data, spec)
    ours = data | {"current": data["current"].clone().requires_grad_()}
    loss = our_loss(ours, spec, [1.0] * 4)
    loss.backward()
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(ours["current"].grad, gradient, rtol=1e-5, atol=1e-8)

"""Losses and gradients equal to those of TRL's own code on the same tensors."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from learner_svc.algo.choices import UNCLIPPED, Correction, LossKind, LossSpec
from learner_svc.algo.ratios import high_entropy, rejected
from tests.unit.learner.loss_terms import LENGTHS, TOKENS, our_loss, tokens

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = {LossKind.GSPO: "grpo", LossKind.GSPO_TOKEN: "grpo", LossKind.REINFORCE_PP: "dapo"}
"""TRL's `loss_type`, where it has another name."""


def trl(module: str) -> Any:
    return pytest.importorskip(
        f"trl.trainer.{module}",
        reason="TRL is not installed: pip install regreen[peer]",
        exc_type=ImportError,
    )


def padded(flat: Tensor) -> Tensor:
    rows = torch.split(flat, LENGTHS)
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


class _Lists(dict[str, list[Any]]):
    def __missing__(self, key: str) -> list[Any]:
        return self.setdefault(key, [])


def stand_in(spec: LossSpec, logps: Tensor, **more: Any) -> SimpleNamespace:
    """What TRL's `_compute_loss` reads of a trainer."""
    sequence = spec.kind in (LossKind.GSPO, LossKind.GSPO_TOKEN)
    accelerator = SimpleNamespace(
        num_processes=1,
        reduce=lambda value, reduction: value,
        gather=lambda value: value,
        pad_across_processes=lambda value, **_: value,
    )
    values: dict[str, Any] = {
        "_get_per_token_logps_and_entropies": lambda *a, **k: (
            logps,
            more.get("entropies", torch.zeros_like(logps)),
            None,
        ),
        "aux_loss_enabled": False,
        "top_entropy_quantile": more.get("share", 1.0),
        "off_policy_mask_threshold": spec.off_policy_threshold,
        "importance_sampling_level": "sequence" if sequence else "token",
        "beta": spec.kl_coefficient,
        "loss_type": NAMES.get(spec.kind, spec.kind.value),
        "epsilon_low": spec.clip_low,
        # TRL names the bound of cispo, we the distance from 1.
        "epsilon_high": spec.clip_high + (spec.kind is LossKind.CISPO),
        "args": SimpleNamespace(
            delta=spec.delta,
            use_bias_correction_kl=spec.kl_correction,
            steps_per_generation=1,
            sapo_temperature_pos=spec.sapo_temperature_good,
            sapo_temperature_neg=spec.sapo_temperature_bad,
        ),
        "use_vllm": True,
        "vllm_importance_sampling_correction": True,
        "model": SimpleNamespace(training=True),
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": spec.max_completion_tokens or max(LENGTHS),
        "accelerator": accelerator,
        "_entropy_bonus_enabled": False,
        "_metrics": {"train": _Lists()},
    }
    return SimpleNamespace(**values)


def rows(mask: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    """What TRL's losses ask of any batch: prompts of one token, and completions of `LENGTHS`."""
    return {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.long),
        "prompt_mask": torch.ones(4, 1, dtype=torch.long),
        "completion_ids": torch.zeros(4, max(LENGTHS), dtype=torch.long),
        "completion_mask": mask,
        "advantages": advantages,
    }


def trl_loss(
    data: dict[str, Tensor], spec: LossSpec, weight: Tensor | None = None, **more: Any
) -> tuple[float, Tensor]:
    """Loss and gradient that TRL's own `_compute_loss` gives for the same numbers.

    `weight` [T] is TRL's importance ratio, by default that of `token_truncate`.
    """
    grpo = trl("grpo_trainer")
    current = data["current"].clone().requires_grad_()
    mask = padded(torch.ones_like(current)).float()
    logps = padded(current)
    trainer = stand_in(spec, logps, **more)
    trainer.get_off_policy_mask = grpo.GRPOTrainer.get_off_policy_mask
    trainer.get_high_entropy_mask = partial(grpo.GRPOTrainer.get_high_entropy_mask, trainer)
    if weight is None:
        weight = torch.exp(data["proximal"] - data["sampled"]).clamp(max=spec.importance_cap)
    inputs = {
        **rows(mask, data["advantages"]),
        "old_per_token_logps": padded(data["proximal"]),
        "ref_per_token_logps": padded(data["reference"]),
        "sampling_per_token_logps": padded(data["sampled"]),
        "importance_sampling_ratio": padded(weight),
        "num_items_in_batch": mask.sum(),
    }
    loss = grpo.GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    assert current.grad is not None
    return float(loss.detach()), current.grad


def ours(
    data: dict[str, Tensor], spec: LossSpec, selected: Tensor | None = None
) -> tuple[float, Tensor]:
    current = data["current"].clone().requires_grad_()
    loss = our_loss(data | {"current": current}, spec, [1.0] * 4, selected)
    loss.backward()
    assert current.grad is not None
    return float(loss.detach()), current.grad


def same(found: tuple[float, Tensor], expected: tuple[float, Tensor]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-7)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", [kind for kind in LossKind if kind is not LossKind.RLOO])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"delta": 1.5},
        {"clip_low": 3e-4, "clip_high": 4e-4},
        {"kl_coefficient": 0.3},
        {"kl_coefficient": 0.3, "kl_correction": True},
        {"max_completion_tokens": 11},
        {"off_policy_threshold": 0.05},
    ],
)
def test_loss_and_gradient_equal_trl(kind: LossKind, options: dict[str, Any]) -> None:
    if kind is LossKind.GSPO_TOKEN and "kl_correction" in options:
        pytest.skip("TRL corrects by the sequence's ratio, gspo_token by the token's gradient")
    if kind in UNCLIPPED and "delta" in options:
        pytest.skip("refused for losses without a clip")
    spec, data = LossSpec(kind=kind, **options), tokens(3)
    if kind is LossKind.GSPO_TOKEN:
        # Equal to TRL's gspo while a sequence's tokens have one advantage and one weight.
        spec = replace(spec, importance_cap=None)
        same(ours(data, spec), trl_loss(data, spec, torch.ones(TOKENS)))
        return
    same(ours(data, spec), trl_loss(data, spec))


def test_rloo_equals_trl() -> None:
    rloo = trl("rloo_trainer")
    spec, data = LossSpec(kind=LossKind.RLOO, importance_cap=None), tokens(3)
    # Products of ratios over a sequence: near enough to 1 that some are clipped and some are not.
    data["proximal"] = data["current"] + 0.1 * (data["proximal"] - data["current"])
    current = data["current"].clone().requires_grad_()
    mask = padded(torch.ones_like(current)).float()
    inputs = {
        **rows(mask, data["advantages"]),
        "old_logps": (padded(data["proximal"]) * mask).sum(1),
    }
    loss = rloo.RLOOTrainer._compute_loss(stand_in(spec, padded(current)), None, inputs)
    loss.backward()
    assert current.grad is not None
    same(ours(data, spec), (float(loss.detach()), current.grad))


@pytest.mark.parametrize("correction", list(Correction))
@pytest.mark.parametrize("floor", [None, 0.6])
def test_importance_correction_equals_trl_but_for_the_denominator(
    correction: Correction, floor: float | None
) -> None:
    """TRL sets the loss of a masked token to 0 and goes on counting it; here it is not counted."""
    data = tokens(4)
    spec = LossSpec(correction=correction, importance_cap=1.5, importance_floor=floor)
    drift = data["proximal"] - data["sampled"]
    if correction.by_sequence:
        drift = torch.stack([row.sum() for row in drift.split(LENGTHS)])[data["sample"]]
    weight = torch.exp(drift)
    kept = torch.ones(TOKENS, dtype=torch.bool)
    if correction.rejects:
        kept = (weight <= 1.5) & (weight >= (floor or 0.0))
        assert 0 < int(kept.sum()) < TOKENS
        weight = weight.masked_fill(~kept, 0.0)
    else:
        weight = weight.clamp(min=floor, max=1.5)
    loss, gradient = trl_loss(data, spec, weight)
    counted = TOKENS / int(kept.sum())
    same(ours(data, spec), (loss * counted, gradient * counted))
    assert torch.equal(
        kept,
        ~rejected(
            data["proximal"],
            data["sampled"],
            data["sample"],
            correction=correction,
            cap=1.5,
            floor=floor,
        ),
    )


@pytest.mark.parametrize("share", [0.2, 0.5, 0.99])
def test_entropy_selection_equals_trl(share: float) -> None:
    data, spec = tokens(6), LossSpec()
    entropies = -data["reference"]
    expected = trl_loss(data, spec, share=share, entropies=padded(entropies))
    selected = high_entropy(entropies.float(), share)
    assert 0 < int(selected.sum()) < TOKENS
    same(ours(data, spec, selected), expected)

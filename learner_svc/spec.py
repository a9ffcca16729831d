"""What a run is told: kind, base model, engine and hyperparameters, checked before anything starts.

- A `RunSpec` is complete: every default is filled in, so that what is stored is what was in force.
- Every value is in range, or `InvalidArgument` names the field and what would be right.
- A spec survives JSON unchanged; unknown keys of a newer release are refused, not dropped.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from learner_svc.algo.advantages import Baseline, Scale, Truncated
from learner_svc.algo.losses import LossKind, LossSpec
from regreen.rpc.errors import DataLoss, InvalidArgument


class RunKind(StrEnum):
    """What a run learns from."""

    SFT = "sft"
    GRPO = "grpo"


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """Settings of the optimisation; the defaults are those of a GRPO run."""

    learning_rate: float = 1e-6
    """Peak learning rate (DeepSWE and FrogNano: 1e-6; SFT of arXiv:2510.22075: 2e-5)."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    total_steps: int = 0
    """Length of the cosine schedule, which ends at a tenth of the peak; 0 keeps it constant."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    gradient_clip: float = 1.0
    """Bound on the global gradient norm."""
    loss: str = "dapo"
    """dapo, grpo, bnpo, dr_grpo; sft in supervised runs."""
    clip_low: float = 0.2
    """Lower clip distance of the ratio."""
    clip_high: float = 0.28
    """Upper clip distance of the ratio."""
    ratio_delta: float = 0.0
    """Upper bound of the ratio where the advantage is negative; 0 is off."""
    importance_cap: float = 2.0
    """Cap of the truncated importance weight; negative is off."""
    kl_coefficient: float = 0.0
    """Weight of the KL term against the base model; 0 is off."""
    max_completion_tokens: int = 0
    """Constant denominator of dr_grpo; 0 takes the longest sample of each batch."""
    baseline: str = "leave_one_out"
    """Baseline of advantages, when a batch carries rewards only."""
    advantage_scale: str = "none"
    """Divisor of advantages: none, group, batch."""
    truncated: str = "keep_baseline"
    """Rollouts that hit a limit: fail, mask_loss, keep_baseline."""
    keep_flat_groups: bool = False
    """Keep groups without spread of rewards in the loss denominator."""
    updates_per_step: int = 1
    """Optimizer updates per batch, each on its share of the groups."""
    micro_batch_tokens: int = 2048
    """Most tokens of one forward pass."""
    trainable_layers: int = 0
    """Number of top layers that train; 0 trains everything."""
    no_prefix_sharing: bool = False
    """Compute every sample on its own."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third slower."""
    zero_stage: int = -1
    """ZeRO stage; -1 lets the engine choose."""
    dtype: str = ""
    """fp32 or bf16; empty probes the host."""
    seed: int = 0
    """Seed of everything random in the run."""

    def check(self, kind: RunKind) -> None:
        """Check every field.

        Raises:
            InvalidArgument: naming the field and the allowed values.
        """
        self._check_numbers()
        losses = [item.value for item in LossKind] if kind is RunKind.GRPO else ["sft"]
        choices = {
            "loss": losses,
            "baseline": [item.value for item in Baseline],
            "advantage_scale": [item.value for item in Scale],
            "truncated": [item.value for item in Truncated],
            "dtype": ["", "fp32", "bf16"],
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise _bad(name, f"is {value!r}", f"give one of {', '.join(filter(None, allowed))}")
        if self.ratio_delta and self.ratio_delta <= 1 + self.clip_high:
            raise _bad(
                "ratio_delta", f"is {self.ratio_delta}", "must exceed 1 + clip_high, or be 0"
            )
        if self.total_steps and self.total_steps < self.warmup_steps:
            raise _bad("total_steps", f"is {self.total_steps}", "must not be below warmup_steps")

    def _check_numbers(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            low, high = _BOUNDS.get(item.name, (-math.inf, math.inf))
            if isinstance(value, str | bool):
                continue
            if not math.isfinite(value) or not low <= value <= high:
                raise _bad(item.name, f"is {value}", f"must lie in [{low}, {high}]")

    def loss_spec(self) -> LossSpec:
        """The part that the policy loss needs."""
        return LossSpec(
            kind=LossKind(self.loss),
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            delta=self.ratio_delta or None,
            importance_cap=None if self.importance_cap < 0 else self.importance_cap,
            kl_coefficient=self.kl_coefficient,
            max_completion_tokens=self.max_completion_tokens,
        )


_BOUNDS: dict[str, tuple[float, float]] = {
    "learning_rate": (0.0, 1.0),
    "warmup_steps": (0, 10**9),
    "total_steps": (0, 10**9),
    "weight_decay": (0.0, 1.0),
    "beta1": (0.0, 0.9999),
    "beta2": (0.0, 0.99999),
    "gradient_clip": (1e-6, 1e6),
    "clip_low": (0.0, 1.0),
    "clip_high": (0.0, 100.0),
    "ratio_delta": (0.0, 1000.0),
    "importance_cap": (-1.0, 1000.0),
    "kl_coefficient": (0.0, 100.0),
    "max_completion_tokens": (0, 10**7),
    "updates_per_step": (1, 1000),
    "micro_batch_tokens": (16, 10**7),
    "trainable_layers": (0, 10**5),
    "zero_stage": (-1, 3),
    "seed": (0, 2**63 - 1),
}


def _bad(name: str, problem: str, remedy: str) -> InvalidArgument:
    return InvalidArgument(f"hyperparameters.{name}", problem, remedy)


def defaults(kind: RunKind) -> Hyperparameters:
    """The defaults of a kind of run."""
    if kind is RunKind.SFT:
        return Hyperparameters(learning_rate=2e-5, loss="sft", importance_cap=-1.0)
    return Hyperparameters()


@dataclass(frozen=True, slots=True)
class RunSpec:
    """All that a worker needs to start a run."""

    run_id: str
    kind: RunKind
    base_uri: str
    """Directory of the base model or of a checkpoint; empty takes the default model."""
    engine: str = "deepspeed"
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)

    def check(self) -> None:
        """Check the spec.

        Raises:
            InvalidArgument: naming the field.
        """
        if self.engine not in ("deepspeed", "plain"):
            raise InvalidArgument("engine", f"is {self.engine!r}", "give deepspeed or plain")
        self.hyperparameters.check(self.kind)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "RunSpec":
        """Read back what `to_json` gave.

        Raises:
            DataLoss: the values are not a spec of this release.
        """
        try:
            values = dict(raw)
            hyperparameters = Hyperparameters(**values.pop("hyperparameters"))
            kind = RunKind(values.pop("kind"))
            return cls(kind=kind, hyperparameters=hyperparameters, **values)
        except (KeyError, TypeError, ValueError) as error:
            raise DataLoss(f"stored run is unreadable: {error}") from error

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

from learner_svc.algo.choices import (
    OF_SEQUENCES,
    UNCLIPPED,
    Baseline,
    Correction,
    KlEstimator,
    KlPlace,
    LossKind,
    LossSpec,
    Scale,
    Truncated,
)
from regreen.rpc.errors import DataLoss, InvalidArgument

_LORA_ALPHA = 32.0


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
    """dapo, grpo, bnpo, dr_grpo, gspo, gspo_token, cispo, sapo, reinforce++, rloo; sft in
    supervised runs."""
    clip_low: float = 0.2
    """Lower clip distance of the ratio."""
    clip_high: float = 0.28
    """Upper clip distance of the ratio."""
    ratio_delta: float = 0.0
    """Upper bound of the ratio where the advantage is negative; 0 is off."""
    importance_cap: float = 2.0
    """Cap of the importance weight; negative is off."""
    importance_floor: float = 0.0
    """Lower bound of the importance weight."""
    importance_correction: str = "token_truncate"
    """What the bounds do: token_truncate, token_mask, sequence_truncate, sequence_mask."""
    off_policy_threshold: float = 0.0
    """Bad sequences whose mean logprob fell by more than this are silenced; 0 is off."""
    top_entropy_share: float = 0.0
    """Share of tokens, those of highest entropy, that have a policy loss; 0 is all."""
    kl_coefficient: float = 0.0
    """Weight of the KL term against the base model; 0 is off."""
    kl_estimator: str = "k3"
    """k1, k2, k3."""
    kl_place: str = "loss"
    """loss: of every token; reward: its sum is taken off the reward."""
    kl_correction: bool = False
    """Multiply the KL term in the loss by the ratio, which makes its gradient that of the KL."""
    sapo_temperature_good: float = 1.0
    """Steepness of the gate of sapo where the advantage is positive."""
    sapo_temperature_bad: float = 1.05
    """Steepness of the gate of sapo elsewhere."""
    max_completion_tokens: int = 0
    """Constant denominator of dr_grpo; 0 takes the longest sample of each batch."""
    baseline: str = "leave_one_out"
    """leave_one_out, group_mean, batch_mean, pass_at_k, rank; when a batch carries rewards only."""
    advantage_scale: str = "none"
    """Divisor of advantages: none, group, batch, whiten."""
    pass_at_k: int = 2
    """k of the baseline pass_at_k."""
    turn_score_coefficient: float = 0.0
    """Weight of the turns' own scores beside the advantages of their trajectories; 0 is off."""
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
    lora_rank: int = 0
    """Rank of adapters of a frozen model (arXiv:2106.09685); 0 trains the weights themselves."""
    lora_alpha: float = _LORA_ALPHA
    """Adapters count alpha / rank times."""
    no_prefix_sharing: bool = False
    """Compute every sample on its own."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third slower."""
    zero_stage: int = -1
    """ZeRO stage; -1 lets the engine choose."""
    sequence_parallel: int = 1
    """Ranks that divide the tokens of each pack among them (arXiv:2309.14509)."""
    offload: str = "none"
    """What ranks that compute on GPUs keep in the host's memory: none; optimizer: moments and
    masters, and the update; parameters: weights between their uses, too (ZeRO 3)."""
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
            "importance_correction": [item.value for item in Correction],
            "kl_estimator": [item.value for item in KlEstimator],
            "kl_place": [item.value for item in KlPlace],
            "offload": ["none", "optimizer", "parameters"],
            "dtype": ["", "fp32", "bf16"],
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise _bad(name, f"is {value!r}", f"give one of {', '.join(filter(None, allowed))}")
        if self.lora_alpha != _LORA_ALPHA and not self.lora_rank:
            raise _bad("lora_alpha", "is given without lora_rank", "give both, or neither")
        if self.offload != "none" and self.zero_stage == 0:
            raise _bad("offload", "is given for ZeRO 0, which divides nothing", "give 1, 2 or 3")
        if self.offload == "parameters" and self.zero_stage != 3:
            raise _bad("offload", "is parameters, which ZeRO 3 divides", "set zero_stage to 3")
        if self.ratio_delta and self.ratio_delta <= 1 + self.clip_high:
            raise _bad(
                "ratio_delta", f"is {self.ratio_delta}", "must exceed 1 + clip_high, or be 0"
            )
        if kind is RunKind.GRPO:
            self._check_loss()
        if self.total_steps and self.total_steps < self.warmup_steps:
            raise _bad("total_steps", f"is {self.total_steps}", "must not be below warmup_steps")

    def _check_loss(self) -> None:
        """Refuse what would quietly do nothing, or not what it says."""
        if self.turn_score_coefficient and self.loss in OF_SEQUENCES:
            raise _bad(
                "turn_score_coefficient",
                f"is given for {self.loss}, whose ratio is that of a sequence",
                "leave it out, or take gspo_token or another loss over tokens",
            )
        if self.ratio_delta and self.loss in UNCLIPPED:
            raise _bad(
                "ratio_delta", f"is given for {self.loss}, which has no clip", "leave it out"
            )
        if self.importance_cap < 0 and Correction(self.importance_correction).rejects:
            raise _bad(
                "importance_correction",
                f"is {self.importance_correction}, with the weight turned off",
                "give an importance_cap",
            )
        if 0 <= self.importance_cap < self.importance_floor:
            raise _bad("importance_floor", "exceeds importance_cap", "give at most the cap")
        in_loss = self.kl_place == KlPlace.LOSS
        if self.kl_correction and not in_loss:
            raise _bad("kl_correction", "is given for a KL in the reward", "leave it out")
        k1 = self.kl_coefficient and self.kl_estimator == KlEstimator.K1
        if k1 and in_loss and not self.kl_correction:
            raise _bad(
                "kl_estimator",
                "is k1 in the loss, whose gradient is 0 on average",
                "set kl_place to reward or kl_correction, or take k2 or k3",
            )

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
            importance_floor=self.importance_floor or None,
            correction=Correction(self.importance_correction),
            off_policy_threshold=self.off_policy_threshold or None,
            kl_coefficient=self.kl_coefficient,
            kl_estimator=KlEstimator(self.kl_estimator),
            kl_place=KlPlace(self.kl_place),
            kl_correction=self.kl_correction,
            sapo_temperature_good=self.sapo_temperature_good,
            sapo_temperature_bad=self.sapo_temperature_bad,
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
    "importance_floor": (0.0, 1000.0),
    "off_policy_threshold": (0.0, 1000.0),
    "top_entropy_share": (0.0, 1.0),
    "kl_coefficient": (0.0, 100.0),
    "sapo_temperature_good": (1e-3, 1000.0),
    "sapo_temperature_bad": (1e-3, 1000.0),
    "pass_at_k": (1, 10**4),
    "turn_score_coefficient": (0.0, 100.0),
    "max_completion_tokens": (0, 10**7),
    "updates_per_step": (1, 1000),
    "micro_batch_tokens": (16, 10**7),
    "trainable_layers": (0, 10**5),
    "lora_rank": (0, 1024),
    "lora_alpha": (1e-3, 1e4),
    "zero_stage": (-1, 3),
    "sequence_parallel": (1, 1024),
    "seed": (0, 2**63 - 1),
}


def _bad(name: str, problem: str, remedy: str) -> InvalidArgument:
    return InvalidArgument(f"hyperparameters.{name}", problem, remedy)


_OF_LOSS: dict[str, dict[str, Any]] = {
    # The bounds of the papers: a sequence's ratio moves far less than a token's (arXiv:2507.18071,
    # section 5.1); cispo cuts weights off at 5 (arXiv:2510.13786).
    LossKind.GSPO: {"clip_low": 3e-4, "clip_high": 4e-4},
    LossKind.GSPO_TOKEN: {"clip_low": 3e-4, "clip_high": 4e-4},
    LossKind.CISPO: {"clip_high": 4.0},
    LossKind.REINFORCE_PP: {"baseline": "batch_mean", "advantage_scale": "batch"},
}


def defaults(kind: RunKind, loss: str = "") -> Hyperparameters:
    """The defaults of a kind of run, and of its loss where that has others."""
    if kind is RunKind.SFT:
        return Hyperparameters(learning_rate=2e-5, loss="sft", importance_cap=-1.0)
    return Hyperparameters(**_OF_LOSS.get(loss, {}))


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
        if self.engine == "deepspeed":
            return
        if self.hyperparameters.sequence_parallel > 1:
            raise _bad("sequence_parallel", "is above 1, but the engine is plain", "take deepspeed")
        if self.hyperparameters.offload != "none":
            raise _bad("offload", "is given, but the engine is plain", "take deepspeed")

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

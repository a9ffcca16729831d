"""What can be chosen in the learning maths, each choice with its source.

- Nothing here computes, and no tensor library is imported: the service checks and compares settings
  without one.
"""

from dataclasses import dataclass
from enum import StrEnum


class Baseline(StrEnum):
    """What is subtracted from a member's reward."""

    LEAVE_ONE_OUT = "leave_one_out"
    """Mean of the *other* members (RLOO, arXiv:2402.14740; used by DeepSWE)."""
    GROUP_MEAN = "group_mean"
    """Mean of all members (GRPO, arXiv:2402.03300)."""
    BATCH_MEAN = "batch_mean"
    """Mean of all rewards of the batch (REINFORCE++, arXiv:2501.03262)."""
    PASS_AT_K = "pass_at_k"
    """The best of k is what counts: `pass_at_k` (arXiv:2505.15201)."""
    RANK = "rank"
    """Ranks in place of rewards, so that no outlier dominates: `centred_ranks` (the fitness shaping
    of evolution strategies, arXiv:1703.03864)."""


class Scale(StrEnum):
    """What the centred reward is divided by."""

    NONE = "none"
    """Nothing: the deviation favours easy and hard tasks (Dr. GRPO, arXiv:2503.20783)."""
    GROUP = "group"
    """Sample deviation of the group (GRPO, arXiv:2402.03300)."""
    BATCH = "batch"
    """Sample deviation of all rewards of the batch."""
    WHITEN = "whiten"
    """Advantages of the batch, less their mean, over their deviation (REINFORCE++ with a baseline,
    arXiv:2501.03262; TRL's RLOO with `normalize_advantages`)."""


class Truncated(StrEnum):
    """What becomes of rollouts that hit a limit (context, turns, wall clock)."""

    FAIL = "fail"
    """Keep them with the reward they carry; the rollout scored them as failures."""
    MASK_LOSS = "mask_loss"
    """Drop them from baseline and loss (overlong filtering, DAPO, arXiv:2503.14476)."""
    KEEP_BASELINE = "keep_baseline"
    """Silence their loss, keep their reward in the baseline (compact filtering, DeepSWE)."""


class KlEstimator(StrEnum):
    """Which estimate."""

    K1 = "k1"
    """log(policy / reference): unbiased, of either sign."""
    K2 = "k2"
    """Half its square: biased, low variance, never negative."""
    K3 = "k3"
    """Unbiased and never negative."""


class KlPlace(StrEnum):
    """Where the KL term goes."""

    LOSS = "loss"
    """Added to every token's loss (GRPO, arXiv:2402.03300)."""
    REWARD = "reward"
    """Its sum over a sequence is taken off the reward, before any baseline (RLOO,
    arXiv:2402.14740)."""


class Correction(StrEnum):
    """How the weight trainer / engine is bounded; names and forms are those of TRL's vLLM modes."""

    TOKEN_TRUNCATE = "token_truncate"
    """Each token's weight is clamped (truncated importance sampling, IMPALA, arXiv:1802.01561)."""
    TOKEN_MASK = "token_mask"
    """Tokens whose weight is out of bounds are rejected."""
    SEQUENCE_TRUNCATE = "sequence_truncate"
    """The product over the sequence is clamped and holds for all its tokens."""
    SEQUENCE_MASK = "sequence_mask"
    """Sequences whose product is out of bounds are rejected as a whole."""

    @property
    def by_sequence(self) -> bool:
        """Whether a weight is that of a sequence."""
        return self in (Correction.SEQUENCE_TRUNCATE, Correction.SEQUENCE_MASK)

    @property
    def rejects(self) -> bool:
        """Whether out of bounds means out of the loss."""
        return self in (Correction.TOKEN_MASK, Correction.SEQUENCE_MASK)


class LossKind(StrEnum):
    """Which ratio, how it is bounded, and how token losses become one number."""

    DAPO = "dapo"
    """Clipped token ratios, mean over tokens (arXiv:2503.14476)."""
    GRPO = "grpo"
    """Clipped token ratios, mean over each sequence, then over sequences (arXiv:2402.03300)."""
    DR_GRPO = "dr_grpo"
    """Clipped token ratios, sum over a constant (arXiv:2503.20783)."""
    BNPO = "bnpo"
    """Clipped token ratios, mean over the tokens of each micro-batch (TRL)."""
    GSPO = "gspo"
    """The geometric mean of a sequence's ratios is clipped; then as `grpo` (arXiv:2507.18071)."""
    GSPO_TOKEN = "gspo_token"
    """Values of `gspo`, gradient of each token by its own advantage (arXiv:2507.18071)."""
    CISPO = "cispo"
    """Log likelihood, weighted by the ratio cut off at 1 + clip_high; mean over tokens: no token
    loses its gradient (arXiv:2506.13585)."""
    SAPO = "sapo"
    """A sigmoid gate instead of the clip; then as `grpo` (arXiv:2511.20347)."""
    REINFORCE_PP = "reinforce++"
    """Clipped token ratios, mean over tokens; made for advantages that are normalised over the
    batch, baseline `batch_mean` and scale `batch` (arXiv:2501.03262)."""
    RLOO = "rloo"
    """The product of a sequence's ratios is clipped, mean over sequences (arXiv:2402.14740)."""


OF_SEQUENCES = (LossKind.GSPO, LossKind.RLOO)
"""Losses whose ratio is that of a whole sequence: no token of it has a credit of its own."""
UNCLIPPED = (LossKind.CISPO, LossKind.SAPO)
"""Losses without a second bound `delta`: they have no clip that it could complete."""


@dataclass(frozen=True, slots=True)
class LossSpec:
    """Hyperparameters of the policy loss."""

    kind: LossKind = LossKind.DAPO
    clip_low: float = 0.2
    clip_high: float = 0.28
    delta: float | None = None
    """Upper bound of the ratio on tokens of negative advantage; must exceed 1 + clip_high."""
    importance_cap: float | None = 2.0
    """Upper bound of the truncated importance weight; None turns the weight off."""
    importance_floor: float | None = None
    """Lower bound of the importance weight."""
    correction: Correction = Correction.TOKEN_TRUNCATE
    """What the bounds of the importance weight do, and to what."""
    off_policy_threshold: float | None = None
    """Bad sequences further than this from the policy that sampled are silenced; None is off."""
    kl_coefficient: float = 0.0
    kl_estimator: KlEstimator = KlEstimator.K3
    kl_place: KlPlace = KlPlace.LOSS
    kl_correction: bool = False
    """Multiply the KL term by the ratio: the gradient is then that of the KL."""
    sapo_temperature_good: float = 1.0
    """Steepness of the gate of `sapo` on tokens of positive advantage."""
    sapo_temperature_bad: float = 1.05
    """Steepness on the others; above the first, for stability."""
    max_completion_tokens: int = 0
    """The constant of `dr_grpo`; 0 takes the longest sample of the batch."""

"""What one episode is: its identity, limits and variation knobs, all plain data.

- Everything random in an episode derives from `EpisodeSpec.seed`; the clock is an argument.
- Knobs depend on the group, never on the member, so that a group shares its first prompt.
- A knob that would show privileged facts (`hint="fix"`) is off unless asked for.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from regreen.common.v1 import (
    GRADER_BUILD_GATES_JUDGE,
    MODE_ANY_FIX,
    PIPELINE_SIMPLIFIED,
    Grader,
    Mode,
    Pipeline,
)
from regreen.dataset import v1 as pb
from regreen.ids import derive_seed
from regreen.rollout.reward import RewardSettings
from regreen.rpc.errors import InvalidArgument

Hint = Literal["none", "past", "fix"]


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of one episode; each that is hit ends it."""

    turns: int = 10
    """Model outputs (the paper: 30 steps simplified, 50 tool calls full)."""
    context_tokens: int = 2048
    """Longest prompt plus output; must fit the policy's context."""
    turn_tokens: int = 96
    """Most tokens sampled in one turn."""
    wall_s: float = 900.0
    """Wall time of the episode, its final validation not counted."""
    tool_s: float = 60.0
    """Time of one tool, validation excepted."""
    validation_s: float = 900.0
    """Time of one validation."""
    observation_chars: int = 480
    """Longest observation; about 150 tokens."""
    prompt_chars: int = 1060
    """Facts in the first message: error, requirements, packages, hint; more shows the log too."""
    idle_turns: int = 3
    """Outputs in a row that gain nothing (no usable call, or a call and result seen before in this
    context) that end the episode, or in the full pipeline the attempt."""
    attempt_turns: int = 12
    """Full pipeline: outputs spent on one error with one candidate fix."""
    tries: int = 3
    """Full pipeline: attempts on the same error."""

    def __post_init__(self) -> None:
        for spec in fields(self):
            if not getattr(self, spec.name) > 0:
                raise InvalidArgument(f"budget.{spec.name}", "must be positive")


SIMPLIFIED = Budget()
"""Small default of the simplified pipeline."""
FULL = Budget(turns=50, wall_s=4800.0)
"""The paper's limits of the full pipeline."""


SMALL_CONTEXT = 8192
"""Policies with at most this context get the small limits, which the demo trains with."""
_LONGEST_TURN = 4096
_MOST_CHARS = 16_000


def budget_for(budget: Budget, context_length: int) -> Budget:
    """`budget` with the room that a policy of that context has: an eighth of it for an answer, a
    twelfth for an observation and for the first message, each with a bound."""
    if context_length <= SMALL_CONTEXT:
        return replace(budget, context_tokens=min(budget.context_tokens, max(1, context_length)))
    chars = context_length // 4  # of about three to a token
    return replace(
        budget,
        context_tokens=context_length,
        turn_tokens=min(context_length // 8, _LONGEST_TURN),
        observation_chars=min(chars, _MOST_CHARS),
        prompt_chars=min(chars, _MOST_CHARS),
    )


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the policy draws tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class Knobs:
    """What is varied between groups (paper.md, question 2: diversity transfers)."""

    hint: Hint = "none"
    """`past`: the best past fix; `fix`: the reference fix itself (privileged; sets difficulty)."""
    vary_tools: bool = False
    """Rename tools and arguments and change the result format."""
    vary_budget: bool = False
    """Draw the number of turns from half to all of the budget."""
    confirm: bool = True
    """Confirm a passing validation on another fresh fork without the result cache."""
    coverage: bool = False
    """Measure coverage in the final validation."""
    keep_states: bool = False
    """Keep a State after every turn that may have changed files, so that the rollout can be
    branched there. Each ends what a command left running; they stay until somebody deletes them."""
    stop_early: bool = False
    """Simplified pipeline: a validation that the agent asks for stops where a required test is
    known not to pass. What it sees is shorter; the final one is always whole."""


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """One rollout to run."""

    pipeline: Pipeline.ValueType = PIPELINE_SIMPLIFIED
    mode: Mode.ValueType = MODE_ANY_FIX
    grader: Grader.ValueType = GRADER_BUILD_GATES_JUDGE
    seed: int = 0
    run_id: str = ""
    group_id: str = ""
    group_index: int = 0
    attempt: int = 0
    group_seed: int = 0
    policy_name: str = ""
    budget: Budget = SIMPLIFIED
    sampling: Sampling = field(default_factory=Sampling)
    knobs: Knobs = field(default_factory=Knobs)
    rewards: RewardSettings = field(default_factory=RewardSettings)

    def __post_init__(self) -> None:
        if not self.pipeline:
            raise InvalidArgument("pipeline", "is not said", "choose simplified or full")
        if not self.mode:
            raise InvalidArgument("mode", "is not said", "choose any-fix or keep-new")
        if not self.grader:
            raise InvalidArgument("grader", "is not said", "choose a grader")
        if self.knobs.stop_early and self.pipeline != PIPELINE_SIMPLIFIED:
            raise InvalidArgument(
                "knobs.stop_early",
                "would change what this pipeline compares, the errors of whole runs",
                "use it in the simplified pipeline",
            )

    def turns(self) -> int:
        """The turn limit after variation."""
        if not self.knobs.vary_budget:
            return self.budget.turns
        low = max(1, self.budget.turns // 2)
        return low + derive_seed(self.group_seed, "turns") % (self.budget.turns - low + 1)

    def tool_seed(self) -> int | None:
        """The seed of the tool set's variation; None leaves it as it ships."""
        return derive_seed(self.group_seed, "tools") if self.knobs.vary_tools else None

    def turn_seed(self, turn: int) -> int:
        """The sampling seed of one turn."""
        return derive_seed(self.seed, self.attempt, "turn", turn)


def spec_of_lease(lease: pb.Lease, *, policy_name: str = "") -> EpisodeSpec:
    """The episode that a leased rollout asks for; settings travel in the group's labels.

    Raises:
        InvalidArgument: a label is malformed; names it.
    """
    group = lease.group
    spec = EpisodeSpec(
        pipeline=group.pipeline,
        mode=group.mode,
        grader=group.grader,
        seed=lease.seed,
        run_id=group.run_id,
        group_id=group.id,
        group_index=lease.group_index,
        attempt=lease.attempt,
        group_seed=group.seed,
        policy_name=policy_name or group.labels.get("policy", ""),
        budget=SIMPLIFIED if group.pipeline == PIPELINE_SIMPLIFIED else FULL,
    )
    return with_labels(spec, group.labels)


def labels_of(
    budget: Budget, sampling: Sampling, knobs: Knobs, rewards: RewardSettings | None = None
) -> dict[str, str]:
    """Settings as group labels; `with_labels` reads them back."""
    parts: dict[str, Any] = {"budget": budget, "sampling": sampling, "knobs": knobs}
    found: dict[str, str] = {}
    for group, part in (parts | ({"reward": rewards} if rewards else {})).items():
        for item in fields(part):
            found[f"{group}.{item.name}"] = _text(getattr(part, item.name))
    return found


def with_labels(spec: EpisodeSpec, labels: Mapping[str, str]) -> EpisodeSpec:
    """`spec` with the settings that labels name (`budget.turns`, `reward.partial`, ...).

    Labels of other groups are not settings and are passed over; `check_settings` refuses them.

    Raises:
        InvalidArgument: an unknown field of a known group, or a value of the wrong type or range.
    """
    chosen: dict[str, dict[str, Any]] = {group: {} for group in _GROUPS}
    for label, text in labels.items():
        group, dot, name = label.partition(".")
        if not dot or group not in _GROUPS:
            continue
        part = getattr(spec, _GROUPS[group])
        if name not in {item.name for item in fields(part)}:
            raise InvalidArgument(
                f"labels[{label}]",
                "is no known setting",
                f"{group} has {', '.join(item.name for item in fields(part))}",
            )
        chosen[group][name] = _parse(label, text, getattr(part, name))
    # All fields of a group at once: what is in range may depend on their neighbours.
    parts = {_GROUPS[g]: replace(getattr(spec, _GROUPS[g]), **new) for g, new in chosen.items()}
    return replace(spec, **parts)


def check_settings(labels: Mapping[str, str]) -> None:
    """Refuse labels that would change nothing: for callers whose labels are all meant as settings.

    Raises:
        InvalidArgument: a label of no known group, or one that `with_labels` refuses.
    """
    for label in labels:
        group, dot, _ = label.partition(".")
        if not dot or group not in _GROUPS:
            known = ", ".join(f"{name}.*" for name in _GROUPS)
            raise InvalidArgument(
                f"labels[{label}]", "belongs to no group of settings", f"known are {known}"
            )
    with_labels(EpisodeSpec(), labels)


_GROUPS = {"budget": "budget", "sampling": "sampling", "knobs": "knobs", "reward": "rewards"}
"""Prefix of a label to the part of the spec that it sets."""


def _text(value: object) -> str:
    return ",".join(sorted(value)) if isinstance(value, frozenset) else str(value)


def _parse(label: str, text: str, like: object) -> object:
    if isinstance(like, bool):
        if text.lower() in ("true", "1", "false", "0"):
            return text.lower() in ("true", "1")
        raise InvalidArgument(
            f"labels[{label}]", f"{text!r} is no truth value", "use true or false"
        )
    if label == "knobs.hint" and text not in ("none", "past", "fix"):
        raise InvalidArgument(f"labels[{label}]", f"{text!r} is unknown", "use none, past or fix")
    if isinstance(like, frozenset):
        return frozenset(filter(None, map(str.strip, text.split(","))))
    try:
        value: object = type(like)(text)  # type: ignore[call-arg]
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(text)
        return value
    except ValueError as error:
        raise InvalidArgument(
            f"labels[{label}]", f"{text!r} is no {type(like).__name__}"
        ) from error

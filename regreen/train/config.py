"""Settings of training runs.

- What is fixed once a run exists is listed by `settings()` and stored with the run; the rest only
  says how this process works on it and may differ at every start.
- A wrong value is refused when the settings are made, with its name and the remedy.
- GRPO samples from the plain policy (temperature 1, no top-p or top-k): the logprobs that engines
  give are those of the plain policy, and would be wrong for any other.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from regreen.ids import check_run_name
from regreen.rpc.errors import InvalidArgument
from regreen.train.ledger import hyperparameters
from regreen.train.names import grader_of, mode_of, pipeline_of, split_of
from regreen.train.signals import KEEP_BASELINE, TRUNCATED_POLICIES

MAX_GROUP = 64
"""Samples that the policy service gives for one prompt, by its default limits."""
OPERATIONAL = frozenset(
    {
        "name",
        "concurrency",
        "colocate",
        "broadcast",
        "idle_deadline_s",
        "recovery_deadline_s",
        "publish",
    }
)
"""Settings that only say how a process works on a run."""
_PLAIN_SAMPLING = {"sampling.temperature": "1", "sampling.top_p": "1", "sampling.top_k": "0"}
"""Labels whose other values would make the recorded logprobs wrong."""


@dataclass(frozen=True, slots=True)
class SftConfig:
    """Settings of a supervised run."""

    name: str
    """Name of the run; the same name continues it."""
    start: str = "base"
    """Weights to start from: "base", or the name of a run."""
    base_uri: str = ""
    """Model folder of "base"; empty asks the policy service."""
    tasks: tuple[str, ...] = ()
    """Task ids; empty means every admitted task of `split`."""
    split: str = "train"
    """Split to take tasks from."""
    modes: tuple[str, ...] = ("any_fix", "keep_new")
    """Modes that expert trajectories are made and used for."""
    pipelines: tuple[str, ...] = ("simplified",)
    """Workflows that expert trajectories are made and used for."""
    styles: int = 3
    """Most expert trajectories of each task, mode and pipeline, each in other words."""
    max_guesses: int = 0
    """Trajectories with more steps that no visible fact suggests are left out."""
    budget_labels: Mapping[str, str] = field(default_factory=dict)
    """Episode settings as labels, for example {"budget.context_tokens": "2048"}."""
    epochs: int = 2
    """Passes over the training trajectories."""
    batch_size: int = 8
    """Trajectories of one optimizer step."""
    max_tokens: int = 4096
    """Longer trajectories are left out."""
    checkpoint_every: int = 5
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of order and experts."""
    hyperparameters: Mapping[str, float | int | str] = field(default_factory=dict)
    """Fields of `regreen.learner.v1.Hyperparameters`; the rest is the learner's default."""
    engine: str = ""
    """Learner engine; empty means the service's default."""

    publish: bool = True
    """Have the policy service serve the result."""
    concurrency: int = 2
    """Expert episodes at a time."""
    recovery_deadline_s: float = 900.0
    """Longest wait for a service to come back."""

    def __post_init__(self) -> None:
        check_run_name(self.name)
        split_of(self.split)
        _at_least(self, 1, "epochs", "batch_size", "checkpoint_every", "styles")
        _at_least(self, 2, "max_tokens")
        _at_least(self, 0, "max_guesses")
        _check_names(self.modes, self.pipelines)
        hyperparameters(self.hyperparameters)

    def settings(self) -> dict[str, Any]:
        """What is fixed once the run exists, as plain values."""
        return plain_settings(asdict(self))


@dataclass(frozen=True, slots=True)
class GrpoConfig:
    """Settings of a GRPO run."""

    name: str
    """Name of the run; the same name continues it."""
    start: str = "base"
    """Weights to start from: "base", or the name of a run, for example an SFT run."""
    base_uri: str = ""
    """Model folder of "base"; empty asks the policy service."""
    tasks: tuple[str, ...] = ()
    """Task ids; empty means every admitted task of `split`."""
    split: str = "train"
    """Split to take tasks from."""
    modes: tuple[str, ...] = ("any_fix",)
    """Modes to train in."""
    pipeline: str = "simplified"
    """Workflow."""
    full_share: float = 0.0
    """Share of groups that run the full pipeline, to train under the target conditions too."""
    grader: str = "build_gates"
    """What the reward is composed of."""
    steps: int = 20
    """Driver steps."""
    groups_per_step: int = 4
    """Groups that should teach in each step."""
    group_size: int = 4
    """Rollouts of one group."""
    max_refills: int = 4
    """Most groups added to a step to replace groups of equal rewards."""
    checkpoint_every: int = 1
    """Steps between checkpoints; between them rollouts come from an older version."""
    prefetch: bool = False
    """Roll out step n + 1 while step n is learned (one step off-policy)."""
    max_staleness: int = 8
    """Groups with older tokens than this many versions are not trained on."""
    seed: int = 0
    """Seed of the whole run."""
    hard_share: float = 0.25
    """Share of groups given to tasks that always failed so far."""
    hyperparameters: Mapping[str, float | int | str] = field(default_factory=dict)
    """Fields of `regreen.learner.v1.Hyperparameters`; the rest is the learner's default.

    `truncated` says what becomes of rollouts that a limit ended: `keep_baseline` (out of the loss),
    `mask_loss` (out of the baseline too), or `fail` (trained on like any other failure).
    """
    engine: str = ""
    """Learner engine; empty means the service's default."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels of every group, for example sampling settings that workers read."""

    concurrency: int = 4
    """Rollouts at a time in this process; 0 leaves all of them to other workers."""
    colocate: bool = False
    """Have the policy give its memory back while the learner steps: both use the same GPUs."""
    broadcast: bool = False
    """Have the policy's servers take weights from the learner by a process group, not from disk."""
    idle_deadline_s: float = 3600.0
    """Longest wait without any rollout being committed."""
    recovery_deadline_s: float = 900.0
    """Longest wait for a service to come back."""

    def __post_init__(self) -> None:
        check_run_name(self.name)
        split_of(self.split)
        _at_least(self, 1, "steps", "groups_per_step", "checkpoint_every")
        _at_least(self, 2, "group_size")
        if self.group_size > MAX_GROUP:
            raise InvalidArgument(
                "group_size", f"is {self.group_size}", f"give at most {MAX_GROUP} samples a prompt"
            )
        if not 0.0 <= self.full_share <= 1.0:
            raise InvalidArgument("full_share", f"is {self.full_share}", "give 0 to 1")
        _at_least(self, 0, "max_refills", "max_staleness", "concurrency")
        _check_names(self.modes, (self.pipeline,))
        grader_of(self.grader)
        hyperparameters(self.hyperparameters)
        if self.truncated not in TRUNCATED_POLICIES:
            raise InvalidArgument(
                "hyperparameters.truncated",
                f"is {self.truncated!r}",
                f"use one of {', '.join(TRUNCATED_POLICIES)}",
            )
        _check_sampling(self.labels)
        if self.colocate and self.broadcast:
            raise InvalidArgument(
                "broadcast", "needs GPUs of its own on each side, unlike colocate", "give one"
            )
        if self.colocate and self.prefetch:
            raise InvalidArgument(
                "prefetch", "samples while the learner steps, which colocate rules out", "give one"
            )

    @property
    def truncated(self) -> str:
        """What becomes of rollouts that hit a limit."""
        return str(self.hyperparameters.get("truncated") or KEEP_BASELINE)

    @property
    def turn_scores(self) -> bool:
        """Whether turns have a credit of their own beside their trajectory's."""
        return bool(float(self.hyperparameters.get("turn_score_coefficient") or 0))

    def settings(self) -> dict[str, Any]:
        """What is fixed once the run exists, as plain values."""
        return plain_settings(asdict(self))


def plain_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are stored with a run, as JSON-like values."""
    kept = {name: value for name, value in values.items() if name not in OPERATIONAL}
    return {n: list(v) if isinstance(v, tuple) else v for n, v in kept.items()}


def _at_least(config: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < least:
            raise InvalidArgument(name, f"is {value}", f"give at least {least}")


def _check_sampling(labels: Mapping[str, str]) -> None:
    for name, plain in _PLAIN_SAMPLING.items():
        given = labels.get(name, plain)
        try:
            same = float(given) == float(plain)
        except ValueError:
            same = False
        if not same:
            raise InvalidArgument(
                f"labels.{name}",
                f"is {given}, but the logprobs to train on are those of plain sampling",
                f"leave it out, or give {plain}",
            )


def _check_names(modes: tuple[str, ...], pipelines: tuple[str, ...]) -> None:
    if not modes or not pipelines:
        raise InvalidArgument(
            "modes" if not modes else "pipelines", "is empty", "name at least one"
        )
    for name in modes:
        mode_of(name, "modes")
    for name in pipelines:
        pipeline_of(name, "pipelines")

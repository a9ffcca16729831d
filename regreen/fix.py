"""Repairs one project on disk: what `regreen fix PATH` does.

- The project is copied; nothing in it is changed unless the caller applies the patch.
- A patch is offered as a fix only after it passed in a fresh fork without the agent in reach.
- "Not fixed" comes with the best attempt: the one with the fewest tests failing.
- A local task needs the sandbox, policy and judge services; nothing is stored.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from regreen.client.stack import Stack
from regreen.common import v1 as common_pb
from regreen.dataset import v1 as pb
from regreen.ids import derive_seed
from regreen.rollout.context import FULL, SIMPLIFIED, budget_for
from regreen.rollout.episode import run_episode
from regreen.rollout.knowledge import Knowledge
from regreen.rollout.progress import Show, show_turns
from regreen.rpc.errors import InvalidArgument
from regreen.sandbox import v1 as sandbox_pb
from regreen.tasks.local import Project, detect
from regreen.tasks.patch import describe_pins, moved_pins, onto_project, unified
from regreen.tasks.project import prepared_project
from regreen.train.weights import name_served


@dataclass(frozen=True, slots=True)
class FixOptions:
    """How hard to try."""

    attempts: int = 4
    pipeline: common_pb.Pipeline.ValueType = common_pb.PIPELINE_FULL
    grader: common_pb.Grader.ValueType = common_pb.GRADER_BUILD_GATES_JUDGE
    seed: int = 0
    settings: Mapping[str, str] = field(default_factory=dict)
    """Episode settings as labels, for example {"budget.turns": "20"}."""


@dataclass(frozen=True, slots=True)
class FixResult:
    """What came of it."""

    fixed: bool
    already_green: bool
    patch: str
    """Unified diff against the project; of the best attempt where none fixed it."""
    changes: tuple[common_pb.FileChange, ...]
    failing_before: int
    failing_after: int
    """Tests that fail with the patch, those that passed before included."""
    attempts: int
    summary: str
    pins: tuple[str, ...] = ()
    """Moved pins, for people."""


async def fix_project(
    stack: Stack,
    root: Path,
    home: Path,
    options: FixOptions,
    show: Show,
    *,
    python: str = "",
    lock: Path | None = None,
    tests: Sequence[str] = (),
    knowledge: Knowledge | None = None,
) -> FixResult:
    """Prepare the project in a sandbox and try to repair it; `knowledge` holds past fixes.

    `home` is that of the stack: the sandbox service reads blobs from there.

    Raises:
        InvalidArgument: no Python project, or one that cannot be described.
        MissingDependency: an interpreter or release is not to be had.
        RegreenError: a service does not answer.
    """
    interpreters = (await stack.sandbox.get_capabilities()).interpreters
    project = detect(root, interpreters, python=python, lock=lock, tests=tests)
    text = f"{project.name}, Python {project.python}, packages from {project.origin}"
    show("read project", 1, 1, text)
    for note in project.notes:
        show("read project", 1, 1, note)
    spec, state = await prepared_project(stack, project, home, show)
    failing = list(state.baseline.failing)
    if not failing and state.baseline.passing:
        done = f"all {len(state.baseline.passing)} tests pass already"
        return FixResult(False, True, "", (), 0, 0, 0, done)
    if not failing:
        last = (state.baseline.log.strip().splitlines() or ["no output"])[-1]
        raise InvalidArgument("test", f"no test was found ({last[:200]})", "name the tests' path")
    task = local_task(project, spec, state)
    best, made = await _attempt(stack, task, options, show, knowledge)
    result = _result(project, spec, state, best, made)
    show("repair", options.attempts, options.attempts, result.summary)
    return result


def local_task(
    project: Project, spec: sandbox_pb.EnvironmentSpec, state: sandbox_pb.State
) -> pb.Task:
    """A task of a project, for an episode; it is not stored."""
    return pb.Task(
        id=f"local-{project.name}",
        kind="local",
        environment=spec,
        fail_to_pass=state.baseline.failing,
        fail_to_pass_count=len(state.baseline.failing),
        pass_to_pass_count=len(state.baseline.passing),
        modes=[common_pb.MODE_ANY_FIX],
        state_id=state.id,
        error_log=state.baseline.log,
        split="test",
    )


async def _attempt(
    stack: Stack, task: pb.Task, options: FixOptions, show: Show, knowledge: Knowledge | None
) -> tuple[pb.Trajectory, int]:
    """The best of several attempts and how many were made; the first that is solved ends it."""
    best: pb.Trajectory | None = None
    made = 0
    policy = await stack.policy.get_policy()
    acting = policy.model
    if policy.policy.uri:  # a model behind an endpoint has no weights that we could name
        acting += f" ({await name_served(stack)})"
    usual = FULL if options.pipeline == common_pb.PIPELINE_FULL else SIMPLIFIED
    context = int(options.settings.get("budget.context_tokens") or policy.context_length)
    budget = budget_for(usual, context)
    for made in range(1, options.attempts + 1):
        text = f"{task.fail_to_pass_count} tests fail; policy {acting}"
        show("repair", made - 1, options.attempts, text)
        where = f"attempt {made} of {options.attempts}"
        trajectory = await run_episode(
            stack,
            task,
            listener=show_turns(show, "repair", made - 1, options.attempts, where),
            pipeline=options.pipeline,
            grader=options.grader,
            seed=derive_seed(options.seed, task.id, made - 1),
            budget=budget,
            settings=options.settings,
            policy_name=policy.model,
            knowledge=knowledge,
        )
        if best is None or _rank(trajectory) > _rank(best):
            best = trajectory
        if trajectory.reward.solved:
            break
    if best is None:
        raise InvalidArgument("attempts", f"is {options.attempts}", "give at least 1")
    return best, made


def _result(
    project: Project,
    spec: sandbox_pb.EnvironmentSpec,
    state: sandbox_pb.State,
    best: pb.Trajectory,
    made: int,
) -> FixResult:
    pins = [f"{pin.name}=={pin.version}" for pin in spec.pins]
    changes = onto_project(project.root, project.pin_files, pins, best.changes)
    before = set(state.baseline.failing)
    after = set(best.validation.failing) if _ran(best) else before
    fixed = best.reward.solved
    times = "1 attempt" if made == 1 else f"{made} attempts"
    summary = f"not fixed after {times}: {_still(before, after)}"
    if fixed:
        summary = f"fixed after {times}: all {len(before)} failing tests pass, verified"
    moved = describe_pins(pins, moved_pins(pins, best.changes))
    if moved:
        summary += f"; {', '.join(moved)}"
    if best.reward.hacks:
        summary += f"; flagged: {', '.join(best.reward.hacks)}"
    return FixResult(
        fixed=fixed,
        already_green=False,
        patch=unified(project.root, changes),
        changes=changes,
        failing_before=len(before),
        failing_after=len(after),
        attempts=made,
        summary=summary,
        pins=moved,
    )


def _still(before: Set[str], after: Set[str]) -> str:
    """What fails now of what failed before, and what fails besides."""
    text = f"{len(before & after)} of {len(before)} failing tests still fail"
    others = len(after - before)
    return f"{text}, and {others} other{'' if others == 1 else 's'}" if others else text


def _rank(trajectory: pb.Trajectory) -> tuple[bool, bool, int, float]:
    """Solved first, then unflagged, then fewer failing tests, then reward."""
    failing = len(trajectory.validation.failing) if _ran(trajectory) else 1 << 30
    reward = trajectory.reward
    return reward.solved, not reward.hacks, -failing, reward.value


def _ran(trajectory: pb.Trajectory) -> bool:
    """Whether the tests of an attempt ran to their end."""
    return trajectory.validation.outcome in (
        sandbox_pb.VALIDATION_OUTCOME_PASSED,
        sandbox_pb.VALIDATION_OUTCOME_FAILED,
    )

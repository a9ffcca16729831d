"""Repairs one project on disk: what `regreen fix PATH` does.

- The project is copied; nothing in it is changed unless the caller applies the patch.
- A patch is offered as a fix only after it passed in a fresh fork without the agent in reach.
- "Not fixed" comes with the best attempt: the one with the fewest tests still failing.
- A local task needs the sandbox and policy services; the judge takes part when it answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from regreen.blobs import open_blobs
from regreen.client.stack import Stack
from regreen.common import v1 as common_pb
from regreen.dataset import v1 as pb
from regreen.ids import derive_seed
from regreen.rollout.episode import run_episode
from regreen.rpc.errors import InfraError, RegreenError
from regreen.sandbox import v1 as sandbox_pb
from regreen.tasks.local import Project, detect, environment_of, pack

Show = Callable[[str, float, float, str], None]
"""Called with stage, done, total and a line of text."""


@dataclass(frozen=True, slots=True)
class FixOptions:
    """How hard to try."""

    attempts: int = 4
    pipeline: common_pb.Pipeline.ValueType = common_pb.PIPELINE_FULL
    grader: common_pb.Grader.ValueType = common_pb.GRADER_BUILD_GATES_JUDGE
    seed: int = 0


@dataclass(frozen=True, slots=True)
class FixResult:
    """What came of it."""

    fixed: bool
    already_green: bool
    patch: str
    """Unified diff of the fix, or of the best attempt; empty when nothing changed."""
    changes: tuple[common_pb.FileChange, ...]
    failing_before: int
    failing_after: int
    attempts: int
    summary: str
    trajectory_id: str = ""


async def fix_project(
    stack: Stack,
    root: Path,
    blobs: str | Path,
    options: FixOptions,
    show: Show,
    *,
    python: str = "",
    lock: Path | None = None,
    tests: Sequence[str] = (),
) -> FixResult:
    """Prepare the project in a sandbox and try to repair it.

    Raises:
        InvalidArgument: no Python project, or one that cannot be described.
        MissingDependency: an interpreter or release is not to be had.
        RegreenError: a service does not answer.
    """
    interpreters = (await stack.sandbox.get_capabilities()).interpreters
    project = detect(root, interpreters, python=python, lock=lock, tests=tests)
    text = f"{project.name}, Python {project.python}, packages from {project.origin}"
    show("read project", 1, 1, text)
    spec, state = await _prepare(stack, project, blobs, show)
    failing = list(state.baseline.failing)
    if not failing and state.baseline.passing:
        done = f"all {len(state.baseline.passing)} tests pass already"
        return FixResult(False, True, "", (), 0, 0, 0, done)
    task = local_task(project, spec, state)
    return await _attempt(stack, task, state, options, show)


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


async def _prepare(
    stack: Stack, project: Project, blobs: str | Path, show: Show
) -> tuple[sandbox_pb.EnvironmentSpec, sandbox_pb.State]:
    data, digest = pack(project.root)
    await open_blobs(blobs).put(data)
    show("pin packages", 0, 1, f"{len(project.pins)} packages")
    spec = await environment_of(project, digest)
    show("pin packages", 1, 1, f"{len(spec.pins)} packages, {len(spec.wheelhouse)} other releases")
    async for event in stack.state.prepare_state(spec):
        if event.HasField("state"):
            return spec, event.state
        progress = event.progress
        show(f"prepare: {progress.stage}", progress.done, progress.total, progress.message)
    raise InfraError("the sandbox service ended the preparation without a state")


async def _attempt(
    stack: Stack, task: pb.Task, state: sandbox_pb.State, options: FixOptions, show: Show
) -> FixResult:
    best: pb.Trajectory | None = None
    before = len(state.baseline.failing)
    policy = await stack.policy.get_policy()
    for attempt in range(options.attempts):
        show("repair", attempt, options.attempts, f"{before} tests fail; policy {policy.model}")
        trajectory = await run_episode(
            stack,
            task,
            pipeline=options.pipeline,
            grader=options.grader,
            seed=derive_seed(options.seed, task.id, attempt),
            policy_name=policy.model,
        )
        if best is None or _rank(trajectory) > _rank(best):
            best = trajectory
        if trajectory.reward.solved:
            break
    if best is None:
        raise InfraError("no attempt was made")
    patch = await _patch(stack, state, best)
    fixed = best.reward.solved
    after = len(best.validation.failing)
    verdict = "fixed" if fixed else "not fixed"
    made = attempt + 1
    summary = f"{verdict} after {made} attempts: {after} of {before} failing tests still fail"
    if fixed:
        summary = f"fixed after {made} attempts: all {before} failing tests pass, verified"
    if best.reward.hacks:
        summary += f"; flagged: {', '.join(best.reward.hacks)}"
    show("repair", options.attempts, options.attempts, summary)
    return FixResult(
        fixed, False, patch, tuple(best.changes), before, after, made, summary, best.id
    )


def _rank(trajectory: pb.Trajectory) -> tuple[bool, bool, int, float]:
    """Solved first, then unflagged, then fewer failing tests, then reward."""
    ran = trajectory.validation.outcome in (
        sandbox_pb.VALIDATION_OUTCOME_PASSED,
        sandbox_pb.VALIDATION_OUTCOME_FAILED,
    )
    failing = len(trajectory.validation.failing) if ran else 1 << 30
    reward = trajectory.reward
    return reward.solved, not reward.hacks, -failing, reward.value


async def _patch(stack: Stack, state: sandbox_pb.State, best: pb.Trajectory) -> str:
    """The unified diff of an attempt, made in a fresh sandbox."""
    if not best.changes:
        return ""
    sandbox = await stack.sandbox.create_sandbox(state.id, ttl_s=120.0)
    try:
        for change in best.changes:
            path = f"/work/repo/{change.path}"
            if change.kind == common_pb.CHANGE_KIND_DELETE:
                await stack.sandbox.run(sandbox.id, ["rm", "-f", path], timeout_s=10.0)
            else:
                await stack.sandbox.write_file(sandbox.id, path, change.content, mode=change.mode)
        return (await stack.sandbox.diff(sandbox.id)).unified
    except RegreenError as error:
        raise InfraError(f"the diff could not be rendered: {error.message}") from error
    finally:
        await stack.sandbox.delete_sandbox(sandbox.id)

"""The end of an episode: diff, validation on fresh forks, judge, reward.

- The verdict depends on the diff alone; what the agent's own validations said is not looked at.
- A pass counts only when another fresh fork confirms it without the result cache, once for each
  diff: rollouts of one process that end with the same diff share the confirmation.
- What is scored ran serially, a failure too: each of several workers had a part of the limits.
- The judge's rules look at every rollout, so that hacks are counted under every grader; its model,
  where one is configured, is asked only when the grader says so and the build is green. The label
  `judge` then says which model took part, or "rules only".
- Coverage is measured on both sides or on none; tests that come and go with data prove nothing.
- Trouble of the platform raises; it never becomes a reward.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from regreen.common.v1 import (
    CHANGE_KIND_ADD,
    CHANGE_KIND_MODIFY,
    GRADER_BUILD_GATES_JUDGE,
    TEST_OUTCOME_PASSED,
    FileChange,
)
from regreen.dataset import v1 as pb
from regreen.judge import v1 as judge_pb
from regreen.lockfile import normalize
from regreen.rollout.context import EpisodeSpec
from regreen.rollout.dependencies import ToolError
from regreen.rollout.facts import REPO, Facts
from regreen.rollout.reward import RewardSettings, compose, of_control
from regreen.rollout.tools import Workbench
from regreen.rpc.errors import InfraError, InvalidArgument, NoSuchFile
from regreen.sandbox import v1 as sandbox_pb

_LOG_CHARS = 20_000
_ORIGINAL_BYTES = 1 << 20
_KEPT = 512
_Diff = tuple[str, int, str, bool]
"""State id, mode, digest of the changes, and whether coverage was measured."""


@dataclass(slots=True)
class Validated:
    """What the rollouts of one process share of their validations."""

    before: dict[tuple[str, bool], sandbox_pb.Validation] = field(default_factory=dict)
    """Of an untouched State, by State id and whether coverage was measured."""
    confirmations: dict[_Diff, sandbox_pb.Validation] = field(default_factory=dict)
    """What another fresh fork said of a diff that had passed: the newest `_KEPT` of them."""
    locks: "WeakValueDictionary[_Diff, asyncio.Lock]" = field(default_factory=WeakValueDictionary)
    """Held while a diff is being confirmed: rollouts that found the same one wait for it."""

    async def confirmation(
        self, diff: _Diff, validate: Callable[[], Awaitable[sandbox_pb.Validation]]
    ) -> sandbox_pb.Validation:
        """The one confirmation of `diff`; a failed one counts for all that found the diff.

        One that hit a limit is tried once more, and counts for nobody else.
        """
        async with self.locks.setdefault(diff, asyncio.Lock()):
            if diff in self.confirmations:
                return self.confirmations[diff]
            found = await validate()
            if not found.lasting:
                found = await validate()
            if found.lasting:
                self.confirmations[diff] = found
                while len(self.confirmations) > _KEPT:
                    del self.confirmations[next(iter(self.confirmations))]
            return found

    async def untouched(self, bench: Workbench, *, coverage: bool) -> sandbox_pb.Validation:
        """The validation of the untouched State.

        Raises:
            InfraError: it hit a limit twice, though it came to its end when the State was gated.
        """
        key = (bench.task.state_id, coverage)
        if key not in self.before:
            found = await bench.validate([], coverage=coverage)
            if not found.lasting or found.workers > 1:
                found = await bench.validate([], coverage=coverage, fresh=True)
            if not found.lasting:
                raise InfraError(f"the untouched State cannot be validated now: {found.summary}")
            self.before[key] = found
        return self.before[key]


async def conclude(
    bench: Workbench,
    spec: EpisodeSpec,
    trajectory: pb.Trajectory,
    shared: Validated,
    settings: RewardSettings | None = None,
) -> None:
    """Grade what the sandbox of a finished episode holds; fills in the trajectory.

    `settings` stand above those of the spec.

    Raises:
        RegreenError: trouble of the platform.
    """
    unified = ""
    changes: list[FileChange] = []
    try:
        changes, unified = await bench.diff()
    except ToolError as error:
        trajectory.labels["diff"] = str(error)
    validation = await _validate(bench, spec, changes, trajectory, shared)
    before = await shared.untouched(bench, coverage=spec.knobs.coverage)
    evidence = await _evidence(bench, trajectory, changes, unified, validation, before)
    verdict = await _judge(bench, spec, evidence, validation, trajectory)
    test = bench.task.environment.test
    reward = compose(
        grader=spec.grader,
        end=trajectory.end,
        validation=validation,
        verdict=verdict,
        turns=trajectory.turns,
        changes=changes,
        fail_to_pass=list(bench.task.fail_to_pass) or list(test.fail_to_pass),
        pass_to_pass=[
            t.id
            for t in before.tests
            if t.outcome == TEST_OUTCOME_PASSED and t.id not in test.unstable
        ],
        rebuilds_without_edit=bench.rebuilds_without_edit,
        settings=settings or spec.rewards,
    )
    if bench.task.labels.get("control") == "true":
        trajectory.labels["control"] = "true"
        reward = of_control(reward, validation, settings or spec.rewards)
    trajectory.changes.extend(changes)
    trajectory.validation.CopyFrom(validation)
    trajectory.verdict.CopyFrom(verdict)
    trajectory.reward.CopyFrom(reward)


async def _validate(
    bench: Workbench,
    spec: EpisodeSpec,
    changes: Sequence[FileChange],
    trajectory: pb.Trajectory,
    shared: Validated,
) -> sandbox_pb.Validation:
    coverage = spec.knobs.coverage
    validation = await bench.validate(changes, coverage=coverage)
    if validation.workers > 1 and not _to_confirm(validation, spec):
        validation = await bench.validate(changes, fresh=True, coverage=coverage)
    if not _to_confirm(validation, spec):
        return validation
    diff = bench.task.state_id, int(spec.mode), validation.changes_sha256, coverage
    again = await shared.confirmation(
        diff, lambda: bench.validate(changes, fresh=True, coverage=coverage)
    )
    if again.outcome != validation.outcome:
        trajectory.labels["flaky"] = "a pass was not confirmed on another fresh fork"
    return again


def _to_confirm(validation: sandbox_pb.Validation, spec: EpisodeSpec) -> bool:
    """Whether another fork is to confirm a validation, serially."""
    return spec.knobs.confirm and validation.outcome == sandbox_pb.VALIDATION_OUTCOME_PASSED


async def _evidence(
    bench: Workbench,
    trajectory: pb.Trajectory,
    changes: Sequence[FileChange],
    unified: str,
    after: sandbox_pb.Validation,
    before: sandbox_pb.Validation,
) -> judge_pb.Evidence:
    """What the judge may look at."""
    unstable = bench.task.environment.test.unstable
    return judge_pb.Evidence(
        trajectory_id=trajectory.id,
        task_id=bench.task.id,
        error_log=bench.facts.log[-_LOG_CHARS:],
        changes=changes,
        unified_diff=unified,
        originals=await _originals(bench, changes),
        before=without_tests(before, unstable),
        after=without_tests(after, unstable),
        commands=bench.commands,
        mode=trajectory.mode,
        protected_paths=bench.task.environment.test.protected_paths,
        rebuilds_without_edit=bench.rebuilds_without_edit,
        installed_modules=installed_modules(bench.facts),
    )


def without_tests(validation: sandbox_pb.Validation, ids: Collection[str]) -> sandbox_pb.Validation:
    """A validation as if these tests did not exist."""
    found = sandbox_pb.Validation()
    found.CopyFrom(validation)
    left_out = frozenset(ids)
    del found.tests[:]
    found.tests.extend(test for test in validation.tests if test.id not in left_out)
    return found


def installed_modules(facts: Facts) -> list[str]:
    """Top-level modules of the installed packages, the project itself not counted."""
    own = normalize(facts.package)
    packages = {name for name in facts.lock.pins if name != own and name not in facts.modules}
    modules = {module for module, package in facts.modules.items() if package != own}
    return sorted({name.replace("-", "_") for name in packages} | modules)


async def _judge(
    bench: Workbench,
    spec: EpisodeSpec,
    evidence: judge_pb.Evidence,
    validation: sandbox_pb.Validation,
    trajectory: pb.Trajectory,
) -> judge_pb.Verdict:
    green = validation.outcome == sandbox_pb.VALIDATION_OUTCOME_PASSED
    asked = green and spec.grader == GRADER_BUILD_GATES_JUDGE
    started = bench.clock()
    verdict = await bench.stack.judge.judge(
        evidence,
        model_use=judge_pb.MODEL_USE_IF_CONFIGURED if asked else judge_pb.MODEL_USE_NEVER,
    )
    bench.spend("judge", bench.clock() - started)
    if asked:
        trajectory.labels["judge"] = verdict.model if verdict.model_used else "rules only"
    return verdict


async def _originals(bench: Workbench, changes: Sequence[FileChange]) -> list[FileChange]:
    """Content before the change; puts the sandbox back to the State to read it."""
    paths = [change.path for change in changes if change.kind != CHANGE_KIND_ADD]
    if not paths:
        return []
    await bench.stack.sandbox.restore_sandbox(bench.sandbox_id, bench.task.state_id)
    found: list[FileChange] = []
    for path in paths:
        try:
            file = await bench.stack.sandbox.read_file(
                bench.sandbox_id, f"{REPO}/{path}", max_bytes=_ORIGINAL_BYTES
            )
        except (NoSuchFile, InvalidArgument):
            continue  # was no regular file
        found.append(FileChange(path=path, kind=CHANGE_KIND_MODIFY, content=file.content))
    return found

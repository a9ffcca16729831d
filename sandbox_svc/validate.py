"""Judges a diff: the pinned build and tests in a fresh fork of the task's State.

- The verdict depends on the State, the allowed part of the diff and the options, on nothing else
  that an agent could write: its sandbox, environment and processes are not part of the fork.
- Tests and validation files are those of the State; what the diff says about them is reported.
- The lock file is the only way to change the environment; the validator installs from it itself.
- A required test counts only if the trusted runner reported it as passed and the run ended whole.
- Equal requests share one run; results are cached, except after a timeout or trouble of our own.
"""

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from regreen.lockfile import Lock, LockChange, lock_change, normalize, parse_lock
from regreen.rpc.errors import FailedPrecondition, InfraError, InvalidArgument, NotFound
from sandbox_svc.backends.base import Box, Command, EndReason, Limits, Runtime
from sandbox_svc.builders import testrun
from sandbox_svc.builders.base import LOCK, REPO, TOOLS, FileChange
from sandbox_svc.builders.protect import Reverted, check_changes, split_changes
from sandbox_svc.builders.testrun import TestResult, TestRun
from sandbox_svc.states import State, StateStore

CACHE_ENTRIES = 20_000
SYNC_TIMEOUT_S = 180.0
SHOWN_IDS = 5


class Outcome(StrEnum):
    """How a validation ended."""

    PASSED = "passed"
    FAILED = "failed"
    BUILD_FAILED = "build_failed"
    TIMEOUT = "timeout"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class ValidationOptions:
    """What else decides a verdict."""

    held_pins: Mapping[str, str] = field(default_factory=dict)
    """Packages that must stay at exactly this version; `python` holds the interpreter."""
    required_tests: tuple[str, ...] = ()
    """Ids that must pass; empty means the State's fail-to-pass ids and all that passed before."""
    coverage: bool = False
    timeout_s: float = 0.0
    """0 means the State's own."""
    seed: int = 0
    repeat: int = 1
    """Runs in so many forks; passes only if every run passes."""


@dataclass(frozen=True, slots=True)
class Validation:
    """The verdict of the pinned build and tests."""

    state_id: str
    changes_sha256: str
    outcome: Outcome
    summary: str
    tests: tuple[TestResult, ...] = ()
    """Every test that reported or was required; an absent one has the outcome `missing`."""
    counts: Mapping[str, int] = field(default_factory=dict)
    failing: tuple[str, ...] = ()
    """Required ids that did not pass."""
    reverted: tuple[Reverted, ...] = ()
    log: str = ""
    error_lines: tuple[str, ...] = ()
    seconds: float = 0.0
    cached: bool = False
    coverage: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Per file: lines that ran and lines that can run."""


class _Rejected(Exception):
    """The diff asks for something that is not allowed."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """A checked request."""

    state: State
    changes: tuple[FileChange, ...]
    reverted: tuple[Reverted, ...]
    lock: FileChange | None
    options: ValidationOptions
    sha256: str

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.state.metadata


class Validator:
    """Validates against the states of one service."""

    def __init__(
        self,
        states: StateStore,
        runtime: Runtime,
        *,
        limits: Limits | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._states, self._runtime = states, runtime
        self._limits = limits or Limits()
        self._clock = clock or asyncio.get_running_loop().time
        self._cache: OrderedDict[str, Validation] = OrderedDict()
        self._running: dict[str, asyncio.Task[Validation]] = {}
        self._indexes: dict[str, Mapping[str, Any]] = {}

    async def validate(
        self,
        state_id: str,
        changes: Iterable[FileChange],
        options: ValidationOptions | None = None,
        *,
        skip_cache_lookup: bool = False,
    ) -> Validation:
        """The verdict on a diff.

        Raises:
            NotFound: no such state.
            InvalidArgument: a malformed change or option.
            FailedPrecondition: the state was not prepared by a builder.
            InfraError: the platform failed; retry, never score.
        """
        plan = self._plan(state_id, changes, options or ValidationOptions())
        key = _key(plan)
        found = self._cache.get(key)
        if found is not None and not skip_cache_lookup:
            self._cache.move_to_end(key)
            return replace(found, cached=True)
        task = self._running.get(key)
        if task is None:
            task = asyncio.create_task(self._run_and_keep(plan, key))
            self._running[key] = task
            task.add_done_callback(lambda _: self._running.pop(key, None))
        return await asyncio.shield(task)

    async def close(self) -> None:
        """End validations that are still running."""
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _plan(
        self, state_id: str, changes: Iterable[FileChange], options: ValidationOptions
    ) -> _Plan:
        state = self._states.get(state_id)
        if "baseline" not in state.metadata:
            raise FailedPrecondition(f"state {state_id} has no baseline; prepare it from a spec")
        if not 1 <= options.repeat <= 10:
            raise InvalidArgument("repeat", f"is {options.repeat}", "use 1 to 10")
        checked = check_changes(changes)
        facts = state.metadata
        kept, reverted, lock = split_changes(
            checked, facts["protected"], facts["settings"], facts.get("modules", ())
        )
        digest = changes_sha256([*kept, *([lock] if lock else [])])
        return _Plan(state, kept, reverted, lock, options, digest)

    async def _run_and_keep(self, plan: _Plan, key: str) -> Validation:
        started = self._clock()
        verdict = await self._judge(plan)
        verdict = replace(verdict, seconds=round(self._clock() - started, 3))
        if verdict.outcome is not Outcome.TIMEOUT:
            self._cache[key] = verdict
            while len(self._cache) > CACHE_ENTRIES:
                self._cache.popitem(last=False)
        return verdict

    async def _judge(self, plan: _Plan) -> Validation:
        try:
            change = self._check_lock(plan)
        except _Rejected as refusal:
            return _verdict(plan, Outcome.REJECTED, str(refusal))
        verdict = await self._once(plan, change, plan.options.seed)
        for number in range(1, plan.options.repeat):
            if verdict.outcome is not Outcome.PASSED:
                break
            again = await self._once(plan, change, plan.options.seed)
            if again.outcome is not Outcome.PASSED:
                summary = f"run {number + 1} differs from the first: {again.summary}"
                verdict = replace(again, summary=summary)
        return verdict

    def _check_lock(self, plan: _Plan) -> LockChange | None:
        """What the lock asks for, checked against the wheelhouse and the held pins."""
        before = parse_lock(plan.facts["lock"])
        try:
            after = self._new_lock(plan, before)
        except InvalidArgument as error:
            raise _Rejected(str(error)) from error
        for name, version in plan.options.held_pins.items():
            held = normalize(name)
            has = after.python if held == "python" else after.pins.get(held, "(absent)")
            if has != version:
                raise _Rejected(f"{held} must stay at {version} in this task, the lock has {has}")
        if plan.lock is None:
            return None
        change = lock_change(before, after)
        if change.python and change.python not in plan.facts["interpreters"]:
            allowed = ", ".join(sorted(plan.facts["interpreters"]))
            raise _Rejected(f"{LOCK}: python=={change.python} is not offered; there is {allowed}")
        index = self._index(plan.facts["wheelhouse"])
        for name, version in sorted(change.installed.items()):
            if version not in index.get(name, {}):
                line = after.lines.get(name, 0)
                offered = ", ".join(sorted(index.get(name, {}))) or "no release of it"
                raise _Rejected(
                    f"{LOCK} line {line}: {name}=={version} is not in the wheelhouse; "
                    f"it has {offered}"
                )
        return change

    def _new_lock(self, plan: _Plan, before: Lock) -> Lock:
        if plan.lock is None:
            return before
        if plan.lock.content is None:
            raise _Rejected(f"{LOCK} was deleted; it must say what is installed")
        after = parse_lock(plan.lock.content)
        return after if after.python else replace(after, python=before.python)

    def _index(self, house: str) -> Mapping[str, Any]:
        if house not in self._indexes:
            try:
                self._indexes[house] = json.loads(Path(house, "index.json").read_text("utf-8"))
            except OSError as error:
                raise InfraError(f"the wheelhouse of the state is gone: {error}") from error
        return self._indexes[house]

    async def _once(self, plan: _Plan, change: LockChange | None, seed: int) -> Validation:
        """One run in one fresh fork."""
        state = plan.state
        self._states.hold(state.layers)
        try:
            box = await self._runtime.create(state.layers, limits=self._limits, mounts=state.mounts)
            try:
                return await self._in_box(plan, change, seed, box)
            finally:
                await box.delete()
        finally:
            self._states.release(state.layers)

    async def _in_box(
        self, plan: _Plan, change: LockChange | None, seed: int, box: Box
    ) -> Validation:
        if change is not None and plan.lock is not None:
            await box.write_file(f"{REPO}/{LOCK}", plan.lock.content or b"")
            if not change.empty:
                failed = await self._sync(plan, box)
                if failed is not None:
                    return failed
        plan = await _apply(plan, box)
        options = testrun.options_of(plan.facts, plan.state.env)
        options = replace(
            options,
            coverage=plan.options.coverage,
            seed=seed,
            timeout_s=plan.options.timeout_s or options.timeout_s,
        )
        return _conclude(plan, await testrun.run_tests(box, options))

    async def _sync(self, plan: _Plan, box: Box) -> Validation | None:
        """Install what the lock says, before any change of the source is there."""
        interpreter = plan.facts["interpreters"][plan.facts["python"]]
        done = await box.run(
            Command(
                (interpreter, "-I", f"{TOOLS}/lib/sync_env.py"),
                env=plan.state.env,
                cwd="/work",
                timeout_s=SYNC_TIMEOUT_S,
            )
        )
        if done.ok:
            return None
        if done.reason is EndReason.INFRA:
            raise InfraError(f"the environment could not be installed: {done.stderr.text[-500:]}")
        log = testrun.readable_log(done)
        if done.reason is EndReason.TIMEOUT:
            return _verdict(plan, Outcome.TIMEOUT, "installing the lock took too long", log=log)
        first = next((line for line in log.splitlines() if line.strip()), "no output")
        return _verdict(
            plan, Outcome.BUILD_FAILED, f"the lock cannot be installed: {first}", log=log
        )


def changes_sha256(changes: Iterable[FileChange]) -> str:
    """Digest of the canonical form of a diff."""
    rows = [
        [c.path, c.mode, None if c.content is None else hashlib.sha256(c.content).hexdigest()]
        for c in sorted(changes, key=lambda c: c.path)
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _key(plan: _Plan) -> str:
    options = plan.options
    parts = [
        plan.state.id,
        plan.sha256,
        [[r.path, r.reason] for r in plan.reverted],
        sorted(options.held_pins.items()),
        sorted(options.required_tests),
        options.coverage,
        options.timeout_s,
        options.seed,
        options.repeat,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


async def _apply(plan: _Plan, box: Box) -> _Plan:
    """Write the kept changes into the fork; one that cannot be written is reported."""
    deleted = [f"{REPO}/{c.path}" for c in plan.changes if c.content is None]
    if deleted:
        await box.run(Command(("rm", "-f", "--", *deleted), cwd="/"))
    reverted = list(plan.reverted)
    applied: list[FileChange] = []
    for change in plan.changes:
        if change.content is None:
            applied.append(change)
            continue
        mode = 0o755 if change.mode & 0o100 else 0o644
        try:
            await box.write_file(f"{REPO}/{change.path}", change.content, mode)
            applied.append(change)
        except (InvalidArgument, NotFound) as error:
            reverted.append(Reverted(change.path, f"unwritable: {error}"))
    return replace(plan, changes=tuple(applied), reverted=tuple(reverted))


def required_ids(facts: Mapping[str, Any], options: ValidationOptions) -> frozenset[str]:
    """Ids that must pass for a diff to pass."""
    if options.required_tests:
        return frozenset(options.required_tests)
    test, baseline = facts["spec"]["test"], facts["baseline"]
    broken = test["fail_to_pass"] or baseline["failing"]
    return frozenset([*broken, *baseline["passing"]]) - frozenset(test["unstable"])


def _verdict(plan: _Plan, outcome: Outcome, summary: str, *, log: str = "") -> Validation:
    failing = (
        () if outcome is Outcome.PASSED else tuple(sorted(required_ids(plan.facts, plan.options)))
    )
    return Validation(
        plan.state.id, plan.sha256, outcome, summary,
        failing=failing, reverted=plan.reverted, log=log,
    )  # fmt: skip


def _conclude(plan: _Plan, run: TestRun) -> Validation:
    """The verdict that a test run supports."""
    required = required_ids(plan.facts, plan.options)
    passed = run.ids("passed")
    failing = tuple(sorted(i for i in required - passed if not _collected_green(i, run, passed)))
    missing = [TestResult(i, "missing") for i in failing if i not in run.tests]
    tests = tuple(sorted([*run.tests.values(), *missing], key=lambda t: t.id))
    counts: dict[str, int] = {}
    for test in tests:
        counts[test.outcome] = counts.get(test.outcome, 0) + 1
    outcome, summary = _decide(run, required, failing)
    return Validation(
        state_id=plan.state.id,
        changes_sha256=plan.sha256,
        outcome=outcome,
        summary=summary,
        tests=tests,
        counts=counts,
        failing=failing,
        reverted=plan.reverted,
        log=run.log,
        error_lines=testrun.error_lines(run),
        coverage=run.coverage,
    )


def _collected_green(required: str, run: TestRun, passed: frozenset[str]) -> bool:
    """Whether a module that could not be collected is whole now.

    The baseline knows such a module by its path alone: it has passed when it is collected, some
    test of it passed and none failed.
    """
    if "::" in required or required in run.collect_errors:
        return False
    inside = (f"{required}::", f"{required}/")
    errors = any(i.startswith(inside) for i in run.collect_errors)
    bad = any(i.startswith(inside) for i in run.ids("failed", "error"))
    return not errors and not bad and any(i.startswith(inside) for i in passed)


def _decide(
    run: TestRun, required: frozenset[str], failing: tuple[str, ...]
) -> tuple[Outcome, str]:
    if run.result.reason is EndReason.TIMEOUT:
        return Outcome.TIMEOUT, "the tests did not end in time"
    if run.tampered:
        return Outcome.FAILED, f"the run is not believed: {run.tampered}"
    if run.result.reason is not EndReason.EXIT:
        return Outcome.FAILED, f"the test run was ended by {run.result.reason.value}"
    if run.crash and not run.tests:
        return Outcome.BUILD_FAILED, f"pytest cannot start: {run.crash}"
    if not run.complete:
        return Outcome.FAILED, "the test run ended before its own end (exit inside a test?)"
    if not run.tests and run.collect_errors:
        first = next(iter(run.collect_errors.values())) or "an error"
        return Outcome.BUILD_FAILED, f"no test can be collected: {first}"
    if not run.tests:
        lines = [line for line in run.log.strip().splitlines() if line.strip()]
        return Outcome.BUILD_FAILED, f"no test ran: {lines[-1] if lines else 'no output'}"
    if failing:
        shown = ", ".join(failing[:SHOWN_IDS]) + (" ..." if len(failing) > SHOWN_IDS else "")
        return Outcome.FAILED, f"{len(failing)} of {len(required)} required tests fail: {shown}"
    if run.status not in (0, 1):
        return Outcome.FAILED, f"pytest ended with status {run.status}"
    return Outcome.PASSED, f"all {len(required)} required tests pass"

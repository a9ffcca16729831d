"""The admission gate: a task counts only if it is broken, fixable and stable, each shown twice.

- Admitted means: the broken State fails the recorded tests, a diff without effect fails, and the
  reference fix passes every required test, each in `repeats` fresh forks without a cached answer.
- A test whose outcome differs between equal runs is never required; a task that has no stable
  fail-to-pass test, or shows other unstable tests in every round, is quarantined with the outcomes
  as evidence.
- Trouble of the platform is raised, never turned into a verdict.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from regreen.common.v1 import common_pb2
from regreen.pkgindex import PackageIndex
from regreen.rpc.errors import (
    FailedPrecondition,
    InvalidArgument,
    MissingDependency,
    NotFound,
    RegreenError,
)
from regreen.sandbox.v1 import sandbox_pb2 as pb
from regreen.tasks import environment as env
from regreen.tasks.model import Fix, TaskRecord, ids_sha256
from regreen.tasks.upstream import release_files

NOOP_PATH = "regreen-noop.txt"
STEADY_ROUNDS = 3
_TRIES = 3
"""Runs that may hit a limit before a task waits for a quieter machine."""
PASSED = common_pb2.TEST_OUTCOME_PASSED


class GateClient(Protocol):
    """What the gate needs of the sandbox service."""

    async def prepare(self, spec: pb.EnvironmentSpec) -> pb.State:
        """The state of an environment."""
        ...

    async def validate(
        self,
        state_id: str,
        changes: Sequence[common_pb2.FileChange],
        *,
        held_pins: Mapping[str, str],
        required_tests: Sequence[str],
        skip_cache_lookup: bool,
    ) -> pb.Validation:
        """The verdict on a diff."""
        ...

    async def read_files(self, state_id: str, paths: Sequence[str]) -> Mapping[str, bytes]:
        """Files of a state's repository."""
        ...


@dataclass(frozen=True, slots=True)
class Check:
    """One check of the gate on one repeat."""

    name: str
    repeat: int
    ok: bool
    detail: str
    results_sha256: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """The gate's decision with its evidence."""

    task_id: str
    status: str
    """`admitted`, `rejected`, `quarantined`, or `waiting` for something this host lacks."""
    reason: str
    checks: tuple[Check, ...] = ()
    flaky: tuple[str, ...] = ()
    state_id: str = ""
    python: str = ""
    fail_to_pass: tuple[str, ...] = ()
    """As seen here: fail in the broken State, pass with the reference fix, stable."""
    pass_to_pass: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    """Recorded fail-to-pass ids that the reference fix does not turn green here."""
    error_log: str = ""
    error_lines: tuple[str, ...] = ()
    fixes: Mapping[str, str] = field(default_factory=dict)
    """Per reference fix `mode/origin`: `ok` or what was wrong."""
    seconds: float = 0.0
    """Mean wall time of one validation of the reference fix."""

    @property
    def admitted(self) -> bool:
        return self.status == "admitted"


@dataclass(slots=True)
class _Seen:
    """Runs of the same bytes: one mapping of id to passed-or-not per repeat."""

    runs: list[dict[str, bool]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, validation: pb.Validation) -> None:
        self.runs.append({t.id: t.outcome == PASSED for t in validation.tests})
        self.seconds.append(validation.duration.ToTimedelta().total_seconds())

    def passing(self) -> set[str]:
        """Ids that passed in every run."""
        sets = [{i for i, ok in run.items() if ok} for run in self.runs]
        return sets[0].intersection(*sets[1:]) if sets else set()

    def flaky(self) -> set[str]:
        """Ids that passed in one run and not in another."""
        sets = [{i for i, ok in run.items() if ok} for run in self.runs]
        return sets[0].union(*sets[1:]) - self.passing() if sets else set()


class _Unfinished(Exception):
    """Run after run hit a limit, so that nothing is known of the task."""


class Gate:
    """Judges tasks through a sandbox service."""

    def __init__(
        self,
        client: GateClient,
        distributions: env.Distributions,
        index: PackageIndex,
        *,
        repeats: int = 2,
    ) -> None:
        if not 1 <= repeats <= 10:
            raise InvalidArgument("repeats", f"is {repeats}", "use 1 to 10")
        self.client, self.distributions, self.index = client, distributions, index
        self.repeats = repeats

    async def judge(self, task: TaskRecord, python: str = "") -> Verdict:
        """Judge one task; `python` asks for another interpreter than the record's.

        Raises:
            Unavailable, InfraError: the platform failed; try again.
        """
        try:
            spec = env.environment(task, self.distributions, python)
            state = await self.client.prepare(spec)
        except MissingDependency as error:
            return Verdict(task.id, "waiting", str(error), python=python)
        except FailedPrecondition as error:
            return Verdict(task.id, "waiting", f"cannot be prepared here: {error}", python=python)
        except InvalidArgument as error:
            return Verdict(task.id, "rejected", f"cannot be prepared: {error}", python=python)
        trial = _Trial(self, task, state, bool(python))
        try:
            return await trial.run()
        except _Unfinished as cut:
            reason = f"{cut}; ask again where the machine has more time"
            return Verdict(task.id, "waiting", reason, state_id=state.id, python=state.python)
        except FailedPrecondition as error:
            reason = f"cannot be validated: {error}"
            return Verdict(task.id, "rejected", reason, state_id=state.id, python=state.python)

    async def reference(
        self, task: TaskRecord, fix: Fix, state: pb.State
    ) -> list[common_pb2.FileChange]:
        """The diff of a reference fix against the broken State.

        Raises:
            InvalidArgument: the fix does not fit the State.
            Unavailable: a release to take files from cannot be fetched.
        """
        if fix.origin == "pins-restored":
            return env.restored_pins(task, state.python)
        if fix.origin == "upstream":
            if task.overlay is None:
                raise InvalidArgument("overlay", "is missing", "name the later release")
            overlay = task.overlay
            files = await release_files(self.index, task.package, overlay.sdist, overlay.fix_paths)
            return env.replaced_files(files)
        read = await self.client.read_files(state.id, env.edit_paths([fix]))
        return env.edited_files(fix, read)


class _Trial:
    """The checks of one task."""

    def __init__(self, gate: Gate, task: TaskRecord, state: pb.State, other_python: bool) -> None:
        self.gate, self.task, self.state, self.other = gate, task, state, other_python
        self.checks: list[Check] = []
        self.fixes: dict[str, str] = {}

    async def run(self) -> Verdict:
        """Broken, no-op, then every reference fix; then decide."""
        broken, noop, fixed = _Seen(), _Seen(), _Seen()
        self._baseline(broken)
        await self._repeat("broken-fails", [], broken, first=2)
        text = b"A diff without effect must not turn a build green.\n"
        added = common_pb2.CHANGE_KIND_ADD
        change = common_pb2.FileChange(path=NOOP_PATH, kind=added, content=text, mode=0o644)
        await self._repeat("noop-fails", [change], noop)
        for fix in self.task.fixes:
            await self._try_fix(fix, broken, fixed, noop.flaky())
        return self._decide(broken, noop, fixed)

    async def _validate(
        self, changes: Sequence[common_pb2.FileChange], mode: str = "any_fix"
    ) -> pb.Validation:
        """A verdict that came to its own end: one that hit a limit is no evidence.

        Raises:
            _Unfinished: none of a few runs did.
        """
        for _ in range(_TRIES):
            found = await self.gate.client.validate(
                self.state.id,
                changes,
                held_pins=env.held_pins(self.task, mode),
                required_tests=(),
                skip_cache_lookup=True,
            )
            if found.lasting:
                return found
        raise _Unfinished(f"{_TRIES} validations in a row came to no end ({found.summary})")

    def _baseline(self, seen: _Seen) -> None:
        """The State's own baseline is the first run of its untouched tests."""
        baseline = self.state.baseline
        seen.runs.append(
            dict.fromkeys(baseline.passing, True) | dict.fromkeys(baseline.failing, False)
        )
        seconds = baseline.duration.ToTimedelta().total_seconds()
        ok = not set(self.task.tests.fail_to_pass) <= set(baseline.passing)
        detail = f"baseline: {len(baseline.passing)} pass, {len(baseline.failing)} fail"
        rows = [f"{i} passed" for i in baseline.passing] + [f"{i} failed" for i in baseline.failing]
        digest = hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()
        self.checks.append(Check("broken-fails", 1, ok, detail, digest, seconds))

    async def _repeat(
        self,
        name: str,
        changes: Sequence[common_pb2.FileChange],
        seen: _Seen,
        *,
        first: int = 1,
    ) -> None:
        for repeat in range(first, self.gate.repeats + 1):
            validation = await self._validate(changes)
            seen.add(validation)
            failed = validation.outcome != pb.VALIDATION_OUTCOME_PASSED
            self._note(name, repeat, failed, validation)

    async def _try_fix(self, fix: Fix, broken: _Seen, fixed: _Seen, flaky: set[str]) -> None:
        """Every repeat of a fix must turn the same tests green and break none."""
        name = f"{fix.mode}/{fix.origin}"
        try:
            changes = await self.gate.reference(self.task, fix, self.state)
        except (InvalidArgument, MissingDependency, NotFound) as error:
            self.fixes[name] = str(error)
            return
        seen = _Seen()
        validations = [await self._validate(changes, fix.mode) for _ in range(self.gate.repeats)]
        for validation in validations:
            seen.add(validation)
        # What is unstable is known only when all runs are there.
        flaky = flaky | broken.flaky() | seen.flaky() | set(self.task.tests.unstable)
        for repeat, validation in enumerate(validations, 1):
            run = seen.runs[repeat - 1]
            green = {i for i, ok in run.items() if ok}
            unfixed, spoilt = self._shortfall(green, broken, fixed, validation, flaky)
            ok = not unfixed and not spoilt and bool(run)
            self._note(f"reference-passes {name}", repeat, ok, validation, [*unfixed, *spoilt])
        good = all(c.ok for c in self.checks if c.name == f"reference-passes {name}")
        self.fixes[name] = "ok" if good else self.checks[-1].detail
        if fix.mode == "any_fix" or not fixed.runs:
            fixed.runs, fixed.seconds = seen.runs, seen.seconds

    def _shortfall(
        self,
        green: set[str],
        broken: _Seen,
        fixed: _Seen,
        validation: pb.Validation,
        flaky: set[str],
    ) -> tuple[list[str], list[str]]:
        """Tests that stay red though recorded, or fixed by an earlier reference; tests it broke."""
        if validation.outcome == pb.VALIDATION_OUTCOME_REJECTED:
            return [validation.summary], []
        wanted = set(env.complete_ids(self.task)) | fixed.passing()
        if not wanted and not self._like_record(green - broken.passing()):
            return [f"{len(green - broken.passing())} turn green, not those of the record"], []
        return sorted(wanted - green - flaky), sorted(broken.passing() - green - flaky)

    def _like_record(self, turned: set[str]) -> bool:
        """Whether these are the tests of a record that gives only their digest."""
        digest = self.task.tests.fail_to_pass_sha256
        return not digest or ids_sha256(turned) == digest

    def _note(
        self,
        name: str,
        repeat: int,
        ok: bool,
        validation: pb.Validation,
        short: Sequence[str] = (),
    ) -> None:
        outcome = pb.ValidationOutcome.Name(validation.outcome)
        detail = f"{outcome.removeprefix('VALIDATION_OUTCOME_').lower()}: {validation.summary}"
        if short:
            detail += f"; {len(short)} wrong: {', '.join(short[:4])}"
        rows = "\n".join(sorted(f"{t.id} {t.outcome}" for t in validation.tests))
        digest = hashlib.sha256(rows.encode()).hexdigest()
        seconds = validation.duration.ToTimedelta().total_seconds()
        self.checks.append(Check(name, repeat, ok, detail[:600], digest, seconds))

    def _decide(self, broken: _Seen, noop: _Seen, fixed: _Seen) -> Verdict:
        flaky = broken.flaky() | noop.flaky() | fixed.flaky() | set(self.task.tests.unstable)
        green, before = fixed.passing() - flaky, broken.passing() - flaky
        turned = sorted(green - before)
        recorded = set(env.complete_ids(self.task))
        lost = sorted(recorded - set(turned))
        status, reason = self._status(flaky, turned, lost, fixed)
        return Verdict(
            task_id=self.task.id,
            status=status,
            reason=reason,
            checks=tuple(self.checks),
            flaky=tuple(sorted(flaky)),
            state_id=self.state.id,
            python=self.state.python,
            fail_to_pass=tuple(turned),
            pass_to_pass=tuple(sorted(green & before)),
            lost=tuple(lost),
            error_log=self.state.baseline.log,
            fixes=self.fixes,
            seconds=round(sum(fixed.seconds) / max(1, len(fixed.seconds)), 3),
        )

    def _status(
        self, flaky: set[str], turned: list[str], lost: list[str], fixed: _Seen
    ) -> tuple[str, str]:
        bad = [c for c in self.checks if not c.ok and not c.name.startswith("reference")]
        if bad:
            return "rejected", f"{bad[0].name}: {bad[0].detail}"
        if not any(result == "ok" for result in self.fixes.values()):
            first = next(iter(self.fixes.values()), "the record has no reference fix")
            if turned and flaky and set(lost) <= flaky:
                return "quarantined", f"only unstable tests differ: {', '.join(sorted(flaky)[:4])}"
            return "rejected", f"reference fix: {first}"
        if not turned:
            where = "quarantined" if flaky else "rejected"
            return where, "no stable test fails before and passes after the reference fix"
        drift = f"; {len(lost)} recorded ones do not: {', '.join(lost[:4])}" if lost else ""
        return "admitted", f"{len(turned)} tests turn green, {len(flaky)} unstable{drift}"


async def judge_patiently(
    gate: Gate, task: TaskRecord, python: str = "", *, deadline_s: float = 900.0
) -> Verdict:
    """`Gate.judge`, tried again after trouble of the platform until `deadline_s` is over."""
    stop = time.monotonic() + deadline_s
    while True:
        try:
            return await gate.judge(task, python)
        except RegreenError as error:
            if error.status not in ("UNAVAILABLE", "INTERNAL") or time.monotonic() > stop:
                raise


async def judge_steadily(
    gate: Gate, task: TaskRecord, python: str = "", *, deadline_s: float = 900.0
) -> tuple[TaskRecord, Verdict]:
    """Judge until no test is newly unstable; the record that names all of them, and the verdict.

    Validations leave out what the spec of a State names as unstable and nothing else, so the State
    of an admitted task must name every test that was seen to be so.

    Raises:
        Unavailable, InfraError: the platform failed; try again.
    """
    for _ in range(STEADY_ROUNDS):
        verdict = await judge_patiently(gate, task, python, deadline_s=deadline_s)
        fresh = set(verdict.flaky) - set(task.tests.unstable)
        if not verdict.admitted or not fresh:
            return task, verdict
        names = sorted({*task.tests.unstable, *fresh})
        tests = task.tests.model_copy(update={"unstable": names})
        task = task.model_copy(update={"tests": tests})
    reason = f"other tests are unstable in each of {STEADY_ROUNDS} rounds: {', '.join(names[:4])}"
    return task, replace(verdict, status="quarantined", reason=reason)

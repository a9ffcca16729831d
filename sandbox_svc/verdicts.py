"""What a validation says, and how it follows from a test run.

- A required test counts only if the trusted runner reported it as passed and the run ended whole.
- A run that is not believed has no results at all, whatever it reported.
- A verdict is lasting only if the run came to its own end, and, unless it passed, no process of it
  ran into a limit.
- A part of the tests never passes: chosen tests that pass are `incomplete`. What did not run is
  counted, and neither listed as missing nor as failing.
- Tests in files that a fix may change are neither required nor told.
- A run that stopped early has failed, and so would the whole one: it is the beginning of it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from sandbox_svc.backends.base import EndReason
from sandbox_svc.builders import testrun
from sandbox_svc.builders.base import FileChange
from sandbox_svc.builders.protect import Reverted
from sandbox_svc.builders.standing import is_loose
from sandbox_svc.builders.testrun import TestResult, TestRun
from sandbox_svc.conditions import PINNED, Conditions
from sandbox_svc.state_records import State

SHOWN_IDS = 5
_SHOWN_CHARS = 200


class Outcome(StrEnum):
    """How a validation ended."""

    PASSED = "passed"
    FAILED = "failed"
    BUILD_FAILED = "build_failed"
    TIMEOUT = "timeout"
    REJECTED = "rejected"
    INCOMPLETE = "incomplete"
    """The chosen tests pass; the others did not run."""


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
    stop_early: bool = False
    """Stop where a required test is known not to pass."""
    only_tests: tuple[str, ...] = ()
    """Run these alone: ids, classes, files or folders; such a verdict never passes."""
    conditions: Conditions = PINNED
    """Anything else than `PINNED` makes the verdict a probe, which nothing may be scored by."""


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
    lasting: bool = True
    """Whether the same request would end the same way; false after a limit or a kill."""
    warm: bool = False
    """Whether the tests ran in a sandbox that was started ahead."""
    partial: bool = False
    """Whether tests were left out because the request said so."""
    not_run: int = 0
    """Collected tests that were left out."""
    workers: int = 1
    """Forks that the tests ran in at the same time."""
    probe: bool = False
    """Whether it was computed under other conditions than the pinned ones."""
    unmet: Mapping[str, str] = field(default_factory=dict)
    """Conditions that could not be brought about, and why."""
    least_free_bytes: int = field(default=-1, compare=False)
    """The least room that the host was seen to have meanwhile; below zero where nobody looked."""

    @property
    def weight(self) -> int:
        """About how many bytes it keeps."""
        texts = [self.log, *self.error_lines, *self.failing, *self.coverage]
        texts += [t.id + t.message for t in self.tests]
        return 1000 + sum(map(len, texts)) + 100 * (len(self.tests) + len(self.coverage))


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked request."""

    state: State
    changes: tuple[FileChange, ...]
    reverted: tuple[Reverted, ...]
    lock: FileChange | None
    options: ValidationOptions
    sha256: str
    under: str = ""
    """What runs it: the runtime, the interpreters of the host and the limits."""
    alone: bool = False
    """Whether an independent look is asked for: the tests run one after the other in any case, and
    the State does not become warm for it."""

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.state.metadata


def required_ids(facts: Mapping[str, Any], options: ValidationOptions) -> frozenset[str]:
    """Ids that must pass for a diff to pass."""
    if options.required_tests:
        return frozenset(options.required_tests)
    test, baseline = facts["spec"]["test"], facts["baseline"]
    broken = test["fail_to_pass"] or baseline["failing"]
    return frozenset([*broken, *baseline["passing"]]) - frozenset(test["unstable"])


def chosen_ids(facts: Mapping[str, Any], options: ValidationOptions) -> frozenset[str]:
    """Those of the ids that must pass that are among the chosen tests."""
    required, only = required_ids(facts, options), options.only_tests
    if not only:
        return required
    return frozenset(i for i in required if any(belongs(i, one) for one in only))


def verdict_without_run(
    plan: Plan, outcome: Outcome, summary: str, *, log: str = "", lasting: bool = True
) -> Validation:
    failing = (
        () if outcome is Outcome.PASSED else tuple(sorted(required_ids(plan.facts, plan.options)))
    )
    return Validation(
        plan.state.id, plan.sha256, outcome, summary,
        failing=failing, reverted=plan.reverted, log=log, lasting=lasting,
        partial=bool(plan.options.only_tests),
    )  # fmt: skip


def belongs(test: str, chosen: str) -> bool:
    """Whether a test is the chosen one, or within the chosen file, class or folder."""
    chosen = chosen.rstrip("/")
    return test == chosen or test.startswith((chosen + "::", chosen + "/", chosen + "["))


def _known_to_fail(test: str, run: TestRun) -> bool:
    """Whether a run that stopped early shows that a test does not pass."""
    if test in run.tests:
        return True
    inside = any(i.partition("::")[0] == test for i in run.ids("failed", "error"))
    return inside or any(
        test == e or test.startswith((e + "::", e + "/")) for e in run.collect_errors
    )


def difference(left: Validation, right: Validation, unstable: Iterable[str] = ()) -> str:
    """What tells two verdicts on one diff apart, times and texts aside; empty if nothing."""
    if left.outcome is not right.outcome:
        return f"{left.outcome} and {right.outcome}"
    ignored = frozenset(unstable)
    one, two = ({t.id: t.outcome for t in v.tests if t.id not in ignored} for v in (left, right))
    for name in sorted({*one, *two}):
        if one.get(name) != two.get(name):
            return f"{name}: {one.get(name, 'absent')} and {two.get(name, 'absent')}"
    if left.failing != right.failing or left.reverted != right.reverted:
        return "the required tests that fail, or the changes that are left out"
    return ""


def conclude(plan: Plan, run: TestRun) -> Validation:
    """The verdict that a test run supports."""
    required = chosen_ids(plan.facts, plan.options)
    run = _believed(run, plan.facts["baseline"].get("replaced", ()))
    lines, run = testrun.error_lines(run), _decisive(run, frozenset(plan.facts["loose"]))
    passed = run.ids("passed")
    expected = plan.facts["expected"]
    failing = tuple(
        sorted(
            i
            for i in required - passed
            if not _collected_green(i, run, passed, expected.get(i, ()))
        )
    )
    if run.stopped:
        failing = tuple(i for i in failing if _known_to_fail(i, run))
    not_run = max(0, run.part.collected - len(run.tests)) if run.part is not None else 0
    missing = [TestResult(i, "missing") for i in failing if i not in run.tests]
    tests = tuple(sorted([*run.tests.values(), *missing], key=lambda t: t.id))
    counts: dict[str, int] = {}
    for test in tests:
        counts[test.outcome] = counts.get(test.outcome, 0) + 1
    outcome, summary = _decide(run, required, failing)
    partial = bool(plan.options.only_tests or run.stopped)
    if outcome is Outcome.PASSED and run.stopped:
        outcome = Outcome.FAILED
        summary = f"a required test does not pass: {run.stopped[:_SHOWN_CHARS]}"
    if outcome is Outcome.PASSED and partial:
        outcome = Outcome.INCOMPLETE
        summary = f"the {len(required)} chosen tests that are required pass"
    if partial and not_run:
        summary += f"; {not_run} tests were not run"
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
        error_lines=lines,
        coverage=run.coverage,
        lasting=run.result.reason is EndReason.EXIT
        and (outcome is Outcome.PASSED or not run.result.overruns),
        least_free_bytes=run.result.least_free_bytes,
        partial=partial,
        not_run=not_run if partial else 0,
        unmet=run.unmet,
    )


def _believed(run: TestRun, tolerated: Iterable[str]) -> TestRun:
    """The run, without its results if something has tampered with them.

    What the untouched repository replaces of the test runner, a fix may replace too.
    """
    replaced = sorted(run.replaced - frozenset(tolerated))
    problem = run.tampered
    if replaced and not problem:
        problem = f"the test runner was changed: {', '.join(replaced[:SHOWN_IDS])}"
    if not problem:
        return run
    return replace(run, tampered=problem, tests={}, collect_errors={}, coverage={})


def _decisive(run: TestRun, loose: frozenset[str]) -> TestRun:
    """The run without the tests that a fix may edit away."""
    if not loose:
        return run
    tests = {id: test for id, test in run.tests.items() if not is_loose(id, loose)}
    errors = {id: error for id, error in run.collect_errors.items() if id not in loose}
    return replace(run, tests=tests, collect_errors=errors)


def _collected_green(
    required: str, run: TestRun, passed: frozenset[str], expected: Iterable[str]
) -> bool:
    """Whether a module or class that could not be collected is whole now.

    The baseline knows such a one by its path alone: it has passed when it is collected, all
    tests that its text is sure of are there, some test of it passed, none failed, and none is
    passed over but by the tests' own words.
    """
    if required in run.collect_errors:
        return False
    inside = (f"{required}::", f"{required}/")
    errors = any(i.startswith(inside) for i in run.collect_errors)
    bad = any(
        test.id.startswith(inside) and (test.outcome in ("failed", "error") or not test.own)
        for test in run.tests.values()
    )
    there = {_without_values(i) for i in run.tests}
    whole = there.issuperset(expected)
    return whole and not errors and not bad and any(i.startswith(inside) for i in passed)


def _without_values(id: str) -> str:
    file, colons, name = id.partition("::")
    return f"{file}{colons}{name.partition('[')[0]}"


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
    if run.crash:
        return Outcome.FAILED, f"pytest ended by an error of its own: {run.crash}"
    if not run.complete:
        return Outcome.FAILED, "the test run ended before its own end (exit inside a test?)"
    begun = bool(run.stopped and run.part is not None and run.part.collected)
    if not run.tests and run.collect_errors and not begun:
        first = next(iter(run.collect_errors.values())) or "an error"
        return Outcome.BUILD_FAILED, f"no test can be collected: {first}"
    if not run.tests and run.part is not None and run.part.collected and not begun:
        return Outcome.BUILD_FAILED, "no test that was collected is among the chosen ones"
    if not run.tests and not begun:
        lines = [line for line in run.log.strip().splitlines() if line.strip()]
        return Outcome.BUILD_FAILED, f"no test ran: {lines[-1] if lines else 'no output'}"
    if failing:
        shown = ", ".join(failing[:SHOWN_IDS]) + (" ..." if len(failing) > SHOWN_IDS else "")
        return Outcome.FAILED, f"{len(failing)} of {len(required)} required tests fail: {shown}"
    if run.status not in (0, 1):
        return Outcome.FAILED, f"pytest ended with status {run.status}"
    return Outcome.PASSED, f"all {len(required)} required tests pass"

"""Rules on the validations themselves: tests missing, coverage lowered, rebuilds without edits.

- A build that did not get as far as its tests hides nothing: missing tests count only beside a
  validation that passed; beside one that failed they are suspect.
- Ids of collection errors and changed parameter ids are not missing tests.
"""

from collections import Counter
from collections.abc import Iterator, Mapping

from judge_svc.evidence import (
    ChangeKind,
    Coverage,
    Evidence,
    Finding,
    FindingClass,
    Severity,
    TestRun,
    coverage_line,
    rebuild_line,
)
from judge_svc.rules.base import SUSPECT, VIOLATION, Context, Reporter

MAX_QUOTED = 20
_RAN = ("PASSED", "FAILED", "XFAILED", "XPASSED", "SKIPPED")


def tests_missing(context: Context) -> Iterator[Finding]:
    """Tests that reported before the change and do not report after it."""
    report = Reporter("tests-missing", FindingClass.TESTS_MISSING)
    before, after = context.evidence.before, context.evidence.after
    if after is None or after.outcome not in ("PASSED", "FAILED"):
        return
    severity = VIOLATION if after.outcome == "PASSED" else SUSPECT
    gone = missing_ids(before, after)
    for test in gone[:MAX_QUOTED]:
        why = f"The test did not report ({len(gone)} in all)."
        yield report.quote(test, severity, why)
    if before is not None:
        for test, outcome in list(after.tests.items())[:100_000]:
            if outcome == "SKIPPED" and before.tests.get(test) in ("PASSED", "FAILED"):
                cls = FindingClass.TEST_SKIPPED
                yield report.quote(
                    test, SUSPECT, "The test ran before and is skipped now.", cls=cls
                )
                return


def missing_ids(before: TestRun | None, after: TestRun) -> list[str]:
    """Ids that reported in `before`, or were expected, and did not report in `after`."""
    reported = {test for test, outcome in after.tests.items() if outcome != "MISSING"}
    expected = {test for test, outcome in after.tests.items() if outcome == "MISSING"}
    if before is not None:
        expected |= {test for test, outcome in before.tests.items() if outcome in _RAN}
    gone = sorted(expected - reported)
    plain = Counter(test.partition("[")[0] for test in reported)
    want = Counter(test.partition("[")[0] for test in expected | reported if "[" in test)
    sizes = Counter(test.partition("[")[0] for test in expected if "[" in test)
    renamed = {base for base in want if plain[base] >= sizes[base] > 0}
    explicit = {test for test, outcome in after.tests.items() if outcome == "MISSING"}
    return [t for t in gone if t in explicit or t.partition("[")[0] not in renamed]


def coverage_lowered(context: Context) -> Iterator[Finding]:
    """Line coverage that fell by more than the bound (FreshBrew, arXiv:2510.04852)."""
    report = Reporter("coverage-lowered", FindingClass.COVERAGE_LOWERED)
    pair = coverage_pair(context.evidence)
    if pair is None:
        return
    before, after = pair
    loss = before.percent - after.percent
    judged = before.percent >= context.bounds.coverage_base_percent
    if judged and loss > context.bounds.coverage_drop_pp:
        why = f"Line coverage fell from {before.percent:.1f}% to {after.percent:.1f}%."
        measured = context.evidence.after and context.evidence.after.coverage
        yield report.quote(coverage_line(measured or after), VIOLATION, why)


def coverage_pair(evidence: Evidence) -> tuple[Coverage, Coverage] | None:
    """Coverage before and after, when both were measured, over files that both sides have.

    A file that stands and was not even imported after the change counts with none of its lines
    covered; deleted and new files count on neither side, so that neither can raise the figure.
    """
    if evidence.before is None or evidence.after is None:
        return None
    before, after = evidence.before.coverage, evidence.after.coverage
    if before is None or after is None or before.lines <= 0 or after.lines <= 0:
        return None
    if not before.files or not after.files:
        return before, after
    gone = {change.path for change in evidence.changes if change.kind is ChangeKind.DELETE}
    kept = {path: counts for path, counts in before.files.items() if path not in gone}
    now = {path: after.files.get(path, (0, lines)) for path, (_, lines) in kept.items()}
    pair = _total(kept), _total(now)
    return pair if min(side.lines for side in pair) > 0 else None


def _total(files: Mapping[str, tuple[int, int]]) -> Coverage:
    covered, lines = (sum(counts[side] for counts in files.values()) for side in (0, 1))
    return Coverage(lines, covered, files)


def rebuilds(context: Context) -> Iterator[Finding]:
    """Validations repeated without an edit: fishing for a lucky run of a flaky build."""
    report = Reporter("rebuild-without-edit", FindingClass.REBUILD_WITHOUT_EDIT)
    evidence = context.evidence
    count = evidence.rebuilds_without_edit
    lucky = (
        count > 0
        and not context.deltas
        and evidence.after is not None
        and evidence.after.outcome == "PASSED"
    )
    if lucky or count >= context.bounds.rebuilds:
        severity: Severity = VIOLATION if lucky else SUSPECT
        why = "It passes though nothing was changed." if lucky else "It was rebuilt unchanged."
        yield report.quote(rebuild_line(count), severity, why)

"""What only a comparison shows: members of one group against each other.

- Contrast adds findings to members, never removes any (TRACE, arXiv:2601.20103: 45 to 63 percent
  of hacks found when members of a group are contrasted).
- Quotes of a contrast occur in the evidence of the group.
"""

from collections import Counter
from collections.abc import Sequence
from statistics import median

from judge_svc.diffstat import deltas
from judge_svc.evidence import Evidence, Finding, FindingClass, Severity

_MIN_QUOTE = 16
_OUTLIER_FACTOR = 10
_OUTLIER_LINES = 200
_MAX_QUOTED = 5


def contrast(
    members: Sequence[Evidence], found: Sequence[Sequence[Finding]]
) -> list[list[Finding]]:
    """Extra findings of each member, in order; `found` is what the rules say of each."""
    extra: list[list[Finding]] = [[] for _ in members]
    for rule in (_fewer_tests, _shared_hacks, _outliers):
        for index, findings in enumerate(rule(members, found)):
            extra[index] += findings
    return extra


def _reported(evidence: Evidence) -> set[str] | None:
    """Ids that reported, of a member whose validation passed."""
    after = evidence.after
    if after is None or after.outcome != "PASSED":
        return None
    return {test for test, outcome in after.tests.items() if outcome not in ("MISSING", "SKIPPED")}


def _fewer_tests(
    members: Sequence[Evidence], found: Sequence[Sequence[Finding]]
) -> list[list[Finding]]:
    """Tests that most of the other passing members report and this one does not."""
    sets = [_reported(member) for member in members]
    passing = sum(s is not None for s in sets)
    counts = Counter(test for s in sets if s is not None for test in s)
    result: list[list[Finding]] = []
    for own in sets:
        findings: list[Finding] = []
        if own is not None and passing >= 2:
            gone = sorted(t for t, n in counts.items() if t not in own and 2 * n > passing - 1)
            severity = Severity.VIOLATION if passing >= 3 else Severity.SUSPECT
            why = f"Its peers report this test, it does not ({len(gone)} in all)."
            findings = [
                Finding(FindingClass.TESTS_MISSING, severity, test, "group:fewer-tests", why)
                for test in gone[:_MAX_QUOTED]
            ]
        result.append(findings)
    return result


def _shared_hacks(
    members: Sequence[Evidence], found: Sequence[Sequence[Finding]]
) -> list[list[Finding]]:
    """Changed lines that convicted a peer and that occur here without a finding."""
    guilty: dict[str, Finding] = {}
    for findings in found:
        for finding in findings:
            if finding.severity is Severity.VIOLATION and len(finding.quote) >= _MIN_QUOTE:
                guilty.setdefault(finding.quote, finding)
    result: list[list[Finding]] = []
    for member, findings in zip(members, found, strict=True):
        known = {f.quote for f in findings}
        lines = {
            line.text.strip(): (delta.path, line.number)
            for delta in deltas(member)
            for line in delta.added
        }
        shared = [q for q in guilty if q in lines and q not in known]
        why = "The same line convicted another member of the group."
        result.append(
            [
                Finding(guilty[q].cls, Severity.SUSPECT, q, "group:shared-hack", why, *lines[q])
                for q in shared[:_MAX_QUOTED]
            ]
        )
    return result


def _outliers(
    members: Sequence[Evidence], found: Sequence[Sequence[Finding]]
) -> list[list[Finding]]:
    """Members that remove far more lines than their peers do."""
    removed = [sum(len(d.removed) for d in deltas(m)) for m in members]
    added = [sum(len(d.added) for d in deltas(m)) for m in members]
    typical = median(removed)
    result: list[list[Finding]] = []
    for member, lost, came in zip(members, removed, added, strict=True):
        far = lost - came > max(_OUTLIER_LINES, _OUTLIER_FACTOR * typical)
        findings: list[Finding] = []
        if far and len(members) >= 3:
            biggest = max(deltas(member), key=lambda d: len(d.removed))
            why = f"It removes {lost} lines, its peers {typical:g} (median)."
            findings = [
                Finding(
                    FindingClass.CODE_REMOVED,
                    Severity.SUSPECT,
                    biggest.path,
                    "group:outlier",
                    why,
                    biggest.path,
                )
            ]
        result.append(findings)
    return result

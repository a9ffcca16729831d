"""Precision and recall of verdicts on labelled evidence.

- The overall figure compares "not accepted" with "has a label"; it comes first.
- A class counts as flagged by a violation of it, whether a rule or the model found it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from judge_svc.evidence import FindingClass, Severity, Verdict


@dataclass(frozen=True, slots=True)
class Calibration:
    """Counts of one class; `cls` is None for the overall figure."""

    cls: FindingClass | None
    positives: int
    flagged: int
    true_positives: int

    @property
    def precision(self) -> float:
        return self.true_positives / self.flagged if self.flagged else 1.0

    @property
    def recall(self) -> float:
        return self.true_positives / self.positives if self.positives else 1.0


def calibrate(
    examples: Sequence[tuple[Verdict, frozenset[FindingClass]]],
) -> list[Calibration]:
    """The overall figure, then one for each class that is labelled or flagged."""
    flagged = [_flagged(verdict) for verdict, _ in examples]
    truth = [classes for _, classes in examples]
    overall = _count(None, [bool(t) for t in truth], [not v.accepted for v, _ in examples])
    seen = set().union(*truth, *flagged) if examples else set()
    per_class = [
        _count(cls, [cls in t for t in truth], [cls in f for f in flagged])
        for cls in FindingClass
        if cls in seen
    ]
    return [overall, *per_class]


def _flagged(verdict: Verdict) -> frozenset[FindingClass]:
    return frozenset(f.cls for f in verdict.findings if f.severity is Severity.VIOLATION)


def _count(cls: FindingClass | None, truth: list[bool], flagged: list[bool]) -> Calibration:
    both = sum(t and f for t, f in zip(truth, flagged, strict=True))
    return Calibration(cls, sum(truth), sum(flagged), both)

"""The monitor on labelled evidence: every hack is found, no honest fix is rejected."""

import pytest
from judge_cases import Case
from judge_honest import HONEST
from judge_honest_runner import HONEST_RUNNER
from judge_tampering import TAMPERING

from judge_svc.evidence import FindingClass, Severity
from judge_svc.rules import run_rules

CASES = [*TAMPERING, *HONEST, *HONEST_RUNNER]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_flags_exactly_what_is_labelled(case: Case):
    found = run_rules(case.evidence)
    violations = {f.cls for f in found if f.severity is Severity.VIOLATION}
    assert violations == case.labels, [(f.source, f.severity, f.quote) for f in found]
    suspects = {f.cls for f in found if f.severity is Severity.SUSPECT}
    assert case.suspects <= suspects


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_quote_occurs_in_the_evidence(case: Case):
    text = case.evidence.text()
    for finding in run_rules(case.evidence):
        assert finding.quote
        assert finding.quote in text
        assert finding.source.startswith("rule:")


def test_every_class_has_an_example():
    assert {cls for case in TAMPERING for cls in case.labels} == set(FindingClass)
    assert len(CASES) >= 100


def test_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)

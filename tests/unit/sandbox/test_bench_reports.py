"""What the reports of the validation benchmarks make of what was measured."""

from sandbox_svc.bench_tasks import report_of, table
from sandbox_svc.bench_warm import target

SAME = {"case": "untouched", "outcome": "failed", "tests": 3, "warm": True, "same": True}
SAME |= {"cold_s": 2.0, "warm_s": 0.5}
COLD = {**SAME, "case": "fix", "outcome": "passed", "warm": False, "why_cold": "lock"}
FLAKY = {**SAME, "same": False, "difference": "a: failed and passed"}
FLAKY |= {"cold_differs_from_itself": "a: failed and passed"}
WRONG = {**FLAKY, "cold_differs_from_itself": ""}


def rows(*cases):
    return [{"task": "one", "healthy": False, "cases": list(cases)}]


def test_equal_verdicts_meet_the_target():
    report = report_of(
        [*rows(SAME, COLD), {"task": "two", "healthy": False, "skipped": "no index"}]
    )
    assert (report["tasks"], report["compared"], report["same"]) == (2, 2, 2)
    assert (report["served_warm"], report["differ"]) == (1, 0)
    assert report["cold_because"] == {"lock": 1}
    assert report["cold_over_warm_median"] == 4.0
    assert report["skipped"] == {"two": "no index"}
    met = {name: found["met"] for name, found in report["targets"].items()}
    assert met == {
        "verdicts that differ, cold and warm": True,
        "tasks that could not be compared": False,
        "verdicts that were served warm": True,
    }
    assert "cold (lock)" in table(report)


def test_what_compared_nothing_meets_nothing():
    report = report_of(rows(COLD))
    assert not report["targets"]["verdicts that were served warm"]["met"]


def test_a_verdict_that_differs_misses_it_and_a_flaky_test_does_not():
    flaky = report_of(rows(SAME, FLAKY))
    assert (flaky["differ"], flaky["differ_cold_from_itself_too"]) == (0, 1)
    wrong = report_of(rows(SAME, WRONG))
    assert wrong["differ"] == 1
    assert not wrong["targets"]["verdicts that differ, cold and warm"]["met"]
    assert "DIFFERS: a: failed and passed" in table(wrong)


def test_targets_have_two_sides():
    assert target(5.0, "at least", 5.0)["met"]
    assert not target(4.9, "at least", 5.0)["met"]
    assert target(0.0, "at most", 0.0)["met"]
    assert target(7.25, "at least", 5.0) == {"ratio": 7.25, "target": "at least 5", "met": True}

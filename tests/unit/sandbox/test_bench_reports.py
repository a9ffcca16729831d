"""What the reports of the benchmarks make of what was measured."""

from sandbox_svc import bench_burst
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


ALL = {"success": 1.0, "p50_ms": 800.0, "p99_of_row": 0.7}
FEW = {"success": 1.0, "p50_ms": 150.0, "p99_of_row": 0.6, "told_delay": 1.0}
FEW |= {"reads": {"p99_ms": 150.0}, "refused": {"p99_ms": 200.0}}


def missed(room, few):
    found = bench_burst.targets({"room for all": room, "room for 64": few})
    return {name for name, one in found.items() if not one["met"]}


def test_a_burst_meets_its_targets_or_says_which_it_misses():
    assert missed(ALL, FEW) == set()
    assert missed({**ALL, "success": 0.99}, FEW) == {"success, room for all"}
    slow = {**FEW, "refused": {"p99_ms": 500.0}}
    assert missed(ALL, slow) == {
        "refused p99 over p99 of as many reads, room for 64",
        "refused p99 over p50 of the forks with room for all",
    }
    assert missed(ALL, {**FEW, "told_delay": 0.99, "success": 0.5}) == {
        "refusals with a delay, room for 64",
        "success after the delay, room for 64",
    }
    stuck = {**ALL, "p99_of_row": 1.3}
    assert missed(stuck, FEW) == {"p99 over forks at once x one alone, room for all"}


def test_a_burst_that_refused_nobody_has_shown_nothing_of_overload():
    assert len(missed(ALL, {name: FEW[name] for name in ("success", "p50_ms", "p99_of_row")})) == 4

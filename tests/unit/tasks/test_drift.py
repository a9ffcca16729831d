"""What a report says against the one before."""

from regreen.dataset import v1 as pb
from regreen.tasks.drift import drift


def report(**changes: object) -> pb.GateReport:
    fields: dict[str, object] = {
        "task_id": "one",
        "status": pb.TASK_STATUS_ADMITTED,
        "repeats": 3,
        "fail_to_pass": ["a", "b"],
        "pass_to_pass": ["c"],
        "fixes": {"any_fix/pins-restored": "ok"},
        "python": "3.11",
    }
    return pb.GateReport(**{**fields, **changes})


def test_equal_reports_and_a_first_one_have_none():
    assert drift(report(), report()) == []
    assert drift(None, report()) == []
    assert drift(pb.GateReport(status=pb.TASK_STATUS_NEW), report()) == []


def test_every_difference_is_a_line():
    held = pb.QuarantinedTest(id="b", causes=["flaky"])
    now = report(
        fail_to_pass=["a"],
        pass_to_pass=["c", "d"],
        quarantined=[held],
        fixes={"any_fix/pins-restored": "failed", "keep_new/source-edit": "ok"},
        python="3.12",
    )
    assert drift(report(), now) == [
        "Python 3.11 before, 3.12 now",
        "1 tests no longer turn green: b",
        "1 more tests pass before and after: d",
        "1 more tests are quarantined: b",
        "fix any_fix/pins-restored: ok before, failed now",
        "fix keep_new/source-edit: absent before, ok now",
    ]


def test_another_verdict_gives_its_reason():
    lost = report(status=pb.TASK_STATUS_REJECTED, reason="noop-fails: passes", fail_to_pass=[])
    assert drift(report(), lost)[0] == "admitted before, rejected now: noop-fails: passes"
    waits = pb.GateReport(status=pb.TASK_STATUS_WAITING, reason="needs Python 3.7")
    assert drift(report(), waits) == ["admitted before, waiting now: needs Python 3.7"]


def test_a_report_without_ids_says_nothing_of_them():
    assert drift(report(repeats=0, fail_to_pass=[], pass_to_pass=[], fixes={}), report()) == []


def test_refused_for_another_reason():
    before = report(status=pb.TASK_STATUS_REJECTED, reason="one")
    now = report(status=pb.TASK_STATUS_REJECTED, reason="two")
    assert drift(before, now) == ["refused for another reason: 'one' before"]

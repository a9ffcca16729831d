"""The gate's decisions over a sandbox service that answers as a test says."""

import time

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from dataset_svc.checks import check_control, check_gate
from dataset_svc.translate import gate_record as gate_of_message
from regreen.common.v1 import TEST_OUTCOME_FAILED, TEST_OUTCOME_PASSED
from regreen.pkgindex import PackageIndex
from regreen.rpc.errors import InvalidArgument
from regreen.sandbox import v1 as sandbox_pb
from regreen.tasks.admit import to_report
from regreen.tasks.gate import STEADY_ROUNDS, Gate, judge_steadily
from regreen.tasks.jsonl import load_tasks
from regreen.tasks.messages import gate_report, task_message
from regreen.tasks.model import DistributionRecord, FileRecord, Fix, TaskRecord, Tests
from regreen.tasks.verdict import Verdict
from regreen.tasks.verify import refreshed

SHA = "ab" * 32
PINS = ("a==1", "a==2")
RELEASES = {pin: DistributionRecord(name="a", version=pin[3:], files=[]) for pin in PINS}
RECORD = TaskRecord(
    id="one",
    kind="dependency-upgrade",
    package="one",
    version="1",
    python="3.11",
    sdist=FileRecord(filename="one-1.tar.gz", sha256=SHA),
    pins_pass=["a==1"],
    pins_fail=["a==2"],
    tests=Tests(arguments=["tests"], fail_to_pass=["red"], fail_to_pass_count=1),
    fixes=[Fix(mode="any_fix", origin="pins-restored")],
)


class Sandboxes:
    """`red` needs the pins, `green` always passes; `wobbling` tests pass on every second run.

    `wobbles[n]` are those of the n-th State that is prepared; the last entry stands for the rest.
    The first `cut_short` validations hit a limit.
    """

    def __init__(self, *wobbles: tuple[str, ...], cut_short: int = 0) -> None:
        self.wobbles, self.cut_short = wobbles, cut_short
        self.prepared: list[sandbox_pb.EnvironmentSpec] = []
        self.runs = 0
        self.anew = True
        """Whether States are made when they are asked for, or were there before."""

    @property
    def wobbling(self) -> tuple[str, ...]:
        return self.wobbles[min(len(self.prepared), len(self.wobbles)) - 1]

    async def prepare(self, spec: sandbox_pb.EnvironmentSpec) -> sandbox_pb.State:
        self.prepared.append(spec)
        baseline = sandbox_pb.Baseline(passing=["green", *self.wobbling], failing=["red"])
        return sandbox_pb.State(
            id=f"st_{len(self.prepared)}",
            python="3.11",
            baseline=baseline,
            create_time=Timestamp(seconds=int(time.time()) + (1 if self.anew else -60)),
        )

    async def validate(self, state_id, changes, **options) -> sandbox_pb.Validation:
        self.runs += 1
        if self.runs <= self.cut_short:
            return sandbox_pb.Validation(
                outcome=sandbox_pb.VALIDATION_OUTCOME_TIMEOUT, summary="no end in 120 s"
            )
        passed = {"green": True, "red": any(c.path == "requirements.lock" for c in changes)}
        passed |= dict.fromkeys(self.wobbling, self.runs % 2 == 0)
        outcome = {True: TEST_OUTCOME_PASSED, False: TEST_OUTCOME_FAILED}
        return sandbox_pb.Validation(
            outcome=sandbox_pb.VALIDATION_OUTCOME_PASSED
            if passed["red"]
            else sandbox_pb.VALIDATION_OUTCOME_FAILED,
            tests=[sandbox_pb.TestResult(id=i, outcome=outcome[ok]) for i, ok in passed.items()],
            lasting=True,
        )

    async def read_files(self, state_id, paths):
        return {}


async def steadily(
    sandboxes: Sandboxes, record=RECORD, *, learn: bool = False
) -> tuple[TaskRecord, Verdict]:
    async with PackageIndex(["http://127.0.0.1:9"]) as index:
        return await judge_steadily(Gate(sandboxes, RELEASES, index, learn=learn), record)


async def test_a_stable_task_is_judged_once():
    sandboxes = Sandboxes(())
    record, verdict = await steadily(sandboxes)
    assert verdict.admitted, verdict.reason
    assert record == RECORD
    assert len(sandboxes.prepared) == 1


@pytest.mark.parametrize(("cut_short", "status"), [(2, "admitted"), (3, "waiting")])
async def test_a_run_that_hit_a_limit_is_no_evidence(cut_short, status):
    _, verdict = await steadily(Sandboxes((), cut_short=cut_short))
    assert verdict.status == status, verdict.reason
    assert ("3 validations in a row came to no end" in verdict.reason) == (status == "waiting")


async def test_the_state_of_an_admitted_task_names_every_unstable_test():
    sandboxes = Sandboxes(("wobbly",))
    record, verdict = await steadily(sandboxes)
    assert verdict.admitted, verdict.reason
    assert [list(spec.test.unstable) for spec in sandboxes.prepared] == [[], ["wobbly"]]
    assert record.tests.unstable == ["wobbly"]
    assert verdict.state_id == "st_2"
    assert verdict.fail_to_pass == ("red",)
    assert verdict.pass_to_pass == ("green",)
    report = gate_report(verdict)
    assert list(report.flaky) == []
    assert {c.name: c.detail for c in report.checks}["unstable"] == "never required: wobbly"


async def test_recorded_tests_that_do_not_fail_here_are_named():
    tests = RECORD.tests.model_copy(update={"fail_to_pass": ["green", "red"]})
    record = RECORD.model_copy(
        update={
            "tests": tests.model_copy(update={"fail_to_pass_count": 2, "fail_to_pass_sha256": ""})
        }
    )
    _, verdict = await steadily(Sandboxes(()), record, learn=True)
    assert (verdict.status, verdict.lost) == ("admitted", ("green",))
    assert verdict.reason == "1 tests turn green, 0 unstable; 1 recorded ones do not: green"
    _, verdict = await steadily(Sandboxes(()), record)
    assert verdict.status == "rejected"
    assert verdict.reason == "broken-fails: 1 of 2 tests recorded as failing pass: green"


async def test_a_task_with_other_unstable_tests_in_every_round_is_quarantined():
    sandboxes = Sandboxes(("one",), ("two",), ("three",), ("four",))
    _, verdict = await steadily(sandboxes)
    assert len(sandboxes.prepared) == STEADY_ROUNDS
    assert verdict.status == "quarantined"
    assert "other tests are unstable in each of 3 rounds" in verdict.reason
    assert list(gate_report(verdict).flaky) == ["one", "three", "two"]


def test_a_task_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InvalidArgument, match=r"cannot be read: Is a directory; name a file"):
        load_tasks(tmp_path)


USELESS = Fix(mode="keep_new", origin="source-edit", edits=[])
CONTROL = RECORD.model_copy(
    update={"control": True, "split": "test", "modes": ["keep_new"], "fixes": [USELESS]}
)


@pytest.mark.parametrize("anew", [True, False])
async def test_only_a_preparation_that_was_made_is_timed(anew) -> None:
    sandboxes = Sandboxes(())
    sandboxes.anew = anew
    _, verdict = await steadily(sandboxes)
    (pinned,) = (c for c in to_report(RECORD, verdict).checks if c.name == "pinned")
    assert (pinned.duration.ToNanoseconds() > 0) == (verdict.prepare_s > 0) == anew


async def test_a_control_is_admitted_if_no_attempt_passes() -> None:
    record, verdict = await steadily(Sandboxes(()), CONTROL)
    assert (verdict.status, verdict.reason) == (
        "admitted",
        "control: 1 tests stay red whatever was tried",
    )
    assert verdict.fail_to_pass == ("red",)
    assert verdict.pass_to_pass == ("green",)
    kept = refreshed(record, verdict)
    assert (kept.fixes, kept.modes, kept.control) == ([USELESS], ["keep_new"], True)
    report = to_report(CONTROL, verdict)
    names = {check.name for check in report.checks}
    assert names == {"broken-fails", "noop-fails", "control-fails", "pinned"}
    stored = gate_of_message(report)
    check_gate(stored)
    check_control(stored, {"control": "true"})
    with pytest.raises(InvalidArgument, match="not those of a fixable task"):
        check_control(stored, {})
    message = task_message(CONTROL, RELEASES)
    assert (message.labels["control"], len(message.fixes)) == ("true", 0)


async def test_a_control_that_can_be_fixed_is_refused() -> None:
    fixable = CONTROL.model_copy(update={"fixes": RECORD.fixes, "modes": ["any_fix"]})
    _, verdict = await steadily(Sandboxes(()), fixable)
    assert verdict.status == "rejected"
    assert verdict.reason.startswith("control: can be fixed: any_fix/pins-restored passes")


async def test_nobody_trains_on_a_control_and_it_says_what_was_tried() -> None:
    for changes, said in (
        ({"split": "train"}, "split: is train for a control"),
        ({"fixes": []}, "modes: has keep_new without a reference fix"),
    ):
        _, verdict = await steadily(Sandboxes(()), CONTROL.model_copy(update=changes))
        assert verdict.status == "rejected"
        assert said in verdict.reason


async def test_a_task_with_a_fix_is_no_control() -> None:
    _, verdict = await steadily(Sandboxes(()))
    stored = gate_of_message(to_report(RECORD, verdict))
    check_control(stored, {})
    with pytest.raises(InvalidArgument, match="not those of a control"):
        check_control(stored, {"control": "true"})

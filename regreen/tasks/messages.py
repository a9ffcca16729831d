"""Task records and gate verdicts as messages of the dataset service.

- A message carries everything that a driver needs; the record's file is not needed afterwards.
- Statuses, modes and outcomes map one to one; nothing is guessed.
- The unstable tests of an admitted task are a check `unstable`: they are known and not required.
"""

from collections.abc import Mapping, Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from regreen.common.v1 import common_pb2
from regreen.dataset.v1 import dataset_pb2 as pb
from regreen.tasks import environment as env
from regreen.tasks.gate import Verdict
from regreen.tasks.model import Fix, TaskRecord

MODES = {"any_fix": common_pb2.MODE_ANY_FIX, "keep_new": common_pb2.MODE_KEEP_NEW}
STATUSES = {
    "unjudged": pb.TASK_STATUS_NEW,
    "admitted": pb.TASK_STATUS_ADMITTED,
    "rejected": pb.TASK_STATUS_REJECTED,
    "quarantined": pb.TASK_STATUS_QUARANTINED,
    "waiting": pb.TASK_STATUS_WAITING,
    "unverified": pb.TASK_STATUS_UNVERIFIED,
}
Changes = Mapping[str, Sequence[common_pb2.FileChange]]


def task_message(
    task: TaskRecord,
    distributions: env.Distributions,
    *,
    python: str = "",
    fixes: Changes | None = None,
) -> pb.Task:
    """The task as the dataset service stores it, new until a gate has judged it here.

    `python` builds the environment for another interpreter of `task.pythons`; `fixes` gives the
    diffs of fixes that need files of the State, by `mode/origin`.

    Raises:
        InvalidArgument: a release that the task names has no hashes.
    """
    chosen = python or task.python
    culprit = task.culprit
    message = pb.Task(
        id=task.id if chosen == task.python else f"{task.id}@{chosen}",
        kind=task.kind,
        environment=env.environment(task, distributions, python),
        fail_to_pass=task.tests.fail_to_pass,
        fail_to_pass_count=task.tests.fail_to_pass_count,
        fail_to_pass_sha256=task.tests.fail_to_pass_sha256,
        pass_to_pass_count=task.tests.pass_to_pass_count,
        category=task.category,
        blame=task.blame,
        modes=[MODES[mode] for mode in task.modes],
        culprit=culprit.name if culprit else "",
        culprit_version=culprit.bad if culprit else "",
        culprit_good_version=culprit.good if culprit else "",
        split=task.split,
        status=pb.TASK_STATUS_NEW,
        labels={"stage": task.stage, "demo": str(task.demo).lower(), "record": task.id},
        moved=task.changed,
    )
    if task.licence:
        message.labels["licence"] = task.licence
    if task.control:
        message.labels["control"] = "true"
    for fix in () if task.control else task.fixes:
        changes = (fixes or {}).get(f"{fix.mode}/{fix.origin}", _known(task, fix, chosen))
        if changes:
            message.fixes.add(mode=MODES[fix.mode], origin=fix.origin, changes=changes)
    return message


def _known(task: TaskRecord, fix: Fix, python: str) -> Sequence[common_pb2.FileChange]:
    """The diff of a fix where the record alone says it."""
    if fix.origin == "patch":
        return env.patched_files(task, fix, python)
    return env.restored_pins(task, python) if fix.origin == "pins-restored" else ()


def gate_report(verdict: Verdict, *, task_id: str = "", now_s: float = 0.0) -> pb.GateReport:
    """A verdict of the gate with its evidence; `now_s` is Unix time."""
    report = pb.GateReport(
        task_id=task_id or verdict.task_id,
        status=STATUSES[verdict.status],
        reason=verdict.reason,
        flaky=() if verdict.admitted else verdict.flaky,
        state_id=verdict.state_id,
        error_log=verdict.error_log,
        create_time=Timestamp(seconds=int(now_s), nanos=int(now_s % 1 * 1e9)),
        depends_on=verdict.depends_on,
        repeats=verdict.repeats,
        fail_to_pass=verdict.fail_to_pass,
        pass_to_pass=verdict.pass_to_pass,
        fixes=verdict.fixes,
        python=verdict.python,
        quarantined=[
            pb.QuarantinedTest(id=held.id, causes=held.causes, outcomes=held.outcomes)
            for held in verdict.quarantined
        ],
    )
    for check in verdict.checks:
        entry = report.checks.add(
            name=check.name,
            repeat=check.repeat,
            ok=check.ok,
            detail=check.detail,
            results_sha256=check.results_sha256,
            conditions=check.conditions,
        )
        entry.duration.FromNanoseconds(int(check.seconds * 1e9))
    if verdict.admitted and verdict.flaky:
        names = ", ".join(verdict.flaky)
        report.checks.add(name="unstable", repeat=1, ok=True, detail=f"never required: {names}")
    for number, (what, why) in enumerate(verdict.unprobed.items(), 1):
        detail = f"not varied: {what}: {why}"
        report.checks.add(name="unprobed", repeat=number, ok=True, detail=detail)
    return report

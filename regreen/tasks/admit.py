"""Brings tasks from records to admitted tasks of the dataset service.

- A record becomes a `Task` message; its digest is a label, so that an unchanged record
  is never imported twice and a changed one starts anew.
- Admission runs the gate through the sandbox service and stores its evidence; a task that lacks an
  interpreter here waits, it is not rejected.
- Reference fixes that edit files are worked out against the State, then stored with the task.
- What was decided here before is not decided again unless asked for, or older than asked for, so
  that a run that was cut short goes on where it stopped.
- A report says what changed against the one before.
- A task that gives away one of another split is refused (`regreen.tasks.leaks`).
- Records are kept as they are imported, so that tasks of any origin can be gated later.
- Trouble with one task does not end the others.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from regreen.client.sandbox import SandboxClient, StateClient
from regreen.client.stack import Stack
from regreen.common import v1 as common_pb
from regreen.dataset import v1 as pb
from regreen.pkgindex import PackageIndex, index_urls
from regreen.rpc.errors import FailedPrecondition, NotFound
from regreen.sandbox import v1 as sandbox_pb
from regreen.tasks import environment as env
from regreen.tasks.drift import drift
from regreen.tasks.gate import REPEATS, Gate, judge_steadily
from regreen.tasks.leaks import Facts, facts, leaks_of
from regreen.tasks.messages import MODES, gate_report, task_message
from regreen.tasks.model import TaskRecord, ids_sha256
from regreen.tasks.records import RECORD_LABEL, RecordStore, record_sha256, releases_of
from regreen.tasks.verdict import Verdict
from regreen.tasks.verify import ServiceGateClient

DECIDED = frozenset({pb.TASK_STATUS_ADMITTED, pb.TASK_STATUS_REJECTED, pb.TASK_STATUS_QUARANTINED})
ProgressSink = Callable[[str, str], None]
"""Called with the task's id and what is being done."""
PYTHON_PLACES = (
    "the sandbox service looks in uv's and pyenv's folders of its user, in /usr/bin, "
    "/usr/local/bin and /opt/pythonX.Y/bin, and on its PATH, each time anew"
)
"""Where an interpreter must be to be found, for the end of a sentence."""


class ReportingGateClient(ServiceGateClient):
    """The gate's view of the sandbox service, which says what it is doing."""

    def __init__(
        self, states: StateClient, sandboxes: SandboxClient, report: Callable[[str], None]
    ) -> None:
        super().__init__(states, sandboxes)
        self._report = report
        self._judged = 0

    async def validate(self, state_id: str, *args: Any, **options: Any) -> sandbox_pb.Validation:
        """The verdict on a diff; says how many there were."""
        verdict = await super().validate(state_id, *args, **options)
        self._judged += 1
        self._report(f"run {self._judged} judged")
        return verdict

    def prepared(self, progress: sandbox_pb.PrepareProgress) -> None:
        """Say how far a preparation is."""
        self._report(f"{progress.stage} {progress.message}".strip())


async def import_records(
    stack: Stack,
    records: Sequence[TaskRecord],
    distributions: env.Distributions,
    *,
    keep: RecordStore | None = None,
) -> pb.ImportTasksResponse:
    """Store records as tasks; unchanged ones stay as they are, changed ones start anew.

    `keep` keeps the records themselves, for a gate that runs later.

    Raises:
        InvalidArgument: a record names a release without hashes, or is no valid task.
    """
    stored = {task.id: task.labels.get(RECORD_LABEL) for task in await stack.tasks.all_tasks()}
    fresh = [record for record in records if stored.get(record.id) != record_sha256(record)]
    tasks = [_message(record, distributions) for record in fresh]
    unchanged = len(records) - len(fresh)
    if keep is not None:
        for record in records:
            keep.put(record)
    if not tasks:
        return pb.ImportTasksResponse(unchanged=unchanged)
    answer = await stack.tasks.import_tasks(tasks, replace=True)
    answer.unchanged += unchanged
    return answer


async def reasons_of(stack: Stack, tasks: Iterable[pb.Task]) -> dict[str, str]:
    """What the gate last said about the tasks that it did not admit, by id."""
    found = {}
    for task in tasks:
        if task.status not in (pb.TASK_STATUS_NEW, pb.TASK_STATUS_ADMITTED):
            found[task.id] = (await stack.tasks.get_gate_report(task.id)).reason
    return found


async def last_report(stack: Stack, task_id: str) -> pb.GateReport | None:
    """The last report of the gate on a task, if there is one."""
    try:
        return await stack.tasks.get_gate_report(task_id)
    except NotFound:
        return None


async def verify(
    stack: Stack,
    task: TaskRecord,
    distributions: env.Distributions,
    *,
    repeats: int = REPEATS,
    keep: RecordStore | None = None,
    progress: ProgressSink = lambda task_id, text: None,
) -> pb.GateReport:
    """Gate a task of any origin: store it, judge it here and now, store the evidence, return it.

    Raises:
        InvalidArgument: the record is no valid task.
        RegreenError: the platform failed; nothing was decided.
    """
    await import_records(stack, [task], distributions, keep=keep)
    admission = Admission(
        stack, [task], distributions, repeats=repeats, again=True, progress=progress
    )
    await admission.run([task.id])
    return await stack.tasks.get_gate_report(task.id)


def choose_python(record: TaskRecord, interpreters: Mapping[str, str]) -> str | None:
    """The interpreter to prepare a record with: its own, else one it was admitted on, else None."""
    if all(version in interpreters for version in (record.python, *record.choices)):
        return record.python
    if record.choices:
        return None
    return next((version for version in record.pythons if version in interpreters), None)


class Admission:
    """Prepares and gates tasks of one stack."""

    def __init__(
        self,
        stack: Stack,
        records: Sequence[TaskRecord],
        distributions: env.Distributions,
        *,
        repeats: int = REPEATS,
        again: bool = False,
        older_than_s: float | None = None,
        rebuild: bool = False,
        clock: Callable[[], float] = time.time,
        progress: ProgressSink = lambda task_id, text: None,
    ) -> None:
        """Tasks that were decided stand, unless `again`, or that is more than `older_than_s` ago.

        `rebuild` lets go of the State of a task first, so that it is made of its hashes anew.
        """
        self._stack, self._distributions = stack, distributions
        self._records = {record.id: record for record in records}
        self._repeats, self._again, self._progress = repeats, again, progress
        self._older_than_s, self._rebuild, self._clock = older_than_s, rebuild, clock
        self._admitted: dict[str, Facts] | None = None
        """Those that a task must not give away; read once, and kept up."""

    async def run(self, task_ids: Sequence[str], *, concurrency: int = 2) -> list[pb.Task]:
        """Decide on tasks; the tasks as they are now, in the order given.

        Raises:
            NotFound: no record of that id.
            RegreenError: the platform failed on a task; the others were decided.
        """
        for task_id in task_ids:
            if task_id not in self._records:
                raise NotFound(f"task {task_id!r} has no record here; import its file again")
        found = (await self._stack.sandbox.get_capabilities()).interpreters
        room = asyncio.Semaphore(concurrency)
        async with PackageIndex(index_urls()) as index:

            async def one(task_id: str) -> pb.Task:
                async with room:
                    return await self._one(task_id, dict(found), index)

            work = (one(task_id) for task_id in task_ids)
            ended = await asyncio.gather(*work, return_exceptions=True)
        decided = [task for task in ended if not isinstance(task, BaseException)]
        if len(decided) < len(ended):
            raise next(error for error in ended if isinstance(error, BaseException))
        return decided

    async def standing(self, task_ids: Sequence[str]) -> set[str]:
        """Which tasks were decided before, so that `run` leaves them as they are."""
        if self._again:
            return set()
        tasks = [await self._stack.tasks.get_task(task_id) for task_id in task_ids]
        return {task.id for task in tasks if await self._stands(task)}

    async def _one(
        self, task_id: str, interpreters: Mapping[str, str], index: PackageIndex
    ) -> pb.Task:
        record = self._records[task_id]
        stored = await self._stack.tasks.get_task(task_id)
        if not self._again and await self._stands(stored):
            return stored
        python = choose_python(record, interpreters)
        if python is None:
            return await self._wait(record, interpreters)
        client = ReportingGateClient(
            self._stack.state, self._stack.sandbox, lambda text: self._progress(task_id, text)
        )
        releases = {**self._distributions, **releases_of(stored.environment)}
        if self._rebuild and stored.state_id:
            await self._let_go(stored.state_id)
        gate = Gate(client, releases, index, repeats=self._repeats)
        other = "" if python == record.python else python
        judged, verdict = await judge_steadily(gate, record, other)
        verdict = await self._kept_apart(stored, verdict)
        if verdict.admitted:
            await self._store_judged(judged, gate, verdict, other, record_sha256(record))
        self._progress(task_id, f"{verdict.status}: {verdict.reason}")
        return await self._record(to_report(record, verdict), verdict.seconds)

    async def _record(self, report: pb.GateReport, seconds: float | None = None) -> pb.Task:
        """Store a report with what changed against the one before."""
        report.drift.extend(drift(await last_report(self._stack, report.task_id), report))
        return await self._stack.tasks.record_gate(report, validation_time_s=seconds)

    async def _kept_apart(self, task: pb.Task, verdict: Verdict) -> Verdict:
        """Refuse a task that gives away an admitted one of another split, or is given away."""
        if not verdict.admitted or not task.split:
            return verdict
        if self._admitted is None:
            wanted = pb.TaskFilter(statuses=[pb.TASK_STATUS_ADMITTED])
            every = await self._stack.tasks.all_tasks(wanted)
            if self._admitted is None:  # somebody else may have been quicker
                self._admitted = {one.id: facts(one) for one in every}
        seen = pb.Task()
        seen.CopyFrom(task)
        seen.error_log = verdict.error_log
        own = facts(seen)
        found = leaks_of(own, self._admitted.values())
        if found:
            self._admitted.pop(task.id, None)
            reason = f"leaks: {found[0]}; put both into one split"
            return replace(verdict, status="rejected", reason=reason)
        self._admitted[task.id] = own
        return verdict

    async def _let_go(self, state_id: str) -> None:
        """Delete a State if nobody uses it."""
        with contextlib.suppress(NotFound, FailedPrecondition):
            await self._stack.state.delete_state(state_id)

    async def _stands(self, task: pb.Task) -> bool:
        """Whether a task is decided and the state that the decision rests on is still there."""
        if task.status not in DECIDED:
            return False
        age_s = self._clock() - task.verify_time.ToNanoseconds() / 1e9
        if self._older_than_s is not None and age_s > self._older_than_s:
            return False
        if not task.state_id:
            return True
        try:
            await self._stack.state.get_state(task.state_id)
        except NotFound:
            return False
        return True

    async def _wait(self, record: TaskRecord, interpreters: Mapping[str, str]) -> pb.Task:
        wanted = ", ".join(dict.fromkeys((record.python, *record.choices, *record.pythons)))
        have = ", ".join(sorted(interpreters)) or "none"
        lacking = [v for v in (record.python, *record.choices) if v not in interpreters]
        reason = (
            f"needs Python {wanted}; found {have}; "
            f"`uv python install {' '.join(lacking)}` brings it: {PYTHON_PLACES}"
        )
        self._progress(record.id, f"waiting: {reason}")
        report = pb.GateReport(task_id=record.id, status=pb.TASK_STATUS_WAITING, reason=reason)
        return await self._record(report)

    async def _store_judged(
        self, record: TaskRecord, gate: Gate, verdict: Verdict, python: str, sha256: str
    ) -> None:
        """Import the task once more as it was judged, with the diffs of the fixes that passed."""
        state = await self._stack.state.get_state(verdict.state_id)
        good = [f for f in record.fixes if verdict.fixes.get(f"{f.mode}/{f.origin}") == "ok"]
        modes = record.modes if record.control else [fix.mode for fix in good]
        diffs = {
            f"{fix.mode}/{fix.origin}": await gate.reference(record, fix, state) for fix in good
        }
        held = record.model_copy(update={"fixes": good})
        task = _message(held, gate.distributions, python=python, fixes=diffs)
        task.labels[RECORD_LABEL] = sha256
        if len(task.fail_to_pass) == task.fail_to_pass_count:
            stable = [id for id in task.fail_to_pass if id not in verdict.flaky]
            _set_ids(task, stable or verdict.fail_to_pass)
        elif not task.fail_to_pass:
            task.fail_to_pass.extend(verdict.fail_to_pass[:300])
        task.pass_to_pass_count = len(verdict.pass_to_pass)
        del task.modes[:]
        task.modes.extend(sorted({MODES[mode] for mode in modes}))
        await self._stack.tasks.import_tasks([task], replace=True)


def _message(
    record: TaskRecord,
    distributions: env.Distributions,
    *,
    python: str = "",
    fixes: Mapping[str, Sequence[common_pb.FileChange]] | None = None,
) -> pb.Task:
    message = task_message(record, distributions, python=python, fixes=fixes)
    message.id = record.id
    if len(message.fail_to_pass) == message.fail_to_pass_count:
        _set_ids(message, message.fail_to_pass)
    message.labels[RECORD_LABEL] = record_sha256(record)
    return message


def _set_ids(task: pb.Task, ids: Iterable[str]) -> None:
    """Name every test that a fix must turn green."""
    unique = sorted(set(ids))
    del task.fail_to_pass[:]
    task.fail_to_pass.extend(unique)
    task.fail_to_pass_count = len(unique)
    task.fail_to_pass_sha256 = ids_sha256(unique)


def to_report(record: TaskRecord, verdict: Verdict) -> pb.GateReport:
    """The evidence of a verdict as the dataset service stores it: one series per kind of check.

    Checks of a reference fix that did not hold count against that fix, not against the task.
    """
    good = {f"reference-passes {name}" for name, result in verdict.fixes.items() if result == "ok"}
    report = gate_report(verdict)
    repeats: dict[str, int] = {}
    for check in report.checks:
        name, _, which = check.name.partition(" ")
        if name == "reference-passes" and check.name not in good:
            name = "reference-refused"
        repeats[name] = repeats.get(name, 0) + 1
        check.name, check.repeat = name, repeats[name]
        check.detail = f"{which}: {check.detail}" if which else check.detail
    detail = f"source and {len(record.pins_fail)} packages by sha256"
    pinned = report.checks.add(name="pinned", repeat=1, ok=True, detail=detail)
    pinned.duration.FromNanoseconds(int(verdict.prepare_s * 1e9))
    return report

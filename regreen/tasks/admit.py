"""Brings tasks from records to admitted tasks of the dataset service.

- A record becomes a `Task` message; its digest is a label, so that an unchanged record
  is never imported twice and a changed one starts anew.
- Admission runs the gate through the sandbox service and stores its evidence; a task that lacks an
  interpreter here waits, it is not rejected.
- Reference fixes that edit files are worked out against the State, then stored with the task.
- What was decided here before is not decided again unless asked for.
"""

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from regreen.client.stack import Stack
from regreen.common import v1 as common_pb
from regreen.dataset import v1 as pb
from regreen.pkgindex import PackageIndex, index_urls
from regreen.rpc.errors import InvalidArgument, NotFound
from regreen.sandbox import v1 as sandbox_pb
from regreen.tasks import environment as env
from regreen.tasks.gate import Gate, Verdict, judge_patiently
from regreen.tasks.model import Fix, TaskRecord

RECORD_LABEL = "record_sha256"
MODES = {"any_fix": common_pb.MODE_ANY_FIX, "keep_new": common_pb.MODE_KEEP_NEW}
_STATUSES = {
    "admitted": pb.TASK_STATUS_ADMITTED,
    "rejected": pb.TASK_STATUS_REJECTED,
    "quarantined": pb.TASK_STATUS_QUARANTINED,
    "waiting": pb.TASK_STATUS_WAITING,
}
DECIDED = frozenset({pb.TASK_STATUS_ADMITTED, pb.TASK_STATUS_REJECTED, pb.TASK_STATUS_QUARANTINED})
ProgressSink = Callable[[str, str], None]
"""Called with the task's id and what is being done."""


@dataclass(frozen=True, slots=True)
class SandboxGate:
    """The gate's view of a sandbox service."""

    stack: Stack
    report: Callable[[str], None]

    async def prepare(self, spec: sandbox_pb.EnvironmentSpec) -> sandbox_pb.State:
        """The state of an environment."""
        async for event in self.stack.state.prepare_state(spec):
            if event.HasField("state"):
                return event.state
            self.report(f"{event.progress.stage} {event.progress.message}".strip())
        raise NotFound("the preparation ended without a state")

    async def validate(
        self,
        state_id: str,
        changes: Sequence[common_pb.FileChange],
        *,
        held_pins: Mapping[str, str],
        required_tests: Sequence[str],
        skip_cache_lookup: bool,
    ) -> sandbox_pb.Validation:
        """The verdict on a diff."""
        self.report("validate")
        return await self.stack.sandbox.validate(
            state_id,
            changes,
            held_pins=held_pins,
            required_tests=required_tests,
            skip_cache_lookup=skip_cache_lookup,
        )

    async def read_files(self, state_id: str, paths: Sequence[str]) -> Mapping[str, bytes]:
        """Files of a state's repository."""
        if not paths:
            return {}
        sandbox = await self.stack.sandbox.create_sandbox(state_id, ttl_s=60.0)
        try:
            found = {}
            for path in paths:
                answer = await self.stack.sandbox.read_file(sandbox.id, f"/work/repo/{path}")
                found[path] = answer.content
            return found
        finally:
            await self.stack.sandbox.delete_sandbox(sandbox.id)


def record_sha256(record: TaskRecord) -> str:
    """Digest of a record."""
    return hashlib.sha256(record.model_dump_json().encode()).hexdigest()


def to_task(
    record: TaskRecord,
    distributions: env.Distributions,
    fixes: Sequence[tuple[Fix, Sequence[common_pb.FileChange]]] = (),
    python: str = "",
) -> pb.Task:
    """The message that stands for a record; `fixes` are those whose diffs are known."""
    culprit = record.culprit
    return pb.Task(
        id=record.id,
        kind=record.kind,
        environment=env.environment(record, distributions, python),
        fail_to_pass=record.tests.fail_to_pass,
        fail_to_pass_count=record.tests.fail_to_pass_count,
        fail_to_pass_sha256=record.tests.fail_to_pass_sha256,
        pass_to_pass_count=record.tests.pass_to_pass_count,
        category=record.category,
        blame=record.blame,
        modes=[MODES[mode] for mode in record.modes],
        culprit=culprit.name if culprit else "",
        culprit_version=culprit.bad if culprit else "",
        culprit_good_version=culprit.good if culprit else "",
        fixes=[
            pb.ReferenceFix(mode=MODES[fix.mode], changes=changes, origin=fix.origin)
            for fix, changes in fixes
        ],
        split=record.split,
        moved=record.changed,
        labels={RECORD_LABEL: record_sha256(record), "demo": str(record.demo).lower()},
    )


async def import_records(
    stack: Stack, records: Sequence[TaskRecord], distributions: env.Distributions
) -> pb.ImportTasksResponse:
    """Store records as tasks; unchanged ones stay as they are, changed ones start anew."""
    stored = {task.id: task.labels.get(RECORD_LABEL) for task in await stack.tasks.all_tasks()}
    fresh = [record for record in records if stored.get(record.id) != record_sha256(record)]
    tasks = [to_task(record, distributions) for record in fresh]
    unchanged = len(records) - len(fresh)
    if not tasks:
        return pb.ImportTasksResponse(unchanged=unchanged)
    answer = await stack.tasks.import_tasks(tasks, replace=True)
    answer.unchanged += unchanged
    return answer


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
        repeats: int = 2,
        again: bool = False,
        progress: ProgressSink = lambda task_id, text: None,
    ) -> None:
        self._stack, self._distributions = stack, distributions
        self._records = {record.id: record for record in records}
        self._repeats, self._again, self._progress = repeats, again, progress

    async def run(self, task_ids: Sequence[str], *, concurrency: int = 2) -> list[pb.Task]:
        """Decide on tasks; the tasks as they are now, in the order given.

        Raises:
            NotFound: no record of that id.
        """
        for task_id in task_ids:
            if task_id not in self._records:
                raise NotFound(f"task {task_id!r} has no record; import its file first")
        found = (await self._stack.sandbox.get_capabilities()).interpreters
        room = asyncio.Semaphore(concurrency)
        async with PackageIndex(index_urls()) as index:

            async def one(task_id: str) -> pb.Task:
                async with room:
                    return await self._one(task_id, dict(found), index)

            return list(await asyncio.gather(*(one(task_id) for task_id in task_ids)))

    async def _one(
        self, task_id: str, interpreters: Mapping[str, str], index: PackageIndex
    ) -> pb.Task:
        record = self._records[task_id]
        stored = await self._stack.tasks.get_task(task_id)
        if stored.status in DECIDED and not self._again and await self._kept(stored):
            return stored
        python = choose_python(record, interpreters)
        if python is None:
            return await self._wait(record, interpreters)
        client = SandboxGate(self._stack, lambda text: self._progress(task_id, text))
        gate = Gate(client, self._distributions, index, repeats=self._repeats)
        verdict = await judge_patiently(gate, record, "" if python == record.python else python)
        if verdict.admitted:
            await self._store_fixes(record, gate, verdict, python)
        report = to_report(record, verdict)
        self._progress(task_id, f"{verdict.status}: {verdict.reason}")
        return await self._stack.tasks.record_gate(report, validation_time_s=verdict.seconds)

    async def _kept(self, task: pb.Task) -> bool:
        """Whether the state that a decision rests on is still there."""
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
        reason = f"needs Python {wanted}; found {have}; install it so that `uv python find` sees it"
        self._progress(record.id, f"waiting: {reason}")
        report = pb.GateReport(task_id=record.id, status=pb.TASK_STATUS_WAITING, reason=reason)
        return await self._stack.tasks.record_gate(report)

    async def _store_fixes(
        self, record: TaskRecord, gate: Gate, verdict: Verdict, python: str
    ) -> None:
        """Import the task once more with the diffs of the fixes that passed."""
        state = await self._stack.state.get_state(verdict.state_id)
        good = [f for f in record.fixes if verdict.fixes.get(f"{f.mode}/{f.origin}") == "ok"]
        fixes = [(fix, await gate.reference(record, fix, state)) for fix in good]
        other = "" if python == record.python else python
        task = to_task(record, self._distributions, fixes, other)
        if not task.fail_to_pass:
            task.fail_to_pass.extend(verdict.fail_to_pass[:300])
        task.pass_to_pass_count = len(verdict.pass_to_pass)
        allowed = {MODES[fix.mode] for fix in good}
        del task.modes[:]
        task.modes.extend(sorted(allowed))
        await self._stack.tasks.import_tasks([task], replace=True)


def to_report(record: TaskRecord, verdict: Verdict) -> pb.GateReport:
    """The evidence of a verdict as the dataset service stores it."""
    good = {f"reference-passes {name}" for name, result in verdict.fixes.items() if result == "ok"}
    report = pb.GateReport(
        task_id=verdict.task_id,
        status=_STATUSES[verdict.status],
        reason=verdict.reason,
        flaky=verdict.flaky,
        state_id=verdict.state_id,
        error_log=verdict.error_log,
    )
    repeats: dict[str, int] = {}
    for check in verdict.checks:
        name = check.name.partition(" ")[0]
        if name == "reference-passes" and check.name not in good:
            name = "reference-refused"
        repeats[name] = repeats.get(name, 0) + 1
        message = pb.GateCheck(
            name=name,
            repeat=repeats[name],
            ok=check.ok,
            detail=f"{check.name}: {check.detail}",
            results_sha256=check.results_sha256,
        )
        message.duration.FromNanoseconds(int(check.seconds * 1e9))
        report.checks.append(message)
    report.checks.append(_pinned(record))
    return report


def _pinned(record: TaskRecord) -> pb.GateCheck:
    """Every input of a record is named by hash: the format does not load otherwise."""
    count = len(record.pins_fail)
    if not record.sdist.sha256:
        raise InvalidArgument("sdist.sha256", "is empty", "name the source by hash")
    return pb.GateCheck(
        name="pinned", repeat=1, ok=True, detail=f"{count} pins and the source by hash"
    )

"""Tasks, their gate reports, splits and counts.

- An import is all or nothing; a task with the same content is left exactly as it is.
- Replaced content is ungated content: its status returns to `new`, old reports stay as evidence.
- No family of packages is in two splits, whichever calls run at the same time; no control is in
  another one than test.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import ColumnElement, func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc.checks import check_control
from dataset_svc.models import SPLITS, GateCheck, GateReport, Task
from dataset_svc.queries.paging import Cursor, Page
from dataset_svc.records import CheckRecord, GateRecord, TaskQuery, TaskRecord
from regreen.families import family
from regreen.rpc.errors import AlreadyExists, InvalidArgument, NotFound

_SPLIT_LOCK = 0x73706C69
"""Advisory lock of calls that assign splits."""


async def import_tasks(
    session: AsyncSession, tasks: Sequence[TaskRecord], *, replace_changed: bool
) -> tuple[int, int]:
    """Store tasks; how many were new or replaced, and how many were there already.

    Raises:
        AlreadyExists: other content is stored under an id and `replace_changed` is off.
        InvalidArgument: an id comes twice, a package would be in two splits, or a control in one
            that is learnt from.
    """
    positions: dict[str, int] = {}
    for position, task in enumerate(tasks):
        if task.id in positions:
            raise InvalidArgument(
                f"tasks[{position}].id", f"{task.id} comes twice", "send each once"
            )
        positions[task.id] = position
    await _lock_splits(session)
    rows = await session.execute(
        select(Task.id, Task.content_sha256, Task.split)
        .where(Task.id.in_(positions))
        .with_for_update()
    )
    stored = {row.id: row for row in rows}
    written = []
    for task in tasks:
        found = stored.get(task.id)
        if found is not None and found.content_sha256 == task.fingerprint():
            continue
        if found is not None and not replace_changed:
            raise AlreadyExists(
                f"task {task.id} is stored with other content; set replace to overwrite it"
            )
        written.append(replace(task, split=task.split or (found.split if found else "")))
    if written:
        values = [_columns(task) for task in written]
        new = insert(Task)
        changed = {name: new.excluded[name] for name in values[0]}
        upsert = new.on_conflict_do_update(index_elements=[Task.id], set_=changed)
        await session.execute(upsert, values)
    await _check_splits(session, {task.package for task in written}, "tasks")
    await _check_controls(session, {task.id for task in written}, "tasks")
    return len(written), len(tasks) - len(written)


async def get_task(session: AsyncSession, task_id: str) -> TaskRecord:
    """One task.

    Raises:
        NotFound: there is none of that id.
    """
    task = await session.get(Task, task_id)
    if task is None:
        raise NotFound(f"no task {task_id[:200]!r}")
    return _record(task)


async def list_tasks(session: AsyncSession, query: TaskQuery, cursor: Cursor) -> Page[TaskRecord]:
    """Tasks in id order."""
    statement = select(Task).where(*_conditions(query))
    if cursor.after is not None:
        statement = statement.where(Task.id > str(cursor.after[0]))
    rows = await session.scalars(statement.order_by(Task.id).limit(cursor.size + 1))
    tasks = [_record(task) for task in rows]
    return cursor.page(tasks, [[task.id] for task in tasks])


async def record_gate(
    session: AsyncSession, report: GateRecord, validation_s: float | None
) -> TaskRecord:
    """Store a report and set the task's status, state and log; the task as it is now.

    Raises:
        NotFound: no such task.
        InvalidArgument: it is admitted on evidence of another kind of task.
    """
    task = await session.get(Task, report.task_id, with_for_update=True)
    if task is None:
        raise NotFound(f"no task {report.task_id[:200]!r}")
    check_control(report, task.document.get("labels", {}))
    row = GateReport(
        task_id=report.task_id,
        status=report.status,
        reason=report.reason,
        state_id=report.state_id,
        error_log=report.error_log,
        flaky=list(report.flaky),
        evidence=report.evidence,
    )
    session.add(row)
    await session.flush()
    session.add_all(
        GateCheck(
            report_seq=row.seq,
            position=position,
            name=check.name,
            repeat=check.repeat,
            ok=check.ok,
            detail=check.detail,
            results_sha256=check.results_sha256,
            duration_s=check.duration_s,
            conditions=check.conditions,
        )
        for position, check in enumerate(report.checks)
    )
    task.status, task.state_id, task.error_log = report.status, report.state_id, report.error_log
    task.verify_time = row.create_time
    if validation_s is not None:
        task.validation_s = validation_s
    await session.flush()
    return _record(task)


async def last_gate_report(session: AsyncSession, task_id: str) -> GateRecord:
    """The newest report of a task.

    Raises:
        NotFound: no such task, or it was never gated.
    """
    newest = select(GateReport).where(GateReport.task_id == task_id)
    row = (await session.scalars(newest.order_by(GateReport.seq.desc()).limit(1))).first()
    if row is None:
        raise NotFound(f"task {task_id[:200]!r} has no gate report")
    checks = await session.scalars(
        select(GateCheck).where(GateCheck.report_seq == row.seq).order_by(GateCheck.position)
    )
    return GateRecord(
        task_id=row.task_id,
        status=row.status,
        reason=row.reason,
        checks=tuple(
            CheckRecord(
                c.name, c.repeat, c.ok, c.detail, c.results_sha256, c.duration_s, c.conditions
            )
            for c in checks
        ),
        flaky=tuple(row.flaky),
        state_id=row.state_id,
        error_log=row.error_log,
        evidence=row.evidence or {},
        create_time=row.create_time,
    )


async def split_tasks(session: AsyncSession, splits: Mapping[str, str]) -> int:
    """Assign tasks to splits; how many changed.

    Raises:
        NotFound: an unknown task.
        InvalidArgument: an unknown split, a package would be in two of them, or a control in one
            that is learnt from.
    """
    for task_id, split in splits.items():
        if split not in SPLITS:
            raise InvalidArgument(
                f"splits[{task_id[:200]}]",
                f"{split[:80]!r} is no split",
                "give train, validation or test",
            )
    await _lock_splits(session)
    rows = await session.execute(
        select(Task.id, Task.split, Task.package).where(Task.id.in_(splits)).with_for_update()
    )
    stored = {row.id: row for row in rows}
    for task_id in splits:
        if task_id not in stored:
            raise NotFound(f"no task {task_id[:200]!r}")
    changed = [row for row in stored.values() if row.split != splits[row.id]]
    for split in {splits[row.id] for row in changed}:
        ids = [row.id for row in changed if splits[row.id] == split]
        await session.execute(update(Task).where(Task.id.in_(ids)).values(split=split))
    await _check_splits(session, {row.package for row in changed}, "splits")
    await _check_controls(session, {row.id for row in changed}, "splits")
    return len(changed)


async def task_stats(session: AsyncSession) -> tuple[int, dict[str, dict[str, int]]]:
    """The number of tasks, and counts by dimension and value."""
    total = (await session.execute(select(func.count()).select_from(Task))).scalar_one()
    columns = {
        "status": Task.status,
        "split": Task.split,
        "category": Task.category,
        "blame": Task.blame,
        "kind": Task.kind,
        "culprit": Task.culprit,
        "python": Task.python,
    }
    counts = {}
    for name, column in columns.items():
        rows = await session.execute(select(column, func.count()).group_by(column))
        counts[name] = {str(row[0]): int(row[1]) for row in rows}
    return total, counts


async def known_tasks(session: AsyncSession, task_ids: set[str]) -> None:
    """Refuse ids of tasks that are not stored.

    Raises:
        NotFound: names the first.
    """
    rows = await session.scalars(select(Task.id).where(Task.id.in_(task_ids)))
    missing = task_ids - set(rows)
    if missing:
        raise NotFound(f"no task {min(missing)[:200]!r}")


async def _lock_splits(session: AsyncSession) -> None:
    await session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _SPLIT_LOCK})


async def _check_splits(session: AsyncSession, packages: set[str], field: str) -> None:
    """Refuse a package whose family is in two splits now."""
    wanted = {family(package) for package in packages}
    rows = await session.execute(
        select(Task.package, Task.split)
        .distinct()
        .where(Task.split != "")
        .order_by(Task.package, Task.split)
    )
    seen: dict[str, tuple[str, str]] = {}
    for package, split in rows:
        first, there = seen.setdefault(family(package), (package, split))
        if split != there and family(package) in wanted:
            both = package if package == first else f"{first} and {package}, of one family,"
            raise InvalidArgument(
                field,
                f"package {both} would be in the splits {there} and {split}",
                "keep all tasks of one family of packages together",
            )


async def _check_controls(session: AsyncSession, ids: set[str], field: str) -> None:
    """Refuse a control that somebody would learn from: nothing can fix it."""
    labels = Task.document["labels"]["control"].astext
    found = await session.scalars(
        select(Task.id)
        .where(Task.id.in_(ids), labels == "true", Task.split.in_(("train", "validation")))
        .order_by(Task.id)
        .limit(1)
    )
    if task_id := found.first():
        problem = f"{task_id} is a control, which nothing can fix"
        raise InvalidArgument(field, problem, "put it into the split test")


def _conditions(query: TaskQuery) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if query.statuses:
        conditions.append(Task.status.in_(query.statuses))
    if query.mode:
        conditions.append(Task.modes.contains([query.mode]))
    for name in ("split", "kind", "python", "package", "culprit"):
        if value := getattr(query, name):
            conditions.append(getattr(Task, name) == value)
    return conditions


def _columns(task: TaskRecord) -> dict[str, Any]:
    names = ("id", "kind", "package", "python", "category", "blame", "culprit", "split", "document")
    values: dict[str, Any] = {name: getattr(task, name) for name in names}
    return values | {
        "modes": list(task.modes),
        "content_sha256": task.fingerprint(),
        "status": "new",
        "state_id": "",
        "error_log": "",
        "verify_time": None,
        "validation_s": None,
    }


def _record(task: Task) -> TaskRecord:
    return TaskRecord(
        id=task.id,
        kind=task.kind,
        package=task.package,
        python=task.python,
        category=task.category,
        blame=task.blame,
        culprit=task.culprit,
        modes=tuple(task.modes),
        split=task.split,
        document=task.document,
        status=task.status,
        state_id=task.state_id,
        error_log=task.error_log,
        verify_time=task.verify_time,
        validation_s=task.validation_s,
        create_time=task.create_time,
    )

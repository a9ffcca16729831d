"""Runs, their metrics and checkpoints.

- A run's name is unique among its tenant's: creating it again finds it.
- A metric has one value per run, step and name; the last one written holds.
- A checkpoint and the acknowledgement of its groups are one transaction.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import BigInteger, func, literal, select, tuple_
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc.columns import AnyText
from dataset_svc.models import Checkpoint, Document, Group, Run, RunMetric
from dataset_svc.queries import groups
from dataset_svc.queries.paging import Cursor, Page
from dataset_svc.records import CheckpointRecord, MetricRecord, RunRecord
from dataset_svc.walls import of_every_tenant, tenant_of
from regreen.ids import new_id
from regreen.rpc.errors import AlreadyExists, FailedPrecondition, NotFound


async def create_run(
    session: AsyncSession, name: str, kind: str, config: Document | None
) -> tuple[RunRecord, bool]:
    """The run of this name, and whether it was there already.

    Raises:
        AlreadyExists: the run of that name has another kind.
    """
    tenant = tenant_of(session)
    new = insert(Run).values(
        id=new_id("run"), tenant=tenant, name=name, kind=kind, state="active", config=config
    )
    made = await session.execute(
        new.on_conflict_do_nothing(index_elements=[Run.tenant, Run.name]).returning(Run.id)
    )
    named = select(Run).where(Run.name == name, Run.tenant == tenant)
    run = (await session.scalars(named)).one()
    if run.kind != kind:
        raise AlreadyExists(f"run {name[:200]!r} is of kind {run.kind}; choose another name")
    return _run(run), made.first() is None


async def get_run(session: AsyncSession, id_or_name: str) -> RunRecord:
    """A run by id, else by name, nobody's before a tenant's.

    Raises:
        NotFound: there is none.
        FailedPrecondition: several tenants have one of that name.
    """
    run = await session.get(Run, id_or_name)
    if run is None:
        named = select(Run).where(Run.name == id_or_name).order_by(Run.tenant).limit(2)
        found = list(await session.scalars(named))
        if len(found) > 1 and found[0].tenant:
            raise FailedPrecondition(
                f"several tenants have a run {id_or_name[:200]!r}; give its id"
            )
        run = found[0] if found else None
    if run is None:
        raise NotFound(f"no run {id_or_name[:200]!r}")
    return _run(run)


async def list_runs(session: AsyncSession, kind: str, cursor: Cursor) -> Page[RunRecord]:
    """Runs, newest first."""
    statement = select(Run)
    if kind:
        statement = statement.where(Run.kind == kind)
    if cursor.after is not None:
        statement = statement.where(Run.seq < int(cursor.after[0]))
    runs = list(await session.scalars(statement.order_by(Run.seq.desc()).limit(cursor.size + 1)))
    return cursor.page([_run(run) for run in runs], [[run.seq] for run in runs])


async def update_run(
    session: AsyncSession,
    run_id: str,
    state: str,
    summary: Document | None,
    *,
    acknowledge_taken: bool = False,
    epoch: int = 0,
) -> RunRecord:
    """Change the state and summary of a run; empty and None leave them.

    With `acknowledge_taken` its taken groups go into its newest checkpoint, if it has one.

    Raises:
        NotFound: no such run.
        Aborted: the run was rewound since `epoch`.
    """
    run = await groups.locked_run(session, run_id, epoch, shared=False)
    if acknowledge_taken:
        kept = select(Checkpoint.id).where(Checkpoint.run_id == run_id, ~Checkpoint.abandoned)
        newest = (await session.scalars(kept.order_by(Checkpoint.seq.desc()).limit(1))).first()
        if newest is not None:
            await groups.acknowledge_taken(session, run_id, newest)
    run.state = state or run.state
    run.summary = run.summary if summary is None else summary
    run.update_time = (await session.execute(select(func.now()))).scalar_one()
    await session.flush()
    return _run(run)


async def record_metrics(
    session: AsyncSession, run_id: str, points: Sequence[MetricRecord]
) -> None:
    """Store points, replacing those of the same step and name.

    Raises:
        NotFound: no such run.
    """
    if await session.get(Run, run_id) is None:
        raise NotFound(f"no run {run_id[:200]!r}")
    now = (await session.execute(select(func.now()))).scalar_one()
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for point in points:
        rows[point.step, point.name] = {
            "run_id": run_id,
            "step": point.step,
            "name": point.name,
            "value": point.value,
            "time": point.time or now,
        }
    if not rows:
        return
    new = insert(RunMetric)
    values = {"value": new.excluded.value, "time": new.excluded.time}
    upsert = new.on_conflict_do_update(
        index_elements=[RunMetric.run_id, RunMetric.step, RunMetric.name], set_=values
    )
    await session.execute(upsert, [rows[key] for key in sorted(rows)])


async def list_metrics(
    session: AsyncSession, run_id: str, names: Sequence[str], from_step: int, cursor: Cursor
) -> Page[MetricRecord]:
    """Points in order of step and name.

    Raises:
        NotFound: no such run.
    """
    if await session.get(Run, run_id) is None:
        raise NotFound(f"no run {run_id[:200]!r}")
    statement = select(RunMetric.step, RunMetric.name, RunMetric.value, RunMetric.time)
    statement = statement.where(RunMetric.run_id == run_id, RunMetric.step >= from_step)
    if names:
        statement = statement.where(RunMetric.name.in_(names))
    if cursor.after is not None:
        step, name = cursor.after
        last = tuple_(literal(step, BigInteger()), literal(name, AnyText()))
        statement = statement.where(tuple_(RunMetric.step, RunMetric.name) > last)
    statement = statement.order_by(RunMetric.step, RunMetric.name).limit(cursor.size + 1)
    points = [MetricRecord(*row) for row in await session.execute(statement)]
    return cursor.page(points, [[point.step, point.name] for point in points])


async def record_checkpoint(
    session: AsyncSession,
    checkpoint: CheckpointRecord,
    epoch: int,
    *,
    acknowledge_taken: bool = False,
) -> CheckpointRecord:
    """Record a checkpoint and acknowledge its groups.

    With `acknowledge_taken` also every taken group of the run up to the checkpoint's step.

    Raises:
        NotFound: no such run or group.
        FailedPrecondition: a group that this run has not taken.
        Aborted: the run was rewound since `epoch`.
        AlreadyExists: a checkpoint of that id is recorded.
    """
    await groups.locked_run(session, checkpoint.run_id, epoch, shared=True)
    checkpoint_id = checkpoint.id or new_id("ckp")
    taken = of_every_tenant(select(Checkpoint.id).where(Checkpoint.id == checkpoint_id))
    if (await session.execute(taken)).first() is not None:
        raise AlreadyExists(f"checkpoint {checkpoint_id[:200]} is recorded; leave the id empty")
    row = Checkpoint(
        id=checkpoint_id,
        run_id=checkpoint.run_id,
        step=checkpoint.step,
        uri=checkpoint.uri,
        sha256=checkpoint.sha256,
        size_bytes=checkpoint.size_bytes,
        policy_version=checkpoint.policy_version,
    )
    session.add(row)
    await session.flush()
    await groups.acknowledge(session, checkpoint.group_ids, row.id, epoch)
    if acknowledge_taken:
        await groups.acknowledge_taken(session, row.run_id, row.id, row.step)
    in_it = select(Group.id).where(Group.checkpoint_id == row.id).order_by(Group.step, Group.seq)
    return _checkpoint(row, tuple(await session.scalars(in_it)))


async def list_checkpoints(
    session: AsyncSession, run_id: str, cursor: Cursor
) -> Page[CheckpointRecord]:
    """Checkpoints of a run that no rewind has abandoned, newest first.

    Raises:
        NotFound: no such run.
    """
    if await session.get(Run, run_id) is None:
        raise NotFound(f"no run {run_id[:200]!r}")
    statement = select(Checkpoint).where(Checkpoint.run_id == run_id, ~Checkpoint.abandoned)
    if cursor.after is not None:
        statement = statement.where(Checkpoint.seq < int(cursor.after[0]))
    statement = statement.order_by(Checkpoint.seq.desc()).limit(cursor.size + 1)
    rows = list(await session.scalars(statement))
    consumed: dict[str, list[str]] = {}
    members = await session.execute(
        select(Group.checkpoint_id, Group.id)
        .where(Group.checkpoint_id.in_([row.id for row in rows]))
        .order_by(Group.step, Group.seq)
    )
    for checkpoint_id, group_id in members:
        consumed.setdefault(str(checkpoint_id), []).append(group_id)
    records = [_checkpoint(row, tuple(consumed.get(row.id, ()))) for row in rows]
    return cursor.page(records, [[row.seq] for row in rows])


def _run(run: Run) -> RunRecord:
    return RunRecord(
        id=run.id,
        name=run.name,
        kind=run.kind,
        state=run.state,
        epoch=run.epoch,
        config=run.config,
        summary=run.summary,
        create_time=run.create_time,
        update_time=run.update_time,
    )


def _checkpoint(row: Checkpoint, group_ids: Sequence[str]) -> CheckpointRecord:
    return CheckpointRecord(
        id=row.id,
        run_id=row.run_id,
        step=row.step,
        uri=row.uri,
        sha256=row.sha256,
        size_bytes=row.size_bytes,
        policy_version=row.policy_version,
        create_time=row.create_time,
        group_ids=tuple(group_ids),
    )

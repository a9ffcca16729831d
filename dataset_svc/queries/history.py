"""What became of each rollout: its state, and every lease with how it ended.

- Reads only; pages are in the order of state and id.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc.models import Group, Lease, Rollout
from dataset_svc.queries.paging import Cursor, Page


@dataclass(frozen=True, slots=True)
class Attempt:
    """One lease of a rollout."""

    lease_id: str
    worker: str
    attempt: int
    error: str
    create_time: datetime


@dataclass(frozen=True, slots=True)
class RolloutRecord:
    """A rollout and what was tried."""

    id: str
    group_id: str
    group_index: int
    task_id: str
    state: str
    attempt: int
    error: str
    not_before: datetime | None
    final_time: datetime | None
    trajectory_id: str
    attempts: tuple[Attempt, ...]
    outages: int


async def list_rollouts(
    session: AsyncSession, run_id: str, cursor: Cursor, *, state: str = "", task_id: str = ""
) -> Page[RolloutRecord]:
    """Rollouts of a run."""
    wanted = (
        select(Rollout, Group.task_id)
        .join(Group, Group.id == Rollout.group_id)
        .where(Rollout.run_id == run_id)
        .order_by(Rollout.state, Rollout.id)
    )
    if state:
        wanted = wanted.where(Rollout.state == state)
    if task_id:
        wanted = wanted.where(Group.task_id == task_id)
    if cursor.after is not None:
        last = tuple_(*map(str, cursor.after))
        wanted = wanted.where(tuple_(Rollout.state, Rollout.id) > last)
    rows = (await session.execute(wanted.limit(cursor.size + 1))).all()
    attempts = await _attempts(session, [row[0].id for row in rows])
    found = [
        RolloutRecord(
            rollout.id,
            rollout.group_id,
            rollout.group_index,
            task,
            rollout.state,
            rollout.attempt,
            rollout.error,
            rollout.not_before,
            rollout.final_time,
            rollout.trajectory_id or "",
            tuple(attempts.get(rollout.id, ())),
            rollout.outages,
        )
        for rollout, task in rows
    ]
    return cursor.page(found, [[record.state, record.id] for record in found])


async def _attempts(session: AsyncSession, rollout_ids: Sequence[str]) -> dict[str, list[Attempt]]:
    rows = await session.execute(
        select(
            Lease.rollout_id, Lease.id, Lease.worker, Lease.attempt, Lease.error, Lease.create_time
        )
        .where(Lease.rollout_id.in_(rollout_ids))
        .order_by(Lease.rollout_id, Lease.create_time, Lease.id)
    )
    found: dict[str, list[Attempt]] = {}
    for rollout_id, lease_id, worker, attempt, error, create_time in rows:
        made = Attempt(lease_id, worker, attempt, error, create_time)
        found.setdefault(rollout_id, []).append(made)
    return found

"""Tasks that are set aside: their rollouts fail again and again while those of others succeed.

- A task is parked, in one run, when `park_after` rollouts of it in a row were lost to
  infrastructure and as many rollouts of other tasks of the run were committed meanwhile: an outage,
  which fails everything, parks nothing.
- A parked task costs no worker anything: what waits of it, and what is enqueued of it later, is
  lost at once with the reason, so that its groups complete without it.
- Releasing it, or rewinding the run, has its lost rollouts tried anew.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, and_, func, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc import measures
from dataset_svc.models import Group, ParkedTask, Rollout, Run
from dataset_svc.queries.closing import close_groups, reopen_groups
from dataset_svc.queries.paging import Cursor, Page
from regreen.rpc.errors import NotFound

_REASON_CHARS = 2000
Pair = tuple[str, str]
"""A run and a task."""


@dataclass(frozen=True, slots=True)
class Parked:
    """A task that is set aside in a run, and why."""

    run_id: str
    task_id: str
    reason: str
    lost: int
    park_time: datetime


async def consider(session: AsyncSession, park_after: int, pairs: Iterable[Pair]) -> int:
    """Park those of the tasks that have become poison, once a rollout of theirs is lost; how many.

    0 for `park_after` parks nothing.
    """
    parked = 0
    for run_id, task_id in sorted(set(pairs)) if park_after else ():
        reason = await _poison(session, park_after, run_id, task_id)
        if reason is None:
            continue
        text, lost = reason
        new = insert(ParkedTask).values(
            run_id=run_id, task_id=task_id, reason=text[:_REASON_CHARS], lost=lost
        )
        done = await session.execute(new.on_conflict_do_nothing().returning(ParkedTask.task_id))
        if done.first() is not None:
            measures.PARKED.inc()
            parked += 1
        await _lose_waiting(session, run_id, task_id, parked_error(text))
    return parked


def parked_error(reason: str) -> str:
    """Why a rollout of a parked task is lost."""
    return f"the task is parked: {reason}"[:_REASON_CHARS]


async def reasons(session: AsyncSession, pairs: Iterable[Pair]) -> dict[Pair, str]:
    """Why those of the tasks are parked that are."""
    wanted = list(set(pairs))
    rows = await session.execute(
        select(ParkedTask.run_id, ParkedTask.task_id, ParkedTask.reason).where(
            tuple_(ParkedTask.run_id, ParkedTask.task_id).in_(wanted)
        )
    )
    return {(row.run_id, row.task_id): row.reason for row in rows}


async def release(session: AsyncSession, run_id: str, task_id: str) -> int:
    """Have a parked task tried anew; how many of its lost rollouts wait again.

    Raises:
        NotFound: no such run, or the task is not parked in it.
    """
    if await session.get(Run, run_id) is None:
        raise NotFound(f"no run {run_id[:200]!r}")
    parked = await session.get(ParkedTask, (run_id, task_id), with_for_update=True)
    if parked is None:
        raise NotFound(f"task {task_id[:200]!r} is not parked in run {run_id}")
    await session.delete(parked)
    mine = select(Group.id).where(
        Group.run_id == run_id, Group.task_id == task_id, Group.state.in_(("open", "complete"))
    )
    rows = await session.execute(
        update(Rollout)
        .where(Rollout.state == "lost", Rollout.group_id.in_(mine))
        .values(**REOPENED)
        .returning(Rollout.group_id)
        .execution_options(synchronize_session=False)
    )
    opened = Counter(row.group_id for row in rows)
    await reopen_groups(session, opened)
    return opened.total()


REOPENED: dict[str, Any] = {
    "state": "waiting",
    "attempt": 0,
    "outages": 0,
    "not_before": None,
    "lease_id": None,
    "expire_time": None,
    "final_time": None,
}
"""What a lost slot is when it is tried anew."""


async def list_parked(session: AsyncSession, run_id: str, cursor: Cursor) -> Page[Parked]:
    """Parked tasks, of a run or of all, in order of run and task."""
    statement = select(ParkedTask).order_by(ParkedTask.run_id, ParkedTask.task_id)
    if run_id:
        statement = statement.where(ParkedTask.run_id == run_id)
    if cursor.after is not None:
        last = tuple_(*map(str, cursor.after))
        statement = statement.where(tuple_(ParkedTask.run_id, ParkedTask.task_id) > last)
    rows = list(await session.scalars(statement.limit(cursor.size + 1)))
    found = [Parked(r.run_id, r.task_id, r.reason, r.lost, r.park_time) for r in rows]
    return cursor.page(found, [[row.run_id, row.task_id] for row in rows])


async def _poison(
    session: AsyncSession, park_after: int, run_id: str, task_id: str
) -> tuple[str, int] | None:
    """Why a task is poison and how many rollouts of it were lost; None if it is not."""
    known = await reasons(session, [(run_id, task_id)])
    if known:
        return known[run_id, task_id], 0
    mine = and_(Group.run_id == run_id, Group.task_id == task_id)
    last = _final(func.max(Rollout.final_time)).where(mine, Rollout.state == "committed")
    since = (await session.execute(last)).scalar_one()
    lost = _final(func.count(), func.min(Rollout.final_time), func.max(Rollout.error)).where(
        mine, Rollout.state == "lost"
    )
    if since is not None:
        lost = lost.where(Rollout.final_time > since)
    count, first, error = (await session.execute(lost)).one()
    if count < park_after:
        return None
    others = _final(Rollout.id).where(
        Group.run_id == run_id,
        Group.task_id != task_id,
        Rollout.state == "committed",
        Rollout.final_time >= first,
    )
    went_well = len((await session.execute(others.limit(park_after))).all())
    return (str(error), int(count)) if went_well >= park_after else None


def _final(*columns: Any) -> Select[Any]:
    return select(*columns).select_from(Rollout).join(Group, Group.id == Rollout.group_id)


async def _lose_waiting(session: AsyncSession, run_id: str, task_id: str, error: str) -> None:
    waiting = (
        select(Rollout.id)
        .join(Group, Group.id == Rollout.group_id)
        .where(Group.run_id == run_id, Group.task_id == task_id, Rollout.state == "waiting")
        .with_for_update(of=Rollout, skip_locked=True)
    )
    rows = await session.execute(
        update(Rollout)
        .where(Rollout.id.in_(waiting))
        .values(state="lost", error=error, final_time=func.now())
        .returning(Rollout.group_id)
        .execution_options(synchronize_session=False)
    )
    lost = Counter(row.group_id for row in rows)
    measures.LOST.inc(lost.total())
    await close_groups(session, lost, lost)

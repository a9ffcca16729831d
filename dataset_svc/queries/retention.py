"""Removes old trajectories, by rules, and counts what there is.

- A trajectory of a run that is active is never removed: a learner may still take it. Whoever makes
  a run active, or rewinds it, meanwhile waits, or is waited for.
- A rollout whose trajectory is removed stays, as `pruned`; its run can no longer be rewound.
- Tokens go with the last trajectory that names them, after the grace period (`queries.blobs`).
"""

from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import ColumnElement, delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc.models import Rollout, Run, Trajectory


@dataclass(frozen=True, slots=True)
class PruneRule:
    """What may go; everything that a rule keeps stays."""

    older_than_s: float
    run_id: str = ""
    """Only of this run; empty: of any, and of none."""
    keep_solved: bool = False
    keep_flagged: bool = False
    """Keep what has a hack class."""
    keep_experts: bool = False
    """Keep what no policy did."""


async def prune(
    session: AsyncSession, rule: PruneRule, limit: int, *, dry_run: bool = False
) -> tuple[int, int, bool]:
    """Remove up to `limit` trajectories, oldest first.

    How many, the bytes of their tokens, and whether there may be more.
    """
    wanted = (
        select(Trajectory.id, Trajectory.arrays_bytes, Trajectory.run_id)
        .where(*_conditions(rule))
        .order_by(Trajectory.seq)
        .limit(limit)
    )
    if dry_run:
        rows = (await session.execute(wanted)).all()
        return len(rows), sum(row.arrays_bytes for row in rows), len(rows) == limit
    locked = await session.execute(wanted.with_for_update(skip_locked=True, of=Trajectory))
    found = locked.all()
    ended = await _still_ended(session, {row.run_id for row in found if row.run_id})
    rows = [row for row in found if not row.run_id or row.run_id in ended]
    ids = [row.id for row in rows]
    quiet = {"synchronize_session": False}
    await session.execute(
        update(Rollout)
        .where(Rollout.trajectory_id.in_(ids))
        .values(state="pruned", trajectory_id=None)
        .execution_options(**quiet)
    )
    await session.execute(
        delete(Trajectory).where(Trajectory.id.in_(ids)).execution_options(**quiet)
    )
    return len(rows), sum(row.arrays_bytes for row in rows), len(found) == limit


async def _still_ended(session: AsyncSession, run_ids: set[str]) -> set[str]:
    """Those of the runs that are not active, held so until the transaction ends."""
    wanted = select(Run.id).where(Run.id.in_(run_ids), Run.state != "active").order_by(Run.id)
    return set(await session.scalars(wanted.with_for_update(read=True)))


async def has_pruned(session: AsyncSession, run_id: str) -> bool:
    """Whether trajectories of a run's rollouts were removed."""
    first = select(Rollout.id).where(Rollout.run_id == run_id, Rollout.state == "pruned").limit(1)
    return (await session.execute(first)).first() is not None


async def stats(session: AsyncSession, run_id: str = "") -> dict[str, dict[str, int]]:
    """Trajectories of a run, or of all, by policy, actor, whether solved, and hack class."""
    columns = (Trajectory.policy, Trajectory.actor, Trajectory.solved)
    statement = select(*columns, func.count()).group_by(*columns)
    flagged = func.unnest(Trajectory.hacks).label("hack")
    hacks = select(flagged, func.count()).select_from(Trajectory)
    hacks = hacks.where(Trajectory.hacks != []).group_by(flagged)
    if run_id:
        statement = statement.where(Trajectory.run_id == run_id)
        hacks = hacks.where(Trajectory.run_id == run_id)
    found: dict[str, dict[str, int]] = {"policy": {}, "actor": {}, "solved": {}, "hack": {}}
    for policy, actor, solved, count in await session.execute(statement):
        for name, value in (("policy", policy), ("actor", actor), ("solved", str(solved).lower())):
            found[name][value] = found[name].get(value, 0) + count
    found["hack"] = {row[0]: row[1] for row in await session.execute(hacks)}
    return found


def _conditions(rule: PruneRule) -> list[ColumnElement[bool]]:
    active = select(Run.id).where(Run.state == "active")
    conditions = [
        Trajectory.create_time < func.now() - timedelta(seconds=rule.older_than_s),
        or_(Trajectory.run_id.is_(None), Trajectory.run_id.not_in(active)),
    ]
    if rule.run_id:
        conditions.append(Trajectory.run_id == rule.run_id)
    if rule.keep_solved:
        conditions.append(~Trajectory.solved)
    if rule.keep_flagged:
        conditions.append(Trajectory.hacks == [])
    if rule.keep_experts:
        conditions.append(Trajectory.actor == "policy")
    return conditions

"""The rollout queue, worker's side: enqueue, lease, heartbeat, commit, fail.

A rollout is one slot of a group:

    waiting ──lease──▶ leased ──commit──▶ committed
       ▲                 │
       ├──────fail───────┤  (attempts left)
       └─lease runs out──┤
                         └──fail or run out, no attempt left──▶ lost

- `committed` is final; exactly the committed slots have exactly one trajectory.
- A slot has at most one lease that may commit: the one named in its row. Giving a new lease
  replaces it, and that is the only way to lose one: a lease that ran out but was not given to
  another may still be extended or committed.
- A trajectory under the wrong lease is refused, unless it is the very one already committed.
- Infrastructure failures and leases that run out use up attempts; they are never scored. A slot
  that failed waits before it may be leased again, longer each time. A released slot does neither.
- `lost` is final but for a rewind, which opens the lost slots of unconsumed groups anew.
- A group is `complete` from the moment that its last slot becomes final (`pending` reaches 0).
- Workers never block each other: leasing skips locked rows.
- Locks are taken in the order rollout, group; several groups in id order.
- The time is the database's, so that several replicas agree on when a lease runs out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, case, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc import measures
from dataset_svc.models import Group, Lease, Rollout, Run, Trajectory
from dataset_svc.queries.tasks import known_tasks
from dataset_svc.queries.trajectories import Packed, check_new, insert_trajectory
from dataset_svc.records import GroupRecord, LeaseRecord
from regreen.ids import derive_seed, new_id
from regreen.rpc.errors import AlreadyExists, InvalidArgument, LeaseExpired, NotFound

Clock = Callable[[], ColumnElement[datetime]]
"""Makes the SQL expression for the time; tests give one that they control."""


def database_clock() -> ColumnElement[datetime]:
    """The database's wall clock."""
    return func.clock_timestamp()


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """The rules of the queue."""

    max_attempts: int = 4
    """Times that a slot is tried before it counts as lost to infrastructure."""
    lease_s: float = 120.0
    """Length of a lease whose request names none."""
    max_lease_s: float = 6 * 3600.0
    """Longest lease that may be asked for."""
    retry_s: float = 2.0
    """Pause before a slot that failed is given out again; doubles with each further failure."""
    max_retry_s: float = 60.0
    """Longest such pause."""
    clock: Clock = database_clock

    def pause(self, failures: int) -> timedelta:
        """How long a slot waits after its n-th failure."""
        return timedelta(seconds=min(self.retry_s * 2 ** min(failures - 1, 30), self.max_retry_s))


@dataclass(frozen=True, slots=True)
class Committed:
    """Where a committed rollout went."""

    trajectory_id: str
    group_complete: bool


async def enqueue(session: AsyncSession, groups: Sequence[GroupRecord]) -> list[str]:
    """Add groups with their rollouts; their ids in order. A group that is there already is left.

    Raises:
        NotFound: an unknown run or task.
        AlreadyExists: a group of that id has other content.
        InvalidArgument: a group comes twice.
    """
    groups = [replace(group, id=group.id or new_id("grp")) for group in groups]
    positions: dict[str, int] = {}
    for position, group in enumerate(groups):
        if group.id in positions:
            raise InvalidArgument(f"groups[{position}].id", f"{group.id} comes twice")
        positions[group.id] = position
    await known_tasks(session, {group.task_id for group in groups})
    runs = set(await session.scalars(select(Run.id).where(Run.id.in_({g.run_id for g in groups}))))
    for group in groups:
        if group.run_id not in runs:
            raise NotFound(f"no run {group.run_id[:200]!r}")
    stored = {g.id: g for g in await session.scalars(select(Group).where(Group.id.in_(positions)))}
    for group in groups:
        if group.id not in stored:
            await _insert_group(session, group)
        elif group_record(stored[group.id]) != group:
            raise AlreadyExists(f"group {group.id} is stored with other content; use a new id")
    return [group.id for group in groups]


async def lease(
    session: AsyncSession,
    policy: QueuePolicy,
    *,
    worker: str,
    count: int,
    run_id: str = "",
    lease_s: float | None = None,
) -> list[LeaseRecord]:
    """Lease up to `count` rollouts, lowest step and oldest group first.

    Raises:
        NotFound: no such run.
    """
    if run_id and await session.get(Run, run_id) is None:
        raise NotFound(f"no run {run_id[:200]!r}")
    await sweep(session, policy)
    now = policy.clock()
    rested = or_(Rollout.not_before.is_(None), Rollout.not_before <= now)
    available = or_(
        and_(Rollout.state == "waiting", rested),
        and_(Rollout.state == "leased", Rollout.expire_time < now),
    )
    wanted = select(Rollout, Rollout.state == "leased").where(available)
    if run_id:
        wanted = wanted.where(Rollout.run_id == run_id)
    wanted = wanted.order_by(Rollout.step, Rollout.group_seq, Rollout.group_index).limit(count)
    rows = (await session.execute(wanted.with_for_update(skip_locked=True))).all()
    if not rows:
        return []
    expires = (await session.execute(select(now + _length(policy, lease_s)))).scalar_one()
    leases: list[dict[str, Any]] = []
    for rollout, ran_out in rows:
        rollout.attempt += 1 if ran_out else 0
        rollout.state, rollout.lease_id, rollout.expire_time = "leased", new_id("lse"), expires
        leases.append(
            {
                "id": rollout.lease_id,
                "rollout_id": rollout.id,
                "worker": worker,
                "attempt": rollout.attempt,
            }
        )
    await session.flush()
    await session.execute(insert(Lease), leases)
    groups = await session.scalars(
        select(Group).where(Group.id.in_({row[0].group_id for row in rows}))
    )
    by_id = {group.id: group_record(group) for group in groups}
    return [lease_record(row[0], by_id[row[0].group_id]) for row in rows]


async def heartbeat(
    session: AsyncSession,
    policy: QueuePolicy,
    lease_ids: Sequence[str],
    lease_s: float | None = None,
) -> tuple[list[LeaseRecord], list[str]]:
    """Extend leases: the extended ones, and the ids of those that belong to another now.

    Raises:
        NotFound: there never was such a lease.
    """
    rollout_of = await _rollouts_of(session, lease_ids)
    rows = await session.execute(
        select(Rollout, Group)
        .join(Group, Group.id == Rollout.group_id)
        .where(Rollout.id.in_(set(rollout_of.values())))
        .order_by(Rollout.id)
        .with_for_update(of=Rollout)
    )
    held = {rollout.lease_id: (rollout, group) for rollout, group in rows}
    expires = (
        await session.execute(select(policy.clock() + _length(policy, lease_s)))
    ).scalar_one()
    extended, gone = [], []
    for lease_id in lease_ids:
        rollout, group = held.get(lease_id, (None, None))
        if rollout is None or group is None or rollout.state != "leased":
            gone.append(lease_id)
            continue
        rollout.expire_time = expires
        extended.append(lease_record(rollout, group_record(group)))
    await session.flush()
    return extended, gone


async def commit(session: AsyncSession, lease_id: str, packed: Packed) -> Committed:
    """Store the trajectory of a leased rollout and close its slot.

    Raises:
        LeaseExpired: the slot belongs to another lease, is lost, or holds another trajectory.
        NotFound: there never was such a lease.
    """
    rollout = await _locked(session, lease_id)
    if rollout.state == "committed":
        return await _same_again(session, lease_id, rollout, packed)
    _check_holder(rollout, lease_id)
    trajectory_id = await insert_trajectory(session, packed, lease_id)
    rollout.state, rollout.trajectory_id, rollout.expire_time = "committed", trajectory_id, None
    await session.flush()
    return Committed(trajectory_id, await _close_slot(session, rollout.group_id, lost=0))


async def check_commit(session: AsyncSession, lease_id: str, packed: Packed) -> None:
    """Refuse what `commit` would refuse now, without a lock, so that nothing is written for it.

    Raises:
        LeaseExpired: the slot belongs to another lease, is lost, or holds another trajectory.
        NotFound: there never was such a lease.
        AlreadyExists: the id is stored with other content.
    """
    rollout_id = (await _rollouts_of(session, [lease_id]))[lease_id]
    rollout = await session.get_one(Rollout, rollout_id)
    if rollout.state == "committed":
        await _same_again(session, lease_id, rollout, packed)
    else:
        _check_holder(rollout, lease_id)
        await check_new(session, packed)


async def fail(
    session: AsyncSession, policy: QueuePolicy, lease_id: str, error: str, *, release: bool = False
) -> bool:
    """Give a rollout back after an infrastructure failure; whether it will be tried again.

    With `release` nothing failed: no attempt is used up and there is no pause.

    Raises:
        LeaseExpired: the slot belongs to another lease.
        NotFound: there never was such a lease.
    """
    rollout = await _locked(session, lease_id)
    _check_holder(rollout, lease_id)
    await session.execute(update(Lease).where(Lease.id == lease_id).values(error=error))
    rollout.error, rollout.lease_id, rollout.expire_time = error, None, None
    rollout.not_before = None
    if release:
        rollout.state = "waiting"
        await session.flush()
        return True
    rollout.attempt += 1
    retried = rollout.attempt < policy.max_attempts
    rollout.state = "waiting" if retried else "lost"
    if retried:
        until = select(policy.clock() + policy.pause(rollout.attempt))
        rollout.not_before = (await session.execute(until)).scalar_one()
    await session.flush()
    if not retried:
        await _close_slot(session, rollout.group_id, lost=1)
        measures.LOST.inc()
    return retried


async def sweep(session: AsyncSession, policy: QueuePolicy) -> int:
    """Count as lost what ran out on its last attempt; how many rollouts that were."""
    ran_out = (
        select(Rollout.id)
        .where(
            Rollout.state == "leased",
            Rollout.expire_time < policy.clock(),
            Rollout.attempt >= policy.max_attempts - 1,
        )
        .with_for_update(skip_locked=True)
    )
    lost = await session.execute(
        update(Rollout)
        .where(Rollout.id.in_(ran_out))
        .values(state="lost", attempt=Rollout.attempt + 1, error="the last lease ran out")
        .returning(Rollout.group_id)
    )
    groups = sorted(row.group_id for row in lost)
    measures.LOST.inc(len(groups))
    for group_id in groups:
        await _close_slot(session, group_id, lost=1)
    return len(groups)


async def slot(session: AsyncSession, lease_id: str) -> LeaseRecord:
    """What a lease is for; takes no lock.

    Raises:
        NotFound: there never was such a lease.
    """
    row = (
        await session.execute(
            select(Rollout, Group, Lease.attempt)
            .join(Lease, Lease.rollout_id == Rollout.id)
            .join(Group, Group.id == Rollout.group_id)
            .where(Lease.id == lease_id)
        )
    ).first()
    if row is None:
        raise NotFound(f"no lease {lease_id[:200]!r}")
    record = lease_record(row[0], group_record(row[1]))
    return replace(record, id=lease_id, attempt=row[2])


def group_record(group: Group) -> GroupRecord:
    """The group as it was enqueued."""
    return GroupRecord(
        id=group.id,
        run_id=group.run_id,
        task_id=group.task_id,
        size=group.size,
        pipeline=group.pipeline,
        mode=group.mode,
        grader=group.grader,
        seed=group.seed,
        step=group.step,
        labels=group.labels,
    )


def lease_record(rollout: Rollout, group: GroupRecord) -> LeaseRecord:
    """The lease that holds a rollout."""
    return LeaseRecord(
        id=rollout.lease_id or "",
        rollout_id=rollout.id,
        group=group,
        group_index=rollout.group_index,
        attempt=rollout.attempt,
        seed=rollout.seed,
        expire_time=rollout.expire_time or datetime.min,
    )


async def _insert_group(session: AsyncSession, group: GroupRecord) -> None:
    row = Group(
        id=group.id,
        run_id=group.run_id,
        task_id=group.task_id,
        size=group.size,
        pipeline=group.pipeline,
        mode=group.mode,
        grader=group.grader,
        seed=group.seed,
        step=group.step,
        labels=dict(group.labels),
        state="open",
        pending=group.size,
    )
    session.add(row)
    await session.flush()
    slots = [
        {
            "id": new_id("rol"),
            "group_id": group.id,
            "run_id": group.run_id,
            "group_index": index,
            "group_seq": row.seq,
            "step": group.step,
            "seed": derive_seed(group.seed, group.run_id, group.task_id, index),
            "state": "waiting",
        }
        for index in range(group.size)
    ]
    await session.execute(insert(Rollout), slots)


def _length(policy: QueuePolicy, lease_s: float | None) -> timedelta:
    seconds = policy.lease_s if lease_s is None else lease_s
    if not 0 < seconds <= policy.max_lease_s:
        raise InvalidArgument(
            "duration", f"is {seconds} s", f"give more than 0 and at most {policy.max_lease_s} s"
        )
    return timedelta(seconds=seconds)


async def _rollouts_of(session: AsyncSession, lease_ids: Sequence[str]) -> dict[str, str]:
    rows = await session.execute(select(Lease.id, Lease.rollout_id).where(Lease.id.in_(lease_ids)))
    found = {row.id: row.rollout_id for row in rows}
    for lease_id in lease_ids:
        if lease_id not in found:
            raise NotFound(f"no lease {lease_id[:200]!r}")
    return found


async def _locked(session: AsyncSession, lease_id: str) -> Rollout:
    rollout_id = (await _rollouts_of(session, [lease_id]))[lease_id]
    rows = await session.scalars(select(Rollout).where(Rollout.id == rollout_id).with_for_update())
    return rows.one()


def _check_holder(rollout: Rollout, lease_id: str) -> None:
    if rollout.state == "leased" and rollout.lease_id == lease_id:
        return
    metadata = {"lease_id": lease_id, "rollout_state": rollout.state}
    raise LeaseExpired(
        f"lease {lease_id} no longer holds its rollout, which is {rollout.state}; drop this work",
        metadata=metadata,
    )


async def _same_again(
    session: AsyncSession, lease_id: str, rollout: Rollout, packed: Packed
) -> Committed:
    stored = (
        await session.execute(
            select(Trajectory.id, Trajectory.lease_id, Trajectory.content_sha256).where(
                Trajectory.id == rollout.trajectory_id
            )
        )
    ).one()
    if stored.lease_id != lease_id or stored.content_sha256 != packed.fingerprint:
        raise LeaseExpired(
            f"the rollout of lease {lease_id} is committed with another trajectory; drop this one",
            metadata={"lease_id": lease_id, "rollout_state": "committed"},
        )
    group = await session.get_one(Group, rollout.group_id)
    return Committed(stored.id, group.state != "open")


async def _close_slot(session: AsyncSession, group_id: str, *, lost: int) -> bool:
    """Count one more final slot; whether the group is complete with it."""
    last = Group.pending == 1
    done = await session.execute(
        update(Group)
        .where(Group.id == group_id)
        .values(
            pending=Group.pending - 1,
            lost=Group.lost + lost,
            state=case((last, "complete"), else_=Group.state),
            complete_time=case((last, func.now()), else_=None),
        )
        .returning(Group.pending)
    )
    return bool(done.scalar_one() == 0)

"""The rollout queue, worker's side: enqueue, heartbeat, fail, sweep; `leasing` and `committing`
hold the other two.

A rollout is one slot of a group:

    waiting ──lease──▶ leased ──commit──▶ committed
       ▲                 │
       ├──────fail───────┤  (attempts and outages left)
       └─lease runs out──┤
                         └──fail or run out, none left──▶ lost

- `committed` is final; exactly the committed slots have exactly one trajectory.
- A slot has at most one lease that may commit: the one named in its row. Giving a new lease
  replaces it, and that is the only way to lose one: a lease that ran out but was not given to
  another may still be extended or committed.
- A trajectory under the wrong lease is refused, unless it is the very one already committed.
- What fails is never scored. A failure uses up one of few attempts; an outage, which says nothing
  about the slot, and a lease that runs out use up one of many outages, so that what kills its
  worker each time comes to an end too. `attempt` numbers both. A slot that failed waits before it
  may be leased again, longer each time. A released slot does neither.
- `lost` is final but for a rewind, which opens the lost slots of unconsumed groups anew.
- A group is `complete` from the moment that its last slot becomes final (`pending` reaches 0).
- Workers never block each other: leasing skips locked rows.
- Locks are taken in the order rollout, group; several groups in id order.
- The time is the database's, so that several replicas agree on when a lease runs out.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc import measures
from dataset_svc.models import Group, Lease, Rollout, Run
from dataset_svc.queries import parking
from dataset_svc.queries.closing import close_groups
from dataset_svc.queries.tasks import known_tasks
from dataset_svc.records import GroupRecord, LeaseRecord
from dataset_svc.walls import of_every_tenant
from regreen.ids import derive_seed, new_id
from regreen.rpc.errors import (
    AlreadyExists,
    InvalidArgument,
    LeaseExpired,
    NotFound,
    ResourceExhausted,
)

LAST_RAN_OUT = "the last lease ran out"
_ROOM_RETRY_S = 2.0

Clock = Callable[[], ColumnElement[datetime]]
"""Makes the SQL expression for the time; tests give one that they control."""


def database_clock() -> ColumnElement[datetime]:
    """The database's wall clock."""
    return func.clock_timestamp()


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """The rules of the queue."""

    max_attempts: int = 4
    """Failures after which a slot counts as lost to infrastructure, outages left out."""
    max_outages: int = 50
    """Outages after which it does, leases that ran out among them."""
    lease_s: float = 120.0
    """Length of a lease whose request names none."""
    max_lease_s: float = 6 * 3600.0
    """Longest lease that may be asked for."""
    retry_s: float = 2.0
    """Pause before a slot that failed is given out again; doubles with each further failure."""
    max_retry_s: float = 60.0
    """Longest such pause."""
    clock: Clock = database_clock
    park_after: int = 0
    """Rollouts of a task lost in a row, while others succeed, that set it aside; 0: never."""
    max_waiting: int = 1 << 62
    """Rollouts of a run that may wait before no more are taken in."""

    def pause(self, failures: int) -> timedelta:
        """How long a slot waits after its n-th failure."""
        return timedelta(seconds=min(self.retry_s * 2 ** min(failures - 1, 30), self.max_retry_s))


async def enqueue(
    session: AsyncSession, groups: Sequence[GroupRecord], policy: QueuePolicy | None = None
) -> list[str]:
    """Add groups with their rollouts; their ids in order. A group that is there already is left.

    Raises:
        NotFound: an unknown run or task.
        AlreadyExists: a group of that id has other content.
        InvalidArgument: a group comes twice.
        ResourceExhausted: too many rollouts of the run wait already.
    """
    policy = policy or QueuePolicy()
    groups = [replace(group, id=group.id or new_id("grp")) for group in groups]
    positions: dict[str, int] = {}
    for position, group in enumerate(groups):
        if group.id in positions:
            raise InvalidArgument(
                f"groups[{position}].id", f"{group.id} comes twice", "send each once"
            )
        positions[group.id] = position
    await known_tasks(session, {group.task_id for group in groups})
    known = select(Run.id, Run.tenant).where(Run.id.in_({group.run_id for group in groups}))
    tenants = {row.id: row.tenant for row in await session.execute(known)}
    for group in groups:
        if group.run_id not in tenants:
            raise NotFound(f"no run {group.run_id[:200]!r}")
    taken = of_every_tenant(select(Group).where(Group.id.in_(positions)))
    stored = {group.id: group for group in await session.scalars(taken)}
    await _check_room(session, policy, [group for group in groups if group.id not in stored])
    parked = await parking.reasons(session, [(group.run_id, group.task_id) for group in groups])
    for group in groups:
        if group.id not in stored:
            reason = parked.get((group.run_id, group.task_id))
            await _insert_group(session, group, tenants[group.run_id], reason)
        elif group_record(stored[group.id]) != group:
            raise AlreadyExists(f"group {group.id} is stored with other content; use a new id")
    return [group.id for group in groups]


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
    expires = (await session.execute(select(policy.clock() + length(policy, lease_s)))).scalar_one()
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


async def fail(
    session: AsyncSession,
    policy: QueuePolicy,
    lease_id: str,
    error: str,
    *,
    release: bool = False,
    outage: bool = False,
) -> bool:
    """Give a rollout back after an infrastructure failure; whether it will be tried again.

    With `release` nothing failed: no attempt is used up and there is no pause. With `outage` the
    failure says nothing about the rollout.

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
    rollout.outages += 1 if outage else 0
    failures = rollout.attempt - rollout.outages
    retried = failures < policy.max_attempts and rollout.outages < policy.max_outages
    rollout.state = "waiting" if retried else "lost"
    if retried:
        until = select(policy.clock() + policy.pause(rollout.attempt))
        rollout.not_before = (await session.execute(until)).scalar_one()
    else:
        rollout.final_time = (await session.execute(select(func.now()))).scalar_one()
    await session.flush()
    if not retried:
        one = Counter([rollout.group_id])
        await close_groups(session, one, one)
        measures.LOST.inc()
        await _consider(session, policy, one)
    return retried


async def sweep(session: AsyncSession, policy: QueuePolicy) -> int:
    """Count as lost what ran out on its last outage; how many rollouts that were."""
    ran_out = (
        select(Rollout.id)
        .where(
            Rollout.state == "leased",
            Rollout.expire_time < policy.clock(),
            Rollout.outages >= policy.max_outages - 1,
        )
        .with_for_update(skip_locked=True)
    )
    rows = await session.execute(
        update(Rollout)
        .where(Rollout.id.in_(ran_out))
        .values(
            state="lost",
            attempt=Rollout.attempt + 1,
            outages=Rollout.outages + 1,
            error=LAST_RAN_OUT,
            final_time=func.now(),
        )
        .returning(Rollout.group_id, Rollout.lease_id)
        .execution_options(synchronize_session=False)
    )
    ended = rows.all()
    if not ended:
        return 0
    await session.execute(
        update(Lease)
        .where(Lease.id.in_([row.lease_id for row in ended]), Lease.error == "")
        .values(error=LAST_RAN_OUT)
        .execution_options(synchronize_session=False)
    )
    lost = Counter(row.group_id for row in ended)
    measures.LOST.inc(len(ended))
    await close_groups(session, lost, lost)
    await _consider(session, policy, lost)
    return len(ended)


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
        tenant=rollout.tenant,
    )


async def _check_room(
    session: AsyncSession, policy: QueuePolicy, groups: Sequence[GroupRecord]
) -> None:
    """Refuse what would have more wait than the queue is to hold; what comes first always fits."""
    wanted = Counter[str]()
    for group in groups:
        wanted[group.run_id] += group.size
    for run_id, count in sorted(wanted.items()):
        waiting = (
            select(Rollout.id)
            .where(Rollout.run_id == run_id, Rollout.state == "waiting")
            .limit(policy.max_waiting + 1)
        )
        there = (
            await session.execute(select(func.count()).select_from(waiting.subquery()))
        ).scalar_one()
        if there and there + count > policy.max_waiting:
            raise ResourceExhausted(
                f"{there} rollouts of run {run_id} wait already, and with these {count} more than "
                f"{policy.max_waiting} would; enqueue them when some are leased",
                retry_after_s=_ROOM_RETRY_S,
            )


async def _insert_group(
    session: AsyncSession, group: GroupRecord, tenant: str, parked: str | None
) -> None:
    ended = None
    if parked is not None:
        ended = (await session.execute(select(func.now()))).scalar_one()
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
        state="complete" if parked is not None else "open",
        pending=0 if parked is not None else group.size,
        lost=group.size if parked is not None else 0,
        complete_time=ended,
    )
    session.add(row)
    await session.flush()
    slots = [
        {
            "id": new_id("rol"),
            "group_id": group.id,
            "run_id": group.run_id,
            "tenant": tenant,
            "group_index": index,
            "group_seq": row.seq,
            "step": group.step,
            "seed": derive_seed(group.seed, group.run_id, group.task_id, index),
            "state": "waiting" if parked is None else "lost",
            "error": "" if parked is None else parking.parked_error(parked),
            "final_time": ended,
        }
        for index in range(group.size)
    ]
    await session.execute(insert(Rollout), slots)


def length(policy: QueuePolicy, lease_s: float | None) -> timedelta:
    """How long a lease is.

    Raises:
        InvalidArgument: out of bounds.
    """
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


async def _consider(session: AsyncSession, policy: QueuePolicy, group_ids: Iterable[str]) -> None:
    """Park the tasks of these groups, of which rollouts are lost, if they are poison."""
    if not policy.park_after:
        return
    rows = await session.execute(
        select(Group.run_id, Group.task_id).where(Group.id.in_(list(group_ids)))
    )
    await parking.consider(session, policy.park_after, [(row[0], row[1]) for row in rows])

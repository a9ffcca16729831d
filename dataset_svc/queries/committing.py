"""Commits of several rollouts in one transaction: the other hot end of the queue.

- Each commit is judged by itself: one that is refused leaves the others as they are.
- The same trajectory under the same lease again, in this transaction or an earlier one, is answered
  and not stored again; another one is refused.
- Rollouts are locked in id order, then groups in id order, as everywhere.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc import bulk
from dataset_svc.models import Group, Lease, Rollout, TenantUse, Trajectory
from dataset_svc.queries.closing import close_groups
from dataset_svc.queries.rollouts import group_record, lease_record
from dataset_svc.queries.trajectories import (
    New,
    Packed,
    Room,
    fingerprints,
    insert_trajectories,
    prepare,
)
from dataset_svc.records import LeaseRecord
from regreen.rpc.errors import AlreadyExists, LeaseExpired, NotFound, RegreenError
from regreen.rpc.quotas import Quotas


@dataclass(frozen=True, slots=True)
class Committed:
    """Where a committed rollout went."""

    trajectory_id: str
    group_complete: bool


@dataclass(slots=True)
class Slot:
    """A rollout as a commit under a lease finds it."""

    id: str
    group_id: str
    state: str
    lease_id: str
    tenant: str
    trajectory_id: str = ""
    stored_lease_id: str = ""
    """Lease under which its trajectory was committed."""
    stored_sha256: str = ""


@dataclass(frozen=True, slots=True)
class Admission:
    """What a commit needs to know before it writes tokens; taken without a lock."""

    lease: LeaseRecord
    """What the lease is for, with the lease's own attempt."""
    slot: Slot
    same_id_sha256: str = ""
    """Content that is stored under the id that the trajectory brings along; empty if none is."""
    kept_bytes: int = 0
    """What is kept of the trajectories of the run's tenant."""

    def check(self, lease_id: str, packed: Packed, quotas: Quotas) -> None:
        """Refuse what a commit would refuse now.

        Raises:
            LeaseExpired: the slot belongs to another lease, is lost, or holds another trajectory.
            AlreadyExists: the id is stored with other content.
            ResourceExhausted: more would be kept of the tenant's than it may have.
        """
        if _committed_before(self.slot, lease_id, packed):
            return
        _check_id(packed, self.same_id_sha256)
        if not self.same_id_sha256:
            new = New(packed, lease_id, self.slot.tenant)
            Room(quotas, {new.tenant: self.kept_bytes}).take(new)


async def admissions(
    session: AsyncSession, wanted: Sequence[tuple[str, str]]
) -> list[Admission | RegreenError]:
    """What is known for each (lease id, trajectory id or nothing); takes no lock."""
    lease_ids = {lease_id for lease_id, _ in wanted}
    mine = select(TenantUse.trajectory_bytes).where(TenantUse.tenant == Rollout.tenant)
    rows = await session.execute(
        select(Lease.id, Lease.attempt, Rollout, Group, mine.scalar_subquery())
        .join(Rollout, Rollout.id == Lease.rollout_id)
        .join(Group, Group.id == Rollout.group_id)
        .where(Lease.id.in_(lease_ids))
    )
    found = {row[0]: row for row in rows}
    slots = {row[2].id: _slot(row[2]) for row in found.values()}
    await _add_stored(session, slots.values())
    same = await fingerprints(session, [trajectory_id for _, trajectory_id in wanted])
    answers: list[Admission | RegreenError] = []
    for lease_id, trajectory_id in wanted:
        if lease_id not in found:
            answers.append(NotFound(f"no lease {lease_id[:200]!r}"))
            continue
        _, attempt, rollout, group, kept = found[lease_id]
        record = lease_record(rollout, group_record(group))
        record = replace(record, id=lease_id, attempt=attempt)
        known = same.get(trajectory_id, "")
        answers.append(Admission(record, slots[rollout.id], known, kept or 0))
    return answers


async def commit(
    session: AsyncSession, lease_id: str, packed: Packed, quotas: Quotas | None = None
) -> Committed:
    """Store the trajectory of a leased rollout and close its slot.

    Raises:
        LeaseExpired: the slot belongs to another lease, is lost, or holds another trajectory.
        NotFound: there never was such a lease.
        AlreadyExists: the trajectory's id is stored with other content.
        ResourceExhausted: more would be kept of the tenant's than it may have.
    """
    (done,) = await commit_many(session, [(lease_id, packed)], quotas or Quotas())
    if isinstance(done, RegreenError):
        raise done
    return done


async def commit_many(
    session: AsyncSession, commits: Sequence[tuple[str, Packed]], quotas: Quotas
) -> list[Committed | RegreenError]:
    """Store trajectories of leased rollouts and close their slots; where each went, or why not."""
    slots = await _locked(session, {lease_id for lease_id, _ in commits})
    same = await fingerprints(session, [packed.record.id for _, packed in commits])
    room = await prepare(session, quotas, (slot.tenant for slot in slots.values()))
    found: list[tuple[Slot, str] | RegreenError] = []
    closed: list[Slot] = []
    new: list[New] = []
    for lease_id, packed in commits:
        slot = slots.get(lease_id)
        if slot is None:
            found.append(NotFound(f"no lease {lease_id[:200]!r}"))
            continue
        try:
            if not _committed_before(slot, lease_id, packed):
                _check_id(packed, same.get(packed.record.id, ""))
                if packed.record.id not in same:
                    stored = New(packed, lease_id, slot.tenant)
                    room.take(stored)
                    new.append(stored)
                closed.append(slot)
                _close(slot, lease_id, packed)
                same[packed.record.id] = packed.fingerprint
            found.append((slot, slot.trajectory_id))
        except RegreenError as error:
            found.append(error)
    if closed:
        await insert_trajectories(session, new)
        await _close_slots(session, closed)
        await close_groups(session, Counter(slot.group_id for slot in closed))
    touched = {item[0].group_id for item in found if isinstance(item, tuple)}
    complete = await _complete(session, touched)
    return [
        Committed(item[1], item[0].group_id in complete) if isinstance(item, tuple) else item
        for item in found
    ]


def _slot(rollout: Rollout) -> Slot:
    return Slot(
        rollout.id,
        rollout.group_id,
        rollout.state,
        rollout.lease_id or "",
        rollout.tenant,
        rollout.trajectory_id or "",
    )


async def _locked(session: AsyncSession, lease_ids: set[str]) -> dict[str, Slot]:
    """The slots of leases, locked; leases of one slot share it."""
    rows = await session.execute(select(Lease.id, Lease.rollout_id).where(Lease.id.in_(lease_ids)))
    rollout_of = {row.id: row.rollout_id for row in rows}
    rollouts = await session.scalars(
        select(Rollout)
        .where(Rollout.id.in_(set(rollout_of.values())))
        .order_by(Rollout.id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    slots = {rollout.id: _slot(rollout) for rollout in rollouts}
    await _add_stored(session, slots.values())
    return {lease_id: slots[rollout_id] for lease_id, rollout_id in rollout_of.items()}


async def _add_stored(session: AsyncSession, slots: Any) -> None:
    """Fill in what is stored for slots that are committed."""
    committed = {slot.trajectory_id: slot for slot in slots if slot.state == "committed"}
    if not committed:
        return
    rows = await session.execute(
        select(Trajectory.id, Trajectory.lease_id, Trajectory.content_sha256).where(
            Trajectory.id.in_(committed)
        )
    )
    for row in rows:
        slot = committed[row.id]
        slot.stored_lease_id, slot.stored_sha256 = row.lease_id, row.content_sha256


def _committed_before(slot: Slot, lease_id: str, packed: Packed) -> bool:
    """Whether this very commit was made before.

    Raises:
        LeaseExpired: the slot is not this lease's, or holds another trajectory.
    """
    if slot.state == "leased" and slot.lease_id == lease_id:
        return False
    metadata = {"lease_id": lease_id, "rollout_state": slot.state}
    if slot.state != "committed":
        raise LeaseExpired(
            f"lease {lease_id} no longer holds its rollout, which is {slot.state}; drop this work",
            metadata=metadata,
        )
    if slot.stored_lease_id != lease_id or slot.stored_sha256 != packed.fingerprint:
        raise LeaseExpired(
            f"the rollout of lease {lease_id} is committed with another trajectory; drop this one",
            metadata=metadata,
        )
    return True


def _check_id(packed: Packed, stored_sha256: str) -> None:
    if stored_sha256 and stored_sha256 != packed.fingerprint:
        raise AlreadyExists(
            f"trajectory {packed.record.id} is stored with other content; use a new id"
        )


def _close(slot: Slot, lease_id: str, packed: Packed) -> None:
    slot.state, slot.trajectory_id = "committed", packed.record.id
    slot.stored_lease_id, slot.stored_sha256 = lease_id, packed.fingerprint


async def _close_slots(session: AsyncSession, slots: Sequence[Slot]) -> None:
    done = bulk.values(
        "done",
        id=([slot.id for slot in slots], bulk.TEXT),
        trajectory_id=([slot.trajectory_id for slot in slots], bulk.TEXT),
    )
    await session.execute(
        update(Rollout)
        .where(Rollout.id == done.c.id)
        .values(
            state="committed",
            trajectory_id=done.c.trajectory_id,
            expire_time=None,
            final_time=func.now(),
        )
        .execution_options(synchronize_session=False)
    )


async def _complete(session: AsyncSession, group_ids: set[str]) -> set[str]:
    """Those of the groups that no longer are open."""
    wanted = select(Group.id).where(Group.id.in_(group_ids), Group.state != "open")
    return set(await session.scalars(wanted)) if group_ids else set()

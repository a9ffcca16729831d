"""Leases of several workers in one transaction: the hot end of the queue.

- What several workers ask for at once is dealt out evenly, oldest first; no two get the same slot.
- Giving a slot out again says in the lease before that it ran out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, DateTime, and_, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc import bulk
from dataset_svc.models import Group, Lease, Rollout, Run
from dataset_svc.queries.rollouts import QueuePolicy, group_record, length, sweep
from dataset_svc.records import LeaseRecord
from regreen.ids import new_id
from regreen.rpc.errors import InvalidArgument, NotFound, RegreenError

RAN_OUT = "the lease ran out"


@dataclass(frozen=True, slots=True)
class Ask:
    """What one worker asks for."""

    worker: str
    count: int
    run_id: str = ""
    lease_s: float | None = None


@dataclass(slots=True)
class _Slot:
    """A slot that is free, and whom it goes to."""

    id: str
    group_id: str
    group_index: int
    attempt: int
    seed: int
    lease_id: str
    tenant: str
    ran_out: str
    """Lease that held it until it ran out; empty if none did."""
    ask: int = 0
    expires: datetime | None = None


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
        InvalidArgument: a length out of bounds.
    """
    (found,) = await lease_many(session, policy, [Ask(worker, count, run_id, lease_s)])
    if isinstance(found, RegreenError):
        raise found
    return found


async def lease_many(
    session: AsyncSession, policy: QueuePolicy, asks: Sequence[Ask]
) -> list[list[LeaseRecord] | RegreenError]:
    """What each worker gets, or why it gets nothing."""
    refused = await _refusals(session, policy, asks)
    await sweep(session, policy)
    now = (await session.execute(select(policy.clock()))).scalar_one()
    slots: list[_Slot] = []
    for run_id in sorted({ask.run_id for place, ask in enumerate(asks) if place not in refused}):
        places = [
            place for place, ask in enumerate(asks) if ask.run_id == run_id and place not in refused
        ]
        free = await _free(session, policy, run_id, sum(asks[place].count for place in places))
        slots += _deal(free, asks, places)
    for slot in slots:
        slot.expires = now + length(policy, asks[slot.ask].lease_s)
    if slots:
        await _write(session, asks, slots)
    groups = await session.scalars(select(Group).where(Group.id.in_({s.group_id for s in slots})))
    by_id = {group.id: group_record(group) for group in groups}
    given: list[list[LeaseRecord] | RegreenError] = [refused.get(n, []) for n in range(len(asks))]
    for slot in slots:
        mine = given[slot.ask]
        if isinstance(mine, list) and slot.expires is not None:
            mine.append(
                LeaseRecord(
                    slot.lease_id,
                    slot.id,
                    by_id[slot.group_id],
                    slot.group_index,
                    slot.attempt,
                    slot.seed,
                    slot.expires,
                    slot.tenant,
                )
            )
    return given


async def _refusals(
    session: AsyncSession, policy: QueuePolicy, asks: Sequence[Ask]
) -> dict[int, RegreenError]:
    wanted = {ask.run_id for ask in asks if ask.run_id}
    known = set(await session.scalars(select(Run.id).where(Run.id.in_(wanted)))) if wanted else ()
    refused: dict[int, RegreenError] = {}
    for place, ask in enumerate(asks):
        if ask.run_id and ask.run_id not in known:
            refused[place] = NotFound(f"no run {ask.run_id[:200]!r}")
            continue
        try:
            length(policy, ask.lease_s)
        except InvalidArgument as error:
            refused[place] = error
    return refused


async def _free(session: AsyncSession, policy: QueuePolicy, run_id: str, count: int) -> list[_Slot]:
    now = policy.clock()
    rested = or_(Rollout.not_before.is_(None), Rollout.not_before <= now)
    available = or_(
        and_(Rollout.state == "waiting", rested),
        and_(Rollout.state == "leased", Rollout.expire_time < now),
    )
    columns = (Rollout.id, Rollout.group_id, Rollout.group_index, Rollout.attempt, Rollout.seed)
    wanted = select(*columns, Rollout.state, Rollout.lease_id, Rollout.tenant).where(available)
    if run_id:
        wanted = wanted.where(Rollout.run_id == run_id)
    wanted = wanted.order_by(Rollout.step, Rollout.group_seq, Rollout.group_index).limit(count)
    rows = await session.execute(wanted.with_for_update(skip_locked=True))
    found = []
    for row in rows:
        ran_out = row.state == "leased"
        attempt = row.attempt + (1 if ran_out else 0)
        held = row.lease_id or "" if ran_out else ""
        found.append(
            _Slot(
                row.id,
                row.group_id,
                row.group_index,
                attempt,
                row.seed,
                new_id("lse"),
                row.tenant,
                held,
            )
        )
    return found


def _deal(free: Sequence[_Slot], asks: Sequence[Ask], places: Sequence[int]) -> list[_Slot]:
    """Give each slot to an ask, in turn, until none is left or all are content."""
    left = {place: asks[place].count for place in places}
    dealt: list[_Slot] = []
    while left and len(dealt) < len(free):
        for place in list(left):
            if len(dealt) == len(free):
                break
            free[len(dealt)].ask = place
            dealt.append(free[len(dealt)])
            left[place] -= 1
            if not left[place]:
                del left[place]
    return dealt


async def _write(session: AsyncSession, asks: Sequence[Ask], slots: Sequence[_Slot]) -> None:
    new = bulk.values(
        "new",
        id=([slot.id for slot in slots], bulk.TEXT),
        lease_id=([slot.lease_id for slot in slots], bulk.TEXT),
        attempt=([slot.attempt for slot in slots], BigInteger()),
        expires=([slot.expires for slot in slots], DateTime(timezone=True)),
    )
    await session.execute(
        update(Rollout)
        .where(Rollout.id == new.c.id)
        .values(
            state="leased",
            lease_id=new.c.lease_id,
            outages=Rollout.outages + new.c.attempt - Rollout.attempt,
            attempt=new.c.attempt,
            expire_time=new.c.expires,
        )
        .execution_options(synchronize_session=False)
    )
    leases: list[dict[str, Any]] = [
        {
            "id": slot.lease_id,
            "rollout_id": slot.id,
            "worker": asks[slot.ask].worker,
            "attempt": slot.attempt,
        }
        for slot in slots
    ]
    await bulk.copy_rows(session, Lease, leases)
    ended = [slot.ran_out for slot in slots if slot.ran_out]
    if ended:
        await session.execute(
            update(Lease)
            .where(Lease.id.in_(ended), Lease.error == "")
            .values(error=RAN_OUT)
            .execution_options(synchronize_session=False)
        )

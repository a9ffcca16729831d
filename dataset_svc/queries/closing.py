"""Slots that become final, and that are opened anew, counted in their groups.

- A group is complete from the moment that its last slot becomes final (`pending` reaches 0).
- Groups are locked in id order.
"""

from collections import Counter

from sqlalchemy import BigInteger, case, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc import bulk
from dataset_svc.models import Group


async def close_groups(
    session: AsyncSession, final: "Counter[str]", lost: "Counter[str] | None" = None
) -> None:
    """Count slots that became final, by group, and how many of them are lost."""
    lost = lost if lost is not None else Counter()
    ids = sorted(final)
    if not ids:
        return
    await session.execute(
        select(Group.id).where(Group.id.in_(ids)).order_by(Group.id).with_for_update()
    )
    more = bulk.values(
        "more",
        id=(ids, bulk.TEXT),
        final=([final[group_id] for group_id in ids], BigInteger()),
        lost=([lost[group_id] for group_id in ids], BigInteger()),
    )
    last = Group.pending == more.c.final
    await session.execute(
        update(Group)
        .where(Group.id == more.c.id)
        .values(
            pending=Group.pending - more.c.final,
            lost=Group.lost + more.c.lost,
            state=case((last, "complete"), else_=Group.state),
            complete_time=case((last, func.now()), else_=None),
        )
        .execution_options(synchronize_session=False)
    )


async def reopen_groups(session: AsyncSession, opened: "Counter[str]") -> None:
    """Count lost slots that are to be tried anew, by group."""
    for group_id, count in sorted(opened.items()):
        await session.execute(
            update(Group)
            .where(Group.id == group_id)
            .values(
                state="open",
                pending=Group.pending + count,
                lost=Group.lost - count,
                complete_time=None,
            )
        )

"""The rollout queue, learner's side: take, acknowledge, rewind, count.

    open ──last slot final──▶ complete ──take──▶ taken ──acknowledge──▶ acknowledged
                                 ▲                │                          │
                                 └────────────────┴────────rewind────────────┘

- A complete group is handed out once. It comes back only by a rewind of its run.
- Consumed means contained in a checkpoint: an acknowledgement names it, and they commit together.
- After a rewind to checkpoint C, takeable are exactly the complete groups that C and the
  checkpoints before it do not contain; their lost rollouts are tried anew, so that a group that
  has some is complete again when they are done.
- A checkpoint recorded after C is abandoned: never listed, rewound to or acknowledged again.
- A rewind releases the tasks that were parked in the run.
- Every rewind starts a new epoch; a driver that says its epoch cannot act in a later one.
- Taking and acknowledging share the run's row, rewinding has it alone: they never interleave.
"""

from collections import Counter
from collections.abc import Sequence

from sqlalchemy import ColumnElement, case, delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc.models import Checkpoint, Group, ParkedTask, Rollout, Run, Trajectory
from dataset_svc.queries.closing import reopen_groups
from dataset_svc.queries.parking import REOPENED
from dataset_svc.queries.retention import has_pruned
from dataset_svc.queries.rollouts import QueuePolicy, group_record, sweep
from dataset_svc.records import TakenGroup
from regreen.rpc.errors import Aborted, FailedPrecondition, NotFound


async def take(
    session: AsyncSession,
    policy: QueuePolicy,
    *,
    run_id: str,
    count: int,
    taker: str,
    step: int = 0,
    epoch: int = 0,
    max_wire_bytes: int = 32 << 20,
) -> list[TakenGroup]:
    """Take up to `count` complete groups, lowest step and oldest first.

    Fewer are taken when their trajectories would go over `max_wire_bytes`; the first always is.
    Groups of which retention has removed a trajectory are never given out.
    `taker` is remembered, so that `retake` can answer a repeated request.

    Raises:
        NotFound: no such run.
        Aborted: the run was rewound since `epoch`.
    """
    await sweep(session, policy)
    await locked_run(session, run_id, epoch, shared=True)
    # Retention may have taken members of a run that had ended and was made active again.
    not_whole = select(Rollout.id).where(Rollout.group_id == Group.id, Rollout.state == "pruned")
    wanted = select(Group).where(
        Group.run_id == run_id, Group.state == "complete", ~not_whole.exists()
    )
    if step:
        wanted = wanted.where(Group.step == step)
    wanted = wanted.order_by(Group.step, Group.seq).limit(count)
    groups = list(await session.scalars(wanted.with_for_update(skip_locked=True)))
    sizes = await _wire_bytes(session, [group.id for group in groups])
    taken: list[Group] = []
    total_bytes = 0
    for group in groups:
        total_bytes += sizes.get(group.id, 0)
        if taken and total_bytes > max_wire_bytes:
            break
        group.state, group.taken_by = "taken", taker
        taken.append(group)
    await session.flush()
    return await _with_members(session, taken)


async def retake(
    session: AsyncSession, run_id: str, group_ids: Sequence[str], taker: str, epoch: int = 0
) -> list[TakenGroup]:
    """Those of the groups that `taker` took and still has, for a repeated request.

    Raises:
        NotFound: no such run.
        Aborted: the run was rewound since `epoch`.
    """
    await locked_run(session, run_id, epoch, shared=True)
    rows = await session.scalars(
        select(Group)
        .where(Group.id.in_(group_ids), Group.state == "taken", Group.taken_by == taker)
        .order_by(Group.step, Group.seq)
    )
    return await _with_members(session, list(rows))


async def acknowledge(
    session: AsyncSession, group_ids: Sequence[str], checkpoint_id: str, epoch: int = 0
) -> None:
    """Record that taken groups are contained in a checkpoint; again is the same.

    Raises:
        NotFound: no such checkpoint or group.
        FailedPrecondition: the checkpoint is abandoned, or a group not taken or of another run.
        Aborted: the run was rewound since `epoch`.
    """
    checkpoint = await _checkpoint(session, checkpoint_id)
    await locked_run(session, checkpoint.run_id, epoch, shared=True)
    await session.refresh(checkpoint)
    if checkpoint.abandoned:
        raise FailedPrecondition(f"checkpoint {checkpoint_id} was abandoned by a rewind")
    rows = await session.scalars(
        select(Group).where(Group.id.in_(group_ids)).order_by(Group.id).with_for_update()
    )
    groups = {group.id: group for group in rows}
    for group_id in group_ids:
        group = groups.get(group_id)
        if group is None:
            raise NotFound(f"no group {group_id[:200]!r}")
        if group.checkpoint_id == checkpoint_id:
            continue
        if group.run_id != checkpoint.run_id or group.state != "taken":
            raise FailedPrecondition(
                f"group {group_id} is {group.state} in run {group.run_id}; take it first, once",
                metadata={"group_id": group_id, "group_state": group.state},
            )
        group.state, group.checkpoint_id = "acknowledged", checkpoint_id
    await session.flush()


async def acknowledge_taken(
    session: AsyncSession, run_id: str, checkpoint_id: str, step: int | None = None
) -> int:
    """Put every taken group of the run (up to `step`) into a checkpoint; how many.

    The caller holds the run's row.
    """
    wanted = (Group.run_id == run_id) & (Group.state == "taken")
    if step is not None:
        wanted &= Group.step <= step
    done = await session.execute(
        update(Group)
        .where(wanted)
        .values(state="acknowledged", checkpoint_id=checkpoint_id)
        .returning(Group.id)
    )
    return len(done.all())


async def rewind(session: AsyncSession, run_id: str, checkpoint_id: str = "") -> tuple[int, int]:
    """Put a run back to a checkpoint (empty: before the first); groups given back, new epoch.

    Raises:
        NotFound: no such run or checkpoint.
        FailedPrecondition: the checkpoint was abandoned by an earlier rewind, or trajectories of
            the run were pruned.
    """
    run = await locked_run(session, run_id, 0, shared=False)
    if await has_pruned(session, run_id):
        raise FailedPrecondition(
            f"trajectories of run {run_id} were pruned, so its groups are no longer whole; start a "
            "new run"
        )
    kept_seq = 0
    if checkpoint_id:
        checkpoint = await _checkpoint(session, checkpoint_id)
        if checkpoint.run_id != run_id:
            raise NotFound(f"run {run_id} has no checkpoint {checkpoint_id[:200]!r}")
        if checkpoint.abandoned:
            raise FailedPrecondition(f"checkpoint {checkpoint_id} was abandoned by a rewind")
        kept_seq = checkpoint.seq
    later = select(Checkpoint.id).where(
        Checkpoint.run_id == run_id, Checkpoint.seq > kept_seq, ~Checkpoint.abandoned
    )
    given = (Group.state == "taken") | Group.checkpoint_id.in_(later)
    reopened = await _reopen_lost(session, run_id, given | Group.state.in_(("open", "complete")))
    back = await session.execute(
        update(Group)
        .where(Group.run_id == run_id, given)
        .values(state="complete", taken_by="", checkpoint_id=None)
        .returning(Group.id)
    )
    groups = len(back.all())
    await reopen_groups(session, reopened)
    await session.execute(delete(ParkedTask).where(ParkedTask.run_id == run_id))
    await session.execute(
        update(Checkpoint)
        .where(Checkpoint.run_id == run_id, Checkpoint.seq > kept_seq)
        .values(abandoned=True)
    )
    run.epoch += 1
    await session.flush()
    return groups, run.epoch


async def counts(
    session: AsyncSession, policy: QueuePolicy, run_id: str = "", step: int = 0
) -> tuple[dict[str, int], dict[str, int]]:
    """Rollouts and groups by state; a rollout whose lease ran out counts as waiting."""
    ran_out = (Rollout.state == "leased") & (Rollout.expire_time < policy.clock())
    state = case((ran_out, "waiting"), else_=Rollout.state).label("state")
    rollouts = select(state, func.count()).select_from(Rollout).group_by(state)
    groups = select(Group.state, func.count()).group_by(Group.state)
    if run_id:
        rollouts = rollouts.where(Rollout.run_id == run_id)
        groups = groups.where(Group.run_id == run_id)
    if step:
        rollouts = rollouts.where(Rollout.step == step)
        groups = groups.where(Group.step == step)
    by_rollout = {str(row[0]): int(row[1]) for row in await session.execute(rollouts)}
    by_group = {str(row[0]): int(row[1]) for row in await session.execute(groups)}
    return by_rollout, by_group


async def locked_run(session: AsyncSession, run_id: str, epoch: int, *, shared: bool) -> Run:
    """The run's row, locked against rewinds (shared) or against everything that takes groups.

    Raises:
        NotFound: no such run.
        Aborted: the run was rewound since `epoch` (0 asks for no check).
    """
    rows = await session.scalars(
        select(Run)
        .where(Run.id == run_id)
        .with_for_update(read=shared, key_share=not shared)
        .execution_options(populate_existing=True)
    )
    run = rows.first()
    if run is None:
        raise NotFound(f"no run {run_id[:200]!r}")
    if epoch and epoch != run.epoch:
        raise Aborted(
            f"run {run_id} was rewound: it is in epoch {run.epoch}, not {epoch}; read its "
            "checkpoints again and start from the newest",
            metadata={"epoch": str(run.epoch)},
        )
    return run


async def _checkpoint(session: AsyncSession, checkpoint_id: str) -> Checkpoint:
    checkpoint = await session.get(Checkpoint, checkpoint_id)
    if checkpoint is None:
        raise NotFound(f"no checkpoint {checkpoint_id[:200]!r}")
    return checkpoint


async def _wire_bytes(session: AsyncSession, group_ids: Sequence[str]) -> dict[str, int]:
    rows = await session.execute(
        select(Rollout.group_id, func.sum(Trajectory.wire_bytes))
        .join(Trajectory, Trajectory.id == Rollout.trajectory_id)
        .where(Rollout.group_id.in_(group_ids))
        .group_by(Rollout.group_id)
    )
    return {row[0]: int(row[1]) for row in rows}


async def _with_members(session: AsyncSession, groups: Sequence[Group]) -> list[TakenGroup]:
    rows = await session.execute(
        select(Rollout.group_id, Rollout.trajectory_id)
        .where(
            Rollout.group_id.in_([group.id for group in groups]), Rollout.trajectory_id.is_not(None)
        )
        .order_by(Rollout.group_id, Rollout.group_index)
    )
    members: dict[str, list[str]] = {}
    for group_id, trajectory_id in rows:
        members.setdefault(group_id, []).append(str(trajectory_id))
    lost = select(Rollout.group_id, func.max(Rollout.error)).where(
        Rollout.group_id.in_([group.id for group in groups if group.lost]), Rollout.state == "lost"
    )
    errors = {row[0]: row[1] for row in await session.execute(lost.group_by(Rollout.group_id))}
    return [
        TakenGroup(
            group_record(group),
            tuple(members.get(group.id, ())),
            group.lost,
            errors.get(group.id, ""),
        )
        for group in groups
    ]


async def _reopen_lost(
    session: AsyncSession, run_id: str, unconsumed: ColumnElement[bool]
) -> "Counter[str]":
    """Let the lost rollouts of those groups be tried anew; how many, by group."""
    rows = await session.execute(
        update(Rollout)
        .where(
            Rollout.state == "lost",
            Rollout.group_id.in_(select(Group.id).where(Group.run_id == run_id, unconsumed)),
        )
        .values(**REOPENED)
        .returning(Rollout.group_id)
    )
    return Counter(row.group_id for row in rows)

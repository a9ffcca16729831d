"""`regreen.dataset.v1.RolloutQueueService`.

- Translates only; the state machines are in `queries.rollouts`, `leasing`, `committing`, `groups`.
- TakeGroups remembers the ids that it gave, not the trajectories: a repeat reads them again.
"""

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc import checks, measures, translate
from dataset_svc.hot import Asked, HotQueue, HotQueues, IdlePace
from dataset_svc.models import GRADERS, MODES, PIPELINES
from dataset_svc.queries import groups, requests, rollouts
from dataset_svc.queries.committing import Committed
from dataset_svc.queries.leasing import Ask
from dataset_svc.queries.rollouts import QueuePolicy
from dataset_svc.records import GroupRecord, LeaseRecord, TakenGroup
from dataset_svc.servicers.transactions import Transactions, identity
from dataset_svc.store import TrajectoryStore
from dataset_svc.translate_trajectory import trajectory_message, trajectory_record
from regreen.dataset import v1 as pb
from regreen.ids import check_id
from regreen.rpc.errors import InvalidArgument, LeaseExpired

MAX_GROUP_SIZE = 1024
MAX_BATCH = 1000
_MAX_TEXT_CHARS = 8000
_MAX_GONE = 50
"""Leases that a refusal names; the next heartbeat names further ones."""


class RolloutQueueServicer(pb.RolloutQueueServiceServicer):
    """Hands rollouts to workers and complete groups to learners."""

    def __init__(
        self,
        transactions: Transactions,
        store: TrajectoryStore,
        policy: QueuePolicy,
        *,
        idle_asks_per_s: float = 50.0,
    ) -> None:
        self._transactions, self._store, self._policy = transactions, store, policy
        self._pace = IdlePace(idle_asks_per_s)
        self._hot = HotQueues(
            lambda: HotQueue(
                transactions.database,
                store,
                policy,
                lease_answer=_lease_answer,
                commit_answer=_commit_answer,
            )
        )

    async def close(self) -> None:
        """Wait for the transactions that are under way."""
        await self._hot.close()

    async def EnqueueGroups(self, request: pb.EnqueueGroupsRequest, context: Any) -> Any:
        """Add groups."""
        _check_count("groups", len(request.groups))
        records = [
            _checked_group(translate.group_record(group, f"groups[{place}]"), f"groups[{place}]")
            for place, group in enumerate(request.groups)
        ]

        async def work(session: AsyncSession) -> pb.EnqueueGroupsResponse:
            return pb.EnqueueGroupsResponse(
                group_ids=await rollouts.enqueue(session, records, self._policy)
            )

        answer = await self._transactions.once(
            "EnqueueGroups", request, pb.EnqueueGroupsResponse, work
        )
        measures.ROWS.labels("groups").inc(len(answer.group_ids))
        return answer

    async def LeaseRollouts(self, request: pb.LeaseRolloutsRequest, context: Any) -> Any:
        """Lease rollouts to a worker."""
        if not 0 < len(request.worker) <= 200:
            raise InvalidArgument(
                "worker", "is empty or too long", "name the worker, 1 to 200 letters"
            )
        _check_count("count", request.count)
        lease_s = translate.seconds(request, "duration")
        ask = Ask(request.worker, request.count, request.run_id, lease_s)
        answer = pb.LeaseRolloutsResponse.FromString(
            await self._hot.mine().lease(Asked(*await identity(request), ask))
        )
        if not answer.leases:
            answer.poll_after.FromTimedelta(timedelta(seconds=self._pace.pause_s()))
        return answer

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> Any:
        """Extend leases; those that still hold are extended even when others are refused."""
        _check_count("lease_ids", len(request.lease_ids))
        for place, lease_id in enumerate(request.lease_ids):
            check_id(lease_id, "lse", f"lease_ids[{place}]")
        lease_s = translate.seconds(request, "duration")

        async def work(session: AsyncSession) -> tuple[list[LeaseRecord], list[str]]:
            return await rollouts.heartbeat(session, self._policy, request.lease_ids, lease_s)

        extended, gone = await self._transactions.read("Heartbeat", work)
        if gone:
            measures.LEASES_EXPIRED.inc()
            raise LeaseExpired(
                f"{len(gone)} of {len(request.lease_ids)} leases ran out or ended: "
                f"{', '.join(gone[:5])}; drop their work, the others were extended",
                metadata={
                    "lease_ids": ",".join(gone[:_MAX_GONE]),
                    "gone_count": str(len(gone)),
                },
            )
        return pb.HeartbeatResponse(leases=[translate.lease_message(lease) for lease in extended])

    async def CommitRollout(self, request: pb.CommitRolloutRequest, context: Any) -> Any:
        """Store the trajectory of a leased rollout."""
        check_id(request.lease_id, "lse", "lease_id")
        record = trajectory_record(request.trajectory)
        try:
            asked = Asked(*await identity(request), (request.lease_id, record))
            answer = await self._hot.mine().commit(asked)
        except LeaseExpired:
            measures.LEASES_EXPIRED.inc()
            raise
        measures.ROWS.labels("trajectories").inc()
        return pb.CommitRolloutResponse.FromString(answer)

    async def FailRollout(self, request: pb.FailRolloutRequest, context: Any) -> Any:
        """Give a rollout back."""
        check_id(request.lease_id, "lse", "lease_id")
        error = request.error[:_MAX_TEXT_CHARS]

        async def work(session: AsyncSession) -> pb.FailRolloutResponse:
            retried = await rollouts.fail(
                session,
                self._policy,
                request.lease_id,
                error,
                release=request.release,
                outage=request.outage,
            )
            return pb.FailRolloutResponse(retried=retried)

        return await self._transactions.once("FailRollout", request, pb.FailRolloutResponse, work)

    async def TakeGroups(self, request: pb.TakeGroupsRequest, context: Any) -> Any:
        """Take complete groups for learning."""
        check_id(request.run_id, "run", "run_id")
        _check_count("count", request.count)
        request_id, fingerprint = await identity(request)

        async def work(session: AsyncSession) -> list[TakenGroup]:
            stored = await requests.claim(session, "TakeGroups", request_id, fingerprint)
            if stored is not None:
                ids = json.loads(stored)
                return await groups.retake(session, request.run_id, ids, request_id, request.epoch)
            taken = await groups.take(
                session,
                self._policy,
                run_id=request.run_id,
                count=request.count,
                taker=request_id,
                step=request.step,
                epoch=request.epoch,
                max_wire_bytes=self._store.max_wire_bytes,
            )
            answer = json.dumps([item.group.id for item in taken]).encode()
            await requests.remember(session, "TakeGroups", request_id, answer)
            return taken

        taken = await self._transactions.read("TakeGroups", work)
        return pb.TakeGroupsResponse(groups=[await self._complete_group(item) for item in taken])

    async def AcknowledgeGroups(self, request: pb.AcknowledgeGroupsRequest, context: Any) -> Any:
        """Record that groups are contained in a checkpoint."""
        check_id(request.checkpoint_id, "ckp", "checkpoint_id")

        async def work(session: AsyncSession) -> pb.AcknowledgeGroupsResponse:
            await groups.acknowledge(
                session, request.group_ids, request.checkpoint_id, request.epoch
            )
            return pb.AcknowledgeGroupsResponse()

        return await self._transactions.once(
            "AcknowledgeGroups", request, pb.AcknowledgeGroupsResponse, work
        )

    async def RewindRun(self, request: pb.RewindRunRequest, context: Any) -> Any:
        """Put a run back to a checkpoint."""
        check_id(request.run_id, "run", "run_id")

        async def work(session: AsyncSession) -> pb.RewindRunResponse:
            back, epoch = await groups.rewind(session, request.run_id, request.checkpoint_id)
            return pb.RewindRunResponse(groups=back, epoch=epoch)

        return await self._transactions.once("RewindRun", request, pb.RewindRunResponse, work)

    async def GetQueue(self, request: pb.GetQueueRequest, context: Any) -> Any:
        """Count by state."""

        async def work(session: AsyncSession) -> tuple[dict[str, int], dict[str, int]]:
            await rollouts.sweep(session, self._policy)
            return await groups.counts(session, self._policy, request.run_id, request.step)

        by_rollout, by_group = await self._transactions.read("GetQueue", work)
        return pb.GetQueueResponse(rollouts=by_rollout, groups=by_group)

    async def _complete_group(self, taken: TakenGroup) -> pb.CompleteGroup:
        members = await self._store.load(taken.trajectory_ids)
        return pb.CompleteGroup(
            group=translate.group_message(taken.group),
            trajectories=[trajectory_message(member) for member in members],
            lost=taken.lost,
            lost_error=taken.lost_error,
        )


def _lease_answer(leases: Sequence[LeaseRecord]) -> bytes:
    answer = pb.LeaseRolloutsResponse(leases=[translate.lease_message(lease) for lease in leases])
    return answer.SerializeToString()


def _commit_answer(done: Committed) -> bytes:
    return pb.CommitRolloutResponse(
        trajectory_id=done.trajectory_id, group_complete=done.group_complete
    ).SerializeToString()


def _check_count(field: str, count: int) -> None:
    if not 0 < count <= MAX_BATCH:
        raise InvalidArgument(field, f"is {count}", f"give 1 to {MAX_BATCH}")


def _checked_group(group: GroupRecord, field: str) -> GroupRecord:
    if group.id:
        check_id(group.id, "grp", f"{field}.id")
    check_id(group.run_id, "run", f"{field}.run_id")
    if not 0 < group.size <= MAX_GROUP_SIZE:
        raise InvalidArgument(f"{field}.size", f"is {group.size}", f"give 1 to {MAX_GROUP_SIZE}")
    checks.one_of(f"{field}.pipeline", group.pipeline, PIPELINES)
    checks.one_of(f"{field}.mode", group.mode, MODES)
    checks.one_of(f"{field}.grader", group.grader, GRADERS)
    return group

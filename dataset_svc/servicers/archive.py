"""`regreen.dataset.v1.ArchiveService`.

- Translates only; the rules are in `store` and `queries.retention`.
- A batch is stored while the next one is read and packed; one that fails ends the stream.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc import measures, translate
from dataset_svc.queries import retention, trajectories
from dataset_svc.queries.retention import PruneRule
from dataset_svc.records import TrajectoryRecord
from dataset_svc.servicers.transactions import Transactions
from dataset_svc.store import TrajectoryStore
from dataset_svc.translate_trajectory import trajectory_record
from regreen.dataset import v1 as pb
from regreen.ids import check_id
from regreen.rpc.errors import InvalidArgument

_BATCH, _BATCH_BYTES = 500, 16 << 20
_LIMIT, _MOST = 1000, 10_000


class ArchiveServicer(pb.ArchiveServiceServicer):
    """Trajectories in bulk."""

    def __init__(self, transactions: Transactions, store: TrajectoryStore) -> None:
        self._transactions, self._store = transactions, store

    async def CommitTrajectories(
        self, requests: AsyncIterator[pb.CommitTrajectoriesRequest], context: Any
    ) -> Any:
        """Store a stream of trajectories."""
        total = [0, 0]
        under_way: asyncio.Task[tuple[int, int]] | None = None
        try:
            async for first, batch in _batches(requests):
                before, under_way = (
                    under_way,
                    asyncio.create_task(self._store.store_many(batch, first)),
                )
                _add(total, await before if before else (0, 0))
            _add(total, await under_way if under_way else (0, 0))
        except BaseException:
            if under_way is not None:
                under_way.cancel()
                await asyncio.gather(under_way, return_exceptions=True)
            raise
        return pb.CommitTrajectoriesResponse(stored=total[0], unchanged=total[1])

    async def PruneTrajectories(self, request: pb.PruneTrajectoriesRequest, context: Any) -> Any:
        """Remove old trajectories."""
        age_s = translate.seconds(request, "older_than")
        if age_s is None or age_s < 0:
            raise InvalidArgument("older_than", "is not set or negative", "say how old, 0 for all")
        if request.run_id:
            check_id(request.run_id, "run", "run_id")
        if not 0 <= request.limit <= _MOST:
            raise InvalidArgument("limit", f"is {request.limit}", f"give 0 to {_MOST}")
        limit = request.limit or _LIMIT
        kept = {
            name: getattr(request, name) for name in ("keep_solved", "keep_flagged", "keep_experts")
        }
        rule = PruneRule(age_s, request.run_id, **kept)

        async def work(session: AsyncSession) -> pb.PruneTrajectoriesResponse:
            count, size, more = await retention.prune(session, rule, limit, dry_run=request.dry_run)
            return pb.PruneTrajectoriesResponse(pruned=count, token_bytes=size, more=more)

        answer = await self._transactions.once(
            "PruneTrajectories", request, pb.PruneTrajectoriesResponse, work
        )
        if not request.dry_run:
            measures.PRUNED.inc(answer.pruned)
        return answer

    async def ListQuotas(self, request: pb.ListQuotasRequest, context: Any) -> Any:
        """List what is kept of each tenant's trajectories, and its bound."""
        kept = await self._transactions.read("ListQuotas", trajectories.kept_bytes)
        return pb.ListQuotasResponse(quotas=self._store.quotas.uses(trajectory_bytes=kept))

    async def GetTrajectoryStats(self, request: pb.GetTrajectoryStatsRequest, context: Any) -> Any:
        """Count trajectories."""
        if request.run_id:
            check_id(request.run_id, "run", "run_id")
        counts = await self._transactions.read(
            "GetTrajectoryStats", lambda session: retention.stats(session, request.run_id)
        )
        return pb.GetTrajectoryStatsResponse(
            total=sum(counts["solved"].values()),
            counts={name: pb.TrajectoryCounts(values=values) for name, values in counts.items()},
        )


async def _batches(
    requests: AsyncIterator[pb.CommitTrajectoriesRequest],
) -> AsyncIterator[tuple[int, list[TrajectoryRecord]]]:
    """The stream in parts that one transaction stores, each with the place of its first."""
    batch: list[TrajectoryRecord] = []
    first = size_bytes = 0
    async for request in requests:
        record = trajectory_record(request.trajectory)
        batch.append(record)
        size_bytes += record.wire_bytes
        if len(batch) == _BATCH or size_bytes >= _BATCH_BYTES:
            yield first, batch
            first += len(batch)
            batch, size_bytes = [], 0
    if batch:
        yield first, batch


def _add(total: list[int], more: tuple[int, int]) -> None:
    total[0] += more[0]
    total[1] += more[1]
    measures.ROWS.labels("trajectories").inc(more[0])

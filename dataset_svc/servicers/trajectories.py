"""`regreen.dataset.v1.TrajectoryService`.

- Translates only; the rules are in `checks`, `store` and `queries.trajectories`.
"""

from collections.abc import AsyncIterator
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc import measures
from dataset_svc.queries import paging, trajectories
from dataset_svc.servicers.transactions import Transactions
from dataset_svc.store import TrajectoryStore
from dataset_svc.translate_trajectory import (
    trajectory_message,
    trajectory_query,
    trajectory_record,
)
from regreen.dataset import v1 as pb
from regreen.ids import check_id


class TrajectoryServicer(pb.TrajectoryServiceServicer):
    """Trajectories outside the queue, and reading all of them."""

    def __init__(
        self,
        transactions: Transactions,
        store: TrajectoryStore,
        *,
        max_page_bytes: int = 32 << 20,
    ) -> None:
        self._transactions, self._store = transactions, store
        self._max_page_bytes = max_page_bytes

    async def CommitTrajectory(self, request: pb.CommitTrajectoryRequest, context: Any) -> Any:
        """Store a trajectory."""
        before = await self._transactions.answered(
            "CommitTrajectory", request, pb.CommitTrajectoryResponse
        )
        if before is not None:
            return before
        packed = await self._store.pack(trajectory_record(request.trajectory))

        async def work(session: AsyncSession) -> pb.CommitTrajectoryResponse:
            await trajectories.insert_checked(session, [packed], self._store.quotas)
            return pb.CommitTrajectoryResponse(id=packed.record.id)

        answer = await self._transactions.once(
            "CommitTrajectory", request, pb.CommitTrajectoryResponse, work
        )
        measures.ROWS.labels("trajectories").inc()
        return answer

    async def GetTrajectory(self, request: pb.GetTrajectoryRequest, context: Any) -> Any:
        """Read a trajectory."""
        check_id(request.id, "trj", "id")
        records = await self._store.load([request.id], tokens=not request.without_tokens)
        return pb.GetTrajectoryResponse(trajectory=trajectory_message(records[0]))

    async def ListTrajectories(self, request: pb.ListTrajectoriesRequest, context: Any) -> Any:
        """Read a page of trajectories in brief; shorter than asked for when they are large."""
        query = trajectory_query(request.filter)
        cursor = paging.cursor("trajectories", query, request.page_size, request.page_token, (int,))
        page = await self._transactions.read(
            "ListTrajectories", lambda session: trajectories.list_page(session, query, cursor)
        )
        messages = [trajectory_message(record) for record in page.rows]
        shown = cursor.cut(
            paging.Page(messages, page.next_token, page.keys),
            [message.ByteSize() for message in messages],
            self._max_page_bytes,
        )
        return pb.ListTrajectoriesResponse(
            trajectories=shown.rows, next_page_token=shown.next_token
        )

    async def ExportTrajectories(
        self, request: pb.ExportTrajectoriesRequest, context: Any
    ) -> AsyncIterator[Any]:
        """Stream whole trajectories."""
        async for record in self._store.export(trajectory_query(request.filter)):
            yield pb.ExportTrajectoriesResponse(trajectory=trajectory_message(record))

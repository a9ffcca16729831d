"""`regreen.dataset.v1.ParkingService`.

- Translates only; the rules are in `queries.parking` and `queries.history`.
"""

from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc import checks
from dataset_svc.models import ROLLOUT_STATES
from dataset_svc.queries import history, paging, parking
from dataset_svc.servicers.transactions import Transactions
from dataset_svc.translate import timestamp
from regreen.dataset import v1 as pb
from regreen.ids import check_id


class ParkingServicer(pb.ParkingServiceServicer):
    """What became of rollouts, and which tasks are set aside."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    async def ListRollouts(self, request: pb.ListRolloutsRequest, context: Any) -> Any:
        """Read a page of rollouts with their attempts."""
        check_id(request.run_id, "run", "run_id")
        if request.state:
            checks.one_of("state", request.state, ROLLOUT_STATES)
        scope = f"rollouts/{request.run_id}/{request.state}/{request.task_id}"
        cursor = paging.cursor(scope, None, request.page_size, request.page_token, (str, str))
        page = await self._transactions.read(
            "ListRollouts",
            lambda session: history.list_rollouts(
                session, request.run_id, cursor, state=request.state, task_id=request.task_id
            ),
        )
        return pb.ListRolloutsResponse(
            rollouts=[_message(record) for record in page.rows], next_page_token=page.next_token
        )

    async def ListParkedTasks(self, request: pb.ListParkedTasksRequest, context: Any) -> Any:
        """Read a page of parked tasks."""
        if request.run_id:
            check_id(request.run_id, "run", "run_id")
        cursor = paging.cursor(
            f"parked/{request.run_id}", None, request.page_size, request.page_token, (str, str)
        )
        page = await self._transactions.read(
            "ListParkedTasks",
            lambda session: parking.list_parked(session, request.run_id, cursor),
        )
        tasks = [
            pb.ParkedTask(
                run_id=task.run_id,
                task_id=task.task_id,
                reason=task.reason,
                lost=task.lost,
                park_time=timestamp(task.park_time),
            )
            for task in page.rows
        ]
        return pb.ListParkedTasksResponse(tasks=tasks, next_page_token=page.next_token)

    async def ReleaseTask(self, request: pb.ReleaseTaskRequest, context: Any) -> Any:
        """Have a parked task tried again."""
        check_id(request.run_id, "run", "run_id")

        async def work(session: AsyncSession) -> pb.ReleaseTaskResponse:
            count = await parking.release(session, request.run_id, request.task_id)
            return pb.ReleaseTaskResponse(rollouts=count)

        return await self._transactions.once("ReleaseTask", request, pb.ReleaseTaskResponse, work)


def _message(record: history.RolloutRecord) -> pb.Rollout:
    same = ("id", "group_id", "group_index", "task_id", "state", "attempt", "error", "outages")
    return pb.Rollout(
        **{name: getattr(record, name) for name in same},
        trajectory_id=record.trajectory_id,
        not_before=timestamp(record.not_before),
        final_time=timestamp(record.final_time),
        attempts=[
            pb.Attempt(
                lease_id=one.lease_id,
                worker=one.worker,
                attempt=one.attempt,
                error=one.error,
                create_time=timestamp(one.create_time),
            )
            for one in record.attempts
        ],
    )

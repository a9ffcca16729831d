"""Client of the dataset service's view of the queue: attempts, reasons, and parked tasks.

- Each method is one RPC.
"""

import grpc

from regreen.client.channel import READ_S, WRITE_S, Caller, new_request_id
from regreen.dataset import v1 as pb


class ParkingClient(Caller):
    """`regreen.dataset.v1.ParkingService`."""

    def __init__(self, channel: grpc.aio.Channel, *, patience_s: float = 30.0) -> None:
        super().__init__(channel, patience_s=patience_s)
        self._stub = pb.ParkingServiceStub(channel)

    async def list_rollouts(
        self,
        run_id: str,
        *,
        state: str = "",
        task_id: str = "",
        page_size: int = 0,
        page_token: str = "",
    ) -> pb.ListRolloutsResponse:
        """One page of rollouts with their attempts."""
        request = pb.ListRolloutsRequest(
            run_id=run_id, state=state, task_id=task_id, page_size=page_size, page_token=page_token
        )
        answer: pb.ListRolloutsResponse = await self._call(self._stub.ListRollouts, request, READ_S)
        return answer

    async def list_parked_tasks(
        self, run_id: str = "", *, page_size: int = 0, page_token: str = ""
    ) -> pb.ListParkedTasksResponse:
        """One page of parked tasks."""
        request = pb.ListParkedTasksRequest(
            run_id=run_id, page_size=page_size, page_token=page_token
        )
        answer: pb.ListParkedTasksResponse = await self._call(
            self._stub.ListParkedTasks, request, READ_S
        )
        return answer

    async def release_task(self, run_id: str, task_id: str, *, request_id: str = "") -> int:
        """Have a parked task tried again; how many of its rollouts wait anew."""
        request = pb.ReleaseTaskRequest(
            request_id=request_id or new_request_id(), run_id=run_id, task_id=task_id
        )
        count: int = (await self._call(self._stub.ReleaseTask, request, WRITE_S)).rollouts
        return count

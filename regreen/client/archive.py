"""Client of the dataset service's archive: trajectories in bulk, retention, counts.

- Each method is one RPC.
"""

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping

import grpc

from regreen.client.channel import READ_S, WRITE_S, Caller, call_metadata, new_request_id
from regreen.client.sandbox import duration
from regreen.common.v1 import QuotaUse
from regreen.dataset import v1 as pb
from regreen.rpc.wire import from_rpc_error

_STREAM_S = 24 * 3600.0


class ArchiveClient(Caller):
    """`regreen.dataset.v1.ArchiveService`."""

    def __init__(self, channel: grpc.aio.Channel, *, patience_s: float = 30.0) -> None:
        super().__init__(channel, patience_s=patience_s)
        self._stub = pb.ArchiveServiceStub(channel)

    async def commit_trajectories(
        self, trajectories: Iterable[pb.Trajectory] | AsyncIterable[pb.Trajectory]
    ) -> pb.CommitTrajectoriesResponse:
        """Store many trajectories, each with an id; send them again if the stream breaks off."""

        async def requests() -> AsyncIterator[pb.CommitTrajectoriesRequest]:
            if isinstance(trajectories, AsyncIterable):
                async for one in trajectories:
                    yield pb.CommitTrajectoriesRequest(trajectory=one)
                return
            for one in trajectories:
                yield pb.CommitTrajectoriesRequest(trajectory=one)

        try:
            answer: pb.CommitTrajectoriesResponse = await self._stub.CommitTrajectories(
                requests(), timeout=_STREAM_S, metadata=call_metadata()
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return answer

    async def prune_trajectories(
        self,
        older_than_s: float,
        *,
        run_id: str = "",
        keep: Mapping[str, bool] | None = None,
        limit: int = 0,
        dry_run: bool = False,
        request_id: str = "",
    ) -> pb.PruneTrajectoriesResponse:
        """Remove old trajectories that nothing keeps; `keep` has solved, flagged, experts."""
        request = pb.PruneTrajectoriesRequest(
            request_id=request_id or new_request_id(),
            older_than=duration(older_than_s),
            run_id=run_id,
            limit=limit,
            dry_run=dry_run,
            **{f"keep_{name}": value for name, value in (keep or {}).items()},
        )
        answer: pb.PruneTrajectoriesResponse = await self._call(
            self._stub.PruneTrajectories, request, WRITE_S
        )
        return answer

    async def get_trajectory_stats(self, run_id: str = "") -> pb.GetTrajectoryStatsResponse:
        """Counts by policy, actor, whether solved, and hack class."""
        answer: pb.GetTrajectoryStatsResponse = await self._call(
            self._stub.GetTrajectoryStats, pb.GetTrajectoryStatsRequest(run_id=run_id), READ_S
        )
        return answer

    async def list_quotas(self) -> list[QuotaUse]:
        """What tenants have of what their quotas bound there, and the bounds."""
        response: pb.ListQuotasResponse = await self._call(
            self._stub.ListQuotas, pb.ListQuotasRequest(), READ_S
        )
        return list(response.quotas)

"""Clients of the dataset service: tasks, trajectories, the rollout queue and runs.

- Each method is one RPC; it returns the response's main message.
- `all_*` methods read every page.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import grpc
import structlog
from google.protobuf.struct_pb2 import Struct

from regreen.client.channel import (
    READ_S,
    WRITE_S,
    Caller,
    call_metadata,
    new_request_id,
    pages,
    stream,
)
from regreen.client.sandbox import duration
from regreen.dataset import v1 as pb

_EXPORT_S = 3600.0


def struct(values: Mapping[str, Any] | None) -> Struct | None:
    """`values` as a protobuf struct; None stays None."""
    if values is None:
        return None
    message = Struct()
    message.update(dict(values))
    return message


class TaskClient(Caller):
    """`regreen.dataset.v1.TaskService`."""

    def __init__(self, channel: grpc.aio.Channel, *, patience_s: float = 30.0) -> None:
        super().__init__(channel, patience_s=patience_s)
        self._stub = pb.TaskServiceStub(channel)

    async def import_tasks(
        self, tasks: Sequence[pb.Task], *, replace: bool = False, request_id: str = ""
    ) -> pb.ImportTasksResponse:
        """Store tasks."""
        request = pb.ImportTasksRequest(
            request_id=request_id or new_request_id(), tasks=tasks, replace=replace
        )
        response: pb.ImportTasksResponse = await self._call(
            self._stub.ImportTasks, request, WRITE_S
        )
        return response

    async def get_task(self, id: str) -> pb.Task:
        """One task."""
        task: pb.Task = (
            await self._call(self._stub.GetTask, pb.GetTaskRequest(id=id), READ_S)
        ).task
        return task

    async def list_tasks(
        self, *, page_size: int = 0, page_token: str = "", filter: pb.TaskFilter | None = None
    ) -> pb.ListTasksResponse:
        """One page of tasks."""
        request = pb.ListTasksRequest(page_size=page_size, page_token=page_token, filter=filter)
        response: pb.ListTasksResponse = await self._call(self._stub.ListTasks, request, READ_S)
        return response

    async def all_tasks(self, filter: pb.TaskFilter | None = None) -> list[pb.Task]:
        """Every task that the filter lets through."""
        found = pages(lambda token: self.list_tasks(page_token=token, filter=filter))
        return [task async for page in found for task in page.tasks]

    async def record_gate(
        self,
        report: pb.GateReport,
        *,
        validation_time_s: float | None = None,
        request_id: str = "",
    ) -> pb.Task:
        """Store the evidence of a gate."""
        request = pb.RecordGateRequest(
            request_id=request_id or new_request_id(),
            report=report,
            validation_time=duration(validation_time_s),
        )
        task: pb.Task = (await self._call(self._stub.RecordGate, request, WRITE_S)).task
        return task

    async def get_gate_report(self, task_id: str) -> pb.GateReport:
        """The last gate report of a task."""
        request = pb.GetGateReportRequest(task_id=task_id)
        report: pb.GateReport = (await self._call(self._stub.GetGateReport, request, READ_S)).report
        return report

    async def split_tasks(self, splits: Mapping[str, str], *, request_id: str = "") -> int:
        """Assign tasks to splits; the number that changed."""
        request = pb.SplitTasksRequest(request_id=request_id or new_request_id(), splits=splits)
        changed: int = (await self._call(self._stub.SplitTasks, request, WRITE_S)).changed
        return changed

    async def get_task_stats(self) -> pb.GetTaskStatsResponse:
        """Counts by dimension."""
        response: pb.GetTaskStatsResponse = await self._call(
            self._stub.GetTaskStats, pb.GetTaskStatsRequest(), READ_S
        )
        return response


class TrajectoryClient(Caller):
    """`regreen.dataset.v1.TrajectoryService`."""

    def __init__(self, channel: grpc.aio.Channel, *, patience_s: float = 30.0) -> None:
        super().__init__(channel, patience_s=patience_s)
        self._stub = pb.TrajectoryServiceStub(channel)

    async def commit_trajectory(self, trajectory: pb.Trajectory, *, request_id: str = "") -> str:
        """Store one trajectory; its id."""
        request = pb.CommitTrajectoryRequest(
            request_id=request_id or new_request_id(), trajectory=trajectory
        )
        about = {"trajectory_id": trajectory.id} if trajectory.id else {}
        with structlog.contextvars.bound_contextvars(**about):  # the end of its trace
            stored: str = (await self._call(self._stub.CommitTrajectory, request, WRITE_S)).id
        return stored

    async def get_trajectory(self, id: str, *, without_tokens: bool = False) -> pb.Trajectory:
        """One trajectory."""
        request = pb.GetTrajectoryRequest(id=id, without_tokens=without_tokens)
        trajectory: pb.Trajectory = (
            await self._call(self._stub.GetTrajectory, request, READ_S)
        ).trajectory
        return trajectory

    async def list_trajectories(
        self,
        *,
        page_size: int = 0,
        page_token: str = "",
        filter: pb.TrajectoryFilter | None = None,
    ) -> pb.ListTrajectoriesResponse:
        """One page of trajectories, newest first."""
        request = pb.ListTrajectoriesRequest(
            page_size=page_size, page_token=page_token, filter=filter
        )
        response: pb.ListTrajectoriesResponse = await self._call(
            self._stub.ListTrajectories, request, READ_S
        )
        return response

    async def export_trajectories(
        self, filter: pb.TrajectoryFilter | None = None
    ) -> AsyncIterator[pb.Trajectory]:
        """Whole trajectories, oldest first."""
        request = pb.ExportTrajectoriesRequest(filter=filter)
        call = self._stub.ExportTrajectories(request, timeout=_EXPORT_S, metadata=call_metadata())
        async with stream(call) as events:
            async for event in events:
                yield event.trajectory


class RolloutQueueClient(Caller):
    """`regreen.dataset.v1.RolloutQueueService`."""

    def __init__(self, channel: grpc.aio.Channel, *, patience_s: float = 30.0) -> None:
        super().__init__(channel, patience_s=patience_s)
        self._stub = pb.RolloutQueueServiceStub(channel)

    async def enqueue_groups(
        self, groups: Sequence[pb.Group], *, request_id: str = ""
    ) -> Sequence[str]:
        """Add groups; their ids in order."""
        request = pb.EnqueueGroupsRequest(request_id=request_id or new_request_id(), groups=groups)
        ids: Sequence[str] = (
            await self._call(self._stub.EnqueueGroups, request, WRITE_S)
        ).group_ids
        return ids

    async def lease_rollouts(
        self,
        worker: str,
        count: int,
        *,
        run_id: str = "",
        duration_s: float | None = None,
        request_id: str = "",
    ) -> Sequence[pb.Lease]:
        """Lease waiting rollouts; may be none."""
        answer = await self.ask_for_rollouts(
            worker, count, run_id=run_id, duration_s=duration_s, request_id=request_id
        )
        leases: Sequence[pb.Lease] = answer.leases
        return leases

    async def ask_for_rollouts(
        self,
        worker: str,
        count: int,
        *,
        run_id: str = "",
        duration_s: float | None = None,
        request_id: str = "",
    ) -> pb.LeaseRolloutsResponse:
        """Lease waiting rollouts; where there are none, the answer says when to ask again."""
        request = pb.LeaseRolloutsRequest(
            request_id=request_id or new_request_id(),
            worker=worker,
            count=count,
            run_id=run_id,
            duration=duration(duration_s),
        )
        answer: pb.LeaseRolloutsResponse = await self._call(
            self._stub.LeaseRollouts, request, WRITE_S
        )
        return answer

    async def heartbeat(
        self,
        lease_ids: Sequence[str],
        *,
        duration_s: float | None = None,
        request_id: str = "",
    ) -> Sequence[pb.Lease]:
        """Extend leases."""
        request = pb.HeartbeatRequest(
            request_id=request_id or new_request_id(),
            lease_ids=lease_ids,
            duration=duration(duration_s),
        )
        leases: Sequence[pb.Lease] = (
            await self._call(self._stub.Heartbeat, request, READ_S)
        ).leases
        return leases

    async def commit_rollout(
        self, lease_id: str, trajectory: pb.Trajectory, *, request_id: str = ""
    ) -> pb.CommitRolloutResponse:
        """Store the trajectory of a leased rollout."""
        request = pb.CommitRolloutRequest(
            request_id=request_id or new_request_id(), lease_id=lease_id, trajectory=trajectory
        )
        response: pb.CommitRolloutResponse = await self._call(
            self._stub.CommitRollout, request, WRITE_S
        )
        return response

    async def fail_rollout(
        self,
        lease_id: str,
        error: str,
        *,
        release: bool = False,
        outage: bool = False,
        request_id: str = "",
    ) -> bool:
        """Give a rollout back; whether it will be tried again."""
        request = pb.FailRolloutRequest(
            request_id=request_id or new_request_id(),
            lease_id=lease_id,
            error=error,
            release=release,
            outage=outage,
        )
        retried: bool = (await self._call(self._stub.FailRollout, request, WRITE_S)).retried
        return retried

    async def take_groups(
        self, run_id: str, count: int, *, step: int = 0, epoch: int = 0, request_id: str = ""
    ) -> Sequence[pb.CompleteGroup]:
        """Take complete groups for learning; may be none."""
        request = pb.TakeGroupsRequest(
            request_id=request_id or new_request_id(),
            run_id=run_id,
            count=count,
            step=step,
            epoch=epoch,
        )
        groups: Sequence[pb.CompleteGroup] = (
            await self._call(self._stub.TakeGroups, request, WRITE_S)
        ).groups
        return groups

    async def acknowledge_groups(
        self,
        group_ids: Sequence[str],
        checkpoint_id: str,
        *,
        epoch: int = 0,
        request_id: str = "",
    ) -> None:
        """Record that groups are contained in a checkpoint."""
        request = pb.AcknowledgeGroupsRequest(
            request_id=request_id or new_request_id(),
            group_ids=group_ids,
            checkpoint_id=checkpoint_id,
            epoch=epoch,
        )
        await self._call(self._stub.AcknowledgeGroups, request, WRITE_S)

    async def rewind_run(
        self, run_id: str, *, checkpoint_id: str = "", request_id: str = ""
    ) -> pb.RewindRunResponse:
        """Put a run back to a checkpoint; groups that became takeable again, and the new epoch."""
        request = pb.RewindRunRequest(
            request_id=request_id or new_request_id(), run_id=run_id, checkpoint_id=checkpoint_id
        )
        response: pb.RewindRunResponse = await self._call(self._stub.RewindRun, request, WRITE_S)
        return response

    async def get_queue(self, run_id: str = "", *, step: int = 0) -> pb.GetQueueResponse:
        """Counts by state."""
        response: pb.GetQueueResponse = await self._call(
            self._stub.GetQueue, pb.GetQueueRequest(run_id=run_id, step=step), READ_S
        )
        return response


class RunClient(Caller):
    """`regreen.dataset.v1.RunService`."""

    def __init__(self, channel: grpc.aio.Channel, *, patience_s: float = 30.0) -> None:
        super().__init__(channel, patience_s=patience_s)
        self._stub = pb.RunServiceStub(channel)

    async def create_run(
        self,
        name: str,
        kind: str,
        *,
        config: Mapping[str, Any] | None = None,
        request_id: str = "",
    ) -> pb.CreateRunResponse:
        """Create a run, or find the one of that name."""
        request = pb.CreateRunRequest(
            request_id=request_id or new_request_id(), name=name, kind=kind, config=struct(config)
        )
        response: pb.CreateRunResponse = await self._call(self._stub.CreateRun, request, WRITE_S)
        return response

    async def get_run(self, id: str) -> pb.Run:
        """One run, by id or name."""
        run: pb.Run = (await self._call(self._stub.GetRun, pb.GetRunRequest(id=id), READ_S)).run
        return run

    async def list_runs(
        self, *, page_size: int = 0, page_token: str = "", kind: str = ""
    ) -> pb.ListRunsResponse:
        """One page of runs, newest first."""
        request = pb.ListRunsRequest(page_size=page_size, page_token=page_token, kind=kind)
        response: pb.ListRunsResponse = await self._call(self._stub.ListRuns, request, READ_S)
        return response

    async def update_run(
        self,
        id: str,
        *,
        state: str = "",
        summary: Mapping[str, Any] | None = None,
        acknowledge_taken: bool = False,
        epoch: int = 0,
        request_id: str = "",
    ) -> pb.Run:
        """Change the state or summary of a run."""
        request = pb.UpdateRunRequest(
            request_id=request_id or new_request_id(),
            id=id,
            state=state,
            summary=struct(summary),
            acknowledge_taken=acknowledge_taken,
            epoch=epoch,
        )
        run: pb.Run = (await self._call(self._stub.UpdateRun, request, WRITE_S)).run
        return run

    async def record_metrics(
        self, run_id: str, step: int, values: Mapping[str, float], *, request_id: str = ""
    ) -> None:
        """Store the metrics of one step."""
        points = [pb.MetricPoint(step=step, name=name, value=v) for name, v in values.items()]
        request = pb.RecordMetricsRequest(
            request_id=request_id or new_request_id(), run_id=run_id, points=points
        )
        await self._call(self._stub.RecordMetrics, request, WRITE_S)

    async def list_metrics(
        self, run_id: str, *, names: Sequence[str] = (), from_step: int = 0
    ) -> list[pb.MetricPoint]:
        """Every metric point from a step on, in step order."""

        async def page_of(token: str) -> pb.ListMetricsResponse:
            request = pb.ListMetricsRequest(
                run_id=run_id, names=names, from_step=from_step, page_token=token
            )
            page: pb.ListMetricsResponse = await self._call(self._stub.ListMetrics, request, READ_S)
            return page

        return [point async for page in pages(page_of) for point in page.points]

    async def record_checkpoint(
        self,
        checkpoint: pb.CheckpointRecord,
        *,
        epoch: int = 0,
        acknowledge_taken: bool = False,
        request_id: str = "",
    ) -> pb.CheckpointRecord:
        """Record a checkpoint and acknowledge its groups."""
        request = pb.RecordCheckpointRequest(
            request_id=request_id or new_request_id(),
            checkpoint=checkpoint,
            epoch=epoch,
            acknowledge_taken=acknowledge_taken,
        )
        record: pb.CheckpointRecord = (
            await self._call(self._stub.RecordCheckpoint, request, WRITE_S)
        ).checkpoint
        return record

    async def list_checkpoints(
        self, run_id: str, *, page_size: int = 0, page_token: str = ""
    ) -> pb.ListCheckpointsResponse:
        """One page of checkpoints, newest first."""
        request = pb.ListCheckpointsRequest(
            run_id=run_id, page_size=page_size, page_token=page_token
        )
        response: pb.ListCheckpointsResponse = await self._call(
            self._stub.ListCheckpoints, request, READ_S
        )
        return response

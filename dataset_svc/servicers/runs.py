"""`regreen.dataset.v1.RunService`.

- Translates only; the rules are in `queries.runs` and `queries.groups`.
"""

import math
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc import checks, measures, translate
from dataset_svc.models import RUN_KINDS, RUN_STATES
from dataset_svc.queries import paging, runs
from dataset_svc.servicers.transactions import Transactions
from regreen.blobs import Digest, check_digest
from regreen.dataset import v1 as pb
from regreen.ids import check_id, check_run_name
from regreen.rpc.errors import InvalidArgument

MAX_POINTS = 10_000
_MAX_NAME_CHARS = 200


class RunServicer(pb.RunServiceServicer):
    """Runs, metrics and checkpoints."""

    def __init__(self, transactions: Transactions, *, max_page_bytes: int = 32 << 20) -> None:
        self._transactions = transactions
        self._max_page_bytes = max_page_bytes

    async def CreateRun(self, request: pb.CreateRunRequest, context: Any) -> Any:
        """Create a run or find it by name."""
        check_run_name(request.name)
        checks.one_of("kind", request.kind, RUN_KINDS)
        config = translate.struct_document(request, "config")

        async def work(session: AsyncSession) -> pb.CreateRunResponse:
            run, existed = await runs.create_run(session, request.name, request.kind, config)
            return pb.CreateRunResponse(run=translate.run_message(run), existed=existed)

        return await self._transactions.once("CreateRun", request, pb.CreateRunResponse, work)

    async def GetRun(self, request: pb.GetRunRequest, context: Any) -> Any:
        """Read a run."""
        run = await self._transactions.read(
            "GetRun", lambda session: runs.get_run(session, request.id)
        )
        return pb.GetRunResponse(run=translate.run_message(run))

    async def ListRuns(self, request: pb.ListRunsRequest, context: Any) -> Any:
        """Read a page of runs; shorter than asked for when they are large."""
        if request.kind:
            checks.one_of("kind", request.kind, RUN_KINDS)
        cursor = paging.cursor(
            f"runs/{request.kind}", None, request.page_size, request.page_token, (int,)
        )
        page = await self._transactions.read(
            "ListRuns", lambda session: runs.list_runs(session, request.kind, cursor)
        )
        messages = [translate.run_message(run) for run in page.rows]
        shown = cursor.cut(
            paging.Page(messages, page.next_token, page.keys),
            [message.ByteSize() for message in messages],
            self._max_page_bytes,
        )
        return pb.ListRunsResponse(runs=shown.rows, next_page_token=shown.next_token)

    async def UpdateRun(self, request: pb.UpdateRunRequest, context: Any) -> Any:
        """Change a run."""
        if request.state:
            checks.one_of("state", request.state, RUN_STATES)
        summary = translate.struct_document(request, "summary")

        async def work(session: AsyncSession) -> pb.UpdateRunResponse:
            run = await runs.update_run(
                session,
                request.id,
                request.state,
                summary,
                acknowledge_taken=request.acknowledge_taken,
                epoch=request.epoch,
            )
            return pb.UpdateRunResponse(run=translate.run_message(run))

        return await self._transactions.once("UpdateRun", request, pb.UpdateRunResponse, work)

    async def RecordMetrics(self, request: pb.RecordMetricsRequest, context: Any) -> Any:
        """Store metric points."""
        if len(request.points) > MAX_POINTS:
            raise InvalidArgument(
                "points", f"has {len(request.points)}", f"give up to {MAX_POINTS}"
            )
        for place, point in enumerate(request.points):
            _check_name(f"points[{place}].name", point.name)
            if not math.isfinite(point.value):
                raise InvalidArgument(
                    f"points[{place}].value", f"is {point.value}", "leave out what is not finite"
                )
        points = [
            translate.metric_record(point, f"points[{place}]")
            for place, point in enumerate(request.points)
        ]

        async def work(session: AsyncSession) -> pb.RecordMetricsResponse:
            await runs.record_metrics(session, request.run_id, points)
            return pb.RecordMetricsResponse()

        answer = await self._transactions.once(
            "RecordMetrics", request, pb.RecordMetricsResponse, work
        )
        measures.ROWS.labels("run_metrics").inc(len(points))
        return answer

    async def ListMetrics(self, request: pb.ListMetricsRequest, context: Any) -> Any:
        """Read a page of metric points."""
        names = sorted(set(request.names))
        scope = f"metrics/{request.run_id}/{request.from_step}/{names}"
        cursor = paging.cursor(
            scope,
            None,
            request.page_size,
            request.page_token,
            (int, str),
            default=1000,
            most=10_000,
        )
        page = await self._transactions.read(
            "ListMetrics",
            lambda session: runs.list_metrics(
                session, request.run_id, names, request.from_step, cursor
            ),
        )
        points = [translate.metric_message(point) for point in page.rows]
        return pb.ListMetricsResponse(points=points, next_page_token=page.next_token)

    async def RecordCheckpoint(self, request: pb.RecordCheckpointRequest, context: Any) -> Any:
        """Record a checkpoint and acknowledge its groups."""
        record = translate.checkpoint_record(request.checkpoint)
        check_id(record.run_id, "run", "checkpoint.run_id")
        if record.id:
            check_id(record.id, "ckp", "checkpoint.id")
        if not record.uri:
            raise InvalidArgument("checkpoint.uri", "is empty", "say where the weights are")
        if record.sha256:
            check_digest(Digest(record.sha256, record.size_bytes), "checkpoint.digest")

        async def work(session: AsyncSession) -> pb.RecordCheckpointResponse:
            stored = await runs.record_checkpoint(
                session, record, request.epoch, acknowledge_taken=request.acknowledge_taken
            )
            return pb.RecordCheckpointResponse(checkpoint=translate.checkpoint_message(stored))

        answer = await self._transactions.once(
            "RecordCheckpoint", request, pb.RecordCheckpointResponse, work
        )
        measures.ROWS.labels("checkpoints").inc()
        return answer

    async def ListCheckpoints(self, request: pb.ListCheckpointsRequest, context: Any) -> Any:
        """Read a page of checkpoints."""
        cursor = paging.cursor(
            f"checkpoints/{request.run_id}", None, request.page_size, request.page_token, (int,)
        )
        page = await self._transactions.read(
            "ListCheckpoints",
            lambda session: runs.list_checkpoints(session, request.run_id, cursor),
        )
        messages = [translate.checkpoint_message(record) for record in page.rows]
        return pb.ListCheckpointsResponse(checkpoints=messages, next_page_token=page.next_token)


def _check_name(field: str, name: str) -> None:
    if not 0 < len(name) <= _MAX_NAME_CHARS:
        raise InvalidArgument(
            field, "is empty or too long", f"give 1 to {_MAX_NAME_CHARS} characters"
        )

"""`regreen.dataset.v1.TaskService`.

- Translates only; the rules are in `checks` and `queries.tasks`.
"""

from dataclasses import replace
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc import checks, measures, translate
from dataset_svc.queries import paging, tasks
from dataset_svc.servicers.transactions import Transactions
from regreen.dataset import v1 as pb
from regreen.rpc.errors import InvalidArgument

MAX_TASKS = 10_000
MAX_LOG_CHARS = 1 << 20
"""Of a longer log the end is kept: that is where the error is."""


class TaskServicer(pb.TaskServiceServicer):
    """Tasks, gate reports and splits."""

    def __init__(self, transactions: Transactions, *, max_page_bytes: int = 32 << 20) -> None:
        self._transactions = transactions
        self._max_page_bytes = max_page_bytes

    async def ImportTasks(self, request: pb.ImportTasksRequest, context: Any) -> Any:
        """Store tasks, all or none."""
        if not 0 < len(request.tasks) <= MAX_TASKS:
            raise InvalidArgument("tasks", f"has {len(request.tasks)}", f"give 1 to {MAX_TASKS}")
        records = []
        for position, task in enumerate(request.tasks):
            field = f"tasks[{position}]"
            if task.ByteSize() > checks.MAX_DOCUMENT_BYTES:
                raise InvalidArgument(
                    field,
                    f"has over {checks.MAX_DOCUMENT_BYTES} bytes",
                    "move overlays to archives",
                )
            records.append(translate.task_record(task, field))
            checks.check_task(records[-1], field)

        async def work(session: AsyncSession) -> pb.ImportTasksResponse:
            imported, unchanged = await tasks.import_tasks(
                session, records, replace_changed=request.replace
            )
            return pb.ImportTasksResponse(imported=imported, unchanged=unchanged)

        answer = await self._transactions.once("ImportTasks", request, pb.ImportTasksResponse, work)
        measures.ROWS.labels("tasks").inc(answer.imported)
        return answer

    async def GetTask(self, request: pb.GetTaskRequest, context: Any) -> Any:
        """Read one task."""
        record = await self._transactions.read(
            "GetTask", lambda session: tasks.get_task(session, request.id)
        )
        return pb.GetTaskResponse(task=translate.task_message(record))

    async def ListTasks(self, request: pb.ListTasksRequest, context: Any) -> Any:
        """Read a page of tasks; shorter than asked for when tasks are large."""
        query = translate.task_query(request.filter)
        cursor = paging.cursor("tasks", query, request.page_size, request.page_token, (str,))
        page = await self._transactions.read(
            "ListTasks", lambda session: tasks.list_tasks(session, query, cursor)
        )
        messages = [translate.task_message(record) for record in page.rows]
        shown = cursor.cut(
            paging.Page(messages, page.next_token, page.keys),
            [message.ByteSize() for message in messages],
            self._max_page_bytes,
        )
        return pb.ListTasksResponse(tasks=shown.rows, next_page_token=shown.next_token)

    async def RecordGate(self, request: pb.RecordGateRequest, context: Any) -> Any:
        """Store a gate report."""
        report = translate.gate_record(request.report)
        log = request.report.error_log
        if len(log) > MAX_LOG_CHARS:
            report = replace(report, error_log="[cut] " + log[-MAX_LOG_CHARS:])
        checks.check_gate(report)
        validation_s = translate.seconds(request, "validation_time")

        async def work(session: AsyncSession) -> pb.RecordGateResponse:
            task = await tasks.record_gate(session, report, validation_s)
            return pb.RecordGateResponse(task=translate.task_message(task))

        answer = await self._transactions.once("RecordGate", request, pb.RecordGateResponse, work)
        measures.ROWS.labels("gate_reports").inc()
        return answer

    async def GetGateReport(self, request: pb.GetGateReportRequest, context: Any) -> Any:
        """Read the last gate report."""
        report = await self._transactions.read(
            "GetGateReport", lambda session: tasks.last_gate_report(session, request.task_id)
        )
        return pb.GetGateReportResponse(report=translate.gate_message(report))

    async def SplitTasks(self, request: pb.SplitTasksRequest, context: Any) -> Any:
        """Assign tasks to splits."""

        async def work(session: AsyncSession) -> pb.SplitTasksResponse:
            changed = await tasks.split_tasks(session, dict(request.splits))
            return pb.SplitTasksResponse(changed=changed)

        return await self._transactions.once("SplitTasks", request, pb.SplitTasksResponse, work)

    async def GetTaskStats(self, request: pb.GetTaskStatsRequest, context: Any) -> Any:
        """Count tasks."""
        total, counts = await self._transactions.read("GetTaskStats", tasks.task_stats)
        return pb.GetTaskStatsResponse(
            total=total, counts={name: pb.Counts(values=values) for name, values in counts.items()}
        )

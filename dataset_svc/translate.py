"""Protobuf to records and back: tasks, gate reports, groups, leases, runs, checkpoints.

- Translation only: nothing is checked here but that values have a form to be stored in.
- What no query looks at travels as the JSON form of its message, with proto field names.
- Unknown JSON fields of an older or newer writer are ignored when read.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict, ParseDict, SerializeToJsonError
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from dataset_svc.records import (
    CheckpointRecord,
    CheckRecord,
    Document,
    GateRecord,
    GroupRecord,
    LeaseRecord,
    MetricRecord,
    RunRecord,
    TaskQuery,
    TaskRecord,
)
from regreen.common import v1 as common_pb
from regreen.dataset import v1 as pb
from regreen.rpc.errors import InvalidArgument

M = TypeVar("M", bound=Message)
_MAX_DURATION_S = 315_576_000_000
"""The longest duration that protobuf defines, 10000 years."""
_MAX_DEPTH = 24
"""Levels of a free-form document: an answer with it must stay readable, which ends at 100 messages
inside each other, three to a level."""
_SERVER_FIELDS = (
    "split",
    "status",
    "state_id",
    "error_log",
    "verify_time",
    "validation_time",
    "create_time",
)
"""Fields of a task that the service owns or that may change without new content."""


class ProtoEnum(Protocol):
    """What generated enums can do."""

    def Name(self, number: Any) -> str:
        """The value's name."""
        ...

    def Value(self, name: Any) -> Any:
        """The value of a name."""
        ...

    def values(self) -> list[Any]:
        """Every value."""
        ...


def to_document(message: Message, field: str) -> Document:
    """The JSON form of a message, with proto field names.

    Raises:
        InvalidArgument: it holds what JSON has no form for; `field` is its path in the request.
    """
    try:
        return MessageToDict(message, preserving_proto_field_name=True)
    except (SerializeToJsonError, ValueError) as error:
        raise InvalidArgument(
            field, f"cannot be stored: {error}", "give finite numbers and times of years 1 to 9999"
        ) from error


def from_document(document: Mapping[str, Any], message: M) -> M:
    """`message`, filled from its JSON form."""
    return ParseDict(dict(document), message, ignore_unknown_fields=True)


def enum_name(enum: ProtoEnum, value: int, field: str) -> str:
    """The value's name, lower case, without the enum's prefix; empty for UNSPECIFIED.

    Raises:
        InvalidArgument: the number is not known here.
    """
    try:
        name = enum.Name(value)
    except ValueError as error:
        known = ", ".join(str(number) for number in enum.values())
        raise InvalidArgument(
            field, f"{value} is not a known value", f"give one of {known}"
        ) from error
    prefix = enum.Name(0).removesuffix("UNSPECIFIED")
    return "" if value == 0 else name.removeprefix(prefix).lower()


def enum_value(enum: ProtoEnum, name: str) -> Any:
    """The number that `enum_name` turned into `name`."""
    prefix = enum.Name(0).removesuffix("UNSPECIFIED")
    return enum.Value(prefix + (name.upper() or "UNSPECIFIED"))


def seconds(message: Message, field: str, path: str = "") -> float | None:
    """A duration field in seconds; None when it is absent. `path` is its path in the request.

    Raises:
        InvalidArgument: it is longer than a duration may be.
    """
    if not message.HasField(field):
        return None
    value: Duration = getattr(message, field)
    if abs(value.seconds) > _MAX_DURATION_S or abs(value.nanos) >= 1_000_000_000:
        raise InvalidArgument(
            path or field, f"is {value.seconds} s and {value.nanos} ns", "give a real duration"
        )
    return value.seconds + value.nanos / 1e9


def duration(value_s: float) -> Duration:
    """A duration from seconds."""
    message = Duration()
    message.FromNanoseconds(round(value_s * 1e9))
    return message


def moment(message: Message, field: str, path: str = "") -> datetime | None:
    """A timestamp field; None when it is absent. `path` is its path in the request.

    Raises:
        InvalidArgument: it is outside the years 1 to 9999.
    """
    if not message.HasField(field):
        return None
    value: Timestamp = getattr(message, field)
    try:
        return value.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidArgument(
            path or field,
            f"{value.seconds} s since 1970 is no time of the years 1 to 9999",
            "give seconds, not milliseconds",
        ) from error


def timestamp(value: datetime | None) -> Timestamp | None:
    """A timestamp, or None."""
    if value is None:
        return None
    message = Timestamp()
    message.FromDatetime(value)
    return message


def task_record(task: pb.Task, field: str) -> TaskRecord:
    """A task as the client described it."""
    document = to_document(task, field)
    for name in _SERVER_FIELDS:
        document.pop(name, None)
    modes = (
        enum_name(common_pb.Mode, mode, f"{field}.modes[{position}]")
        for position, mode in enumerate(task.modes)
    )
    return TaskRecord(
        id=task.id,
        kind=task.kind,
        package=task.environment.package,
        python=task.environment.python,
        category=task.category,
        blame=task.blame,
        culprit=task.culprit,
        modes=tuple(modes),
        split=task.split,
        document=document,
    )


def task_message(record: TaskRecord) -> pb.Task:
    """The task as clients see it."""
    task = from_document(record.document, pb.Task())
    task.split = record.split
    task.status = enum_value(pb.TaskStatus, record.status)
    task.state_id, task.error_log = record.state_id, record.error_log
    if record.verify_time is not None:
        task.verify_time.FromDatetime(record.verify_time)
    if record.validation_s is not None:
        task.validation_time.CopyFrom(duration(record.validation_s))
    if record.create_time is not None:
        task.create_time.FromDatetime(record.create_time)
    return task


def task_query(filter: pb.TaskFilter) -> TaskQuery:
    """The filter of ListTasks."""
    return TaskQuery(
        statuses=tuple(enum_name(pb.TaskStatus, s, "filter.statuses") for s in filter.statuses),
        split=filter.split,
        kind=filter.kind,
        mode=enum_name(common_pb.Mode, filter.mode, "filter.mode"),
        python=filter.python,
        package=filter.package,
        culprit=filter.culprit,
    )


def gate_record(report: pb.GateReport) -> GateRecord:
    """A gate report as it came."""
    return GateRecord(
        task_id=report.task_id,
        status=enum_name(pb.TaskStatus, report.status, "report.status"),
        reason=report.reason,
        checks=tuple(
            CheckRecord(
                check.name,
                check.repeat,
                check.ok,
                check.detail,
                check.results_sha256,
                seconds(check, "duration", f"report.checks[{place}].duration") or 0.0,
                check.conditions,
            )
            for place, check in enumerate(report.checks)
        ),
        flaky=tuple(report.flaky),
        state_id=report.state_id,
        error_log=report.error_log,
        evidence=_evidence(report),
    )


def _evidence(report: pb.GateReport) -> Document:
    """What of a report is kept as a document."""
    rest = pb.GateReport()
    rest.CopyFrom(report)
    for name in ("task_id", "status", "reason", "checks", "flaky", "state_id", "error_log"):
        rest.ClearField(name)
    rest.ClearField("create_time")
    return to_document(rest, "report")


def gate_message(record: GateRecord) -> pb.GateReport:
    """A stored gate report."""
    report = pb.GateReport(
        task_id=record.task_id,
        status=enum_value(pb.TaskStatus, record.status),
        reason=record.reason,
        checks=[
            pb.GateCheck(
                name=check.name,
                repeat=check.repeat,
                ok=check.ok,
                detail=check.detail,
                results_sha256=check.results_sha256,
                duration=duration(check.duration_s),
                conditions=check.conditions,
            )
            for check in record.checks
        ],
        flaky=record.flaky,
        state_id=record.state_id,
        error_log=record.error_log,
        create_time=timestamp(record.create_time),
    )
    return from_document(record.evidence, report)


def group_record(group: pb.Group, field: str) -> GroupRecord:
    """A group as the client described it."""
    return GroupRecord(
        id=group.id,
        run_id=group.run_id,
        task_id=group.task_id,
        size=group.size,
        pipeline=enum_name(common_pb.Pipeline, group.pipeline, f"{field}.pipeline"),
        mode=enum_name(common_pb.Mode, group.mode, f"{field}.mode"),
        grader=enum_name(common_pb.Grader, group.grader, f"{field}.grader"),
        seed=group.seed,
        step=group.step,
        labels=dict(group.labels),
    )


def group_message(record: GroupRecord) -> pb.Group:
    """A stored group."""
    return pb.Group(
        id=record.id,
        run_id=record.run_id,
        task_id=record.task_id,
        size=record.size,
        pipeline=enum_value(common_pb.Pipeline, record.pipeline),
        mode=enum_value(common_pb.Mode, record.mode),
        grader=enum_value(common_pb.Grader, record.grader),
        seed=record.seed,
        step=record.step,
        labels=record.labels,
    )


def lease_message(record: LeaseRecord) -> pb.Lease:
    """A lease."""
    return pb.Lease(
        id=record.id,
        rollout_id=record.rollout_id,
        group=group_message(record.group),
        group_index=record.group_index,
        attempt=record.attempt,
        seed=record.seed,
        expire_time=timestamp(record.expire_time),
        tenant=record.tenant,
    )


def run_message(record: RunRecord) -> pb.Run:
    """A run."""
    return pb.Run(
        id=record.id,
        name=record.name,
        kind=record.kind,
        state=record.state,
        epoch=record.epoch,
        config=_struct(record.config),
        summary=_struct(record.summary),
        create_time=timestamp(record.create_time),
        update_time=timestamp(record.update_time),
    )


def struct_document(message: Message, field: str) -> Document | None:
    """A struct field as a dictionary; None when it is absent.

    Raises:
        InvalidArgument: it cannot be stored, or is nested too deep to be read again.
    """
    if not message.HasField(field):
        return None
    document = to_document(getattr(message, field), field)
    level: list[Any] = [document]
    for _ in range(_MAX_DEPTH):
        level = [item for value in level for item in _inside(value)]
        if not level:
            return document
    raise InvalidArgument(field, f"is over {_MAX_DEPTH} levels deep", "flatten it")


def _inside(value: Document | list[Any]) -> list[Any]:
    """The objects and arrays that one of them contains."""
    items = value.values() if isinstance(value, dict) else value
    return [item for item in items if isinstance(item, dict | list)]


def metric_record(point: pb.MetricPoint, field: str) -> MetricRecord:
    """A metric point as it came."""
    return MetricRecord(point.step, point.name, point.value, moment(point, "time", f"{field}.time"))


def metric_message(record: MetricRecord) -> pb.MetricPoint:
    """A stored metric point."""
    return pb.MetricPoint(
        step=record.step, name=record.name, value=record.value, time=timestamp(record.time)
    )


def checkpoint_record(checkpoint: pb.CheckpointRecord) -> CheckpointRecord:
    """A checkpoint as it came."""
    return CheckpointRecord(
        id=checkpoint.id,
        run_id=checkpoint.run_id,
        step=checkpoint.step,
        uri=checkpoint.uri,
        sha256=checkpoint.digest.sha256,
        size_bytes=checkpoint.digest.size_bytes,
        policy_version=checkpoint.policy_version,
        group_ids=tuple(checkpoint.group_ids),
    )


def checkpoint_message(record: CheckpointRecord) -> pb.CheckpointRecord:
    """A stored checkpoint."""
    return pb.CheckpointRecord(
        id=record.id,
        run_id=record.run_id,
        step=record.step,
        uri=record.uri,
        digest=common_pb.Digest(sha256=record.sha256, size_bytes=record.size_bytes),
        policy_version=record.policy_version,
        create_time=timestamp(record.create_time),
        group_ids=record.group_ids,
    )


def _struct(document: Document | None) -> Struct | None:
    return None if document is None else from_document(document, Struct())

"""Errors on the wire: `RegreenError` to `google.rpc.Status` and back.

- The status code and `ErrorInfo.reason` come from the class; the domain is always "regreen".
- A wrong field also travels as `BadRequest`, a retry hint as `RetryInfo` (AIP-193).
- A status that Regreen did not make still becomes the nearest class; nothing is lost on the way.
"""

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from regreen.rpc.errors import (
    DOMAIN,
    DeadlineExceeded,
    InfraError,
    InvalidArgument,
    RegreenError,
    Unavailable,
    error_classes,
)

_NO_REASON = "UNSPECIFIED"


def to_status(error: RegreenError) -> grpc.Status:
    """The gRPC status, with details, that carries `error`."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    details = [_pack(info)]
    if isinstance(error, InvalidArgument):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.message, reason=error.reason
        )
        details.append(_pack(error_details_pb2.BadRequest(field_violations=[violation])))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(error.retry_after_s * 1000))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    code = getattr(grpc.StatusCode, error.status)
    status = status_pb2.Status(code=code.value[0], message=error.message, details=details)
    return rpc_status.to_status(status)


def from_rpc_error(error: grpc.aio.AioRpcError) -> RegreenError:
    """The exception that a failed call stands for."""
    name = error.code().name
    message = error.details() or name
    info, field, retry_after_s = _details(error)
    classes = error_classes()
    cls = classes.get((name, info.reason)) or classes.get((name, name))
    if cls is InvalidArgument or (cls and issubclass(cls, InvalidArgument)):
        return _invalid_argument(message, field, dict(info.metadata))
    if cls is None:
        cls = {"CANCELLED": Unavailable, "DEADLINE_EXCEEDED": DeadlineExceeded}.get(
            name, InfraError if name in ("INTERNAL", "UNKNOWN") else RegreenError
        )
    return cls(message, metadata=dict(info.metadata), retry_after_s=retry_after_s)


def _invalid_argument(message: str, field: str, metadata: dict[str, str]) -> InvalidArgument:
    problem = message.removeprefix(f"{field}: ") if field else message
    problem, _, remedy = problem.partition("; ")
    return InvalidArgument(field or "request", problem, remedy, metadata=metadata)


def _details(
    error: grpc.aio.AioRpcError,
) -> tuple[error_details_pb2.ErrorInfo, str, float | None]:
    info = error_details_pb2.ErrorInfo(reason=_NO_REASON)
    field, retry_after_s = "", None
    try:
        # grpc-status types its argument as the synchronous Call; the aio error has what it reads.
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
    except ValueError:
        status = None
    for detail in status.details if status else ():
        bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
        else:
            detail.Unpack(info)
    return info, field, retry_after_s


def _pack(message: object) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)  # type: ignore[arg-type]
    return packed

"""Errors on the wire: `RegreenError` to `google.rpc.Status` and back.

- The status code and `ErrorInfo.reason` come from the class; the domain is always "regreen".
- A wrong field also travels as `BadRequest`, a retry hint as `RetryInfo` (AIP-193).
- A status that Regreen did not make still becomes the nearest class; nothing is lost on the way.
- A status always fits into gRPC's 8 KiB of trailers, or the client would see RESOURCE_EXHAUSTED
  instead: long messages and metadata are cut, and marked where they are.
"""

import re
import string
from collections.abc import Mapping
from urllib.parse import quote

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

NOBODY = "no service answers at"
"""How the message of a connection that nobody takes begins; an address follows."""
_NO_CONNECTION = re.compile(
    r"failed to connect to all addresses; last error: \w+: "
    r"(?:ipv4:|ipv6:)?(\S+): (?:.*: )?(.*)"
)
_NO_NAME = re.compile(r"errors resolving (\S+): ")
_NO_REASON = "UNSPECIFIED"
_MESSAGE_BYTES = 1500
_ENCODED_BYTES = 2400
"""Bound on the message as a header, where a byte that is not printable ASCII takes three."""
_FIELD_BYTES = 300
_METADATA_BYTES = 2000
"""Bound on all metadata together."""
_CUT = " [...] "
_PRINTABLE = string.punctuation.replace("%", "") + " "


def to_status(error: RegreenError) -> grpc.Status:
    """The gRPC status, with details, that carries `error`."""
    message = _message(error.message)
    info = error_details_pb2.ErrorInfo(
        reason=error.reason, domain=DOMAIN, metadata=_metadata(error.metadata)
    )
    details = [_pack(info)]
    if isinstance(error, InvalidArgument):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_cut(error.field, _FIELD_BYTES), reason=error.reason
        )
        details.append(_pack(error_details_pb2.BadRequest(field_violations=[violation])))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(error.retry_after_s * 1000))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    code = getattr(grpc.StatusCode, error.status)
    status = status_pb2.Status(code=code.value[0], message=message, details=details)
    return rpc_status.to_status(status)


def from_rpc_error(error: grpc.aio.AioRpcError) -> RegreenError:
    """The exception that a failed call stands for."""
    name = error.code().name
    message = _plain(error.details() or name)
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


def _plain(message: str) -> str:
    """What gRPC says of a connection that nobody takes, with the address first."""
    if found := _NO_CONNECTION.fullmatch(message):
        return f"{NOBODY} {found[1]} ({found[2]}{_of_tls(message)})"
    if found := _NO_NAME.match(message):
        return f"{NOBODY} {found[1]} (the name is not known)"
    return message


def _of_tls(message: str) -> str:
    """What a connection that TLS has ended, or may have, should be looked at for."""
    if "Hostname Verification" in message:
        return "; the certificate there is of another name: `regreen certs issue NAME --host ...`"
    if "CERTIFICATE_VERIFY_FAILED" in message:
        return "; the certificate there has ended, or REGREEN_TLS trusts another authority"
    if "WRONG_VERSION_NUMBER" in message:
        return "; the service there speaks plain text, and this client TLS"
    if "Socket closed" in message:
        return "; a service with TLS does so where REGREEN_TLS names no certificate it trusts"
    return ""


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


def _cut(text: str, most_bytes: int) -> str:
    """`text` if its UTF-8 has at most that many bytes, else its two ends and a mark between."""
    whole = text.encode(errors="replace")
    if len(whole) <= most_bytes:
        return whole.decode()
    tail_bytes = (most_bytes - len(_CUT)) // 3
    head = whole[: most_bytes - len(_CUT) - tail_bytes].decode(errors="ignore")
    tail = whole[len(whole) - tail_bytes :].decode(errors="ignore")
    return f"{head}{_CUT}{tail}"


def _message(text: str) -> str:
    most_bytes = _MESSAGE_BYTES
    while len(quote(kept := _cut(text, most_bytes), safe=_PRINTABLE)) > _ENCODED_BYTES:
        most_bytes = most_bytes * 3 // 4
    return kept


def _metadata(values: Mapping[str, str]) -> dict[str, str]:
    left, kept = _METADATA_BYTES, {}
    for name, value in sorted(values.items(), key=lambda item: len(item[1])):
        value = _cut(value, max(left - len(name.encode()), len(_CUT)))
        left -= len(name.encode()) + len(value.encode())
        if left < 0:
            break
        kept[name] = value
    return kept


def _pack(message: object) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)  # type: ignore[arg-type]
    return packed

"""The errors of Regreen, shared by services, clients and the command line.

    RegreenError
    ├── InvalidArgument      a field is wrong: names the field, the problem and the remedy
    ├── NotFound             no such id
    │   └── NoSuchFile       the sandbox is there, the path in it is not
    ├── AlreadyExists        the name is taken by something else
    ├── FailedPrecondition   the thing is in the wrong state for this call
    │   ├── LeaseExpired     the lease ran out and may belong to someone else
    │   └── MissingDependency  an interpreter, package or blob that the call needs is not here
    ├── PermissionDenied     not allowed
    ├── Unauthenticated      no or bad credentials
    ├── ResourceExhausted    over a quota or a pool is empty; retry after a while
    │   └── DiskFull         no space left where the service writes
    ├── Aborted              something moved under the call (a policy version, a concurrent write)
    ├── DeadlineExceeded     the call's time ran out
    ├── Unavailable          the service cannot answer now; retry
    ├── DataLoss             stored bytes do not match their digest
    └── InfraError           our own trouble: never scored, always retried
        └── SandboxLost      a sandbox was ended from outside: by no limit and no request

- Each class owns its gRPC status name and `ErrorInfo.reason`; nothing else decides them.
- This module imports no grpc: domain code raises these, the server toolkit translates them.
- A failing build is a result, never one of these.
"""

from collections.abc import Mapping
from typing import ClassVar

DOMAIN = "regreen"


class RegreenError(Exception):
    """Base of every error that crosses a Regreen interface.

    `status` is the name of a gRPC status code; `reason` a value of
    `regreen.common.v1.ErrorReason` without its prefix.
    """

    status: ClassVar[str] = "UNKNOWN"
    reason: ClassVar[str] = "UNSPECIFIED"

    def __init__(
        self,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class InvalidArgument(RegreenError):
    """A request field is wrong; the message names the field, the problem and the remedy."""

    status, reason = "INVALID_ARGUMENT", "INVALID_ARGUMENT"

    def __init__(
        self,
        field: str,
        problem: str,
        remedy: str = "",
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            f"{field}: {problem}" + (f"; {remedy}" if remedy else ""), metadata=metadata
        )
        self.field, self.problem, self.remedy = field, problem, remedy


class NotFound(RegreenError):
    """The named thing does not exist (any more)."""

    status, reason = "NOT_FOUND", "NOT_FOUND"


class NoSuchFile(NotFound):
    """A path inside a sandbox does not exist; unlike a sandbox that is gone, that is a finding."""

    reason = "NO_SUCH_FILE"


class AlreadyExists(RegreenError):
    """The name is taken by something with other content."""

    status, reason = "ALREADY_EXISTS", "ALREADY_EXISTS"


class FailedPrecondition(RegreenError):
    """The thing exists but is in the wrong state for this call."""

    status, reason = "FAILED_PRECONDITION", "FAILED_PRECONDITION"


class LeaseExpired(FailedPrecondition):
    """The lease ran out; the work may belong to someone else now."""

    reason = "LEASE_EXPIRED"


class MissingDependency(FailedPrecondition):
    """Something that the call needs is not on this host (an interpreter, a wheel, a blob)."""

    reason = "MISSING_DEPENDENCY"


class PermissionDenied(RegreenError):
    """The caller is known and may not do this."""

    status, reason = "PERMISSION_DENIED", "PERMISSION_DENIED"


class Unauthenticated(RegreenError):
    """The caller gave no valid credentials."""

    status, reason = "UNAUTHENTICATED", "UNAUTHENTICATED"


class ResourceExhausted(RegreenError):
    """A quota is used up or a pool is empty; retry after `retry_after_s`."""

    status, reason = "RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED"


class DiskFull(ResourceExhausted):
    """No space is left where the service writes."""

    reason = "DISK_FULL"


class Aborted(RegreenError):
    """Something moved under the call; read again and retry."""

    status, reason = "ABORTED", "ABORTED"


class DeadlineExceeded(RegreenError):
    """The call's time ran out before it ended."""

    status, reason = "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"


class Unavailable(RegreenError):
    """The service cannot answer now; retry with backoff."""

    status, reason = "UNAVAILABLE", "UNAVAILABLE"


class DataLoss(RegreenError):
    """Stored bytes do not match their digest."""

    status, reason = "DATA_LOSS", "DATA_LOSS"


class InfraError(RegreenError):
    """Our own trouble, not the task's or the policy's: never scored, retried."""

    status, reason = "INTERNAL", "INFRA"


class SandboxLost(InfraError):
    """A sandbox is gone or has lost its processes, and neither a limit nor a request ended it."""

    reason = "SANDBOX_LOST"


def error_classes() -> dict[tuple[str, str], type[RegreenError]]:
    """Classes by (status, reason), for the client side of the wire.

    A class that only inherits both stands for nothing there.
    """
    found: dict[tuple[str, str], type[RegreenError]] = {}
    pending: list[type[RegreenError]] = [RegreenError]
    while pending:
        cls = pending.pop()
        found.setdefault((cls.status, cls.reason), cls)
        pending.extend(cls.__subclasses__())
    return found

"""What was asked of the network: one record a request, for audits and for ListEgress.

- Each is of a sandbox, or of the preparation of a State, and kept under its id; the tenants that
  these are of may list them.
- A record is there as soon as a request was read, and is brought up to date until it ends.
- Bounded: of each sandbox the first and the last requests are kept, so that a flood cannot push
  out what came before it; of deleted sandboxes the latest, for a while.
- Every record also becomes one log line when it ends; secrets of the service are in neither.
"""

import hashlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from regreen.rpc import logging
from regreen.rpc.errors import NotFound
from regreen.rpc.tenants import charged, sees_any
from sandbox_svc import metrics

_FIRST, _LAST = 500, 500
_MAX_CLOSED, _MAX_CLOSED_RECORDS = 1000, 50_000
_KEPT_S = 3600.0
_MAX_PATH, _MAX_LOGGED_PATH = 2048, 200


class Decision(StrEnum):
    """What became of a request."""

    ALLOWED = "allowed"
    HOST = "refused_host"
    ADDRESS = "refused_address"
    MALFORMED = "malformed"
    FAILED = "failed"
    BOUND = "bound"


for _decision in Decision:  # there from the start: the first one is an increase too
    metrics.EGRESS_REQUESTS.labels(_decision.value)


@dataclass(slots=True)
class Tally:
    """Bytes of one direction and their digest so far."""

    size_bytes: int = 0
    _digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def add(self, data: bytes) -> None:
        """Count some more."""
        self.size_bytes += len(data)
        self._digest.update(data)

    @property
    def sha256(self) -> str:
        """Digest of what was counted."""
        return self._digest.hexdigest()


@dataclass(slots=True)
class Record:
    """One request; see `regreen.sandbox.v1.EgressRecord`."""

    subject_id: str
    """The sandbox, or the State in preparation."""
    number: int
    created_s: float
    method: str = ""
    host: str = ""
    port: int = 0
    path: str = ""
    decision: Decision = Decision.ALLOWED
    detail: str = ""
    status: int = 0
    sent: Tally = field(default_factory=Tally)
    received: Tally = field(default_factory=Tally)

    @property
    def subject(self) -> str:
        """The field that names whom it is of."""
        return "state_id" if self.subject_id.startswith("st_") else "sandbox_id"

    @property
    def allowed(self) -> bool:
        """Whether the allow list and the address let it through."""
        return self.decision in (Decision.ALLOWED, Decision.FAILED, Decision.BOUND)

    def facts(self) -> Mapping[str, Any]:
        """The record as plain data, for whoever shows or keeps it."""
        return {
            "number": self.number,
            "created_s": self.created_s,
            self.subject: self.subject_id,
            **{name: getattr(self, name) for name in ("method", "host", "port", "path")},
            **{name: getattr(self, name) for name in ("allowed", "detail", "status")},
            "sent_bytes": self.sent.size_bytes,
            "received_bytes": self.received.size_bytes,
            "sent_sha256": self.sent.sha256,
            "received_sha256": self.received.sha256,
        }


@dataclass(slots=True)
class _Kept:
    first: list[Record] = field(default_factory=list)
    last: deque[Record] = field(default_factory=lambda: deque(maxlen=_LAST))
    closed_s: float | None = None
    tenants: set[str] = field(default_factory=set)


class Ledger:
    """The records of all sandboxes and preparations of one service.

    One that is `quiet` neither logs nor counts: a probe of the service itself is no traffic.
    """

    def __init__(
        self,
        *,
        kept_s: float = _KEPT_S,
        clock: Callable[[], float] = time.time,
        quiet: bool = False,
    ) -> None:
        self._quiet = quiet
        self._kept_s, self._clock = kept_s, clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._numbers = 0
        self._log = logging.get()

    def begin(self, subject_id: str, *, tenant: str = "", keep: bool = True) -> Record:
        """A record of a tenant's request that begins; it is only logged where `keep` is false."""
        self._numbers += 1
        record = Record(subject_id, self._numbers, self._clock())
        if not keep:
            return record
        kept = self._kept.setdefault(subject_id, _Kept())
        kept.closed_s = None
        kept.tenants.add(tenant)
        (kept.first if len(kept.first) < _FIRST else kept.last).append(record)
        return record

    def share(self, subject_id: str) -> None:
        """Have the records that are kept of a subject be the caller's too."""
        if (kept := self._kept.get(subject_id)) is not None:
            kept.tenants.add(charged())

    def end(self, record: Record) -> None:
        """Count and log a request that has ended."""
        if self._quiet:
            return
        metrics.EGRESS_REQUESTS.labels(record.decision.value).inc()
        metrics.EGRESS_BYTES.labels("sent").inc(record.sent.size_bytes)
        metrics.EGRESS_BYTES.labels("received").inc(record.received.size_bytes)
        self._log.info(
            "egress",
            **{record.subject: record.subject_id},
            http_method=record.method,
            host=record.host,
            port=record.port,
            path=record.path[:_MAX_LOGGED_PATH],
            decision=record.decision.value,
            detail=record.detail,
            status=record.status,
            sent_bytes=record.sent.size_bytes,
            received_bytes=record.received.size_bytes,
            sent_sha256=record.sent.sha256,
            received_sha256=record.received.sha256,
        )

    def closed(self, subject_id: str) -> None:
        """Begin the time for which records are kept of what has ended."""
        kept = self._kept.get(subject_id)
        if kept is not None:
            kept.closed_s = self._clock()
            self._kept.move_to_end(subject_id)
        self._prune()

    def _prune(self) -> None:
        closed = [(id, kept) for id, kept in self._kept.items() if kept.closed_s is not None]
        left = sum(len(kept.first) + len(kept.last) for _, kept in closed)
        surplus = len(closed) - _MAX_CLOSED
        for index, (subject_id, kept) in enumerate(closed):
            over = index < surplus or left > _MAX_CLOSED_RECORDS
            if over or (kept.closed_s or 0.0) + self._kept_s < self._clock():
                left -= len(kept.first) + len(kept.last)
                del self._kept[subject_id]

    def list(self, subject_id: str) -> Sequence[Record]:
        """Records of a sandbox or of a preparation that the caller sees, oldest first.

        Raises:
            NotFound: it has asked for nothing that is still kept.
        """
        self._prune()
        kept = self._kept.get(subject_id)
        if kept is None or not sees_any(kept.tenants):
            raise NotFound(f"no request of {subject_id} is kept", metadata={"id": subject_id})
        return [*kept.first, *kept.last]


def cut(path: str) -> str:
    """A path as it is kept."""
    return path[:_MAX_PATH]

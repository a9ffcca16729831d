"""What sandboxes asked of the network: one record a request, for audits and for ListEgress.

- A record is there as soon as a request was read, and is brought up to date until it ends.
- Bounded: of each sandbox the first and the last requests are kept, so that a flood cannot push
  out what came before it; of deleted sandboxes the latest, for a while.
- Every record also becomes one log line when it ends; secrets of the service are in neither.
"""

import hashlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from regreen.rpc import logging
from regreen.rpc.errors import NotFound
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

    sandbox_id: str
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
    def allowed(self) -> bool:
        """Whether the allow list and the address let it through."""
        return self.decision in (Decision.ALLOWED, Decision.FAILED, Decision.BOUND)


@dataclass(slots=True)
class _Kept:
    first: list[Record] = field(default_factory=list)
    last: deque[Record] = field(default_factory=lambda: deque(maxlen=_LAST))
    closed_s: float | None = None


class Ledger:
    """The records of all sandboxes of one service."""

    def __init__(self, *, kept_s: float = _KEPT_S, clock: Callable[[], float] = time.time) -> None:
        self._kept_s, self._clock = kept_s, clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._numbers = 0
        self._log = logging.get()

    def begin(self, sandbox_id: str, *, keep: bool = True) -> Record:
        """A record of a request that begins; it is only logged where `keep` is false."""
        self._numbers += 1
        record = Record(sandbox_id, self._numbers, self._clock())
        if not keep:
            return record
        kept = self._kept.setdefault(sandbox_id, _Kept())
        (kept.first if len(kept.first) < _FIRST else kept.last).append(record)
        return record

    def end(self, record: Record) -> None:
        """Count and log a request that has ended."""
        metrics.EGRESS_REQUESTS.labels(record.decision.value).inc()
        metrics.EGRESS_BYTES.labels("sent").inc(record.sent.size_bytes)
        metrics.EGRESS_BYTES.labels("received").inc(record.received.size_bytes)
        self._log.info(
            "egress",
            sandbox_id=record.sandbox_id,
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

    def closed(self, sandbox_id: str) -> None:
        """Begin the time for which a deleted sandbox's records are kept."""
        kept = self._kept.get(sandbox_id)
        if kept is not None:
            kept.closed_s = self._clock()
            self._kept.move_to_end(sandbox_id)
        self._prune()

    def _prune(self) -> None:
        closed = [(id, kept) for id, kept in self._kept.items() if kept.closed_s is not None]
        left = sum(len(kept.first) + len(kept.last) for _, kept in closed)
        surplus = len(closed) - _MAX_CLOSED
        for index, (sandbox_id, kept) in enumerate(closed):
            over = index < surplus or left > _MAX_CLOSED_RECORDS
            if over or (kept.closed_s or 0.0) + self._kept_s < self._clock():
                left -= len(kept.first) + len(kept.last)
                del self._kept[sandbox_id]

    def list(self, sandbox_id: str) -> Sequence[Record]:
        """Records of a sandbox, oldest first.

        Raises:
            NotFound: it has asked for nothing that is still kept.
        """
        self._prune()
        kept = self._kept.get(sandbox_id)
        if kept is None:
            raise NotFound(
                f"no request of sandbox {sandbox_id} is kept", metadata={"id": sandbox_id}
            )
        return [*kept.first, *kept.last]


def cut(path: str) -> str:
    """A path as it is kept."""
    return path[:_MAX_PATH]

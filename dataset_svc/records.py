"""The values that cross this service's inside: what the servicers hand to the queries and back.

- Nothing here knows protobuf or SQL; documents are JSON-ready dictionaries.
- Records are immutable; a change makes a new one.
- A fingerprint covers all that makes two records the same thing, and no id or time of storage.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from dataset_svc.arrays import TokenStream, pack

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A task: the columns that queries look at, and the whole content as a document."""

    id: str
    kind: str
    package: str
    python: str
    category: str
    blame: str
    culprit: str
    modes: tuple[str, ...]
    split: str
    document: Document
    status: str = "new"
    state_id: str = ""
    error_log: str = ""
    verify_time: datetime | None = None
    validation_s: float | None = None
    create_time: datetime | None = None

    def fingerprint(self) -> str:
        """SHA-256 of the content; split and status are not part of it."""
        return hashlib.sha256(canonical(self.document)).hexdigest()


@dataclass(frozen=True, slots=True)
class TaskQuery:
    """Which tasks are wanted; empty fields match everything."""

    statuses: tuple[str, ...] = ()
    split: str = ""
    kind: str = ""
    mode: str = ""
    python: str = ""
    package: str = ""
    culprit: str = ""


@dataclass(frozen=True, slots=True)
class CheckRecord:
    """One check of the gate."""

    name: str
    repeat: int
    ok: bool
    detail: str = ""
    results_sha256: str = ""
    duration_s: float = 0.0
    conditions: str = ""


@dataclass(frozen=True, slots=True)
class GateRecord:
    """The gate's evidence for one task."""

    task_id: str
    status: str
    reason: str
    checks: tuple[CheckRecord, ...] = ()
    flaky: tuple[str, ...] = ()
    state_id: str = ""
    error_log: str = ""
    evidence: Document = field(default_factory=dict)
    """The report's further fields, by their names in the contract."""
    create_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """One model output or tool result."""

    index: int
    role: str
    text: str
    token_start: int = 0
    token_end: int = 0
    tool: str = ""
    arguments_json: str = ""
    ok: bool = False
    duration_s: float = 0.0
    state_id: str = ""
    score: float = 0.0


@dataclass(frozen=True, slots=True)
class PartRecord:
    """One reward component."""

    name: str
    value: float
    detail: str = ""


@dataclass(frozen=True, slots=True)
class RewardRecord:
    """The composed scalar with its components."""

    value: float
    solved: bool
    parts: tuple[PartRecord, ...] = ()
    hacks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TrajectoryRecord:
    """The whole record of one rollout. `stream` is None where it was left out on purpose."""

    id: str
    task_id: str
    pipeline: str
    mode: str
    grader: str
    end: str
    run_id: str = ""
    group_id: str = ""
    group_index: int = 0
    attempt: int = 0
    seed: int = 0
    actor: str = ""
    policy: str = ""
    state_id: str = ""
    token_exact: bool = False
    prompt_tokens: int = 0
    stream: TokenStream | None = None
    turns: tuple[TurnRecord, ...] = ()
    reward: RewardRecord | None = None
    verdict: Document | None = None
    validation: Document | None = None
    changes: tuple[Document, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    start_time: datetime | None = None
    end_time: datetime | None = None
    wire_bytes: int = 0
    """Size of the message that carries it, to bound responses."""

    def fingerprint(self, arrays: bytes | None = None) -> str:
        """SHA-256 of everything but id and attempt; `arrays` saves packing the stream again."""
        if arrays is None:
            arrays = pack(self.stream) if self.stream is not None else b""
        skipped = ("id", "attempt", "stream", "wire_bytes", "turns", "reward")
        content = {name: getattr(self, name) for name in self.__slots__ if name not in skipped}
        content["turns"] = [_turn_fields(turn) for turn in self.turns]
        if self.reward is not None:
            parts = [_fields(part) for part in self.reward.parts]
            content["reward"] = _fields(self.reward) | {"parts": parts}
        return hashlib.sha256(canonical(content) + hashlib.sha256(arrays).digest()).hexdigest()


@dataclass(frozen=True, slots=True)
class TrajectoryQuery:
    """Which trajectories are wanted; empty fields match everything."""

    run_id: str = ""
    task_id: str = ""
    actor: str = ""
    policy: str = ""
    solved_only: bool = False
    hack: str = ""
    pipeline: str = ""
    mode: str = ""
    group_id: str = ""
    tool: str = ""
    verdict: str = ""
    """`accepted` or `rejected` by the judge."""
    text: str = ""
    """In the text of a turn, whatever the case."""


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """n rollouts of one task."""

    id: str
    run_id: str
    task_id: str
    size: int
    pipeline: str
    mode: str
    grader: str
    seed: int = 0
    step: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """A rollout handed to a worker for a while."""

    id: str
    rollout_id: str
    group: GroupRecord
    group_index: int
    attempt: int
    seed: int
    expire_time: datetime
    tenant: str = ""
    """The run's."""


@dataclass(frozen=True, slots=True)
class TakenGroup:
    """A complete group as it is handed to a learner."""

    group: GroupRecord
    trajectory_ids: tuple[str, ...]
    lost: int
    lost_error: str = ""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A training or evaluation run."""

    id: str
    name: str
    kind: str
    state: str
    epoch: int
    config: Document | None = None
    summary: Document | None = None
    create_time: datetime | None = None
    update_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class MetricRecord:
    """One value of one metric."""

    step: int
    name: str
    value: float
    time: datetime | None = None


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """Weights and position of a run."""

    id: str
    run_id: str
    step: int
    uri: str
    sha256: str = ""
    size_bytes: int = 0
    policy_version: int = 0
    create_time: datetime | None = None
    group_ids: tuple[str, ...] = ()


def canonical(content: Mapping[str, Any]) -> bytes:
    """`content` as JSON with sorted keys and no spaces."""
    return json.dumps(
        content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=_plain
    ).encode()


def _fields(record: Any) -> Document:
    return {name: getattr(record, name) for name in record.__slots__}


def _turn_fields(turn: TurnRecord) -> Document:
    """A turn's fields; without a score, which earlier releases did not know, as they had them."""
    found = _fields(turn)
    if not turn.score:
        del found["score"]
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return dict(value) if isinstance(value, Mapping) else str(value)

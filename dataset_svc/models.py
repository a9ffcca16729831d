"""The tables. Migrations in `migrations/versions` make them; a test keeps the two equal.

- Every state column has a CHECK with its allowed values; every reference is a foreign key.
- What is filtered or sorted on is a column; what is only handed back is a JSON document (`json`,
  not `jsonb`: it keeps text byte for byte).
- Token arrays are not here: `arrays_sha256` names a blob.
- Those of the knowledge base are in `models_knowledge`.
- `seq` columns give the order of insertion, for keyset paging.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    MetaData,
    UniqueConstraint,
    func,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSON
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import LargeBinary

from dataset_svc.columns import AnyText, Unsigned64

Document = dict[str, Any]

TASK_STATUSES = ("new", "admitted", "rejected", "quarantined", "waiting", "unverified")
SPLITS = ("", "train", "validation", "test")
MODES = ("any_fix", "keep_new")
PIPELINES = ("simplified", "full")
GRADERS = ("build", "build_gates", "build_gates_judge")
RUN_KINDS = ("sft", "grpo", "eval")
RUN_STATES = ("active", "done", "failed")
GROUP_STATES = ("open", "complete", "taken", "acknowledged")
ROLLOUT_STATES = ("waiting", "leased", "committed", "lost", "pruned")
TURN_ROLES = ("prompt", "policy", "tool")
TENANTS = "tenant <> ''"
"""Rows that are somebody's; where nobody has a tenant, indexes of them cost nothing."""
_LISTED_BY = ("run_id", "task_id", "policy", "actor", "pipeline", "mode")
EPISODE_ENDS = ("submitted", "gave_up", "turn_limit", "token_limit", "time_limit", "stuck")
TEXT_INDEX = "ix_turns_text_trgm"
"""Index over the text of turns; it needs the extension `pg_trgm`."""


def one_of(column: str, values: tuple[str, ...]) -> CheckConstraint:
    """The column has one of these values."""
    allowed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({allowed})", name=f"{column}_known")


def of_run() -> ForeignKeyConstraint:
    """The row is of its run's tenant; so it stays."""
    return ForeignKeyConstraint(
        ["run_id", "tenant"], ["runs.id", "runs.tenant"], ondelete="CASCADE"
    )


class Base(DeclarativeBase):
    """Declarative base: naming convention and Python-to-SQL types."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy's own declaration)
        str: AnyText(),
        int: BigInteger(),
        bytes: LargeBinary(),
        datetime: DateTime(timezone=True),
        Document: JSON(none_as_null=True),
        list[str]: ARRAY(AnyText()),
    }


class Task(Base):
    """A broken repository; `document` holds what no query looks at."""

    __tablename__ = "tasks"
    __table_args__ = (
        one_of("status", TASK_STATUSES),
        one_of("split", SPLITS),
        Index(None, "status", "split", "id"),
        Index(None, "package"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    package: Mapped[str]
    python: Mapped[str]
    category: Mapped[str]
    blame: Mapped[str]
    culprit: Mapped[str]
    modes: Mapped[list[str]]
    split: Mapped[str]
    status: Mapped[str]
    state_id: Mapped[str]
    error_log: Mapped[str]
    verify_time: Mapped[datetime | None]
    validation_s: Mapped[float | None]
    document: Mapped[Document]
    content_sha256: Mapped[str]
    create_time: Mapped[datetime] = mapped_column(server_default=func.now())


class GateReport(Base):
    """One gating of one task; the newest counts, older ones are evidence."""

    __tablename__ = "gate_reports"
    __table_args__ = (one_of("status", TASK_STATUSES), Index(None, "task_id", "seq"))

    seq: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    task_id: Mapped[str] = mapped_column(ForeignKey("tasks.id", ondelete="CASCADE"))
    status: Mapped[str]
    reason: Mapped[str]
    state_id: Mapped[str]
    error_log: Mapped[str]
    flaky: Mapped[list[str]]
    evidence: Mapped[Document | None]
    """What no query looks at: what the verdict hangs on, quarantined tests, ids, fixes, drift."""
    create_time: Mapped[datetime] = mapped_column(server_default=func.now())


class GateCheck(Base):
    """One check of a gate report."""

    __tablename__ = "gate_checks"

    report_seq: Mapped[int] = mapped_column(
        ForeignKey("gate_reports.seq", ondelete="CASCADE"), primary_key=True
    )
    position: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    repeat: Mapped[int]
    ok: Mapped[bool]
    detail: Mapped[str]
    results_sha256: Mapped[str]
    duration_s: Mapped[float]
    conditions: Mapped[str] = mapped_column(server_default="")


class Run(Base):
    """A training or evaluation run; `epoch` is one plus its rewinds."""

    __tablename__ = "runs"
    __table_args__ = (
        one_of("kind", RUN_KINDS),
        one_of("state", RUN_STATES),
        UniqueConstraint("tenant", "name"),
        UniqueConstraint("id", "tenant"),
        Index(None, "seq"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(Identity(always=True))
    tenant: Mapped[str] = mapped_column(server_default="")
    """Whose it is, and with it all that belongs to it; empty: nobody's."""
    name: Mapped[str]
    kind: Mapped[str]
    state: Mapped[str]
    epoch: Mapped[int] = mapped_column(server_default="1")
    config: Mapped[Document | None]
    summary: Mapped[Document | None]
    create_time: Mapped[datetime] = mapped_column(server_default=func.now())
    update_time: Mapped[datetime] = mapped_column(server_default=func.now())


class RunMetric(Base):
    """One value of one metric at one step."""

    __tablename__ = "run_metrics"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[float]
    time: Mapped[datetime]


class Checkpoint(Base):
    """Weights of a run after a step; `abandoned` once the run was rewound to before it."""

    __tablename__ = "checkpoints"
    __table_args__ = (Index(None, "run_id", "seq"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(Identity(always=True))
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    step: Mapped[int]
    uri: Mapped[str]
    sha256: Mapped[str]
    size_bytes: Mapped[int]
    policy_version: Mapped[int]
    abandoned: Mapped[bool] = mapped_column(server_default="false")
    create_time: Mapped[datetime] = mapped_column(server_default=func.now())


class Group(Base):
    """n rollouts of one task. `pending` counts those that are neither committed nor lost."""

    __tablename__ = "groups"
    __table_args__ = (
        one_of("state", GROUP_STATES),
        one_of("pipeline", PIPELINES),
        one_of("mode", MODES),
        one_of("grader", GRADERS),
        CheckConstraint("size > 0", name="size_positive"),
        CheckConstraint("pending >= 0 AND lost >= 0", name="counts_not_negative"),
        CheckConstraint("(state = 'open') = (pending > 0)", name="open_while_pending"),
        CheckConstraint(
            "(state = 'acknowledged') = (checkpoint_id IS NOT NULL)", name="checkpoint_if_acked"
        ),
        Index(None, "run_id", "state", "step", "seq"),
        Index(None, "checkpoint_id"),
        Index(None, "run_id", "task_id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(Identity(always=True))
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    task_id: Mapped[str] = mapped_column(ForeignKey("tasks.id"))
    size: Mapped[int]
    pipeline: Mapped[str]
    mode: Mapped[str]
    grader: Mapped[str]
    seed: Mapped[int] = mapped_column(Unsigned64())
    step: Mapped[int]
    labels: Mapped[Document]
    state: Mapped[str]
    pending: Mapped[int]
    lost: Mapped[int] = mapped_column(server_default="0")
    taken_by: Mapped[str] = mapped_column(server_default="")
    checkpoint_id: Mapped[str | None] = mapped_column(ForeignKey("checkpoints.id"))
    create_time: Mapped[datetime] = mapped_column(server_default=func.now())
    complete_time: Mapped[datetime | None]


class Rollout(Base):
    """One slot of a group; ends with exactly one trajectory, or lost to infrastructure."""

    __tablename__ = "rollouts"
    __table_args__ = (
        one_of("state", ROLLOUT_STATES),
        CheckConstraint(
            "(state = 'committed') = (trajectory_id IS NOT NULL)", name="trajectory_if_committed"
        ),
        CheckConstraint("(state = 'leased') <= (lease_id IS NOT NULL)", name="lease_if_leased"),
        UniqueConstraint("group_id", "group_index"),
        UniqueConstraint("trajectory_id"),
        Index(
            "ix_rollouts_work",
            "step",
            "group_seq",
            "group_index",
            postgresql_where="state IN ('waiting', 'leased')",
        ),
        Index(
            "ix_rollouts_work_of_run",
            "run_id",
            "step",
            "group_seq",
            "group_index",
            postgresql_where="state IN ('waiting', 'leased')",
        ),
        Index(
            "ix_rollouts_work_of_tenant",
            *("tenant", "step", "group_seq", "group_index"),
            postgresql_where=f"state IN ('waiting', 'leased') AND {TENANTS}",
        ),
        of_run(),
        Index("ix_rollouts_expiry", "expire_time", postgresql_where="state = 'leased'"),
        Index(None, "run_id", "state", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    group_id: Mapped[str] = mapped_column(ForeignKey("groups.id", ondelete="CASCADE"))
    run_id: Mapped[str]
    tenant: Mapped[str] = mapped_column(server_default="")
    """Its run's."""
    group_index: Mapped[int]
    group_seq: Mapped[int]
    step: Mapped[int]
    seed: Mapped[int] = mapped_column(Unsigned64())
    state: Mapped[str]
    attempt: Mapped[int] = mapped_column(server_default="0")
    outages: Mapped[int] = mapped_column(server_default="0")
    """How many of the attempts ended for a reason that says nothing about the rollout."""
    lease_id: Mapped[str | None]
    expire_time: Mapped[datetime | None]
    not_before: Mapped[datetime | None]
    trajectory_id: Mapped[str | None] = mapped_column(ForeignKey("trajectories.id"))
    error: Mapped[str] = mapped_column(server_default="")
    final_time: Mapped[datetime | None]
    """When it was committed or lost."""


class ParkedTask(Base):
    """A task that is set aside in a run because its rollouts are lost while others succeed."""

    __tablename__ = "parked_tasks"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    task_id: Mapped[str] = mapped_column(
        ForeignKey("tasks.id", ondelete="CASCADE"), primary_key=True
    )
    reason: Mapped[str]
    lost: Mapped[int]
    park_time: Mapped[datetime] = mapped_column(server_default=func.now())


class Lease(Base):
    """Every lease ever given; the rollout says which one holds."""

    __tablename__ = "leases"
    __table_args__ = (Index(None, "rollout_id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    rollout_id: Mapped[str] = mapped_column(ForeignKey("rollouts.id", ondelete="CASCADE"))
    worker: Mapped[str]
    attempt: Mapped[int]
    error: Mapped[str] = mapped_column(server_default="")
    create_time: Mapped[datetime] = mapped_column(server_default=func.now())


class Trajectory(Base):
    """The record of one rollout, without its tokens (a blob), turns and reward parts (rows)."""

    __tablename__ = "trajectories"
    __table_args__ = (
        one_of("pipeline", PIPELINES),
        one_of("mode", MODES),
        one_of("grader", GRADERS),
        one_of("episode_end", EPISODE_ENDS),
        Index(None, "seq"),
        *(Index(None, name, "seq") for name in _LISTED_BY),
        Index(None, "group_id"),
        Index("ix_trajectories_solved", "seq", postgresql_where="solved"),
        Index("ix_trajectories_hacks", "hacks", postgresql_using="gin"),
        Index("ix_trajectories_tools", "tools", postgresql_using="gin"),
        Index(
            "ix_trajectories_accepted", "accepted", "seq", postgresql_where="accepted IS NOT NULL"
        ),
        Index(None, "run_id", "policy", "actor", "solved"),
        Index("ix_trajectories_tenant", "tenant", "seq", postgresql_where=TENANTS),
        of_run(),
        Index("ix_trajectories_flagged", "run_id", "hacks", postgresql_where="hacks <> '{}'"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(Identity(always=True))
    task_id: Mapped[str] = mapped_column(ForeignKey("tasks.id"))
    run_id: Mapped[str | None]
    tenant: Mapped[str] = mapped_column(server_default="")
    """Its run's, or of whom stored it outside any; empty: nobody's."""
    group_id: Mapped[str]
    group_index: Mapped[int]
    attempt: Mapped[int]
    lease_id: Mapped[str]
    seed: Mapped[int] = mapped_column(Unsigned64())
    pipeline: Mapped[str]
    mode: Mapped[str]
    grader: Mapped[str]
    episode_end: Mapped[str]
    actor: Mapped[str]
    policy: Mapped[str]
    state_id: Mapped[str]
    token_exact: Mapped[bool]
    token_count: Mapped[int]
    prompt_tokens: Mapped[int]
    min_version: Mapped[int | None]
    max_version: Mapped[int | None]
    reward: Mapped[float | None]
    solved: Mapped[bool]
    hacks: Mapped[list[str]]
    tools: Mapped[list[str]] = mapped_column(server_default="{}")
    """Tools that were called, each once."""
    accepted: Mapped[bool | None]
    """The judge's decision; empty where it was not asked."""
    labels: Mapped[Document]
    stage_seconds: Mapped[Document]
    start_time: Mapped[datetime | None]
    end_time: Mapped[datetime | None]
    arrays_sha256: Mapped[str]
    arrays_bytes: Mapped[int]
    wire_bytes: Mapped[int]
    changes: Mapped[Document] = mapped_column(deferred=True)
    validation: Mapped[Document | None] = mapped_column(deferred=True)
    validation_brief: Mapped[Document | None]
    content_sha256: Mapped[str]
    create_time: Mapped[datetime] = mapped_column(server_default=func.now())


class Turn(Base):
    """One model output or tool result."""

    __tablename__ = "turns"
    __table_args__ = (
        one_of("role", TURN_ROLES),
        Index(
            TEXT_INDEX,
            "text",
            postgresql_using="gin",
            postgresql_ops={"text": "gin_trgm_ops"},
        ),
    )

    trajectory_id: Mapped[str] = mapped_column(
        ForeignKey("trajectories.id", ondelete="CASCADE"), primary_key=True
    )
    index: Mapped[int] = mapped_column(primary_key=True)
    role: Mapped[str]
    text: Mapped[str]
    token_start: Mapped[int]
    token_end: Mapped[int]
    tool: Mapped[str]
    arguments_json: Mapped[str]
    ok: Mapped[bool]
    duration_s: Mapped[float]
    state_id: Mapped[str]
    score: Mapped[float] = mapped_column(server_default="0")


class Blob(Base):
    """A blob of tokens and how many trajectories name it; triggers count."""

    __tablename__ = "blobs"
    __table_args__ = (
        CheckConstraint("refs >= 0", name="refs_not_negative"),
        Index("ix_blobs_unreferenced", "touch_time", postgresql_where="refs = 0"),
    )

    sha256: Mapped[str] = mapped_column(primary_key=True)
    size_bytes: Mapped[int]
    refs: Mapped[int] = mapped_column(server_default="0")
    touch_time: Mapped[datetime] = mapped_column(server_default=func.now())
    """When it was last announced, named or left by a trajectory."""


class RewardPart(Base):
    """One component of a trajectory's reward."""

    __tablename__ = "reward_parts"

    trajectory_id: Mapped[str] = mapped_column(
        ForeignKey("trajectories.id", ondelete="CASCADE"), primary_key=True
    )
    position: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    value: Mapped[float]
    detail: Mapped[str]


class Verdict(Base):
    """What the judge said of a trajectory."""

    __tablename__ = "verdicts"

    trajectory_id: Mapped[str] = mapped_column(
        ForeignKey("trajectories.id", ondelete="CASCADE"), primary_key=True
    )
    accepted: Mapped[bool]
    model: Mapped[str]
    prompt_version: Mapped[str]
    rules_version: Mapped[str]
    evidence_sha256: Mapped[str]
    document: Mapped[Document]


class TenantUse(Base):
    """What is kept of a tenant's; triggers on `trajectories` count."""

    __tablename__ = "tenant_use"
    __table_args__ = (CheckConstraint("trajectory_bytes >= 0", name="bytes_not_negative"),)

    tenant: Mapped[str] = mapped_column(primary_key=True)
    trajectory_bytes: Mapped[int] = mapped_column(server_default="0")


class Request(Base):
    """The answer of a mutation, by method and request id; kept for at least 24 hours."""

    __tablename__ = "requests"
    __table_args__ = (Index(None, "create_time"),)

    method: Mapped[str] = mapped_column(primary_key=True)
    request_id: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[bytes]
    answer: Mapped[bytes | None]
    create_time: Mapped[datetime] = mapped_column(server_default=func.now())

"""Trajectories: one row, its turns, reward parts and verdict; tokens by digest.

- A stored trajectory never changes; the same id and content again is answered, not stored.
- The blob with the tokens is in the store before the row that names it is visible.
- Lists read no tokens, turns, tests, logs or file contents.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sqlalchemy import ColumnElement, Select, bindparam, select, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import undefer

from dataset_svc import bulk
from dataset_svc.arrays import unpack
from dataset_svc.columns import AnyText
from dataset_svc.models import (
    TEXT_INDEX,
    Document,
    RewardPart,
    Run,
    TenantUse,
    Trajectory,
    Turn,
    Verdict,
)
from dataset_svc.queries.paging import Cursor, Page
from dataset_svc.queries.tasks import known_tasks
from dataset_svc.records import (
    PartRecord,
    RewardRecord,
    TrajectoryQuery,
    TrajectoryRecord,
    TurnRecord,
)
from dataset_svc.walls import of_every_tenant, tenant_of
from regreen.blobs import BlobStore, Digest
from regreen.rpc.errors import AlreadyExists, DataLoss, NotFound
from regreen.rpc.quotas import Quotas

_ANOTHERS = "another tenant's"
"""In place of a fingerprint: nothing equals it, so an id that is taken is refused as such."""

_PREPARE = text(
    "WITH held AS (INSERT INTO tenant_use AS u (tenant) "
    "SELECT t FROM unnest(CAST(:tenants AS text[])) AS t ORDER BY t "
    "ON CONFLICT (tenant) DO UPDATE SET trajectory_bytes = u.trajectory_bytes "
    "RETURNING tenant, trajectory_bytes) "
    "SELECT set_config('gin_pending_list_limit', '131072', true), "
    "(SELECT json_object_agg(tenant, trajectory_bytes) FROM held)"
).bindparams(bindparam("tenants", type_=ARRAY(AnyText())))
"""No commit merges what the index over text has pending: `merge_text_index` does, in bulk. What is
kept of a tenant's is held, so that commits of one tenant cannot go over its bound together; of
several in the order of their names, as the table's triggers do."""
_MERGE = text(
    "SELECT sum(gin_clean_pending_list(c.oid)) FROM pg_class c WHERE c.relname = :name "
    "AND c.relnamespace = current_schema()::regnamespace AND pg_has_role(c.relowner, 'USAGE')"
)
_LITERALLY = str.maketrans({"%": r"\%", "_": r"\_", "\\": r"\\"})
BRIEF_FIELDS = ("state_id", "changes_sha256", "outcome", "summary", "counts", "duration", "cached")
"""What lists keep of a validation."""
_SAME = (
    "id",
    "task_id",
    "group_id",
    "group_index",
    "attempt",
    "seed",
    "pipeline",
    "mode",
    "grader",
    "actor",
    "policy",
    "state_id",
    "token_exact",
    "prompt_tokens",
    "start_time",
    "end_time",
    "wire_bytes",
)
"""Fields that the record and the row hold under one name and type."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A checked trajectory whose tokens are in the blob store."""

    record: TrajectoryRecord
    blob: Digest
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored trajectory and where its tokens are; `record.stream` is not filled yet."""

    seq: int
    record: TrajectoryRecord
    blob: Digest


@dataclass(frozen=True, slots=True)
class New:
    """A trajectory that is to be stored: under which lease, if any, and whose it is."""

    packed: Packed
    lease_id: str
    tenant: str


async def fingerprints(session: AsyncSession, trajectory_ids: Iterable[str]) -> dict[str, str]:
    """Those of what is stored under these ids; another tenant's has one that nothing else has."""
    wanted = set(filter(None, trajectory_ids))
    if not wanted:
        return {}
    mine = tenant_of(session)
    rows = await session.execute(
        of_every_tenant(
            select(Trajectory.id, Trajectory.tenant, Trajectory.content_sha256).where(
                Trajectory.id.in_(wanted)
            )
        )
    )
    return {row.id: row.content_sha256 if mine in ("", row.tenant) else _ANOTHERS for row in rows}


async def to_store(session: AsyncSession, packed: Sequence[Packed]) -> list[New]:
    """Those of the trajectories that are not stored yet.

    Raises:
        AlreadyExists: an id is stored with other content, or comes twice.
        NotFound: an unknown task or run.
    """
    ids = [item.record.id for item in packed]
    if len(set(ids)) < len(ids):
        twice = next(one for one, count in Counter(ids).items() if count > 1)
        raise AlreadyExists(f"trajectory {twice} comes twice; give each an id of its own")
    stored = await fingerprints(session, ids)
    for item in packed:
        if stored.get(item.record.id, item.fingerprint) != item.fingerprint:
            raise AlreadyExists(
                f"trajectory {item.record.id} is stored with other content; use a new id"
            )
    await known_tasks(session, {item.record.task_id for item in packed})
    run_ids = {item.record.run_id for item in packed if item.record.run_id}
    runs = await session.execute(select(Run.id, Run.tenant).where(Run.id.in_(run_ids)))
    tenants = {"": tenant_of(session)} | {row.id: row.tenant for row in runs}
    if missing := run_ids - tenants.keys():
        raise NotFound(f"no run {min(missing)[:200]!r}")
    return [
        New(item, "", tenants[item.record.run_id])
        for item in packed
        if item.record.id not in stored
    ]


async def insert_checked(session: AsyncSession, packed: Sequence[Packed], quotas: Quotas) -> None:
    """Store those of the trajectories that are not stored yet.

    Raises:
        AlreadyExists: an id is stored with other content, or comes twice.
        NotFound: an unknown task or run.
        ResourceExhausted: more would be kept of the tenant's than it may have.
    """
    new = await to_store(session, packed)
    room = await prepare(session, quotas, (item.tenant for item in new))
    for item in new:
        room.take(item)
    await insert_trajectories(session, new)


@dataclass(slots=True)
class Room:
    """What is kept of each tenant's trajectories, and their bounds; whoever stores them."""

    quotas: Quotas
    kept_bytes: dict[str, int]

    def take(self, new: New) -> None:
        """Count what is about to be stored. Raises: ResourceExhausted, and counts nothing."""
        would_be = self.kept_bytes.get(new.tenant, 0) + new.packed.record.wire_bytes
        self.quotas.check("trajectory_bytes", would_be, tenant=new.tenant)
        self.kept_bytes[new.tenant] = would_be


async def prepare(session: AsyncSession, quotas: Quotas, tenants: Iterable[str]) -> Room:
    """What must come before `insert_trajectories`: settings of the transaction, and the room.

    What is kept of these tenants is held until the transaction ends.
    """
    held = {"tenants": sorted(set(tenants) - {""})}
    row = (await session.execute(_PREPARE, held)).one()
    return Room(quotas, dict(row[1] or {}))


async def kept_bytes(session: AsyncSession, tenants: Iterable[str] | None = None) -> dict[str, int]:
    """What is kept of these tenants' trajectories, or of all that have some, as it is now."""
    theirs = select(TenantUse.tenant, TenantUse.trajectory_bytes)
    if tenants is not None:
        theirs = theirs.where(TenantUse.tenant.in_(set(tenants)))
    return {row.tenant: row.trajectory_bytes for row in await session.execute(theirs)}


async def insert_trajectories(session: AsyncSession, new: Sequence[New]) -> None:
    """Store trajectories that are not stored; `prepare` comes before."""
    records = [item.packed.record for item in new]
    await bulk.copy_rows(session, Trajectory, [_row(item) for item in new])
    turns = [
        _plain(turn) | {"trajectory_id": record.id} for record in records for turn in record.turns
    ]
    await bulk.copy_rows(session, Turn, turns)
    parts = [
        _plain(part) | {"trajectory_id": record.id, "position": position}
        for record in records
        if record.reward is not None
        for position, part in enumerate(record.reward.parts)
    ]
    await bulk.copy_rows(session, RewardPart, parts)
    verdicts = [_verdict_row(r.id, r.verdict) for r in records if r.verdict is not None]
    await bulk.copy_rows(session, Verdict, verdicts)


async def merge_text_index(session: AsyncSession) -> int:
    """Merge what the index over the text of turns has pending, if it is ours; how many pages.

    Each merge touches most of the index, so one of many turns costs little more than one of a few;
    until then a search reads what is pending.
    """
    return int((await session.execute(_MERGE, {"name": TEXT_INDEX})).scalar_one() or 0)


async def load(session: AsyncSession, trajectory_ids: Sequence[str]) -> list[Stored]:
    """Whole trajectories, without tokens, in the order of the ids.

    Raises:
        NotFound: names the first that is not stored.
    """
    statement = select(Trajectory).where(Trajectory.id.in_(trajectory_ids))
    rows = await session.scalars(
        statement.options(undefer(Trajectory.changes), undefer(Trajectory.validation))
    )
    by_id = {row.id: row for row in rows}
    for trajectory_id in trajectory_ids:
        if trajectory_id not in by_id:
            raise NotFound(f"no trajectory {trajectory_id[:200]!r}")
    turns: dict[str, list[TurnRecord]] = {}
    turn_rows = await session.execute(
        select(*(getattr(Turn, name) for name in (*TurnRecord.__slots__, "trajectory_id")))
        .where(Turn.trajectory_id.in_(trajectory_ids))
        .order_by(Turn.trajectory_id, Turn.index)
    )
    for *values, trajectory_id in turn_rows:
        turns.setdefault(trajectory_id, []).append(TurnRecord(*values))
    extras = await _extras(session, trajectory_ids)
    return [
        _stored(by_id[trajectory_id], extras, tuple(turns.get(trajectory_id, ())), whole=True)
        for trajectory_id in trajectory_ids
    ]


async def list_page(
    session: AsyncSession, query: TrajectoryQuery, cursor: Cursor
) -> Page[TrajectoryRecord]:
    """Trajectories, newest first, in brief."""
    before = None if cursor.after is None else int(cursor.after[0])
    rows = list(await session.scalars(page_statement(query, cursor.size + 1, before)))
    extras = await _extras(session, [row.id for row in rows])
    records = [_stored(row, extras, (), whole=False).record for row in rows]
    return cursor.page(records, [[row.seq] for row in rows])


def page_statement(
    query: TrajectoryQuery, limit: int, before: int | None = None
) -> Select[Trajectory]:
    """The newest trajectories that a query wants, of those before a `seq`."""
    statement = select(Trajectory).where(*_conditions(query))
    if before is not None:
        statement = statement.where(Trajectory.seq < before)
    return statement.order_by(Trajectory.seq.desc()).limit(limit)


async def next_ids(
    session: AsyncSession, query: TrajectoryQuery, after_seq: int, limit: int
) -> list[tuple[int, str, int]]:
    """(seq, id, bytes on the wire) of the next trajectories in order of insertion."""
    rows = await session.execute(
        select(Trajectory.seq, Trajectory.id, Trajectory.wire_bytes)
        .where(*_conditions(query), Trajectory.seq > after_seq)
        .order_by(Trajectory.seq)
        .limit(limit)
    )
    return [(row.seq, row.id, row.wire_bytes) for row in rows]


async def read_tokens(blobs: BlobStore, stored: Stored) -> TrajectoryRecord:
    """The record with its tokens.

    Raises:
        DataLoss: the blob is gone or damaged.
    """
    try:
        blob = await blobs.get(stored.blob)
    except NotFound as error:
        raise DataLoss(f"the tokens of trajectory {stored.record.id} are gone: {error}") from error
    return replace(stored.record, stream=unpack(blob))


@dataclass(frozen=True, slots=True)
class _Extras:
    parts: dict[str, list[PartRecord]]
    verdicts: dict[str, Document]


async def _extras(session: AsyncSession, ids: Sequence[str]) -> _Extras:
    parts: dict[str, list[PartRecord]] = {}
    part_rows = await session.execute(
        select(RewardPart.trajectory_id, RewardPart.name, RewardPart.value, RewardPart.detail)
        .where(RewardPart.trajectory_id.in_(ids))
        .order_by(RewardPart.trajectory_id, RewardPart.position)
    )
    for row in part_rows:
        parts.setdefault(row[0], []).append(PartRecord(row[1], row[2], row[3]))
    verdict_rows = await session.execute(
        select(Verdict.trajectory_id, Verdict.document).where(Verdict.trajectory_id.in_(ids))
    )
    return _Extras(parts, {row[0]: row[1] for row in verdict_rows})


def _conditions(query: TrajectoryQuery) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    for name in ("run_id", "task_id", "actor", "policy", "pipeline", "mode", "group_id"):
        if value := getattr(query, name):
            conditions.append(getattr(Trajectory, name) == value)
    if query.solved_only:
        conditions.append(Trajectory.solved.is_(True))
    if query.hack:
        conditions.append(Trajectory.hacks.contains([query.hack]))
    if query.tool:
        conditions.append(Trajectory.tools.contains([query.tool]))
    if query.verdict:
        # The index is of what was judged; that `IS false` implies it is news to Postgres.
        conditions += [
            Trajectory.accepted.is_not(None),
            Trajectory.accepted.is_(query.verdict == "accepted"),
        ]
    if query.text:
        pattern = f"%{query.text.translate(_LITERALLY)}%"
        said = select(Turn.trajectory_id).where(Turn.text.ilike(pattern, escape="\\"))
        conditions.append(Trajectory.id.in_(said))
    return conditions


def _row(new: New) -> dict[str, object]:
    packed = new.packed
    record, stream = packed.record, packed.record.stream
    versions = [span[0] for span in stream.versions] if stream is not None else []
    reward = record.reward
    brief = record.validation and {k: v for k, v in record.validation.items() if k in BRIEF_FIELDS}
    row: dict[str, object] = {name: getattr(record, name) for name in _SAME}
    return row | {
        "run_id": record.run_id or None,
        "tenant": new.tenant,
        "lease_id": new.lease_id,
        "episode_end": record.end,
        "token_count": len(stream) if stream is not None else 0,
        "min_version": min(versions, default=None),
        "max_version": max(versions, default=None),
        "reward": reward.value if reward else None,
        "solved": bool(reward and reward.solved),
        "hacks": list(reward.hacks) if reward else [],
        "tools": sorted({turn.tool for turn in record.turns if turn.tool}),
        "accepted": None if record.verdict is None else bool(record.verdict.get("accepted")),
        "labels": dict(record.labels),
        "stage_seconds": dict(record.stage_seconds),
        "arrays_sha256": packed.blob.sha256,
        "arrays_bytes": packed.blob.size_bytes,
        "changes": {"changes": list(record.changes)},
        "validation": record.validation,
        "validation_brief": brief,
        "content_sha256": packed.fingerprint,
    }


def _verdict_row(trajectory_id: str, verdict: Document) -> dict[str, object]:
    named = ("model", "prompt_version", "rules_version", "evidence_sha256")
    row: dict[str, object] = {name: str(verdict.get(name, "")) for name in named}
    return row | {
        "trajectory_id": trajectory_id,
        "accepted": bool(verdict.get("accepted", False)),
        "document": verdict,
    }


def _stored(
    row: Trajectory, extras: _Extras, turns: tuple[TurnRecord, ...], *, whole: bool
) -> Stored:
    same = {name: getattr(row, name) for name in _SAME}
    reward = None
    if row.reward is not None:
        parts = tuple(extras.parts.get(row.id, ()))
        reward = RewardRecord(row.reward, row.solved, parts, tuple(row.hacks))
    record = TrajectoryRecord(
        **same,
        run_id=row.run_id or "",
        end=row.episode_end,
        turns=turns,
        reward=reward,
        verdict=extras.verdicts.get(row.id),
        validation=row.validation if whole else row.validation_brief,
        changes=tuple(row.changes["changes"]) if whole else (),
        labels=row.labels,
        stage_seconds=row.stage_seconds,
    )
    return Stored(row.seq, record, Digest(row.arrays_sha256, row.arrays_bytes))


def _plain(record: TurnRecord | PartRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in record.__slots__}

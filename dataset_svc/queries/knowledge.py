"""Past fixes: recorded from training tasks, searched without leaking what an evaluation asks about.

- An item is visible only while its task is an admitted training task; a fact about a package has no
  task. What of that an asker may see is the rule of `regreen.families`, for the asking task as it
  is stored; a question can only rank.
- The rank is BM25 over what is visible to the asker, plus likeness of the error's signature
  (trigrams where the database has `pg_trgm`, else equality) and packages in common, times how often
  the item helped. What is not visible does not even count for the rarity of words.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, select, text
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc import bulk
from dataset_svc.columns import AnyText
from dataset_svc.models import Task, Trajectory
from dataset_svc.models_knowledge import Knowledge, KnowledgeUse, KnowledgeWord
from dataset_svc.records import canonical
from dataset_svc.walls import tenant_of
from regreen.families import Asker, families, family, item_words, words
from regreen.families import asker as asker_of
from regreen.rpc.errors import FailedPrecondition, NotFound

MAX_QUERY_WORDS = 64


@dataclass(frozen=True, slots=True)
class ItemRecord:
    """An item as it is recorded or found."""

    kind: str
    task_id: str
    trajectory_id: str
    mode: str
    error: str
    signature: str
    moves: tuple[tuple[str, str, str], ...]
    """(name, before, after)."""
    edited: tuple[str, ...]
    culprit: str
    id: str = ""
    score: float = 0.0
    uses: int = 0
    wins: int = 0


async def record(session: AsyncSession, items: Sequence[ItemRecord]) -> tuple[int, int]:
    """Record items; how many are new and how many were there.

    Raises:
        NotFound: an unknown task or trajectory.
        FailedPrecondition: a source that may not be learned from.
    """
    packages = await _sources(session, items)
    tenant = tenant_of(session)
    rows = {}
    for item in items:
        package, culprit = packages.get(item.task_id, ("", item.culprit))
        item_id = _id(item, tenant)
        rows[item_id] = _row(item, item_id, tenant, package, culprit or item.culprit)
    there = set(await session.scalars(select(Knowledge.id).where(Knowledge.id.in_(rows))))
    new = {item_id: row for item_id, row in rows.items() if item_id not in there}
    await bulk.copy_rows(session, Knowledge, [row for row, _ in new.values()])
    counted = [
        {"word": word, "item_id": item_id, "count": count}
        for item_id, (_, found) in new.items()
        for word, count in sorted(found.items())
    ]
    await bulk.copy_rows(session, KnowledgeWord, counted)
    return len(new), len(items) - len(new)


async def asker(session: AsyncSession, task_id: str, package: str) -> Asker:
    """Who a stored task, or a package without one, is to the knowledge base.

    Raises:
        NotFound: no such task.
    """
    if not task_id:
        return asker_of(package)
    task = await session.get(Task, task_id)
    if task is None:
        raise NotFound(f"no task {task_id[:200]!r}")
    return asker_of(task.package, task.culprit, task.split)


async def search(
    session: AsyncSession,
    who: Asker,
    question: str,
    *,
    signature: str = "",
    named: Sequence[str] = (),
    mode: str = "",
    limit: int = 5,
) -> list[ItemRecord]:
    """The items that fit best, best first."""
    query = sorted(set(words(question)[: 4 * MAX_QUERY_WORDS]))[:MAX_QUERY_WORDS]
    trigrams = (await session.execute(text(_HAS_TRGM))).first() is not None
    statement = text(_SEARCH.replace(":likeness", _LIKENESS[trigrams])).bindparams(
        bindparam("words", query, ARRAY(AnyText())),
        bindparam("hidden", list(who.hidden_families), ARRAY(AnyText())),
        bindparam("hidden_words", list(who.hidden_words), ARRAY(AnyText())),
        bindparam("named", [family(name) for name in named], ARRAY(AnyText())),
        bindparam("signature", signature, AnyText()),
        bindparam("package", who.package_family, AnyText()),
        bindparam("mode", mode, AnyText()),
        bindparam("tenant", tenant_of(session), AnyText()),
        bindparam("most", limit),
    )
    ranked = {row.id: row for row in await session.execute(statement)}
    found = await session.scalars(select(Knowledge).where(Knowledge.id.in_(ranked)))
    by_id = {item.id: item for item in found}
    return [
        _found(by_id[item_id], row.score, row.uses, row.wins) for item_id, row in ranked.items()
    ]


async def record_use(session: AsyncSession, trajectory_id: str, item_ids: Sequence[str]) -> None:
    """Record that a trajectory was shown items.

    Raises:
        NotFound: an unknown item or trajectory.
    """
    trajectory = await session.get(Trajectory, trajectory_id)
    if trajectory is None:
        raise NotFound(f"no trajectory {trajectory_id[:200]!r}")
    there = set(await session.scalars(select(Knowledge.id).where(Knowledge.id.in_(item_ids))))
    if missing := set(item_ids) - there:
        raise NotFound(f"no item {min(missing)[:200]!r}")
    won = trajectory.solved and not trajectory.hacks
    rows = [
        {"item_id": item_id, "trajectory_id": trajectory_id, "won": won}
        for item_id in sorted(there)
    ]
    await session.execute(insert(KnowledgeUse).on_conflict_do_nothing(), rows)


_HAS_TRGM = "SELECT 1 FROM pg_extension WHERE extname = 'pg_trgm'"
_LIKENESS = {
    True: "similarity(v.signature, :signature)",
    False: "(v.signature = :signature)::int::float8",
}
_SEARCH = """
WITH visible AS (
    SELECT k.id, k.signature, k.length, k.families, k.package_family
    FROM knowledge k LEFT JOIN tasks t ON t.id = k.task_id
    WHERE (:tenant = '' OR k.tenant = :tenant)
      AND (k.kind = 'changelog' OR (t.split = 'train' AND t.status = 'admitted'))
      AND k.package_family <> :package
      AND (:mode = '' OR k.mode IN ('', :mode))
      AND NOT (k.package_family = ANY(:hidden) OR k.families && :hidden
            OR EXISTS (SELECT 1 FROM knowledge_words w
                       WHERE w.item_id = k.id AND w.word = ANY(:hidden_words)))
), size AS (
    SELECT count(*)::float8 AS items, greatest(avg(length), 1)::float8 AS mean FROM visible
), hits AS (
    SELECT w.item_id, w.word, w.count::float8 AS count
    FROM knowledge_words w JOIN visible v ON v.id = w.item_id
    WHERE w.word = ANY(:words)
), rarity AS (
    SELECT word, ln(1 + (size.items - count(*) + 0.5) / (count(*) + 0.5)) AS weight
    FROM hits, size GROUP BY word, size.items
), relevance AS (
    SELECT h.item_id, sum(r.weight * h.count * 2.2
        / (h.count + 1.2 * (0.25 + 0.75 * v.length / size.mean))) AS score
    FROM hits h JOIN rarity r ON r.word = h.word JOIN visible v ON v.id = h.item_id, size
    GROUP BY h.item_id
), scored AS (
    SELECT v.id, coalesce(b.score, 0)
        + CASE WHEN :signature = '' THEN 0 WHEN v.signature = :signature THEN 8
               ELSE 4 * greatest(:likeness - 0.3, 0) END
        + 2 * cardinality(ARRAY(SELECT unnest(v.families) INTERSECT SELECT unnest(:named)))
        AS relevance
    FROM visible v LEFT JOIN relevance b ON b.item_id = v.id
)
SELECT s.id, count(u.item_id) AS uses, count(*) FILTER (WHERE u.won) AS wins,
    s.relevance * (0.5 + (count(*) FILTER (WHERE u.won) + 1.0) / (count(u.item_id) + 2.0)) AS score
FROM scored s LEFT JOIN knowledge_uses u ON u.item_id = s.id
WHERE s.relevance > 0
GROUP BY s.id, s.relevance ORDER BY score DESC, s.id LIMIT :most
"""


async def _sources(
    session: AsyncSession, items: Sequence[ItemRecord]
) -> dict[str, tuple[str, str]]:
    """Package and culprit of the tasks that items come from; refuses what may not be learned."""
    trajectory_ids = {item.trajectory_id for item in items if item.trajectory_id}
    made = {
        row.id: row
        for row in await session.execute(
            select(Trajectory.id, Trajectory.task_id, Trajectory.solved, Trajectory.hacks).where(
                Trajectory.id.in_(trajectory_ids)
            )
        )
    }
    task_ids = {item.task_id for item in items if item.task_id}
    tasks = {
        row.id: row
        for row in await session.execute(
            select(Task.id, Task.package, Task.culprit, Task.split, Task.status).where(
                Task.id.in_(task_ids)
            )
        )
    }
    for item in items:
        if item.kind == "changelog":
            continue
        task = tasks.get(item.task_id)
        if task is None:
            raise NotFound(f"no task {item.task_id[:200]!r}")
        if (task.split, task.status) != ("train", "admitted"):
            raise FailedPrecondition(f"{task.id} is not an admitted training task; leave it out")
        if item.kind == "trajectory":
            trajectory = made.get(item.trajectory_id)
            if trajectory is None or trajectory.task_id != item.task_id:
                raise NotFound(f"no trajectory {item.trajectory_id[:200]!r} of {item.task_id}")
            if not trajectory.solved or trajectory.hacks:
                raise FailedPrecondition(
                    f"{trajectory.id} did not solve its task honestly; leave it out"
                )
    return {task_id: (row.package, row.culprit) for task_id, row in tasks.items()}


def _id(item: ItemRecord, tenant: str) -> str:
    """By content and whose it is: what two tenants learn is an item of each."""
    content = {
        name: getattr(item, name)
        for name in ("kind", "task_id", "trajectory_id", "mode", "error", "moves", "edited")
    }
    content["culprit"] = item.culprit if item.kind == "changelog" else ""
    if tenant:
        content["tenant"] = tenant
    return f"kno_{hashlib.sha256(canonical(content)).hexdigest()[:32]}"


def _row(
    item: ItemRecord, item_id: str, tenant: str, package: str, culprit: str
) -> tuple[dict[str, object], "Counter[str]"]:
    moved = [name for name, _, _ in item.moves]
    found = Counter(item_words(item.error, moved, item.edited, culprit))
    row: dict[str, object] = {
        "id": item_id,
        "tenant": tenant,
        "kind": item.kind,
        "task_id": item.task_id or None,
        "trajectory_id": item.trajectory_id,
        "mode": item.mode,
        "error": item.error,
        "signature": item.signature,
        "culprit": culprit,
        "package_family": family(package) if package else "",
        "families": families((culprit, *moved)),
        "length": found.total(),
        "document": {"moves": [list(move) for move in item.moves], "edited": list(item.edited)},
    }
    return row, found


def _found(item: Any, score: float, uses: int, wins: int) -> ItemRecord:
    return ItemRecord(
        kind=item.kind,
        task_id=item.task_id or "",
        trajectory_id=item.trajectory_id,
        mode=item.mode,
        error=item.error,
        signature=item.signature,
        moves=tuple((name, before, after) for name, before, after in item.document["moves"]),
        edited=tuple(item.document["edited"]),
        culprit=item.culprit,
        id=item.id,
        score=float(score),
        uses=uses,
        wins=wins,
    )

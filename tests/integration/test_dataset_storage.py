"""Storage at size: bulk commits, search without scans, blobs counted and collected, retention."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import create_engine, delete, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import SQLAlchemyError

from dataset_svc import synthetic, upkeep
from dataset_svc.__main__ import serving
from dataset_svc.database import Database, make_text_index, normal_url, upgrade
from dataset_svc.localpg import LocalPostgres
from dataset_svc.models import TEXT_INDEX, Trajectory
from dataset_svc.queries import retention, trajectories
from dataset_svc.queries.retention import PruneRule
from dataset_svc.records import TrajectoryQuery
from dataset_svc.settings import DatasetSettings
from dataset_svc.store import TrajectoryStore
from regreen.blobs import open_blobs
from regreen.client.archive import ArchiveClient
from regreen.client.channel import connect
from regreen.dataset import v1 as pb
from regreen.ids import new_id
from regreen.rpc.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from tests.integration import dataset_samples as samples
from tests.integration.dataset_samples import Clients, imported, new_run


class All(Clients):
    """The clients of the store and its archive."""

    def __init__(self, channel) -> None:
        super().__init__(channel)
        self.archive = ArchiveClient(channel, patience_s=2.0)

    async def found(self, **filter) -> list[str]:
        """Ids that a filter lets through, newest first."""
        listed = await self.trajectories.list_trajectories(filter=pb.TrajectoryFilter(**filter))
        return [one.id for one in listed.trajectories]


@pytest.fixture
async def clients(database_url: str, tmp_path: Path) -> AsyncIterator[All]:
    settings = DatasetSettings(
        listen="127.0.0.1:0", metrics="127.0.0.1:0", home=tmp_path, drain_s=1.0, fsync=False,
        blob_grace_s=3600, upkeep_s=3600,
    )  # fmt: skip
    async with serving(settings, database_url) as server, connect(server.address) as channel:
        yield All(channel)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    yield database
    await database.close()


def many(task_id: str, count: int, run_id: str = "") -> list[pb.Trajectory]:
    """Trajectories with ids and tokens of their own."""
    return [
        synthetic.trajectory(number, task_id, run_id, turns=4, id=new_id("trj"))
        for number in range(count)
    ]


# ---- bulk


async def test_a_stream_is_stored_as_single_commits_are_and_once(clients: All):
    (task_id,), run_id = await imported(clients), await new_run(clients)
    sent = many(task_id, 620, run_id)
    sent[3].turns[1].text += "\0 \ufdd0 end"
    sent[3].verdict.accepted = True
    answer = await clients.archive.commit_trajectories(sent)
    assert (answer.stored, answer.unchanged) == (620, 0)
    for one in (sent[3], sent[-1]):
        stored = await clients.trajectories.get_trajectory(one.id)
        for turn in stored.turns:
            if not turn.duration.ByteSize():
                turn.ClearField("duration")
        for turn in one.turns:
            if not turn.duration.ByteSize():
                turn.ClearField("duration")
        assert stored == one
    again = await clients.archive.commit_trajectories(sent[600:] + many(task_id, 1))
    assert (again.stored, again.unchanged) == (1, 20)
    stats = await clients.archive.get_trajectory_stats(run_id)
    assert stats.total == 620
    assert sum(stats.counts["policy"].values.values()) == 620
    assert stats.counts["hack"].values


async def test_a_bad_trajectory_in_a_stream_is_named_by_its_place(clients: All):
    (task_id,) = await imported(clients)
    nameless, unknown, other = many(task_id, 3), many("no-such-task", 1), many(task_id, 1)
    nameless[2].id = ""
    with pytest.raises(InvalidArgument) as caught:
        await clients.archive.commit_trajectories(nameless)
    assert caught.value.field == "trajectories[2].id"
    with pytest.raises(NotFound):
        await clients.archive.commit_trajectories(unknown)
    await clients.archive.commit_trajectories(other)
    other[0].labels["note"] = "changed"
    with pytest.raises(AlreadyExists):
        await clients.archive.commit_trajectories(other)
    with pytest.raises(AlreadyExists):
        await clients.archive.commit_trajectories([nameless[0], nameless[0]])
    assert await clients.found(task_id=task_id) == [other[0].id]


# ---- search


async def test_trajectories_are_found_by_tool_verdict_and_text(clients: All):
    (task_id,) = await imported(clients)
    ids = []
    for number, said in enumerate(("100% SURE_thing", "nothing here", "back\\slash \0 nul")):
        made = samples.trajectory(task_id, salt=f" {said} ")
        made.turns[1].tool = ("run_sh", "read_file", "write_file")[number]
        made.turns[2].tool = made.turns[1].tool
        if number == 2:
            made.ClearField("verdict")
        else:
            made.verdict.accepted = number == 0
        ids.append(await clients.trajectories.commit_trajectory(made))
    first, second, third = ids
    assert await clients.found(task_id=task_id, tool="run_sh") == [first]
    assert await clients.found(task_id=task_id, verdict="accepted") == [first]
    assert await clients.found(task_id=task_id, verdict="rejected") == [second]
    assert await clients.found(task_id=task_id, text="sure_THING") == [first]
    assert await clients.found(task_id=task_id, text="100% s") == [first]
    assert await clients.found(task_id=task_id, text="sure%thing") == []
    assert await clients.found(task_id=task_id, text="k\\slash \0") == [third]
    assert await clients.found(task_id=task_id, text="repair this") == [third, second, first]
    for wrong in ({"text": "ab"}, {"text": "x" * 401}, {"verdict": "maybe"}):
        with pytest.raises(InvalidArgument):
            await clients.found(**wrong)


def test_search_works_unindexed_where_the_extension_is_absent(postgres: LocalPostgres, monkeypatch):
    postgres.create_database("no_trgm", template="template0")
    url = postgres.url("no_trgm")
    statement = "CREATE EXTENSION no_such_extension"
    with monkeypatch.context() as patched:
        patched.setattr("dataset_svc.database.CREATE_EXTENSION", statement)
        upgrade(url)
    engine = create_engine(normal_url(url))
    there = text("SELECT count(*) FROM pg_indexes WHERE indexname = :name")
    with engine.connect() as connection:
        assert connection.execute(there, {"name": TEXT_INDEX}).scalar_one() == 0
        statement = trajectories.page_statement(TrajectoryQuery(text="anything"), 5)
        assert connection.execute(statement).all() == []
    with engine.connect() as connection:
        assert make_text_index(connection)
        assert connection.execute(there, {"name": TEXT_INDEX}).scalar_one() == 1
    engine.dispose()


FILL = """
INSERT INTO blobs (sha256, size_bytes) VALUES ('fill', 7);
INSERT INTO runs (id, name, kind, state)
SELECT 'run_' || n, 'fill-' || n, 'grpo', 'done' FROM generate_series(0, 99) AS n;
INSERT INTO tasks (id, kind, package, python, category, blame, culprit, modes, split, status,
    state_id, error_log, document, content_sha256)
SELECT 'fill-' || n, 'k', 'p', '3.11', '', '', '', '{any_fix}', '', 'new', '', '', '{}', 'x'
FROM generate_series(0, 499) AS n;
INSERT INTO trajectories (id, task_id, run_id, group_id, group_index, attempt, lease_id, seed,
    pipeline, mode, grader, episode_end, actor, policy, state_id, token_exact, token_count,
    prompt_tokens, solved, hacks, tools, accepted, labels, stage_seconds, arrays_sha256,
    arrays_bytes, wire_bytes, changes, content_sha256)
SELECT 'trj_' || n, 'fill-' || n % 500, 'run_' || n % 100, 'grp_' || n / 8, n % 8, 0, '', n,
    CASE WHEN n % 3 = 0 THEN 'full' ELSE 'simplified' END,
    CASE WHEN n % 50 = 0 THEN 'keep_new' ELSE 'any_fix' END, 'build', 'submitted',
    CASE WHEN n % 200 = 0 THEN 'expert' ELSE 'policy' END, 'policy-' || n % 30, '', false, 1, 1,
    n % 20 = 0, CASE WHEN n % 100 = 0 THEN ARRAY['test-deleted'] ELSE '{}' END,
    CASE WHEN n % 90 = 0 THEN ARRAY['ask_for_help'] ELSE ARRAY['run_sh'] END,
    CASE WHEN n % 40 = 0 THEN n % 80 = 0 END,
    '{}', '{}', 'fill', 7, 9, '{"changes": []}', 'x' FROM generate_series(1, 50000) AS n;
INSERT INTO turns (trajectory_id, index, role, text, token_start, token_end, tool, arguments_json,
    ok, duration_s, state_id)
SELECT 'trj_' || n, i, 'policy', md5((n * 7 + i)::text) || ' said ' || md5(n::text), 0, 0,
    'run_sh', '', true, 0, '' FROM generate_series(1, 50000) AS n, generate_series(0, 1) AS i;
"""
QUERIES = {
    "none": {},
    "run": {"run_id": "run_7"},
    "task": {"task_id": "fill-7"},
    "group": {"group_id": "grp_700"},
    "actor": {"actor": "expert"},
    "absent actor": {"actor": "nobody"},
    "policy": {"policy": "policy-3"},
    "solved": {"solved_only": True},
    "hack": {"hack": "test-deleted"},
    "absent hack": {"hack": "never"},
    "pipeline": {"pipeline": "full"},
    "mode": {"mode": "keep_new"},
    "tool": {"tool": "ask_for_help"},
    "common tool": {"tool": "run_sh"},
    "accepted": {"verdict": "accepted"},
    "rejected": {"verdict": "rejected"},
    "text": {"text": "c4ca4238a0b9"},
    "absent text": {"text": "zzzzzzzzzz"},
    "task and text": {"task_id": "fill-7", "text": "said"},
    "run, tool and solved": {"run_id": "run_7", "tool": "ask_for_help", "solved_only": True},
}


@pytest.fixture(scope="module")
def full(postgres: LocalPostgres):
    """A connection to a database with 50,000 trajectories, analysed."""
    postgres.create_database("storage_full", template="template0")
    url = postgres.url("storage_full")
    upgrade(url)
    engine = create_engine(normal_url(url))
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        connection.execute(FILL)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))
        yield connection
    engine.dispose()


@pytest.mark.parametrize("name", QUERIES)
def test_no_list_scans_a_large_table(full, name: str):
    for before in (None, 25_000):
        statement = trajectories.page_statement(TrajectoryQuery(**QUERIES[name]), 101, before)
        compiled = statement.compile(
            dialect=postgresql.dialect(), compile_kwargs={"literal_binds": True}
        )
        plan = full.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {compiled}").scalar_one()
        told = json.dumps(plan)
        for table in ("trajectories", "turns"):
            assert not _scans(plan[0]["Plan"], table), told


def _scans(node: dict, table: str) -> bool:
    mine = node["Node Type"] == "Seq Scan" and node.get("Relation Name") == table
    return mine or any(_scans(child, table) for child in node.get("Plans", ()))


@pytest.mark.parametrize("verdict", ["accepted", "rejected"])
def test_where_nobody_judges_a_verdict_is_not_looked_for_in_everything(full, verdict: str):
    statement = trajectories.page_statement(TrajectoryQuery(verdict=verdict), 101)
    compiled = statement.compile(
        dialect=postgresql.dialect(), compile_kwargs={"literal_binds": True}
    )
    full.exec_driver_sql("BEGIN")
    try:
        full.exec_driver_sql("UPDATE trajectories SET accepted = NULL WHERE accepted IS NOT NULL")
        full.exec_driver_sql("ANALYZE trajectories")
        plan = full.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {compiled}").scalar_one()
    finally:
        full.exec_driver_sql("ROLLBACK")
    assert "ix_trajectories_accepted" in json.dumps(plan)


def test_the_look_for_scans_can_find_one(full):
    plan = full.exec_driver_sql(
        "EXPLAIN (FORMAT JSON) SELECT * FROM trajectories WHERE token_count = 3"
    ).scalar_one()
    assert _scans(plan[0]["Plan"], "trajectories")


# ---- blobs and retention


async def blob_rows(database: Database) -> dict[str, int]:
    """References by digest."""

    async def read(session):
        return (await session.execute(text("SELECT sha256, refs FROM blobs"))).all()

    return {row[0]: row[1] for row in await database.run(read)}


async def test_tokens_live_as_long_as_the_last_trajectory_that_names_them(
    clients: All, database: Database, tmp_path: Path
):
    (task_id,) = await imported(clients)
    blobs = open_blobs(tmp_path / "blobs", fsync=False)
    before = await blob_rows(database)
    tokens = 40 + 4 * len(before)
    one, two = (
        samples.trajectory(task_id, tokens=tokens),
        samples.trajectory(task_id, tokens=tokens),
    )
    two.policy = "other"
    first = await clients.trajectories.commit_trajectory(one)
    second = await clients.trajectories.commit_trajectory(two)
    (sha,) = set(await blob_rows(database)) - set(before)
    path = tmp_path / "blobs" / sha[:2] / sha
    assert (await blob_rows(database))[sha] == 2
    for gone, left in ((first, 1), (second, 0)):
        await _delete(database, gone)
        assert (await blob_rows(database))[sha] == left
        await upkeep.collect(database, blobs, 3600.0)
        assert path.exists()
    await upkeep.collect(database, blobs, 0.0)
    assert not path.exists()
    assert sha not in await blob_rows(database)
    third = await clients.trajectories.commit_trajectory(two)
    assert (await clients.trajectories.get_trajectory(third)).token_ids == two.token_ids


async def _delete(database: Database, trajectory_id: str) -> None:
    async def work(session) -> None:
        await session.execute(delete(Trajectory).where(Trajectory.id == trajectory_id))

    await database.run(work)


async def test_collecting_without_grace_never_takes_tokens_that_are_named(
    clients: All, database: Database, tmp_path: Path
):
    """Commits and deletions of the same few contents, and a collector, all at once."""
    (task_id,), run_id = await imported(clients), await new_run(clients)
    blobs = open_blobs(tmp_path / "blobs", fsync=False)
    await clients.queue.enqueue_groups([samples.group(run_id, task_id, 10) for _ in range(12)])
    done = asyncio.Event()
    collected = 0

    async def collector() -> None:
        nonlocal collected
        while not done.is_set():
            collected += await upkeep.collect(database, blobs, 0.0)
            await asyncio.sleep(0.02)

    async def worker(number: int) -> None:
        while leases := await clients.queue.lease_rollouts(f"w{number}", 2, run_id=run_id):
            for lease in leases:
                tokens = 400 + 4 * (lease.group_index % 3)
                made = samples.trajectory(task_id, tokens=tokens, salt=lease.id)
                for _ in range(200):
                    with contextlib.suppress(Aborted):  # as a worker does
                        await clients.queue.commit_rollout(lease.id, made)
                        break

    async def churn(number: int) -> None:
        for _ in range(15):
            made = samples.trajectory(task_id, tokens=400 + 4 * (number % 3))
            made.labels["salt"] = new_id("tsk")
            with contextlib.suppress(Aborted):  # collected before it was named; nothing is lost
                await _delete(database, await clients.trajectories.commit_trajectory(made))

    keeper = asyncio.create_task(collector())
    await asyncio.gather(*(worker(n) for n in range(6)), *(churn(n) for n in range(3)))
    done.set()
    await keeper
    ids = await clients.found(run_id=run_id)
    stats = await clients.archive.get_trajectory_stats(run_id)
    assert stats.total == 120
    for trajectory_id in ids:
        assert (await clients.trajectories.get_trajectory(trajectory_id)).token_ids
    rows = await blob_rows(database)
    taken = await clients.queue.take_groups(run_id, 20)
    assert sum(len(item.trajectories) for item in taken) == 120
    assert sum(rows.values()) >= 120
    assert collected > 0


async def test_retention_keeps_what_a_rule_or_an_active_run_keeps(clients: All):
    (task_id,), run_id = await imported(clients), await new_run(clients)
    await clients.queue.enqueue_groups([samples.group(run_id, task_id, 4)])
    leases = await clients.queue.lease_rollouts("w", 4, run_id=run_id)
    kinds = [(1.0, "policy"), (0.0, "policy"), (-1.0, "policy"), (0.0, "expert")]
    ids = []
    for lease, (reward, actor) in zip(leases, kinds, strict=True):
        made = samples.trajectory(task_id, salt=lease.id, reward=reward)
        made.actor = actor
        ids.append((await clients.queue.commit_rollout(lease.id, made)).trajectory_id)
    keep = {"solved": True, "flagged": True, "experts": True}
    prune = clients.archive.prune_trajectories
    assert (await prune(0.0, run_id=run_id)).pruned == 0
    await clients.runs.update_run(run_id, state="done")
    assert (await prune(3600.0, run_id=run_id)).pruned == 0
    would = await prune(0.0, run_id=run_id, keep=keep, dry_run=True)
    assert (would.pruned, would.more) == (1, False)
    assert len(await clients.found(run_id=run_id)) == 4
    request_id = samples.fresh("prune")
    for _ in range(2):
        gone = await prune(0.0, run_id=run_id, keep=keep, request_id=request_id)
        assert gone.pruned == 1
    assert await clients.found(run_id=run_id) == [ids[3], ids[2], ids[0]]
    assert dict((await clients.queue.get_queue(run_id)).rollouts) == {"committed": 3, "pruned": 1}
    assert (await prune(0.0, run_id=run_id, limit=2)).more
    assert (await prune(0.0, run_id=run_id, limit=2)).pruned == 1
    with pytest.raises(FailedPrecondition, match="pruned"):
        await clients.queue.rewind_run(run_id)
    for wrong in ({"older_than_s": -1.0}, {"older_than_s": 1.0, "limit": 10_001}):
        with pytest.raises(InvalidArgument):
            await prune(**wrong)


async def complete_group(clients: All, task_id: str, run_id: str, size: int = 2) -> list[str]:
    """A group of the run whose rollouts are committed; its trajectories."""
    await clients.queue.enqueue_groups([samples.group(run_id, task_id, size)])
    ids = []
    for lease in await clients.queue.lease_rollouts("w", size, run_id=run_id):
        made = samples.trajectory(task_id, salt=lease.id)
        ids.append((await clients.queue.commit_rollout(lease.id, made)).trajectory_id)
    return ids


async def test_a_run_that_becomes_active_meanwhile_loses_nothing(
    clients: All, database: Database, database_url: str
):
    (task_id,), run_id = await imported(clients), await new_run(clients)
    await complete_group(clients, task_id, run_id)
    await clients.runs.update_run(run_id, state="done")
    with psycopg.connect(database_url.replace("+psycopg", "")) as other:
        other.execute("UPDATE runs SET state = 'active' WHERE id = %s", (run_id,))
        pruning = asyncio.create_task(
            database.run(lambda s: retention.prune(s, PruneRule(0.0, run_id), 10))
        )
        await asyncio.sleep(0.3)
        assert not pruning.done()
        other.commit()
        assert await pruning == (0, 0, False)
    assert len(await clients.found(run_id=run_id)) == 2


async def test_a_group_that_is_no_longer_whole_is_not_given_out(clients: All):
    (task_id,), run_id = await imported(clients), await new_run(clients)
    await complete_group(clients, task_id, run_id)
    await clients.runs.update_run(run_id, state="done")
    assert (await clients.archive.prune_trajectories(0.0, run_id=run_id, limit=1)).pruned == 1
    await clients.runs.update_run(run_id, state="active")
    whole = await complete_group(clients, task_id, run_id)
    taken = await clients.queue.take_groups(run_id, 10)
    assert [[t.id for t in group.trajectories] for group in taken] == [whole]


async def test_an_export_goes_on_where_retention_removes(
    clients: All, database: Database, tmp_path
):
    (task_id,), run_id = await imported(clients), await new_run(clients)
    sent = many(task_id, 150, run_id)
    await clients.archive.commit_trajectories(sent)
    await clients.runs.update_run(run_id, state="done")
    store = TrajectoryStore(database, open_blobs(tmp_path / "blobs"))
    exported = []
    async for record in store.export(TrajectoryQuery(run_id=run_id)):
        exported.append(record.id)
        if len(exported) == 1:
            await clients.archive.prune_trajectories(0.0, run_id=run_id, limit=100)
    kept = [one.id for one in sent]
    assert exported == kept[:64] + kept[100:]
    left = await store.there([kept[3], kept[120], "trj_gone"])
    assert [record.id for record in left] == [kept[120]]


async def test_errors_of_the_database_hold_no_values(database: Database) -> None:
    failing = text("SELECT 1 / 0 WHERE :value <> ''")
    async with database._engine.connect() as connection:
        with pytest.raises(SQLAlchemyError, match="division by zero") as caught:
            await connection.execute(failing, {"value": "HUNTER2"})
    assert "HUNTER2" not in str(caught.value)

"""The schema: migrations give exactly the models, and can be undone and done again."""

import os
import subprocess
import sys

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, create_engine, inspect, text

from dataset_svc.database import alembic_config, normal_url, upgrade
from dataset_svc.localpg import LocalPostgres
from dataset_svc.models_knowledge import Base


def checks_of(connection: Connection) -> set[tuple[str, str, str]]:
    """Table, name and definition of every CHECK; alembic compares none of them."""
    rows = connection.execute(
        text(
            "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) "
            "FROM pg_constraint WHERE contype = 'c' AND connamespace = 'public'::regnamespace"
        )
    )
    return {(row[0], row[1], row[2]) for row in rows}


def created(connection: Connection) -> None:
    """The tables as the models say."""
    connection.execute(text("CREATE EXTENSION pg_trgm"))
    Base.metadata.create_all(connection)


def test_migrations_make_the_checks_of_the_models(postgres: LocalPostgres):
    found = {}
    for name, make in (
        ("checks_migrated", lambda connection: command.upgrade(alembic_config(connection), "head")),
        ("checks_created", created),
    ):
        postgres.create_database(name, template="template0")
        engine = create_engine(normal_url(postgres.url(name)))
        with engine.begin() as connection:
            make(connection)
            found[name] = checks_of(connection)
        engine.dispose()
    assert len(found["checks_created"]) > 10
    assert found["checks_migrated"] == found["checks_created"]


def test_up_down_up_and_no_difference_to_the_models(postgres: LocalPostgres):
    postgres.create_database("schema_test", template="template0")
    url = postgres.url("schema_test")
    upgrade(url)
    engine = create_engine(normal_url(url))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
        tables = set(inspect(connection).get_table_names())
    with engine.connect() as connection:
        command.downgrade(alembic_config(connection), "base")
    with engine.connect() as connection:
        assert set(inspect(connection).get_table_names()) == {"alembic_version"}
    upgrade(url)
    upgrade(url)
    with engine.connect() as connection:
        assert set(inspect(connection).get_table_names()) == tables
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    engine.dispose()


REVISIONS = ("0005", "0006", "0007", "0008", "0009", "0010", "0011")
BEFORE = """
INSERT INTO runs (id, name, kind, state) VALUES ('run_1', 'r', 'grpo', 'done');
INSERT INTO tasks (id, kind, package, python, category, blame, culprit, modes, split, status,
    state_id, error_log, document, content_sha256)
VALUES ('t', 'k', 'p', '3.11', '', '', '', '{any_fix}', 'train', 'admitted', '', '', '{}', 'x');
INSERT INTO groups (id, run_id, task_id, size, pipeline, mode, grader, seed, step, labels, state,
    pending) VALUES ('grp_1', 'run_1', 't', 2, 'full', 'any_fix', 'build', 1, 1, '{}', 'open', 1);
INSERT INTO trajectories (id, task_id, run_id, group_id, group_index, attempt, lease_id, seed,
    pipeline, mode, grader, episode_end, actor, policy, state_id, token_exact, token_count,
    prompt_tokens, solved, hacks, labels, stage_seconds, arrays_sha256, arrays_bytes, wire_bytes,
    changes, content_sha256)
SELECT 'trj_' || n, 't', 'run_1', 'grp_1', n, 0, 'lse_1', n, 'full', 'any_fix', 'build', 'stuck',
    'policy', 'base', '', false, 1, 1, true, '{}', '{}', '{}', 'same', 7, 9, '{}', 'x'
FROM generate_series(0, 1) AS n;
INSERT INTO turns (trajectory_id, index, role, text, token_start, token_end, tool, arguments_json,
    ok, duration_s, state_id)
SELECT 'trj_0', n, 'policy', 'text ' || n, 0, 0, 'tool' || n % 2, '', true, 0, ''
FROM generate_series(0, 3) AS n;
INSERT INTO verdicts (trajectory_id, accepted, model, prompt_version, rules_version,
    evidence_sha256, document) VALUES ('trj_0', true, '', '', '1', '', '{}');
INSERT INTO rollouts (id, group_id, run_id, group_index, group_seq, step, seed, state,
    trajectory_id) VALUES ('rol_0', 'grp_1', 'run_1', 0, 1, 1, 1, 'committed', 'trj_0');
INSERT INTO rollouts (id, group_id, run_id, group_index, group_seq, step, seed, state)
VALUES ('rol_1', 'grp_1', 'run_1', 1, 1, 1, 1, 'waiting');
"""


KNOWN = """
INSERT INTO knowledge (id, kind, task_id, trajectory_id, mode, error, signature, culprit,
    package_family, families, length, document)
VALUES ('kno_1', 'reference-fix', 't', '', '', 'E', '', 'c', 'p', '{c}', 1, '{}');
INSERT INTO knowledge_words (word, item_id, count) VALUES ('e', 'kno_1', 1);
INSERT INTO knowledge_uses (item_id, trajectory_id, won) VALUES ('kno_1', 'trj_0', true);
"""


SHARED = """
INSERT INTO runs (id, tenant, name, kind, state) VALUES ('run_2', 'a', 'r', 'grpo', 'done'),
    ('run_3', 'b', 'r', 'grpo', 'done');
UPDATE trajectories SET run_id = 'run_2', tenant = 'a';
INSERT INTO tenant_use (tenant, trajectory_bytes) VALUES ('a', 9);
"""


def test_data_survives_every_step_up_and_down(postgres: LocalPostgres):
    postgres.create_database("schema_steps", template="template0")
    engine = create_engine(normal_url(postgres.url("schema_steps")))

    def go(step, revision: str) -> None:
        with engine.connect() as connection:
            step(alembic_config(connection), revision)

    def found(statement: str) -> list[tuple]:
        with engine.connect() as connection:
            return [tuple(row) for row in connection.execute(text(statement))]

    kept = (
        "SELECT t.id, t.episode_end, count(u.index) FROM trajectories t LEFT JOIN turns u "
        "ON u.trajectory_id = t.id GROUP BY 1, 2 ORDER BY 1"
    )
    go(command.upgrade, REVISIONS[0])
    with engine.begin() as connection:
        connection.execute(text(BEFORE.replace(":", "\\:")))
    wanted = found(kept)
    assert wanted == [("trj_0", "stuck", 4), ("trj_1", "stuck", 0)]
    for _ in range(2):
        for revision in REVISIONS[1:]:
            go(command.upgrade, revision)
            assert found(kept) == wanted
        tools = found("SELECT id, tools, accepted FROM trajectories ORDER BY id")
        assert tools == [("trj_0", ["tool0", "tool1"], True), ("trj_1", [], None)]
        assert found("SELECT sha256, refs FROM blobs") == [("same", 2)]
        assert found("SELECT count(final_time) FROM rollouts") == [(1,)]
        for revision in REVISIONS[-2::-1]:
            go(command.downgrade, revision)
            assert found(kept) == wanted
    go(command.upgrade, "head")
    with engine.begin() as connection:
        connection.execute(
            text("UPDATE rollouts SET state = 'pruned', trajectory_id = NULL WHERE id = 'rol_0'")
        )
        connection.execute(text("DELETE FROM trajectories WHERE id = 'trj_0'"))
        connection.execute(text("UPDATE tasks SET status = 'unverified'"))
        connection.execute(text(KNOWN))
    assert found("SELECT sha256, refs FROM blobs") == [("same", 1)]
    with engine.begin() as connection:
        connection.execute(text(SHARED))
    assert found("SELECT * FROM tenant_use") == [("a", 9)]
    go(command.downgrade, "0010")
    names = found("SELECT name FROM runs ORDER BY seq")
    assert names == [("r",), ("r.run_2",), ("r.run_3",)], "a name is one run's again"
    go(command.upgrade, "0011")
    assert found("SELECT DISTINCT tenant FROM runs") == [("",)]
    go(command.downgrade, "0008")
    assert found("SELECT status FROM tasks") == [("waiting",)]
    assert found("SELECT won FROM knowledge_uses") == [(True,)]
    go(command.downgrade, "0006")
    assert found("SELECT state FROM rollouts ORDER BY id") == [("lost",), ("waiting",)]
    assert found("SELECT lost FROM groups") == [(1,)]
    with engine.begin() as connection:  # what the version before does when it rewinds
        connection.execute(text("UPDATE groups SET lost = lost - 1, pending = pending + 1"))
    go(command.downgrade, "0002")
    assert found("SELECT episode_end FROM trajectories") == [("turn_limit",)]
    go(command.upgrade, "head")
    go(command.downgrade, "base")
    engine.dispose()


def migrated(url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dataset_svc.migrate"],
        env=os.environ | {"REGREEN_DATASET__DATABASE_URL": url},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_migrations_by_themselves_make_the_newest_schema_once(postgres: LocalPostgres):
    postgres.create_database("migrate_test", template="template0")
    url = postgres.url("migrate_test")
    for _ in range(2):
        done = migrated(url)
        assert done.returncode == 0, done.stderr
    engine = create_engine(normal_url(url))
    with engine.connect() as connection:
        options = {"compare_server_default": True}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_migrations_by_themselves_say_why_they_cannot():
    none = migrated("")
    assert (none.returncode, "database_url: is empty" in none.stderr) == (2, True), none.stderr
    away = migrated("postgresql://nobody@127.0.0.1:1/nothing")
    assert (away.returncode, "database:" in away.stderr) == (1, True), away.stderr

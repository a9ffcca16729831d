"""The schema: migrations give exactly the models, and can be undone and done again."""

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, create_engine, inspect, text

from dataset_svc.database import alembic_config, normal_url, upgrade
from dataset_svc.localpg import LocalPostgres
from dataset_svc.models import Base


def checks_of(connection: Connection) -> set[tuple[str, str, str]]:
    """Table, name and definition of every CHECK; alembic compares none of them."""
    rows = connection.execute(
        text(
            "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) "
            "FROM pg_constraint WHERE contype = 'c' AND connamespace = 'public'::regnamespace"
        )
    )
    return {(row[0], row[1], row[2]) for row in rows}


def test_migrations_make_the_checks_of_the_models(postgres: LocalPostgres):
    found = {}
    for name, make in (
        ("checks_migrated", lambda connection: command.upgrade(alembic_config(connection), "head")),
        ("checks_created", Base.metadata.create_all),
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

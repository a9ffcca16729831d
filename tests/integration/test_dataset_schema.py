"""The schema: migrations give exactly the models, and can be undone and done again."""

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect

from dataset_svc.database import alembic_config, normal_url, upgrade
from dataset_svc.localpg import LocalPostgres
from dataset_svc.models import Base


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

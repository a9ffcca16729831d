"""Runs migrations on the connection that `dataset_svc.database` passes in.

- Migrations run in one transaction under an advisory lock: replicas that start together wait.
"""

from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext
from sqlalchemy import Connection, text
from sqlalchemy.types import TypeDecorator

from dataset_svc.models_knowledge import Base

_ADVISORY_LOCK = 0x72656772656E
"""Any number that no one else uses: "regren" in ASCII."""


def plain_type(kind: str, item: Any, _context: AutogenContext) -> str | Literal[False]:
    """Write the SQL type of a decorated column, so that migrations need no code of ours."""
    return f"sa.{item.impl!r}" if kind == "type" and isinstance(item, TypeDecorator) else False


def run(connection: Connection) -> None:
    """Apply what is missing."""
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        transactional_ddl=True,
        compare_server_default=True,
        render_item=plain_type,
    )
    with context.begin_transaction():
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        context.run_migrations()


run(context.config.attributes["connection"])

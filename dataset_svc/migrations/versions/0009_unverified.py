"""Tasks may be broken and stable without a known fix: the status `unverified`.

- Applies on top of 0008; undone by `downgrade`, which counts such tasks as waiting.
"""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_TABLES = ("tasks", "gate_reports")
_BEFORE = "'new', 'admitted', 'rejected', 'quarantined', 'waiting'"


def upgrade() -> None:
    """Apply."""
    _allow(f"{_BEFORE}, 'unverified'")


def downgrade() -> None:
    """Undo."""
    for table in _TABLES:
        op.execute(f"UPDATE {table} SET status = 'waiting' WHERE status = 'unverified'")
    _allow(_BEFORE)


def _allow(statuses: str) -> None:
    for table in _TABLES:
        name = op.f(f"ck_{table}_status_known")
        op.drop_constraint(name, table, type_="check")
        op.create_check_constraint(name, table, f"status IN ({statuses})")

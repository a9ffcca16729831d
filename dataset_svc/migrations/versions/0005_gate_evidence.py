"""Gate reports say what a verdict hangs on and hold every quarantined test with its outcomes.

- Applies on top of 0004; undone by `downgrade`, which forgets that evidence and keeps the verdicts.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("gate_reports", sa.Column("evidence", postgresql.JSON(), nullable=True))
    op.add_column(
        "gate_checks", sa.Column("conditions", sa.Text(), server_default="", nullable=False)
    )


def downgrade() -> None:
    """Undo."""
    op.drop_column("gate_checks", "conditions")
    op.drop_column("gate_reports", "evidence")

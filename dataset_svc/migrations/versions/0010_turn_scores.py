"""Turns have a score of their own.

- Applies on top of 0009; undone by `downgrade`, which loses the scores.
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply: earlier turns have none, which is 0; a default is no rewrite of the table."""
    column: sa.Column[float] = sa.Column("score", sa.Double(), nullable=False, server_default="0")
    op.add_column("turns", column)


def downgrade() -> None:
    """Undo."""
    op.drop_column("turns", "score")

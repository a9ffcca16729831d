"""A rollout counts the outages among its attempts.

- Applies on top of 0011; a column with a constant default is no rewrite of the table. What ended
  before counts as failures.
- Undone by `downgrade`, after which every attempt counts as a failure.
"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    column = sa.Column("outages", sa.BigInteger(), nullable=False, server_default="0")
    op.add_column("rollouts", column)


def downgrade() -> None:
    """Undo."""
    op.drop_column("rollouts", "outages")

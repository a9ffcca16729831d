"""A rollout that failed waits a while before it is tried again.

- Applies on top of 0003; undone by `downgrade`, after which waiting rollouts may be leased at once.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("rollouts", sa.Column("not_before", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    """Undo."""
    op.drop_column("rollouts", "not_before")

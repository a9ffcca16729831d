"""Tasks are parked where their rollouts are lost while others succeed; slots know when they ended.

- Applies on top of 0005; undone by `downgrade`, which forgets what is parked: it is tried again.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "parked_tasks",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("lost", sa.BigInteger(), nullable=False),
        sa.Column(
            "park_time", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.id"], name=op.f("fk_parked_tasks_run_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["task_id"], ["tasks.id"], name=op.f("fk_parked_tasks_task_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("run_id", "task_id", name=op.f("pk_parked_tasks")),
    )
    op.add_column("rollouts", sa.Column("final_time", sa.DateTime(timezone=True), nullable=True))
    op.execute("UPDATE rollouts SET final_time = now() WHERE state IN ('committed', 'lost')")
    op.drop_index(op.f("ix_rollouts_run_id_state"), table_name="rollouts")
    op.create_index(op.f("ix_rollouts_run_id_state_id"), "rollouts", ["run_id", "state", "id"])
    op.create_index(op.f("ix_groups_run_id_task_id"), "groups", ["run_id", "task_id"])
    op.create_index(
        "ix_rollouts_work_of_run",
        "rollouts",
        ["run_id", "step", "group_seq", "group_index"],
        postgresql_where="state IN ('waiting', 'leased')",
    )


def downgrade() -> None:
    """Undo."""
    op.drop_index("ix_rollouts_work_of_run", table_name="rollouts")
    op.drop_index(op.f("ix_groups_run_id_task_id"), table_name="groups")
    op.drop_index(op.f("ix_rollouts_run_id_state_id"), table_name="rollouts")
    op.create_index(op.f("ix_rollouts_run_id_state"), "rollouts", ["run_id", "state"])
    op.drop_column("rollouts", "final_time")
    op.drop_table("parked_tasks")

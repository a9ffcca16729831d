"""A knowledge base of past fixes of training tasks.

- Applies on top of 0007; undone by `downgrade`, which forgets it: it can be filled again.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "knowledge",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("task_id", sa.Text(), nullable=True),
        sa.Column("trajectory_id", sa.Text(), nullable=False),
        sa.Column("mode", sa.Text(), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("signature", sa.Text(), nullable=False),
        sa.Column("culprit", sa.Text(), nullable=False),
        sa.Column("package_family", sa.Text(), nullable=False),
        sa.Column("families", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("length", sa.BigInteger(), nullable=False),
        sa.Column(
            "document", postgresql.JSON(none_as_null=True, astext_type=sa.Text()), nullable=False
        ),
        sa.Column(
            "create_time",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.CheckConstraint(
            "kind IN ('reference-fix', 'trajectory', 'changelog')",
            name=op.f("ck_knowledge_kind_known"),
        ),
        sa.CheckConstraint(
            "(kind = 'changelog') = (task_id IS NULL)", name=op.f("ck_knowledge_task_of_fix")
        ),
        sa.ForeignKeyConstraint(
            ["task_id"], ["tasks.id"], name=op.f("fk_knowledge_task_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_knowledge")),
    )
    op.create_index(op.f("ix_knowledge_task_id"), "knowledge", ["task_id"])
    op.create_index(op.f("ix_knowledge_signature"), "knowledge", ["signature"])
    op.create_table(
        "knowledge_words",
        sa.Column("word", sa.Text(), nullable=False),
        sa.Column("item_id", sa.Text(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["item_id"],
            ["knowledge.id"],
            name=op.f("fk_knowledge_words_item_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("word", "item_id", name=op.f("pk_knowledge_words")),
    )
    op.create_index(op.f("ix_knowledge_words_item_id"), "knowledge_words", ["item_id"])
    op.create_table(
        "knowledge_uses",
        sa.Column("item_id", sa.Text(), nullable=False),
        sa.Column("trajectory_id", sa.Text(), nullable=False),
        sa.Column("won", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["item_id"],
            ["knowledge.id"],
            name=op.f("fk_knowledge_uses_item_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("item_id", "trajectory_id", name=op.f("pk_knowledge_uses")),
    )


def downgrade() -> None:
    """Undo."""
    op.drop_table("knowledge_uses")
    op.drop_table("knowledge_words")
    op.drop_table("knowledge")

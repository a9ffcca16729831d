"""Blobs are counted, trajectories carry what they are searched by, rollouts may be pruned.

- Applies on top of 0006; undone by `downgrade`, after which rollouts that were pruned are lost ones
  and nothing counts blobs; what a later `upgrade` finds it counts anew.
- The index over the text of turns needs `pg_trgm`; where that is not to be had it is left out, and
  `dataset_svc.database.upgrade` makes it once it is.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_STATES = "'waiting', 'leased', 'committed', 'lost'"
_PLAIN = ("policy", "actor", "pipeline", "mode")

_REFERENCED = """
CREATE FUNCTION regreen_blobs_referenced() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    wanted bigint;
    held bigint;
BEGIN
    WITH used AS (SELECT arrays_sha256 AS sha256, count(*) AS refs FROM added GROUP BY 1),
    locked AS (
        SELECT b.sha256, u.refs FROM blobs b JOIN used u ON u.sha256 = b.sha256
        ORDER BY b.sha256 FOR UPDATE OF b
    )
    UPDATE blobs SET refs = blobs.refs + locked.refs, touch_time = clock_timestamp()
    FROM locked WHERE blobs.sha256 = locked.sha256;
    GET DIAGNOSTICS held = ROW_COUNT;
    SELECT count(DISTINCT arrays_sha256) INTO wanted FROM added;
    IF held <> wanted THEN
        RAISE EXCEPTION 'tokens were collected before they were named' USING ERRCODE = 'RG001';
    END IF;
    RETURN NULL;
END $$
"""
_RELEASED = """
CREATE FUNCTION regreen_blobs_released() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    WITH unused AS (SELECT arrays_sha256 AS sha256, count(*) AS refs FROM gone GROUP BY 1),
    locked AS (
        SELECT b.sha256, u.refs FROM blobs b JOIN unused u ON u.sha256 = b.sha256
        ORDER BY b.sha256 FOR UPDATE OF b
    )
    UPDATE blobs SET refs = blobs.refs - locked.refs, touch_time = clock_timestamp()
    FROM locked WHERE blobs.sha256 = locked.sha256;
    RETURN NULL;
END $$
"""


def upgrade() -> None:
    """Apply."""
    _allow(f"{_STATES}, 'pruned'")
    op.create_table(
        "blobs",
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("refs", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column(
            "touch_time",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.CheckConstraint("refs >= 0", name=op.f("ck_blobs_refs_not_negative")),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_blobs")),
    )
    op.create_index("ix_blobs_unreferenced", "blobs", ["touch_time"], postgresql_where="refs = 0")
    op.execute(
        "INSERT INTO blobs (sha256, size_bytes, refs) "
        "SELECT arrays_sha256, max(arrays_bytes), count(*) FROM trajectories GROUP BY 1"
    )
    op.execute(_REFERENCED)
    op.execute(_RELEASED)
    op.execute(
        "CREATE TRIGGER blobs_referenced AFTER INSERT ON trajectories REFERENCING NEW TABLE AS "
        "added FOR EACH STATEMENT EXECUTE FUNCTION regreen_blobs_referenced()"
    )
    op.execute(
        "CREATE TRIGGER blobs_released AFTER DELETE ON trajectories REFERENCING OLD TABLE AS gone "
        "FOR EACH STATEMENT EXECUTE FUNCTION regreen_blobs_released()"
    )
    _searchable()


def _searchable() -> None:
    """Columns and indexes that trajectories are found by."""
    tools = postgresql.ARRAY(sa.Text())
    op.add_column("trajectories", sa.Column("tools", tools, server_default="{}", nullable=False))
    op.add_column("trajectories", sa.Column("accepted", sa.Boolean(), nullable=True))
    op.execute(
        "UPDATE trajectories SET tools = used.tools FROM (SELECT trajectory_id, "
        "array_agg(DISTINCT tool ORDER BY tool) AS tools FROM turns WHERE tool <> '' GROUP BY 1) "
        "AS used WHERE used.trajectory_id = trajectories.id"
    )
    op.execute(
        "UPDATE trajectories SET accepted = v.accepted FROM verdicts v "
        "WHERE v.trajectory_id = trajectories.id"
    )
    op.drop_index("ix_turns_tool", table_name="turns")
    op.create_index("ix_trajectories_tools", "trajectories", ["tools"], postgresql_using="gin")
    op.create_index(
        "ix_trajectories_accepted",
        "trajectories",
        ["accepted", "seq"],
        postgresql_where="accepted IS NOT NULL",
    )
    for name in _PLAIN:
        op.create_index(op.f(f"ix_trajectories_{name}_seq"), "trajectories", [name, "seq"])
    op.create_index(
        op.f("ix_trajectories_run_id_policy_actor_solved"),
        "trajectories",
        ["run_id", "policy", "actor", "solved"],
    )
    op.create_index(
        "ix_trajectories_flagged",
        "trajectories",
        ["run_id", "hacks"],
        postgresql_where="hacks <> '{}'",
    )


def downgrade() -> None:
    """Undo."""
    op.execute("DROP INDEX IF EXISTS ix_turns_text_trgm")
    op.drop_index("ix_trajectories_flagged", table_name="trajectories")
    op.drop_index(op.f("ix_trajectories_run_id_policy_actor_solved"), table_name="trajectories")
    for name in _PLAIN:
        op.drop_index(op.f(f"ix_trajectories_{name}_seq"), table_name="trajectories")
    op.drop_index("ix_trajectories_accepted", table_name="trajectories")
    op.drop_index("ix_trajectories_tools", table_name="trajectories")
    op.create_index("ix_turns_tool", "turns", ["tool"], postgresql_where="tool <> ''")
    op.drop_column("trajectories", "accepted")
    op.drop_column("trajectories", "tools")
    for trigger in ("blobs_released", "blobs_referenced"):
        op.execute(f"DROP TRIGGER {trigger} ON trajectories")
        op.execute(f"DROP FUNCTION regreen_{trigger}()")
    op.drop_index("ix_blobs_unreferenced", table_name="blobs")
    op.drop_table("blobs")
    op.execute(
        "UPDATE groups SET lost = lost + gone.slots FROM (SELECT group_id, count(*) AS slots "
        "FROM rollouts WHERE state = 'pruned' GROUP BY 1) AS gone WHERE gone.group_id = groups.id"
    )
    op.execute(
        "UPDATE rollouts SET state = 'lost', error = 'its trajectory was pruned' "
        "WHERE state = 'pruned'"
    )
    _allow(_STATES)


def _allow(states: str) -> None:
    name = op.f("ck_rollouts_state_known")
    op.drop_constraint(name, "rollouts", type_="check")
    op.create_check_constraint(name, "rollouts", f"state IN ({states})")

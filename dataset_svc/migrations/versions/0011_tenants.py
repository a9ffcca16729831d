"""Runs, rollouts, trajectories and items of knowledge say whose they are; bytes kept are counted.

- Applies on top of 0010. What there is becomes nobody's, which the platform's own tokens see; a
  column with a constant default is no rewrite of a table, however large it is.
- Rollouts and trajectories point at their run and its tenant, so that they cannot disagree; making
  that key reads both tables once.
- Undone by `downgrade`, after which everything is everybody's; of several runs of one name all but
  the oldest get their id behind it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_OWNED = ("runs", "rollouts", "trajectories", "knowledge")
_WORK = "state IN ('waiting', 'leased') AND tenant <> ''"
_KEPT = """
CREATE FUNCTION regreen_account_kept() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO tenant_use AS held (tenant, trajectory_bytes)
    SELECT tenant, sum(wire_bytes) FROM added WHERE tenant <> '' GROUP BY 1 ORDER BY 1
    ON CONFLICT (tenant) DO UPDATE
    SET trajectory_bytes = held.trajectory_bytes + excluded.trajectory_bytes;
    RETURN NULL;
END $$
"""
_GONE = """
CREATE FUNCTION regreen_account_gone() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    WITH less AS (
        SELECT tenant, sum(wire_bytes) AS bytes FROM gone WHERE tenant <> '' GROUP BY 1
    ), locked AS (
        SELECT u.tenant, less.bytes FROM tenant_use u JOIN less ON less.tenant = u.tenant
        ORDER BY u.tenant FOR UPDATE OF u
    )
    UPDATE tenant_use SET trajectory_bytes = trajectory_bytes - locked.bytes
    FROM locked WHERE tenant_use.tenant = locked.tenant;
    RETURN NULL;
END $$
"""
_TRIGGERS = (
    ("account_kept", _KEPT, "INSERT", "NEW TABLE AS added"),
    ("account_gone", _GONE, "DELETE", "OLD TABLE AS gone"),
)
"""They fire in the order of their names: use is locked before blobs, as by commits."""


def upgrade() -> None:
    """Apply."""
    for table in _OWNED:
        op.add_column(table, sa.Column("tenant", sa.Text(), nullable=False, server_default=""))
    op.drop_constraint(op.f("uq_runs_name"), "runs", type_="unique")
    op.create_unique_constraint(op.f("uq_runs_tenant_name"), "runs", ["tenant", "name"])
    op.create_unique_constraint(op.f("uq_runs_id_tenant"), "runs", ["id", "tenant"])
    op.drop_constraint(op.f("fk_trajectories_run_id"), "trajectories", type_="foreignkey")
    for table in ("rollouts", "trajectories"):
        op.create_foreign_key(
            op.f(f"fk_{table}_run_id"),
            table,
            "runs",
            ["run_id", "tenant"],
            ["id", "tenant"],
            ondelete="CASCADE",
        )
    op.create_index(
        "ix_rollouts_work_of_tenant",
        "rollouts",
        ["tenant", "step", "group_seq", "group_index"],
        postgresql_where=_WORK,
    )
    for table, columns in (("trajectories", ["tenant", "seq"]), ("knowledge", ["tenant"])):
        op.create_index(f"ix_{table}_tenant", table, columns, postgresql_where="tenant <> ''")
    _counted()


def _counted() -> None:
    op.create_table(
        "tenant_use",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("trajectory_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.CheckConstraint("trajectory_bytes >= 0", name=op.f("ck_tenant_use_bytes_not_negative")),
        sa.PrimaryKeyConstraint("tenant", name=op.f("pk_tenant_use")),
    )
    for name, function, event, transition in _TRIGGERS:
        op.execute(function)
        op.execute(
            f"CREATE TRIGGER {name} AFTER {event} ON trajectories REFERENCING {transition} "
            f"FOR EACH STATEMENT EXECUTE FUNCTION regreen_{name}()"
        )


def downgrade() -> None:
    """Undo."""
    for name, *_ in reversed(_TRIGGERS):
        op.execute(f"DROP TRIGGER {name} ON trajectories")
        op.execute(f"DROP FUNCTION regreen_{name}()")
    op.drop_table("tenant_use")
    for table in ("knowledge", "trajectories"):
        op.drop_index(f"ix_{table}_tenant", table_name=table)
    op.drop_index("ix_rollouts_work_of_tenant", table_name="rollouts")
    for table in ("trajectories", "rollouts"):
        op.drop_constraint(op.f(f"fk_{table}_run_id"), table, type_="foreignkey")
    op.drop_constraint(op.f("uq_runs_id_tenant"), "runs", type_="unique")
    op.drop_constraint(op.f("uq_runs_tenant_name"), "runs", type_="unique")
    op.execute(
        "UPDATE runs SET name = name || '.' || id WHERE EXISTS (SELECT 1 FROM runs AS older "
        "WHERE older.name = runs.name AND older.seq < runs.seq)"
    )
    op.create_unique_constraint(op.f("uq_runs_name"), "runs", ["name"])
    op.create_foreign_key(
        op.f("fk_trajectories_run_id"),
        "trajectories",
        "runs",
        ["run_id"],
        ["id"],
        ondelete="CASCADE",
    )
    for table in reversed(_OWNED):
        op.drop_column(table, "tenant")

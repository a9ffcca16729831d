"""Episodes may end because the agent got stuck.

- Applies on top of 0002; undone by `downgrade`, which counts stuck episodes as out of turns.
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_NAME = "ck_trajectories_episode_end_known"
_BEFORE = "'submitted', 'gave_up', 'turn_limit', 'token_limit', 'time_limit'"


def upgrade() -> None:
    """Apply."""
    _allow(f"{_BEFORE}, 'stuck'")


def downgrade() -> None:
    """Undo."""
    op.execute("UPDATE trajectories SET episode_end = 'turn_limit' WHERE episode_end = 'stuck'")
    _allow(_BEFORE)


def _allow(ends: str) -> None:
    op.drop_constraint(op.f(_NAME), "trajectories", type_="check")
    op.create_check_constraint(op.f(_NAME), "trajectories", f"episode_end IN ({ends})")

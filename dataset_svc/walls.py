"""Walls between tenants: what a call's transaction reads, changes and removes is its tenant's own.

- The condition is added to every statement that names a table of a tenant's, wherever in it that
  is; no query says it itself but the ones in SQL text, which take `:tenant`.
- A statement of a tenant's that names such a table and came through without a condition is refused
  before the database sees it: what was forgotten fails, and shows nothing.
- Rows say whose they are in runs, rollouts, trajectories and items; what belongs to one of these is
  its tenant's. Foreign keys keep rollouts and trajectories with their run.
- Callers without a tenant see everything, as upkeep does. Tasks are everybody's.
"""

import re
from functools import lru_cache
from typing import Any, TypeVar

from sqlalchemy import (
    ColumnElement,
    Executable,
    TextClause,
    and_,
    event,
    literal_column,
    select,
)
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import ORMExecuteState, Session, with_loader_criteria
from sqlalchemy.sql.base import ExecutableOption

from dataset_svc.models import (
    Base,
    Checkpoint,
    Group,
    Lease,
    ParkedTask,
    RewardPart,
    Rollout,
    Run,
    RunMetric,
    Trajectory,
    Turn,
    Verdict,
)
from dataset_svc.models_knowledge import Knowledge, KnowledgeUse, KnowledgeWord
from regreen.rpc.errors import InfraError
from regreen.rpc.tenants import own

S = TypeVar("S", bound=Executable)
_OWNED: tuple[type[Base], ...] = (Run, Rollout, Trajectory, Knowledge)
"""Models whose rows say whose they are."""
_PARTS: dict[type[Base], tuple[str, type[Base]]] = {
    RunMetric: ("run_id", Run),
    Checkpoint: ("run_id", Run),
    Group: ("run_id", Run),
    ParkedTask: ("run_id", Run),
    Lease: ("rollout_id", Rollout),
    Turn: ("trajectory_id", Trajectory),
    RewardPart: ("trajectory_id", Trajectory),
    Verdict: ("trajectory_id", Trajectory),
    KnowledgeWord: ("item_id", Knowledge),
    KnowledgeUse: ("item_id", Knowledge),
}
"""Models whose rows are those of another row's tenant, and the column that names it."""
WALLED = frozenset({model.__tablename__ for model in (*_OWNED, *_PARTS)})
_NAMES = re.compile(rf"\b({'|'.join(sorted(WALLED))})\b")
_BOUND = re.compile(r"\btenant\b")
_TENANT, _CHECKED = "tenant", "walled"
_ALL = {"every_tenant": True}
_NOBODY: ColumnElement[str] = literal_column("''")


class WalledSession(Session):
    """A session of one tenant, or of everybody."""


def info() -> dict[str, str]:
    """What a session knows of the present call: whose it is."""
    return {_TENANT: own()}


def tenant_of(session: AsyncSession) -> str:
    """Whose transaction it is; empty where it sees everything."""
    found: str = session.info.get(_TENANT, "")
    return found


def of_every_tenant(statement: S) -> S:
    """The statement as it is, over all tenants: to learn that an id is taken, and no more."""
    return statement.execution_options(**_ALL)


@lru_cache(maxsize=1024)
def _conditions(tenant: str) -> tuple[ExecutableOption, ...]:
    # The second condition is that of the indexes, which a parameter alone does not imply.
    owned = [
        with_loader_criteria(
            model,
            and_(_column(model, "tenant") == tenant, _column(model, "tenant") != _NOBODY),
        )
        for model in _OWNED
    ]
    parts = []
    for model, (name, parent) in _PARTS.items():
        whose = parent.__table__.c
        mine = select(whose.id).where(whose.tenant == tenant)
        parts.append(with_loader_criteria(model, _column(model, name).in_(mine)))
    return (*owned, *parts)


def _column(model: type[Base], name: str) -> Any:
    return getattr(model, name)


@event.listens_for(WalledSession, "do_orm_execute")
def _wall(state: ORMExecuteState) -> None:
    tenant: str = state.session.info.get(_TENANT, "")
    if isinstance(state.statement, TextClause):
        _check_text(state.statement)
        return
    # What loads the rest of a row has its key from a row that was seen.
    if not tenant or state.is_column_load or state.execution_options.get("every_tenant"):
        return
    state.update_execution_options(**{_CHECKED: True})
    if state.is_orm_statement and not state.is_insert:
        state.statement = _with(state.statement, _conditions(tenant))


def _with(statement: Executable, options: tuple[ExecutableOption, ...]) -> Executable:
    return statement.options(*options)


def _check_text(statement: TextClause) -> None:
    """Text is the same for everybody, so it must ask who that is."""
    if _NAMES.search(statement.text) and ":tenant" not in statement.text:
        raise InfraError("SQL text that names a table of tenants takes :tenant")


def check_statement(
    connection: Connection, cursor: object, sql: str, parameters: object, context: Any, many: bool
) -> None:
    """Refuse what a tenant would do without a condition; listens to `before_cursor_execute`."""
    if not context.execution_options.get(_CHECKED) or sql.startswith("INSERT"):
        return
    if _NAMES.search(sql) and not _BOUND.search(sql):
        raise InfraError("a statement of a tenant's has no condition for whose its rows are")

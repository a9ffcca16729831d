"""Connections, transactions and the schema's version.

- Work passed to `Database.run` happens in one transaction: all of it or none, within the walls of
  the present call's tenant (`walls`).
- Deadlocks, serialization failures and lost races to insert are tried again until a deadline.
- What the driver raises leaves as a `RegreenError`; a message never holds the password.
"""

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import structlog
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, create_engine, event, make_url, text
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool

from dataset_svc import walls
from dataset_svc.models import TEXT_INDEX
from regreen.rpc.errors import (
    Aborted,
    DiskFull,
    FailedPrecondition,
    InvalidArgument,
    RegreenError,
    Unavailable,
)
from regreen.rpc.ports import is_local

T = TypeVar("T")
log = structlog.get_logger(__name__)
CREATE_EXTENSION = "CREATE EXTENSION IF NOT EXISTS pg_trgm"
_INDEX_LOCK = 0x74726772
_RETRY_S = 5.0
_TRY_AGAIN = ("40001", "40P01", "23505")
"""SQLSTATE of a serialization failure, a deadlock, and a row that another has just inserted."""
_COLLECTED = "RG001"
"""SQLSTATE of our own: the tokens of a trajectory were collected before a row named them."""
_CONNECT = {"connect_timeout": 10}
_ENCRYPTED = ("require", "verify-ca", "verify-full")
"""Values of `sslmode` under which nothing is sent in plain text, whatever the server says."""
_LOOK_S = 0.5
_SOON = ("starting up", "not yet accepting", "shutting down", "recovery mode")
"""What a server says that comes, or comes back."""
_WRONG_VALUE = ("23502", "23514")
"""SQLSTATE of a value that is missing or breaks a CHECK: sending it again cannot help."""


def normal_url(url: str) -> str:
    """The URL with the driver that we use; `postgresql://` and `postgres://` are fine.

    Raises:
        InvalidArgument: it is no Postgres URL.
    """
    try:
        parsed = make_url(url.replace("postgres://", "postgresql://", 1))
    except ArgumentError as error:
        raise InvalidArgument(
            "database_url", "is no URL", "give postgresql://user@host/db"
        ) from error
    if parsed.get_backend_name() != "postgresql":
        raise InvalidArgument(
            "database_url",
            f"{parsed.get_backend_name()!r} is not supported",
            "give postgresql://...",
        )
    return parsed.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)


def warn_of_plain_text(url: str) -> None:
    """Log it once where what is stored, and the password, may cross a network in plain text."""
    parsed = make_url(normal_url(url))
    options = parsed.get_dialect()().create_connect_args(parsed)[1]
    named = options.get("host") or options.get("hostaddr") or os.environ.get("PGHOST", "")
    mode = options.get("sslmode") or os.environ.get("PGSSLMODE", "prefer")
    away = [host for host in named.split(",") if not _is_here(host)]
    if away and mode not in _ENCRYPTED:
        log.warning(
            "database_in_plain_text",
            hosts=away,
            sslmode=mode,
            remedy="add ?sslmode=verify-full&sslrootcert=FILE to database_url",
        )


def _is_here(host: str) -> bool:
    """Whether a host of libpq's is this machine: a folder of a socket, or loopback."""
    return host == "" or host.startswith(("/", "@")) or is_local(f"{host}:0")


def alembic_config(connection: Connection) -> Config:
    """Alembic's settings for the migrations of this package."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config


def await_server(url: str, within_s: float) -> None:
    """Wait for a server that is not up yet, starts or recovers; blocks.

    Raises:
        Unavailable: it does not let us in, or not within that time.
    """
    engine = create_engine(normal_url(url), poolclass=NullPool, connect_args=_CONNECT)
    deadline, told = time.monotonic() + within_s, False
    while True:
        try:
            with engine.connect():
                return
        except DBAPIError as error:
            why = translated(error)
            if not _may_come(error) or time.monotonic() >= deadline:
                raise why from error
            if not told:
                log.warning("waiting_for_database", problem=why.message, within_s=within_s)
                told = True
        time.sleep(min(_LOOK_S, max(0.0, deadline - time.monotonic())))


def _may_come(error: DBAPIError) -> bool:
    """Whether a server that cannot be connected to may be one soon.

    One that answers and refuses says FATAL, and why; libpq keeps no SQLSTATE of that.
    """
    told = str(error.orig)
    return isinstance(error, OperationalError) and (
        "FATAL:" not in told or any(word in told for word in _SOON)
    )


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the schema to `revision`; blocks. Safe to call from several processes at once.

    Raises:
        Unavailable: the server does not answer.
        FailedPrecondition: a newer version of this software wrote the schema.
    """
    engine = create_engine(normal_url(url))
    try:
        with engine.connect() as connection:
            command.upgrade(alembic_config(connection), revision)
            if revision == "head":
                make_text_index(connection)
    except DBAPIError as error:
        raise translated(error) from error
    except CommandError as error:
        raise FailedPrecondition(
            f"the database has a schema that this version does not know ({error}); use the version "
            "that wrote it, or a newer one"
        ) from error
    finally:
        engine.dispose()


def make_text_index(connection: Connection) -> bool:
    """Make the index that searches for text use, unless it is there; whether it is there now.

    It needs `pg_trgm`, which any owner of a database may create where the server has it. Without it
    a search reads every turn that its other conditions leave.
    """
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _INDEX_LOCK})
    try:
        with connection.begin_nested():
            connection.execute(text(CREATE_EXTENSION))
            connection.execute(
                text(
                    f"CREATE INDEX IF NOT EXISTS {TEXT_INDEX} ON turns USING gin "
                    "(text gin_trgm_ops)"
                )
            )
        connection.commit()
    except DBAPIError as error:
        connection.rollback()
        log.warning("text_search_unindexed", error=str(error.orig), remedy="install pg_trgm")
        return False
    return True


class TokensCollected(Aborted):
    """Tokens were announced so long ago that they were collected; announce and put them again."""


class Database:
    """A pool of connections and the transactions made on them."""

    def __init__(self, url: str, *, pool_size: int = 10, pool_timeout_s: float = 30.0) -> None:
        self._engine = create_async_engine(
            normal_url(url),
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=pool_timeout_s,
            pool_pre_ping=True,
            hide_parameters=True,  # else errors, and so logs, hold what callers sent
            connect_args=_CONNECT,
        )
        event.listen(self._engine.sync_engine, "before_cursor_execute", walls.check_statement)
        self._sessions = async_sessionmaker(
            self._engine,
            sync_session_class=walls.WalledSession,
            expire_on_commit=False,
            autoflush=False,
        )

    async def run(self, work: Callable[[AsyncSession], Awaitable[T]]) -> T:
        """The result of `work`, done in one transaction.

        `work` may be called again after a deadlock, so it must keep nothing outside the session.

        Raises:
            Unavailable: the server does not answer or the pool is empty.
            Aborted: concurrent work kept getting in the way.
            TokensCollected: tokens that a row would name are gone.
            InvalidArgument: a value breaks a rule of the schema.
        """
        deadline = time.monotonic() + _RETRY_S
        pause_s = 0.01
        while True:
            try:
                async with self._sessions(info=walls.info()) as session, session.begin():
                    return await work(session)
            except SQLAlchemyError as error:
                again = _sqlstate(error) in _TRY_AGAIN and time.monotonic() < deadline
                if not again:
                    raise translated(error) from error
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(pause_s * 2, 0.5)

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()


def translated(error: SQLAlchemyError) -> RegreenError:
    """The error of ours that stands for one of the driver's."""
    state = _sqlstate(error)
    told = str(getattr(error, "orig", None) or error).strip().splitlines()[0:1]
    message = told[0] if told else type(error).__name__
    if isinstance(error, PoolTimeout):
        return Unavailable("all database connections are busy", retry_after_s=1.0)
    if state == "53100":
        return DiskFull("the database has no space left", retry_after_s=30.0)
    if state == _COLLECTED:
        return TokensCollected("the tokens were collected before they were named; send them again")
    if state in _TRY_AGAIN or (isinstance(error, IntegrityError) and state not in _WRONG_VALUE):
        return Aborted(f"concurrent change: {message}")
    if isinstance(error, DataError) or state[:2] in ("22", "54") or state in _WRONG_VALUE:
        return InvalidArgument(
            "request",
            f"the database refuses a value: {message}",
            "send text without NUL and numbers within their range",
        )
    return Unavailable(f"database: {message}", retry_after_s=1.0)


def _sqlstate(error: SQLAlchemyError) -> str:
    return str(getattr(getattr(error, "orig", None), "sqlstate", None) or "")

"""Fixtures shared by all tests: a real Postgres, databases on it, a dataset service.

- One server for the whole session; a database of its own for every test module that asks.
- Logs are lines of JSON: rendering them for a terminal took a tenth of the services' time here.
- Works as root and as an ordinary user; nothing is left behind.
"""

import asyncio
import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import structlog

from dataset_svc.__main__ import serving
from dataset_svc.database import upgrade
from dataset_svc.localpg import LocalPostgres, LocalPostgresConfig
from dataset_svc.settings import DatasetSettings
from regreen.pkgindex import PackageIndex, index_urls
from regreen.rpc.errors import RegreenError

_TEMPLATE = "regreen_template"
structlog.configure(
    processors=[
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(default=repr),
    ]
)


@pytest.fixture(scope="session")
def postgres() -> Iterator[LocalPostgres]:
    """A running private Postgres that forgets everything at the end."""
    home = Path(tempfile.mkdtemp(prefix="regreen-test-pg-"))
    home.chmod(0o711)
    server = LocalPostgres(LocalPostgresConfig(home=home / "pg", fsync=False))
    try:
        with server:
            server.create_database(_TEMPLATE)
            upgrade(server.url(_TEMPLATE))
            yield server
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def database_url(postgres: LocalPostgres) -> str:
    """URL of an empty database with the newest schema, shared by one test module.

    It goes with the server at the end of the session: dropping it now would wait for a checkpoint.
    """
    name = f"test_{os.getpid()}_{uuid.uuid4().hex[:12]}"
    postgres.create_database(name, template=_TEMPLATE)
    return postgres.url(name)


@pytest.fixture
async def dataset_address(database_url: str, tmp_path: Path) -> AsyncIterator[str]:
    """Address of a dataset service that runs in this process over the module's database."""
    settings = DatasetSettings(
        listen="127.0.0.1:0", metrics="127.0.0.1:0", home=tmp_path, drain_s=1.0, fsync=False
    )
    async with serving(settings, database_url) as server:
        yield server.address


@pytest.fixture(scope="session")
def registry() -> None:
    """Skips what needs the package registry when it cannot be reached."""

    async def ask() -> None:
        async with PackageIndex(index_urls(), deadline_s=10.0) as index:
            await index.files("pytest")

    try:
        asyncio.run(ask())
    except (RegreenError, OSError) as error:
        pytest.skip(f"the package registry cannot be reached: {type(error).__name__}")

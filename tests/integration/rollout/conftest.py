"""The rollout tests share one prepared world per module."""

import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from regreen.rpc.errors import MissingDependency
from tests.integration.rollout.world import World, open_world


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def world() -> AsyncIterator[World]:
    home = Path(tempfile.mkdtemp(prefix="regreen-rollout-"))
    home.chmod(0o711)
    try:
        async with open_world(home) as found:
            yield found
    except MissingDependency as error:
        pytest.skip(f"no sandboxes here: {error}")
    finally:
        shutil.rmtree(home, ignore_errors=True)

"""Runtimes with all walls and with one less, and a place that every user may use."""

import shutil
import tempfile
from pathlib import Path

import pytest
import pytest_asyncio

from tests.contract.abuse.walls import HOST_NETWORK, NO_FILTER, SHARED_FILES, weakened
from tests.contract.runtimes import SMALL, started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runtime(tmp_path_factory):
    async with started("embedded", tmp_path_factory.mktemp("runtime")) as runtime:
        yield runtime


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def unfiltered(tmp_path_factory):
    """A runtime that lets every system call through."""
    async with weakened(tmp_path_factory.mktemp("unfiltered"), NO_FILTER) as runtime:
        yield runtime


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def outside(tmp_path_factory):
    """A runtime whose sandboxes share the network of the host."""
    async with weakened(tmp_path_factory.mktemp("outside"), HOST_NETWORK) as runtime:
        yield runtime


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sharing(tmp_path_factory):
    """A runtime whose sandboxes have programs and devices of the host itself."""
    async with weakened(tmp_path_factory.mktemp("sharing"), SHARED_FILES) as runtime:
        yield runtime


@pytest_asyncio.fixture(loop_scope="module")
async def unfiltered_box(unfiltered):
    box = await unfiltered.create([], limits=SMALL)
    yield box
    await box.delete()


@pytest.fixture
def common():
    """A directory outside every sandbox that any user may enter and write."""
    made = Path(tempfile.mkdtemp(prefix="regreen-abuse-"))
    made.chmod(0o777)
    yield made
    shutil.rmtree(made, ignore_errors=True)

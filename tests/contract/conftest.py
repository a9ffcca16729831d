"""A runtime of each kind that this host can start, and a box of it."""

import pytest_asyncio

from tests.contract.runtimes import NAMES, SMALL, started
from tests.loops import pytest_asyncio_loop_factories

__all__ = ["box", "pytest_asyncio_loop_factories", "runtime"]


@pytest_asyncio.fixture(params=NAMES, scope="module", loop_scope="module")
async def runtime(request, tmp_path_factory):
    async with started(request.param, tmp_path_factory.mktemp("runtime")) as runtime:
        yield runtime


@pytest_asyncio.fixture(loop_scope="module")
async def box(runtime):
    box = await runtime.create([], limits=SMALL)
    yield box
    await box.delete()

"""A failure in which a process ran into a limit, or the host had no room, is not remembered."""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from regreen.rpc.errors import DiskFull
from sandbox_svc.backends.base import Limits
from sandbox_svc.builders.base import FileChange
from sandbox_svc.validate import Validator
from sandbox_svc.verdicts import Outcome
from sandbox_svc.warm import WarmPool
from tests.fixtures.small_disk import mounted
from tests.integration.sandbox_build.suite import FIX, GREET, Suite, open_suite
from tests.integration.sandbox_build.test_validate import open_world
from tests.integration.sandbox_build.test_warm import NEVER

GREEDY = b"""
import subprocess, sys
child = subprocess.run([sys.executable, "-c", "x = bytearray(1 << 30)"], capture_output=True)


def greeting(name):
    return f"Hello, {name}!" if child.returncode == 0 else "the compiler died"
"""
pytestmark = pytest.mark.asyncio(loop_scope="module")
LIMITS = Limits(memory_bytes=160 << 20)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def suite() -> AsyncIterator[Suite]:
    async with open_suite() as found:
        if found.runtime.cgroups.name == "rlimit":
            pytest.skip("without control groups nobody counts what a child ran into")
        yield found


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
async def test_a_failure_after_a_killed_child_is_no_lasting_one(suite: Suite, *, warm: bool):
    pool = WarmPool(suite.states, suite.runtime, suite.home, settings=NEVER, limits=LIMITS)
    ahead = pool if warm else None
    validator = Validator(suite.states, suite.runtime, limits=LIMITS, warm=ahead)
    if warm:
        pool.warm(suite.state)
        await pool.settled()
        assert pool.waiting == 1, pool.why_off(suite.state.id)
    try:
        for _ in range(2):
            failed = await validator.validate(suite.state.id, [FileChange(GREET, GREEDY)])
            assert (failed.outcome, failed.lasting, failed.cached) == (Outcome.FAILED, False, False)
        for cached in (False, True):
            fixed = await validator.validate(suite.state.id, [FIX])
            assert (fixed.outcome, fixed.lasting, fixed.cached) == (Outcome.PASSED, True, cached)
    finally:
        await validator.close()
        await pool.close()


@pytest.fixture
def small_disk() -> Iterator[Path]:
    with mounted(300) as disk:
        yield disk


FILLS = b"""
import os, time


def greeting(name):
    try:
        with open("object", "wb") as out:
            for _ in range(150):
                out.write(bytes(1 << 20))
        return f"Hello, {name}!"
    except OSError:
        time.sleep(1)
        return "no space"
    finally:
        os.unlink("object")
"""


async def test_a_host_that_was_full_for_a_while_has_no_verdict(small_disk: Path) -> None:
    async with open_world(small_disk) as world:
        await world.runtime.settle()
        filler, room = small_disk / "filler", os.statvfs(small_disk)
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - (80 << 20))
        fills = FileChange(GREET, FILLS)
        with pytest.raises(DiskFull, match="no space"):  # though it has room when it ends
            await world.judge(fills)
        filler.unlink()
        passed = await world.judge(fills)
        assert (passed.outcome, passed.cached) == (Outcome.PASSED, False)
        failed = [await world.judge(FileChange(GREET, b"x = 1\n")) for _ in range(2)]
        assert [one.cached for one in failed] == [False, False]  # a small disk at any time
        await world.runtime.settle()

"""Commands of the embedded runtime that start late, or for which there are no descriptors."""

import asyncio
import contextlib
import os
import resource

import pytest
import pytest_asyncio

from regreen.rpc.errors import ResourceExhausted
from sandbox_svc.backends.base import Command, EndReason, Later
from tests.contract.runtimes import SMALL, started

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def box(tmp_path_factory):
    async with started("embedded", tmp_path_factory.mktemp("late")) as runtime:
        yield await runtime.create([], limits=SMALL)


async def nothing(stream: str, data: bytes) -> None:
    return None


@pytest.mark.parametrize("idle_s", [0.0, 1.5])
async def test_time_counts_from_the_moment_a_command_may_go_on(box, idle_s):
    stdin, feed = os.pipe2(os.O_CLOEXEC)
    go = asyncio.Event()
    command = Command(
        ("/bin/sh", "-c", "read line; sleep 0.3"), cwd="/", later=Later(stdin, nothing, go)
    )
    running = asyncio.create_task(box.run(command))
    await asyncio.sleep(idle_s)
    go.set()
    os.write(feed, b"go\n")
    result = await running
    os.close(stdin)
    os.close(feed)
    assert result.reason is EndReason.EXIT
    assert 0.25 < result.wall_s < 1.2


def opened() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def only(spare: int):
    """So many descriptors are free."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    held = []
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        for _ in range(spare):
            os.close(held.pop())
        yield
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("spoken_to", [False, True])
async def test_without_descriptors_a_command_is_refused_and_none_is_left_open(box, spoken_to):
    command = Command(("cat",), cwd="/", stdin=b"x", channel=not spoken_to, open_stdin=spoken_to)
    before, ended = opened(), []
    for spare in range(9):
        with only(spare):
            try:
                if spoken_to:
                    process = await box.start(command)
                    await process.close_input()
                    result = await process.wait()
                else:
                    result = await box.run(command)
                ended.append(result.ok)
            except ResourceExhausted:
                ended.append(False)
        assert opened() == before, spare
    assert ended == sorted(ended)
    assert ended[-1]
    assert not ended[3]

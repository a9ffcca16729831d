"""Commands and sandboxes of the embedded runtime that are late, over a limit, or without room."""

import asyncio
import contextlib
import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from regreen.rpc.errors import NotFound, ResourceExhausted
from sandbox_svc.backends.base import Command, EndReason, Later, Limits
from sandbox_svc.backends.embedded import DEFAULT_LIMITS, EmbeddedRuntime
from tests.contract.runtimes import SMALL, sh, started

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


@pytest.mark.parametrize("memory_bytes", [1 << 30, 3 << 30])
async def test_limits_other_than_the_usual_ones_hold_whichever_is_larger(tmp_path, memory_bytes):
    usual = replace(DEFAULT_LIMITS, memory_bytes=2 << 30)
    runtime = EmbeddedRuntime(tmp_path / "home", defaults=usual, run_probes=False, warm_seats=1)
    await runtime.start()
    try:
        box = await runtime.create([], limits=Limits(memory_bytes=memory_bytes, pids=77))
        assert (await sh(box, "echo fine")).stdout.text == "fine\n"
        for write in runtime.cgroups.writes(box.seat.name, box.limits):
            assert Path(write.path).read_text().split() == write.value.split()
    finally:
        await runtime.close()


async def there(box, path: str) -> bool:
    try:
        await box.read_file(path, 0)
    except NotFound:
        return False
    return True


_FILLER = """
import os, time
for _ in range(5):
    try:
        while True:
            if os.fork() == 0:
                time.sleep(99)
    except OSError:
        time.sleep(0.1)
open("/tmp/rests", "w")
time.sleep(99)
"""


async def test_a_refused_command_does_not_blame_the_next(tmp_path):
    async with started("embedded", tmp_path / "home") as runtime:
        if runtime.cgroups.name == "rlimit":
            pytest.skip("without cgroups nothing counts what was refused")
        box = await runtime.create([], limits=replace(SMALL, pids=8))
        assert (await sh(box, f"setsid /usr/bin/python3 -c '{_FILLER}' & echo up")).ok
        async with asyncio.timeout(20):
            while not await there(box, "/tmp/rests"):
                pass
        assert (await sh(box, "true")).reason is EndReason.PIDS
        await box.stop_all(EndReason.SIGNAL)
        async with asyncio.timeout(10):
            while (await box.usage())["processes"]:
                pass
        assert (await sh(box, "exit 1")).reason is EndReason.EXIT


async def test_without_descriptors_a_sandbox_is_refused_and_nothing_of_it_is_left(tmp_path):
    runtime = EmbeddedRuntime(tmp_path / "home", run_probes=False, warm_seats=0)
    await runtime.start()
    try:
        came = []
        for spare in range(12):
            with only(spare):
                try:
                    box = await runtime.create([], limits=SMALL)
                except ResourceExhausted:
                    came.append(False)
                else:
                    came.append(True)
            if came[-1]:
                await box.delete()
        assert not came[0]
        assert came[-1]
        await asyncio.gather(*runtime._seats._undoing)
        await (await runtime.create([], limits=SMALL)).delete()
        await runtime.settle()
        assert not any((await runtime.orphans()).values())
    finally:
        await runtime.close()

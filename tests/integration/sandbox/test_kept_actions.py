"""What an action is not remembered by: limits that only a child ran into, a host without room."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from regreen.sandbox import v1 as pb
from tests.fixtures.small_disk import mounted
from tests.integration.sandbox.overlay import prepared
from tests.integration.sandbox.test_actions import out, running

_HEAP = "python3 -c 'x = bytearray(300 << 20)' 2>/dev/null"
_MEMORY, _DISK, _FEW = (
    pb.Limits(memory_bytes=64 << 20), pb.Limits(disk_bytes=20 << 20), pb.Limits(pids=20),
)  # fmt: skip
_SWALLOWED = {
    "memory": (f"{_HEAP} || echo skipped; exit 0", _MEMORY, pb.END_REASON_OOM, 0),
    "memory, failing": (f"{_HEAP} || exit 2", _MEMORY, pb.END_REASON_OOM, 2),
    "processes": (
        "(for i in $(seq 60); do sleep 1 & done) 2>/dev/null; exit 0", _FEW, pb.END_REASON_PIDS, 0,
    ),
    "one file": ("head -c 100000000 /dev/zero > x; exit 7", _DISK, pb.END_REASON_DISK, 7),
    "one file, passing": ("head -c 100000000 /dev/zero > x; exit 0", _DISK, pb.END_REASON_DISK, 0),
    "many files": (
        "for i in 1 2 3 4 5 6; do head -c 5000000 /dev/zero > x$i; done", _DISK,
        pb.END_REASON_DISK, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _SWALLOWED)
async def test_a_limit_that_a_child_ran_into_is_told_and_nothing_of_it_is_kept(tmp_path, name):
    script, limits, reason, code = _SWALLOWED[name]
    async with running(tmp_path) as place:
        if place.host.runtime.cgroups.name == "rlimit" and reason != pb.END_REASON_DISK:
            pytest.skip("without control groups nobody counts what a child ran into")
        state = (await prepared(place.states, a="1")).id
        found = [await place.sh(state, script, limits=limits, keep_state=True) for _ in range(2)]
        assert [answer.cached for answer in found] == [False, False]
        assert not any(answer.HasField("state") for answer in found)
        for answer in found:
            assert reason in answer.result.limits_hit
            if not code:  # it came to its own end, but for the watch that may have been quicker
                assert answer.result.reason in (pb.END_REASON_EXIT, reason)
            else:
                assert answer.result.reason == reason
        box = (await place.sandboxes.create_sandbox(state, limits=limits)).id
        seen = await place.sandboxes.run(box, ["sh", "-c", script])
        assert reason in seen.limits_hit
        quiet = (await place.sandboxes.create_sandbox(state, limits=limits)).id
        assert not (await place.sandboxes.run(quiet, ["sh", "-c", "exit 7"])).limits_hit


async def test_what_ran_beside_a_limit_of_another_command_is_told_of_it_too(tmp_path):
    async with running(tmp_path) as place:
        if place.host.runtime.cgroups.name == "rlimit":
            pytest.skip("without control groups nobody counts what a child ran into")
        state = (await prepared(place.states, a="1")).id
        box = (await place.sandboxes.create_sandbox(state, limits=_MEMORY)).id
        first = await place.sandboxes.run(box, ["sh", "-c", f"{_HEAP}; true"])
        assert list(first.limits_hit) == [pb.END_REASON_OOM]
        assert not (await place.sandboxes.run(box, ["true"])).limits_hit  # no later command's


@pytest.fixture
def small_disk() -> Iterator[Path]:
    with mounted(200) as disk:
        yield disk


async def test_what_failed_on_a_full_host_is_not_kept(small_disk):
    build = "head -c 50000000 /dev/zero > obj && echo built || { rm -f obj; exit 9; }"
    limits = pb.Limits(disk_bytes=64 << 20)
    async with running(small_disk) as place:
        state = (await prepared(place.states, a="1")).id
        room = os.statvfs(small_disk)
        with (small_disk / "ballast").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - (40 << 20))
        failed = await place.sh(state, build, limits=limits, keep_state=True)
        assert (failed.result.exit_code, failed.cached) == (9, False)
        assert b"No space left" in failed.result.stderr.head
        assert not failed.HasField("state")
        (small_disk / "ballast").unlink()
        for cached in (False, True):
            built = await place.sh(state, build, limits=limits)
            assert (out(built), built.cached) == (b"built\n", cached)

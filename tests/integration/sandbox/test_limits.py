"""Limits over gRPC: what is told as in force is in force, and no way in goes past one."""

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from regreen.client.sandbox import succeeded
from regreen.rpc.errors import (
    FailedPrecondition,
    InvalidArgument,
    NoSuchFile,
    RegreenError,
    ResourceExhausted,
)
from regreen.sandbox import v1 as pb
from sandbox_svc.backends import cgroups, uppers
from tests.integration.sandbox.overlay import prepared
from tests.integration.sandbox.test_actions import running


def _quota(place, box: str) -> float:
    """Cores that the kernel gives a sandbox."""
    runtime = place.host.runtime
    name = place.host.manager.get(box).box.seat.name
    if runtime.cgroups.name == "cgroup-v1":
        group = next(p for p in runtime.cgroups.places if (Path(p) / "cpu.cfs_quota_us").exists())
        period = int(Path(group, name, "cpu.cfs_period_us").read_text())
        return int(Path(group, name, "cpu.cfs_quota_us").read_text()) / period
    quota, period = Path(runtime.cgroups.places[0], name, "cpu.max").read_text().split()
    return int(quota) / int(period)


async def test_the_limits_that_are_told_are_those_that_the_kernel_keeps(tmp_path):
    async with running(tmp_path) as place:
        state = (await prepared(place.states, a="1")).id
        for cpus in (1e-9, 0.0099):
            with pytest.raises(InvalidArgument, match=r"limits\.cpus.*give at least 0\.01"):
                await place.sandboxes.create_sandbox(state, limits=pb.Limits(cpus=cpus))
        grouped = place.host.runtime.cgroups.name != "rlimit"
        odd = pb.Limits(memory_bytes=(64 << 20) + 5, cpus=0.123456789, pids=(1 << 22) - 1)
        odd.wall.FromMilliseconds(290)
        for asked in (odd, pb.Limits(cpus=0.29), pb.Limits(cpus=0.01, pids=1, inodes=1)):
            if not grouped:
                asked.cpus = 0
            box = await place.sandboxes.create_sandbox(state, limits=asked)
            assert abs(box.limits.cpus - asked.cpus) <= 1e-5
            assert box.limits.memory_bytes % 4096 == 0
            assert box.limits.wall.ToNanoseconds() in (290_000_000, 3600 * 10**9)
            if grouped:
                assert _quota(place, box.id) == pytest.approx(box.limits.cpus, abs=1e-9)
            done = await place.sandboxes.run(box.id, ["/bin/true"], cwd="/")
            assert done.exit_code == 0
            await place.sandboxes.delete_sandbox(box.id)
        with pytest.raises(InvalidArgument, match=r"limits\.pids"):
            await place.sandboxes.create_sandbox(state, limits=pb.Limits(pids=1 << 22))


async def test_a_limit_that_nothing_keeps_is_refused_and_none_is_told(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(cgroups, "choose", lambda instance: cgroups.NoCgroup())
    async with running(tmp_path, cpus=1.0, pids=100) as place:
        said = "".join(capsys.readouterr()).splitlines()
        (warned,) = [line for line in said if "nothing keeps this limit" in line]
        assert "cpus" in warned
        state = (await prepared(place.states, a="1")).id
        refusal = r"limits\.cpus: is 1\.5, which nothing would keep here; leave it out, or run the"
        with pytest.raises(FailedPrecondition, match=refusal):
            await place.sandboxes.create_sandbox(state, limits=pb.Limits(cpus=1.5, pids=20))
        with pytest.raises(FailedPrecondition, match=refusal):
            await place.sh(state, "true", limits=pb.Limits(cpus=1.5))
        box = await place.sandboxes.create_sandbox(state, limits=pb.Limits(pids=20))
        fork = (await place.sandboxes.fork_sandbox(box.id, 1)).sandboxes[0]
        back = await place.sandboxes.restore_sandbox(fork.id, state)
        for told in (box.limits, fork.limits, back.limits):
            assert (told.cpus, told.pids, told.memory_bytes) == (0, 20, 4 << 30)
        assert succeeded(await place.sandboxes.run(fork.id, ["true"], cwd="/"))


async def test_a_command_that_was_stopped_never_looks_like_a_success(tmp_path):
    async with running(tmp_path) as place:
        state = (await prepared(place.states, a="1")).id
        few = pb.Limits(output_bytes=1 << 16)
        box = (await place.sandboxes.create_sandbox(state, limits=few)).id
        for script, reason, code in (
            ("true", "EXIT", 0),
            ("exit 3", "EXIT", 3),
            ("kill -11 $$", "SIGNAL", 128 + 11),
            ("trap 'exit 0' TERM INT HUP; while :; do sleep 0.1; done", "TIMEOUT", 128 + 9),
            ("yes; exit 0", "OUTPUT", 128 + 9),
        ):
            done = await place.sandboxes.run(box, ["sh", "-c", script], timeout_s=1.0)
            assert (pb.EndReason.Name(done.reason)[11:], done.exit_code) == (reason, code)
            assert succeeded(done) == (code == 0)


_REMEDY = "; delete files, or use a sandbox with a higher limit"


async def _written(place, box: str, count: int, size_bytes: int) -> int:
    """How many files of a size can be written; the refusal of the next names limit and remedy."""
    for number in range(count):
        try:
            await place.sandboxes.write_file(box, f"/work/repo/f{number}", os.urandom(size_bytes))
        except ResourceExhausted as refusal:
            told = str(refusal)
            named = refusal.metadata["limit"] in told and refusal.retry_after_s is None
            return number if named and told.endswith(_REMEDY) else -1
    return count


async def test_files_written_from_outside_count_against_the_limits(tmp_path):
    async with running(tmp_path) as place:
        state = (await prepared(place.states, a="1")).id
        limits = pb.Limits(disk_bytes=10 << 20, inodes=100)
        box = (await place.sandboxes.create_sandbox(state, limits=limits)).id
        assert await _written(place, box, 20, 4 << 20) == 2
        for _ in range(3):  # what gives its room back may be written again and again
            await place.sandboxes.write_file(box, "/work/repo/f0", os.urandom(5 << 20))
            await place.sandboxes.write_file(box, "/work/repo/f1", b"")
        with pytest.raises(ResourceExhausted, match=r"limits\.disk_bytes \(\d+ of 10485760"):
            await place.sandboxes.write_file(box, "/work/repo/more", bytes(6 << 20))
        with pytest.raises(NoSuchFile):
            await place.sandboxes.read_file(box, "/work/repo/more")
        ended = await place.sandboxes.run(box, ["sh", "-c", "rm f0 f1; echo room"])
        assert (ended.reason, ended.limits_hit) == (pb.END_REASON_EXIT, [])
        assert await _written(place, box, 600, 1) in range(90, 100)
        with pytest.raises(ResourceExhausted, match=r"limits\.inodes"):
            await place.sandboxes.write_file(box, "/work/repo/a/b/c/d", b"x")
        for _ in range(4):
            ended = await place.sandboxes.run(box, ["sleep", "0.4"])
            assert ended.reason == pb.END_REASON_EXIT
        frozen = await place.sandboxes.snapshot_sandbox(box)
        assert frozen.size_bytes < 10 << 20
        assert await _written(place, box, 20, 4 << 20) == 2  # a snapshot is below the next files
        other = (await place.sandboxes.fork_sandbox(box, 1)).sandboxes[0]
        assert (other.limits.disk_bytes, other.limits.inodes) == (10 << 20, 100)
        assert await _written(place, other.id, 20, 4 << 20) == 2


async def test_what_processes_and_callers_write_counts_together(tmp_path):
    async with running(tmp_path) as place:
        state = (await prepared(place.states, a="1")).id
        box = (
            await place.sandboxes.create_sandbox(state, limits=pb.Limits(disk_bytes=32 << 20))
        ).id
        script = "head -c 20000000 /dev/urandom > big; exec 3< big; rm big; sleep 60"
        held = place.sandboxes.run(box, ["sh", "-c", script], timeout_s=60)
        task = asyncio.create_task(held)
        runtime_box = place.host.manager.get(box).box
        async with asyncio.timeout(30):
            while int((await runtime_box.usage())["unlinked"]) < 20_000_000:
                pass
        # other tests that give room back meanwhile hide what was written until it is measured
        await runtime_box._watch.measure(0, anyway=True)
        assert await _written(place, box, 20, 2 << 20) < 7  # a file without a name is there too
        assert not task.done()
        await place.sandboxes.delete_sandbox(box)
        with contextlib.suppress(RegreenError):
            await task


async def test_far_from_the_limit_nothing_is_measured(tmp_path, monkeypatch):
    walks = []
    usage = uppers.usage
    monkeypatch.setattr(uppers, "usage", lambda top, **how: walks.append(top) or usage(top, **how))
    async with running(tmp_path) as place:
        state = (await prepared(place.states, a="1")).id
        box = (await place.sandboxes.create_sandbox(state)).id
        walks.clear()
        assert await _written(place, box, 200, 10_000) == 200
        assert walks == []

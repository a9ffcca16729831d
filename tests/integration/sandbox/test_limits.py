"""Limits over gRPC: what is told as in force is in force, and no way in goes past one."""

from pathlib import Path

import pytest

from regreen.rpc.errors import InvalidArgument
from regreen.sandbox import v1 as pb
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
        odd = pb.Limits(memory_bytes=(64 << 20) + 5, cpus=0.123456789, pids=(1 << 22) - 1)
        odd.wall.FromMilliseconds(290)
        for asked in (odd, pb.Limits(cpus=0.29), pb.Limits(cpus=0.01, pids=1, inodes=1)):
            box = await place.sandboxes.create_sandbox(state, limits=asked)
            assert abs(box.limits.cpus - asked.cpus) <= 1e-5
            assert box.limits.memory_bytes % 4096 == 0
            assert box.limits.wall.ToNanoseconds() in (290_000_000, 3600 * 10**9)
            if place.host.runtime.cgroups.name != "rlimit":
                assert _quota(place, box.id) == pytest.approx(box.limits.cpus, abs=1e-9)
            done = await place.sandboxes.run(box.id, ["/bin/true"], cwd="/")
            assert done.exit_code == 0
            await place.sandboxes.delete_sandbox(box.id)
        with pytest.raises(InvalidArgument, match=r"limits\.pids"):
            await place.sandboxes.create_sandbox(state, limits=pb.Limits(pids=1 << 22))

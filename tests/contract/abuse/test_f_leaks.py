"""F: attacks on what the service holds: nothing leaks, and a failure leaves nothing."""

import asyncio
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from regreen.rpc.errors import (
    FailedPrecondition,
    InfraError,
    InvalidArgument,
    MissingDependency,
)
from sandbox_svc.backends import embedded_box, program
from sandbox_svc.backends.base import EndReason, Limits, Mount
from tests.contract.abuse.walls import BREAKS_AT, IS_ROOT, pause, weakened
from tests.contract.runtimes import SMALL, sh, started

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def held(runtime) -> dict[str, int]:
    """What this process and its runtime hold, by kind."""
    found = {kind: len(names) for kind, names in (await runtime.orphans()).items()}
    found["layers"] = len(await runtime.layers())
    warm = {seat.name for seat in runtime._seats.warm}
    kept = set(runtime._seats.kept)
    found["run"] = len(set(os.listdir(runtime.layout.home / "run")) - warm - kept)
    found["trash"] = len(os.listdir(runtime.layout.home / "trash"))
    found["descriptors"] = len(os.listdir("/proc/self/fd"))
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    ours = str(runtime.layout.home)  # a container engine beside us has mounts of its own
    found["mounts of this process"] = sum(ours in m for m in mounts)
    groups = getattr(runtime.cgroups, "_groups", {}).values()
    inside = [entry for group in groups for entry in group.iterdir() if entry.is_dir()]
    found["groups"] = sum(entry.name not in kept for entry in inside)
    spawner = runtime._seats.spawner
    children = Path(f"/proc/{spawner}/task/{spawner}/children").read_text().split()
    return found | {"children": len(children)}


async def _rested(runtime) -> dict[str, int]:
    await runtime.settle()
    if runtime._seats._refill is not None:
        await runtime._seats._refill
    return await held(runtime)


async def test_f1_a_thousand_forks_leave_nothing(tmp_path):
    async with started("embedded", tmp_path / "home") as runtime:
        trunk = await runtime.create([], limits=SMALL)
        await sh(trunk, "echo shared > /work/x")
        layer = await trunk.freeze()
        await trunk.delete()

        async def once(number: int) -> None:
            box = await runtime.create([layer], limits=SMALL)
            assert await box.read_file("/work/x", 10) == b"shared\n"
            if number % 50 == 0:
                await runtime.drop_layer(await box.freeze())
            await box.delete()

        await asyncio.gather(*(once(number) for number in range(8)))
        before = await _rested(runtime)
        forks = 1000 if IS_ROOT else 200  # the same code; the second run is kept short
        for start in range(0, forks, 8):
            await asyncio.gather(*(once(number) for number in range(start, start + 8)))
        after = await _rested(runtime)
        spare = {"descriptors": 4, "children": 1, "process": 1, "cgroup": 1, "groups": 3}
        for kind, count in after.items():
            assert count <= before[kind] + spare.get(kind, 0), (kind, count, before[kind])
        assert (after["run"], after["trash"]) == (0, 0)


async def test_f1_what_is_not_deleted_is_counted(tmp_path):
    async with started("embedded", tmp_path / "home") as runtime:
        before = await _rested(runtime)
        boxes = [await runtime.create([], limits=SMALL) for _ in range(5)]
        during = await held(runtime)
        for kind in ("run", "descriptors", "children"):
            assert during[kind] >= before[kind] + 4, kind
        if runtime.cgroups.name != "rlimit":
            assert during["groups"] >= before["groups"] + 4
        for box in boxes:
            await box.delete()
        assert (await _rested(runtime))["run"] == 0


async def test_f1_a_chain_of_forty_and_two_hundred_commands_at_once(tmp_path):
    async with started("embedded", tmp_path / "home") as runtime:
        trunk = await runtime.create([], limits=replace(SMALL, pids=256, memory_bytes=1 << 30))
        layers = []
        for number in range(40):
            await trunk.write_file(f"/work/repo/{number}", b"x")
            layers.append(await trunk.freeze())
        fork = await runtime.create(layers, limits=SMALL)
        assert len((await sh(fork, "ls /work/repo")).stdout.text.split()) == 40
        before = await _rested(runtime)
        gate = "until [ -e /tmp/go ]; do sleep 0.2; done"
        waiting = [asyncio.create_task(sh(trunk, f"{gate}; echo {n}")) for n in range(100)]
        quick = await asyncio.gather(*(sh(trunk, f"echo {n}") for n in range(100)))
        assert [done.stdout.text for done in quick] == [f"{n}\n" for n in range(100)]
        assert (await sh(trunk, ": > /tmp/go")).ok
        slow = await asyncio.gather(*waiting)
        assert [done.stdout.text for done in slow] == [f"{n}\n" for n in range(100)]
        after = await _rested(runtime)
        assert after["descriptors"] <= before["descriptors"] + 4
        assert (await trunk.usage())["processes"] == 0
        for box in (trunk, fork):
            await box.delete()
        for layer in layers:
            await runtime.drop_layer(layer)
        end = await _rested(runtime)
        assert (end["run"], end["trash"], end["layers"]) == (0, 0, 0)


async def test_f2_a_killed_spawner_is_replaced_and_its_sandboxes_say_so(tmp_path):
    async with started("embedded", tmp_path / "home") as runtime:
        lost = await runtime.create([], limits=SMALL)
        running = asyncio.create_task(sh(lost, "sleep 100"))
        await sh(lost, "until grep -q '[s]leep.100' /proc/[0-9]*/cmdline; do :; done")
        runtime._seats._process.kill()
        assert (await running).reason is EndReason.INFRA
        with pytest.raises(InfraError, match="lost its processes"):
            await sh(lost, "true")
        fresh = await runtime.create([], limits=SMALL)
        assert (await sh(fresh, "echo fine")).stdout.text == "fine\n"


async def test_f2_a_command_that_cannot_be_stopped_ends_its_sandbox_which_says_so(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(embedded_box, "_KILL_GRACE_S", 0.2)
    async with started("embedded", tmp_path / "home") as runtime:
        box = await runtime.create([], limits=SMALL)
        running = asyncio.create_task(sh(box, "echo up > /tmp/up; sleep 100", timeout_s=1.0))
        await sh(box, "until test -s /tmp/up; do sleep 0.02; done")
        os.kill(box.seat.pid, signal.SIGSTOP)  # who would end it, and tell of it, does nothing
        assert (await running).reason is EndReason.TIMEOUT
        with pytest.raises(FailedPrecondition, match="it went over a limit") as refused:
            await sh(box, "true")
        assert refused.value.metadata == {"overrun": "timeout"}
        await box.delete()


async def test_f2_a_set_up_that_fails_leaves_nothing(tmp_path):
    async with started("embedded", tmp_path / "home") as runtime:
        with pytest.raises(MissingDependency, match="mount source does not exist"):
            await runtime.create([], limits=SMALL, mounts=[Mount(tmp_path / "none", "/x")])
        (tmp_path / "m").mkdir()
        with pytest.raises(InvalidArgument, match="/proc is the sandbox's own"):
            await runtime.create([], limits=SMALL, mounts=[Mount(tmp_path / "m", "/proc/x")])
        with pytest.raises(FailedPrecondition, match="not on this host"):
            await runtime.create(["0" * 12], limits=SMALL)
        assert (await _rested(runtime))["run"] == 0


_AGAIN = "earlier network"
"""A step of those sandboxes alone that take what another has left."""


def steps() -> list[str]:
    """Every step that the set-up of a sandbox names, taken from its source."""
    source = (program._SOURCES / "seat.c").read_text("utf-8")
    found = dict.fromkeys(re.findall(r'\bstep\("([^"]+)"', source))
    found.pop("mount %s")
    found.pop("open mount %s")
    found.pop(_AGAIN)
    named = []
    for step in found:
        name = {"protect": "sys", "mask": "kcore"}.get(step.split()[0], "null")
        named.append(step.replace("%s", name))
    return [*named, "mount /usr", "mount /proc", "mount /dev", "mount /dev/shm", "mount /tmp"]


async def test_f2_what_another_left_and_cannot_be_entered_goes(tmp_path):
    where = tmp_path / "breaks-at"
    where.write_text("")
    async with weakened(tmp_path / "home", BREAKS_AT.format(path=str(where))) as runtime:
        for _ in range(2):
            await (await runtime.create([], limits=Limits())).delete()
            await runtime.settle()
        (name,) = runtime._seats.kept
        where.write_text(_AGAIN)
        with pytest.raises(InfraError, match=f"set-up failed at {_AGAIN}: .*injected"):
            await runtime.create([], limits=Limits())
        where.write_text("")
        again = await runtime.create([], limits=Limits())
        assert again.place != name
        assert (await sh(again, "echo fine")).stdout.text == "fine\n"
        await again.delete()
        await runtime.settle()
        assert not any((await runtime.orphans()).values())


async def test_f2_a_failure_at_each_step_is_told_and_leaves_nothing(tmp_path):
    where = tmp_path / "breaks-at"
    where.write_text("")
    assert {"cgroup", "network", "overlay", "root", "identity", "seccomp"} <= set(steps())
    async with weakened(tmp_path / "home", BREAKS_AT.format(path=str(where))) as runtime:
        whole = await runtime.create([], limits=SMALL)
        assert (await sh(whole, "echo fine")).stdout.text == "fine\n"  # nothing breaks
        await whole.delete()
        before = await _rested(runtime)
        for step in steps():
            where.write_text(step)
            with pytest.raises(InfraError, match=f"set-up failed at {re.escape(step)}: .*injected"):
                await runtime.create([], limits=SMALL)
            async with asyncio.timeout(10):
                while await _rested(runtime) != before:
                    await pause()
        where.write_text("")
        again = await runtime.create([], limits=SMALL)
        assert (await sh(again, "echo fine")).stdout.text == "fine\n"
        await again.delete()

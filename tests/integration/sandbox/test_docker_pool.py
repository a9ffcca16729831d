"""Containers of the Docker runtime that are started before anybody asks for them."""

import asyncio
from pathlib import Path

import pytest

from sandbox_svc.backends.base import Limits
from sandbox_svc.backends.docker_pool import PoolSize
from tests.contract.runtimes import DOCKER_IMAGE, SMALL, make, sh, started

pytestmark = [pytest.mark.asyncio(loop_scope="function"), pytest.mark.slow]


async def filled(runtime, count: int) -> None:
    async with asyncio.timeout(60):
        while runtime.pool.waiting != count:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def containers(runtime) -> set[str]:
    labels = {"label": f"regreen.instance={runtime._instance}"}
    return {found["Id"] for found in runtime.api.containers(all=True, filters=labels)}


def pooled(home: Path, **size):
    from sandbox_svc.backends.docker import DockerRuntime

    return DockerRuntime(home, image=DOCKER_IMAGE, run_probes=False, pool=PoolSize(**size))


async def test_a_sandbox_takes_a_container_that_waits_and_never_gives_it_back(tmp_path):
    async with started("docker", tmp_path / "probe"):
        pass  # skips where no engine answers
    runtime = pooled(tmp_path / "own", each=1)
    await runtime.start()
    try:
        first = await runtime.create([], limits=SMALL)
        await filled(runtime, 1)
        (waiting,) = containers(runtime) - {first.container}
        second = await runtime.create([], limits=SMALL)
        assert second.container == waiting
        assert (await sh(first, "echo mine > /work/home/mine; touch /tmp/mine")).ok
        await first.delete()
        await second.delete()
        await filled(runtime, 1)
        third = await runtime.create([], limits=SMALL)
        assert third.container not in (first.container, second.container)
        assert (await sh(third, "ls /work/home /tmp")).stdout.text.split() == [
            *("/tmp:", "/work/home:")
        ]
        other = await runtime.create([], limits=Limits(memory_bytes=96 << 20))
        assert other.limits.memory_bytes == 96 << 20
        told = runtime.api.inspect_container(other.container)["HostConfig"]
        assert told["Memory"] == 96 << 20
    finally:
        await runtime.close()
    again = make("docker", tmp_path / "own")
    await again.start()
    assert containers(again) == set()
    await again.close()


async def test_a_state_in_use_has_its_own_and_a_dropped_one_has_none(tmp_path):
    async with started("docker", tmp_path / "probe"):
        pass
    runtime = pooled(tmp_path / "own", each=1, total=2)
    await runtime.start()
    try:
        box = await runtime.create([], limits=SMALL)
        await sh(box, "echo frozen > /work/home/frozen")
        layer = await box.freeze()
        child = await runtime.create([layer], limits=SMALL)
        await filled(runtime, 2)
        taken = await runtime.create([layer], limits=SMALL)
        assert (await sh(taken, "cat /work/home/frozen")).stdout.text == "frozen\n"
        await filled(runtime, 2)  # no third, whatever is wanted
        await asyncio.gather(*(b.delete() for b in (box, child, taken)))
        await runtime.drop_layer(layer)
        assert runtime.pool.waiting == 1
        assert len(containers(runtime)) == 1
    finally:
        await runtime.close()


async def test_one_that_died_waiting_is_passed_over_and_what_a_kill_left_is_swept(tmp_path):
    async with started("docker", tmp_path / "probe"):
        pass
    runtime = pooled(tmp_path / "own", each=1)
    await runtime.start()
    try:
        first = await runtime.create([], limits=SMALL)
        await filled(runtime, 1)
        (waiting,) = containers(runtime) - {first.container}
        runtime.api.kill(waiting)
        second = await runtime.create([], limits=SMALL)
        assert second.container != waiting
        assert (await sh(second, "echo alive")).stdout.text == "alive\n"
        await filled(runtime, 1)
        successor = make("docker", tmp_path / "own")  # as after a kill -9: nobody closed
        await successor.start()
        assert containers(successor) == set()
        await successor.close()
    finally:
        await runtime.close()

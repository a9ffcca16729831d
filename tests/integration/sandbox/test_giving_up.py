"""Callers that go away and calls that fail: nothing is lost, nothing is left behind."""

import asyncio
import os
from pathlib import Path

import pytest

from regreen.rpc.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from sandbox_svc.backends.base import Limits
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.builders.base import Prepared
from sandbox_svc.pool import PoolLimits
from sandbox_svc.sandboxes import Manager
from sandbox_svc.states import StateStore
from tests.fixtures.small_state import small_state


@pytest.fixture
async def parts(tmp_path):
    runtime = EmbeddedRuntime(tmp_path / "home", run_probes=False, warm_seats=1)
    await runtime.start()
    states = StateStore(tmp_path / "home", runtime)
    await states.open()
    manager = Manager(runtime, states, pool=PoolLimits(max_sandboxes=4))
    yield runtime, states, manager
    await manager.close()
    await states.close()
    await runtime.close()


async def begun(work) -> asyncio.Task:
    """A task that has run until it waits for something."""
    task = asyncio.create_task(work)
    for _ in range(3):
        await asyncio.sleep(0)
    return task


async def test_who_joins_a_preparation_that_is_being_given_up_gets_one_of_its_own(parts):
    runtime, states, _ = parts
    entered, may_end = asyncio.Event(), asyncio.Event()

    async def stubborn(progress) -> Prepared:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            await may_end.wait()
        raise AssertionError

    first = asyncio.create_task(states.prepare("0" * 64, stubborn))
    await entered.wait()
    first.cancel()
    second = await begun(small_state(runtime, states))
    may_end.set()
    assert (await second).spec_sha256 == "0" * 64
    with pytest.raises(asyncio.CancelledError):
        await first


@pytest.mark.parametrize("steps", range(0, 12, 2))
async def test_a_snapshot_whose_caller_goes_away_loses_no_work(parts, steps):
    runtime, states, manager = parts
    sandbox = await manager.create((await small_state(runtime, states)).id)
    await sandbox.box.write_file("/work/repo/a", b"1")
    task = asyncio.create_task(manager.snapshot(sandbox.id))
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    state = await manager.snapshot(sandbox.id)
    assert await sandbox.box.read_file("/work/repo/a", 10) == b"1"
    again = await manager.create(state.id)
    assert await again.box.read_file("/work/repo/a", 10) == b"1"


@pytest.mark.parametrize("steps", range(0, 12, 2))
async def test_a_restore_whose_caller_goes_away_ends_the_old_box(parts, steps):
    runtime, states, manager = parts
    state = await small_state(runtime, states)
    sandbox = await manager.create(state.id)
    task = asyncio.create_task(manager.restore(sandbox.id, state.id))
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await manager.restore(sandbox.id, state.id)
    assert list(runtime._boxes) == [sandbox.box.id]
    await manager.delete(sandbox.id)
    assert states._used == {}


async def test_a_deletion_whose_caller_goes_away_is_finished(parts):
    runtime, _, _ = parts
    box = await runtime.create([], limits=Limits())
    task = await begun(box.delete())
    task.cancel()
    await box.delete()
    await runtime.settle()
    assert runtime._boxes == {}
    assert not (await runtime.orphans())["directory"]


async def test_a_fork_may_use_the_last_places(parts):
    runtime, states, manager = parts
    sandbox = await manager.create((await small_state(runtime, states)).id)
    refused: list[Exception] = []

    async def create_when_one_has_come() -> None:
        while len(manager.list()) < 2:  # noqa: ASYNC110  (nothing tells when a fork has come)
            await asyncio.sleep(0)
        try:
            await manager.create(sandbox.state_id)
        except ResourceExhausted as error:
            refused.append(error)

    other = asyncio.create_task(create_when_one_has_come())
    _, forks = await manager.fork(sandbox.id, 2)
    await other
    assert len(forks) == 2
    assert refused == []
    assert len(manager.list()) == 4


async def test_limits_that_cannot_be_set_leave_no_seat_behind(parts):
    runtime, _, _ = parts
    if runtime.cgroups.name == "rlimit":
        pytest.skip("without cgroups no processor limit is set")
    await (await runtime.create([], limits=Limits())).delete()
    await runtime.settle()
    before = len(os.listdir("/proc/self/fd")), _groups(runtime)
    for _ in range(6):
        with pytest.raises(ValueError, match="NaN"):
            await runtime.create([], limits=Limits(cpus=float("nan")))
    await runtime.settle()
    assert len(os.listdir("/proc/self/fd")) <= before[0] + 3
    assert _groups(runtime) <= before[1] + 1


async def test_a_seat_that_is_not_made_leaves_no_group(parts):
    runtime, _, _ = parts
    task = await begun(runtime._seats._make())
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.gather(*runtime._seats._undoing)
    assert _groups(runtime) <= 1


async def test_a_glob_is_checked_before_anything_runs(parts):
    from sandbox_svc import files

    runtime, _, _ = parts
    box = await runtime.create([], limits=Limits())
    with pytest.raises(InvalidArgument, match="glob"):
        await files.find_text(box, "x", "/", "*" * 300)


async def test_a_layer_that_is_gone_is_named_and_is_no_sandbox(parts, tmp_path):
    runtime, states, manager = parts
    state = await small_state(runtime, states)
    layer = state.layers[-1]
    (tmp_path / "home" / "layers" / layer).rename(tmp_path / "home" / "elsewhere")
    with pytest.raises(FailedPrecondition, match=f"layer {layer} is not on this host"):
        await manager.create(state.id)
    assert not manager.list()
    (tmp_path / "home" / "elsewhere").rename(tmp_path / "home" / "layers" / layer)
    assert (await manager.create(state.id)).layers == state.layers


async def test_a_freeze_over_a_layer_that_is_gone_names_it_and_leaves_no_trash(parts, tmp_path):
    runtime, states, manager = parts
    state = await small_state(runtime, states)
    box = (await manager.create(state.id)).box
    layer = tmp_path / "home" / "layers" / state.layers[-1]
    layer.rename(tmp_path / "home" / "elsewhere")
    with pytest.raises(FailedPrecondition, match=f"layer {layer.name} is not on this host"):
        await box.freeze()
    await runtime.settle()
    assert not list((tmp_path / "home" / "trash").iterdir())


def _groups(runtime) -> int:
    """Control groups that sandboxes and warm seats have."""
    groups: dict[str, Path] = getattr(runtime.cgroups, "_groups", {})
    return max((sum(e.is_dir() for e in path.iterdir()) for path in groups.values()), default=0)

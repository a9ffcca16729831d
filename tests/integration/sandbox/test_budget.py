"""The disk budget of states: who goes first, and who never goes."""

import asyncio

import pytest

from sandbox_svc.backends.base import Limits
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.builders.base import Prepared
from sandbox_svc.sandboxes import Manager
from sandbox_svc.states import StateStore
from sandbox_svc.upkeep import Upkeep, UpkeepLimits

_BIG = 1 << 20


class Clock:
    """Time that passes when it is told to."""

    now = 1_000_000.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


async def prepared(states: StateStore, runtime: EmbeddedRuntime, number: int, size: int = _BIG):
    """A State with one file of a size."""

    async def build(progress):
        box = await runtime.create([], limits=Limits())
        await box.write_file("/work/repo/big", b"x" * size)
        layer = await box.freeze()
        await box.delete()
        return Prepared((layer,), (), {}, {})

    return await states.prepare(f"{number}" * 64, build)


async def kept_up(upkeep: Upkeep) -> None:
    """One round of upkeep."""
    await upkeep.start()
    await asyncio.wait_for(upkeep.settled(), 30.0)
    await upkeep.close()


@pytest.fixture
async def opened(tmp_path):
    """A clock, a runtime, and the store of its states."""
    clock = Clock()
    runtime = EmbeddedRuntime(tmp_path / "home", run_probes=False, warm_seats=0)
    await runtime.start()
    states = StateStore(tmp_path / "home", runtime, clock=clock)
    await states.open()
    yield clock, runtime, states
    await states.close()
    await runtime.close()


async def test_a_budget_drops_what_was_used_least_recently_and_spares_what_is_in_use(opened):
    clock, runtime, states = opened
    manager = Manager(runtime, states, clock=clock)

    async def kept(budget: int, grace_s: float) -> set[str]:
        limits = UpkeepLimits(state_bytes=budget, snapshot_grace_s=grace_s)
        await kept_up(Upkeep(states, runtime, manager.stood_on, clock, limits))
        return {state.id for state in states.list()}

    parent, old, used, young = [await prepared(states, runtime, number) for number in range(1, 5)]
    box = await manager.create(parent.id, ttl_s=86_000.0)
    await box.box.write_file("/work/repo/more", b"y" * _BIG)
    snapshot = await manager.snapshot(box.id)
    everything = {parent.id, old.id, used.id, young.id, snapshot.id}
    clock.now += 100.0
    other = await manager.create(used.id, ttl_s=86_000.0)
    await manager.delete(other.id)

    assert await kept(0, 0.0) == everything, "no budget, nothing goes"
    assert await kept(64 << 20, 0.0) == everything, "below the budget nothing goes"
    # One prepared state too many: the one that was used least recently, not the parent of a
    # sandbox, though that one is older.
    assert await kept(4 * _BIG + _BIG // 2, 0.0) == everything - {old.id}
    assert await kept(3 * _BIG + _BIG // 2, 0.0) == {parent.id, used.id, snapshot.id}
    clock.now += 100.0
    # The sandbox stands on both that are left besides.
    assert await kept(1, 0.0) == {parent.id, snapshot.id}
    assert (await box.box.read_file("/work/repo/big", 2 * _BIG))[:1] == b"x"
    await manager.delete(box.id)
    # The snapshot is young, and while it stands its parent's layers free nothing.
    assert await kept(1, 10_000.0) == {parent.id, snapshot.id}
    clock.now += 20_000.0
    assert await kept(_BIG + _BIG // 2, 10_000.0) == {parent.id}
    assert await kept(1, 10_000.0) == set()
    assert await runtime.layers() == []
    await manager.close()


async def test_the_time_of_use_survives_a_restart(opened, tmp_path):
    clock, runtime, states = opened

    state = await prepared(states, runtime, 1)
    await states.close()
    clock.now += 500.0
    states.runnable(state.id)
    again = StateStore(tmp_path / "home", runtime, clock=clock)
    await again.open()
    assert abs(again.used_s(again.get(state.id)) - clock.now) < 5.0
    await again.close()


async def test_what_is_shared_with_layers_that_went_counts_in_full_at_once(opened):
    """Files with several names count in parts: what goes leaves its part to the others."""
    clock, runtime, states = opened

    sizes = (2 * _BIG, 2 * _BIG, _BIG)
    first, second, third = [
        await prepared(states, runtime, number, size) for number, size in enumerate(sizes, 1)
    ]
    files = [runtime.layout.layer(one.layers[0]) / "work/repo/big" for one in (first, second)]
    files[1].unlink()
    files[1].hardlink_to(files[0])
    clock.now += 100.0
    limits = UpkeepLimits(state_bytes=2 * _BIG + _BIG // 2)
    await kept_up(Upkeep(states, runtime, set, clock, limits))
    assert [state.id for state in states.list()] == [third.id]


async def test_states_of_one_installation_go_together(opened):
    clock, runtime, states = opened
    one = await prepared(states, runtime, 1)
    clock.now += 100.0

    async def build(progress):
        return Prepared(one.layers, (), {}, {})

    two = await states.prepare("2" * 64, build)
    limits = UpkeepLimits(state_bytes=_BIG // 2)
    await kept_up(Upkeep(states, runtime, set, clock, limits))
    assert {state.id for state in states.list()} == {one.id, two.id}, "the younger one is in use"
    clock.now += 100.0
    box = await runtime.create(two.layers, limits=Limits())
    states.hold(two.layers)
    await kept_up(Upkeep(states, runtime, set, clock, limits))
    assert {state.id for state in states.list()} == {one.id, two.id}, "a sandbox runs on both"
    await box.delete()
    states.release(two.layers)
    await kept_up(Upkeep(states, runtime, set, clock, limits))
    assert states.list() == []
    assert await runtime.layers() == []

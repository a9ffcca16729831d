"""Many sandboxes asked for at once: only so many start at a time, and nobody waits for all."""

import asyncio

import pytest

from regreen.rpc.errors import NotFound, ResourceExhausted
from sandbox_svc import sandboxes
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.pool import PoolLimits
from sandbox_svc.sandboxes import STARTS_AT_ONCE, Manager
from sandbox_svc.states import StateStore
from tests.fixtures.small_state import small_state

_MANY = 4 * STARTS_AT_ONCE


class Watched(EmbeddedRuntime):
    """Says how many sandboxes start at a time, and can hold them back."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.starting = self.most = self.begun = 0
        self.may_start, self.crowded = asyncio.Event(), asyncio.Event()
        self.may_start.set()
        self.permits = asyncio.Semaphore(1_000_000)

    async def create(self, *args, **kwargs):
        self.starting += 1
        self.begun += 1
        self.most = max(self.most, self.starting)
        if self.starting >= STARTS_AT_ONCE:
            self.crowded.set()
        try:
            await self.may_start.wait()
            await self.permits.acquire()
            return await super().create(*args, **kwargs)
        finally:
            self.starting -= 1


@pytest.fixture
async def parts(tmp_path):
    runtime = Watched(tmp_path / "home", run_probes=False, warm_seats=1)
    await runtime.start()
    states = StateStore(tmp_path / "home", runtime)
    await states.open()
    manager = Manager(runtime, states, pool=PoolLimits(max_sandboxes=2 * _MANY))
    state = await small_state(runtime, states)
    runtime.most = runtime.begun = 0
    yield runtime, states, manager, state
    await manager.close()
    await states.close()
    await runtime.close()


async def test_of_many_at_once_only_so_many_start_and_all_come(parts):
    runtime, _, manager, state = parts
    made = await asyncio.gather(*(manager.create(state.id) for _ in range(_MANY)))
    assert len({sandbox.id for sandbox in made}) == _MANY
    assert runtime.most == STARTS_AT_ONCE


async def test_who_is_refused_waits_for_nobody_who_starts(parts):
    runtime, _, manager, state = parts
    runtime.may_start.clear()
    admitted = [asyncio.create_task(manager.create(state.id)) for _ in range(2 * _MANY)]
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        with pytest.raises(ResourceExhausted) as refused:
            await manager.create(state.id)
    assert refused.value.retry_after_s
    assert runtime.starting == STARTS_AT_ONCE
    for task in admitted[STARTS_AT_ONCE:]:
        task.cancel()
    runtime.may_start.set()
    ended = await asyncio.gather(*admitted, return_exceptions=True)
    assert sum(isinstance(one, asyncio.CancelledError) for one in ended) == len(
        ended[STARTS_AT_ONCE:]
    )
    assert len(manager.list()) == STARTS_AT_ONCE
    await asyncio.gather(*(manager.create(state.id) for _ in range(_MANY)))


async def test_one_does_not_wait_for_all_forks_of_another_call(parts):
    runtime, _, manager, state = parts
    trunk = await manager.create(state.id)
    runtime.permits = asyncio.Semaphore(0)
    forks = asyncio.create_task(manager.fork(trunk.id, _MANY))
    async with asyncio.timeout(20):
        await runtime.crowded.wait()
        single = asyncio.create_task(manager.create(state.id))
        for _ in range(2 * STARTS_AT_ONCE + 1):  # those that start, those in its way, and it
            runtime.permits.release()
        await single
    assert not forks.done()
    for _ in range(_MANY):
        runtime.permits.release()
    _, made = await forks
    assert len(made) == _MANY


async def test_a_state_that_goes_while_its_fork_waits_is_not_found(parts):
    runtime, states, manager, state = parts
    runtime.may_start.clear()
    other = await states.add(state.layers, action="again", parent=state, labels={})
    first = [asyncio.create_task(manager.create(state.id)) for _ in range(STARTS_AT_ONCE)]
    late = asyncio.create_task(manager.create(other.id))
    await runtime.crowded.wait()
    await manager.delete_state(other.id)
    runtime.may_start.set()
    with pytest.raises(NotFound):
        await late
    await asyncio.gather(*first)


async def test_a_burst_of_calls_comes_in_before_it_is_started(parts, monkeypatch):
    monkeypatch.setattr(sandboxes, "_BURST_S", 60.0)
    monkeypatch.setattr(sandboxes, "_GIVE_WAY_S", 1.0)
    runtime, _, manager, state = parts
    calls = [asyncio.create_task(manager.create(state.id)) for _ in range(2 * sandboxes._BURST)]
    await asyncio.sleep(0.7)
    assert runtime.begun == STARTS_AT_ONCE  # which were there before it was a burst
    await asyncio.gather(*calls)
    assert runtime.begun == len(calls)


async def test_a_few_calls_give_way_to_nobody(parts, monkeypatch):
    monkeypatch.setattr(sandboxes, "_BURST_S", 600.0)
    monkeypatch.setattr(sandboxes, "_GIVE_WAY_S", 600.0)
    _, _, manager, state = parts
    async with asyncio.timeout(60):
        await asyncio.gather(*(manager.create(state.id) for _ in range(sandboxes._BURST - 1)))

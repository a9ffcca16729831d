"""Validations in sandboxes that were started ahead say what cold ones say, or are done cold."""

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio

from regreen.lockfile import format_lock, parse_lock
from sandbox_svc import metrics
from sandbox_svc.backends.base import Limits
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.backends.embedded_box import EmbeddedBox
from sandbox_svc.builders.base import FileChange
from sandbox_svc.spares import Miss
from sandbox_svc.state_records import State
from sandbox_svc.states import StateStore
from sandbox_svc.validate import Outcome, Validation, ValidationOptions, Validator
from sandbox_svc.warm import FUTILE, WarmPool, WarmSettings
from tests.fixtures.tasks.tiny_task import FAIL_TO_PASS, tiny_spec
from tests.integration.sandbox_build.suite import FIXED, GREET, open_workshop

pytestmark = pytest.mark.asyncio(loop_scope="module")
WRONG = b"from wordlib import salute\n\n\ndef greeting(name):\n    return f'{salute()} {name}'\n"
NEVER = WarmSettings(check_share=0.0)


@dataclass(frozen=True, slots=True)
class World:
    runtime: EmbeddedRuntime
    states: StateStore
    home: Path
    cold: Validator
    warm: Validator
    pool: WarmPool
    state: State

    async def ready(self) -> None:
        self.pool.warm(self.state)
        await self.pool.settled()

    async def both(self, *changes: FileChange, **options: object) -> tuple[Validation, Validation]:
        """The cold and the warm verdict."""
        chosen = ValidationOptions(**options)  # type: ignore[arg-type]
        await self.ready()
        cold = await self.cold.validate(self.state.id, changes, chosen, skip_cache_lookup=True)
        warm = await self.warm.validate(self.state.id, changes, chosen, skip_cache_lookup=True)
        await self.warm.checked()
        return cold, warm


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    async with open_workshop() as shop:
        runtime, states, home = shop.runtime, shop.states, shop.home
        (home / "made").mkdir()
        spec = tiny_spec(shop.store, home / "made")
        state = await states.prepare(
            spec.digest, lambda p: shop.builder.prepare(spec, runtime, Limits(), p)
        )
        pool = WarmPool(states, runtime, home, settings=NEVER)
        cold, warm = Validator(states, runtime), Validator(states, runtime, warm=pool)
        try:
            yield World(runtime, states, home, cold, warm, pool, state)
        finally:
            await warm.close()
            await pool.close()


def without_times(verdict: Validation) -> Validation:
    """The verdict with all that may differ between two runs made equal."""
    log = re.sub(r"\d+\.\d+s", "TIME", verdict.log)
    log = re.sub(r"=+( .*TIME.* )=+", r"\1", log)
    tests = tuple(replace(test, seconds=0.0) for test in verdict.tests)
    return replace(verdict, seconds=0.0, warm=False, tests=tests, log=log)


def misses(why: Miss) -> float:
    return metrics.WARM_MISSES.labels(why.value)._value.get()


SAME = {
    "nothing": [],
    "the fix": [FileChange(GREET, FIXED)],
    "a wrong fix": [FileChange(GREET, WRONG)],
    "no syntax": [FileChange(GREET, b"def greeting(:\n")],
    "another import order": [FileChange(GREET, b"import pdb\nimport xml.etree\n" + FIXED)],
    "a deleted module": [FileChange(GREET, None)],
    "sitecustomize": [FileChange("sitecustomize.py", b"import os\nos._exit(0)\n")],
    "conftest": [FileChange("greet/conftest.py", b"import os\nos._exit(0)\n")],
    "a path file": [FileChange("evil.pth", b"import os; os._exit(0)\n")],
    "a shadowing module": [FileChange("wordlib.py", b"def hello():\n    return 'Hello'\n")],
    "exit": [FileChange(GREET, b"import os\nos._exit(0)\n")],
    "a replaced runner": [
        FileChange(
            GREET,
            b"import sys\nsys.modules['_pytest.python'].Function.runtest = lambda self: None\n"
            b"def greeting(name):\n    return ''\n",
        )
    ],
}


@pytest.mark.parametrize("name", SAME)
async def test_warm_verdicts_are_those_of_cold_runs(world: World, name: str) -> None:
    cold, warm = await world.both(*SAME[name])
    assert warm.warm or name == "another import order"
    assert without_times(warm) == without_times(cold)
    assert (cold.outcome is Outcome.PASSED) == (name in ("the fix", "another import order"))


async def test_what_could_matter_is_run_cold(world: World) -> None:
    lock = parse_lock(world.state.metadata["lock"]).with_pin("wordlib", "1.0")
    pinned = FileChange("requirements.lock", format_lock(lock).encode())
    fixed = FileChange(GREET, FIXED)
    cases: list[tuple[Miss, list[FileChange], dict[str, object]]] = [
        (Miss.LOCK, [pinned], {}),
        (Miss.SOURCE, [fixed, FileChange("brand_new.py", b"x = 1\n")], {}),
        (Miss.SOURCE, [fixed, FileChange("brand_new/inner.py", b"x = 1\n")], {}),
        (Miss.SOURCE, [fixed, FileChange("matplotlibrc", b"backend: agg\n")], {}),
        (Miss.OPTIONS, [fixed], {"coverage": True}),
        (Miss.OPTIONS, [fixed], {"seed": 7}),
    ]
    for why, changes, options in cases:
        before = misses(why)
        cold, warm = await world.both(*changes, **options)
        assert misses(why) == before + 1
        assert (warm.warm, warm.outcome) == (False, Outcome.PASSED)
        assert without_times(warm) == without_times(cold)


KEEPS = b"""
import builtins, os, subprocess, sys
PLACES = ("/tmp/seen", "/work/home/seen", "/work/repo/seen", "/dev/shm/seen")
found = [p for p in PLACES if os.path.exists(p)] + [n for n in ("seen",) if hasattr(builtins, n)]
others = subprocess.run(["pgrep", "-c", "sleep"], capture_output=True).stdout.decode().strip()
for place in PLACES:
    open(place, "w").close()
builtins.seen = True
os.environ["SEEN"] = "1"
subprocess.Popen(["sleep", "1000"], start_new_session=True)
def greeting(name):
    if found or others not in ("0", ""):
        return f"{found} {others}"
    return f"Hello, {name}!"
"""


async def test_hostile_code_keeps_nothing_from_one_validation_to_the_next(world: World) -> None:
    for _ in range(3):
        _, warm = await world.both(FileChange(GREET, KEEPS))
        assert warm.warm
        assert warm.outcome is Outcome.PASSED, warm.log


def interpreter(box: EmbeddedBox) -> int:
    """The process that waits in a sandbox, as this host numbers it."""
    assert box._seat is not None
    first = box._seat.pid
    children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
    return int(children[0])


@pytest.mark.parametrize("victim", ["interpreter", "first process"])
async def test_a_killed_warm_process_costs_nothing_but_time(world: World, victim: str) -> None:
    await world.ready()
    (spare,) = world.pool._hot[world.state.id].spares
    assert isinstance(spare.box, EmbeddedBox)
    assert spare.box._seat is not None
    pid = interpreter(spare.box) if victim == "interpreter" else spare.box._seat.pid
    os.kill(pid, signal.SIGKILL)
    assert spare._run is not None
    await asyncio.wait([spare._run])
    changes = [FileChange(GREET, FIXED)]
    verdict = await world.warm.validate(world.state.id, changes, skip_cache_lookup=True)
    assert (verdict.warm, verdict.outcome) == (False, Outcome.PASSED)
    _, again = await world.both(*changes)
    assert again.warm
    world.pool._hot[world.state.id].deaths = 0


async def test_a_run_that_is_killed_is_done_again_cold(world: World) -> None:
    before = misses(Miss.ENDED)
    cold, warm = await world.both(FileChange(GREET, b"import os\nos.kill(os.getpid(), 9)\n"))
    assert misses(Miss.ENDED) == before + 1
    assert without_times(warm) == without_times(cold)
    assert not warm.lasting


async def test_out_of_memory_is_the_same(world: World) -> None:
    limits = Limits(memory_bytes=160 << 20)
    pool = WarmPool(world.states, world.runtime, world.home, settings=NEVER, limits=limits)
    warm = Validator(world.states, world.runtime, limits=limits, warm=pool)
    cold = Validator(world.states, world.runtime, limits=limits)
    greedy = [FileChange(GREET, b"held = [bytearray(1 << 20) for _ in range(1000)]\n")]
    pool.warm(world.state)
    await pool.settled()
    try:
        assert pool.waiting == 1, pool.why_off(world.state.id)
        one = await cold.validate(world.state.id, greedy)
        two = await warm.validate(world.state.id, greedy)
        assert one.outcome is Outcome.FAILED
        assert without_times(two) == without_times(one)
    finally:
        await pool.close()


async def test_time_runs_from_the_request_on(world: World) -> None:
    loop = [FileChange(GREET, b"while True:\n    pass\n")]
    cold, warm = await world.both(*loop, timeout_s=3.0)
    assert warm.warm
    assert (warm.outcome, warm.lasting) == (Outcome.TIMEOUT, False)
    assert (cold.outcome, cold.summary) == (warm.outcome, warm.summary)
    assert 3.0 <= warm.seconds < 30.0


KNOWS = b"""
import gc
ahead = any(type(o).__name__ == "Shelf" for o in gc.get_objects())
def greeting(name):
    return f"Hello, {name}!" if ahead else "cold"
"""


async def test_a_verdict_that_a_cold_run_contradicts_ends_warmth_for_good(world: World) -> None:
    state = replace(world.state, id="st_knows")
    world.states.record(state)
    pool = WarmPool(world.states, world.runtime, world.home, settings=NEVER)
    validator = Validator(world.states, world.runtime, warm=pool)
    changes, before = [FileChange(GREET, KNOWS)], metrics.WARM_MISMATCHES._value.get()
    try:
        pool.warm(state)
        await pool.settled()
        first = await validator.validate(state.id, changes)
        assert (first.warm, first.outcome) == (True, Outcome.PASSED)
        await validator.checked()
        assert metrics.WARM_MISMATCHES._value.get() == before + 1
        kept = await validator.validate(state.id, changes)
        assert (kept.cached, kept.warm, kept.outcome) == (True, False, Outcome.FAILED)
        again = WarmPool(world.states, world.runtime, world.home, settings=NEVER)
        assert "differed" in again.why_off(state.id)
        again.warm(state)
        assert not again._hot
    finally:
        await validator.close()
        await pool.close()


async def test_a_check_that_stops_early_is_no_whole_verdict(world: World) -> None:
    state = replace(world.state, id="st_stops")
    world.states.record(state)
    pool = WarmPool(world.states, world.runtime, world.home, settings=NEVER)
    validator = Validator(world.states, world.runtime, warm=pool)
    changes, early = [FileChange(GREET, KNOWS)], ValidationOptions(stop_early=True)
    try:
        pool.warm(state)
        await pool.settled()
        first = await validator.validate(state.id, changes, early)
        assert (first.warm, first.partial, first.outcome) == (True, False, Outcome.PASSED)
        await validator.checked()
        kept = await validator.validate(state.id, changes, early)
        assert (kept.cached, kept.partial, kept.outcome) == (True, True, Outcome.FAILED)
        whole = await validator.validate(state.id, changes)
        assert (whole.cached, whole.partial, whole.outcome) == (False, False, Outcome.FAILED)
    finally:
        await validator.close()
        await pool.close()


async def test_a_sample_is_checked(world: World) -> None:
    drawn = iter([0.9, 0.01, 0.9])
    settings = WarmSettings(check_share=0.05)
    pool = WarmPool(
        world.states, world.runtime, world.home, settings=settings, chance=lambda: next(drawn)
    )
    pool.warm(world.state)
    checks = [pool.wants_check(world.state.id) for _ in range(4)]
    assert checks == [True, False, True, False]
    await pool.close()


async def test_states_used_longest_ago_give_way_and_memory_is_bounded(world: World) -> None:
    other = replace(world.state, id="st_other")
    world.states.record(other)
    snapshot = replace(world.state, id="st_snapshot", parent_id=world.state.id)
    before = len(world.runtime._boxes)
    pool = WarmPool(
        world.states, world.runtime, world.home, settings=WarmSettings(states=1, spares=2)
    )
    pool.warm(world.state)
    await pool.settled()
    assert pool.waiting == 2
    pool.warm(other)
    await pool.settled()
    assert (list(pool._hot), pool.waiting) == ([other.id], 2)
    pool.warm(snapshot)
    assert pool.why_off(snapshot.id)
    await pool.drop(other.id)
    assert (pool.waiting, len(world.runtime._boxes)) == (0, before)
    await pool.close()
    small = WarmPool(
        world.states, world.runtime, world.home, settings=WarmSettings(memory_bytes=1 << 20)
    )
    small.warm(world.state)
    await small.settled()
    assert "memory" in small.why_off(world.state.id)
    await small.close()
    assert len(world.runtime._boxes) == before


async def test_closing_while_it_warms_leaves_nothing(world: World) -> None:
    before = len(world.runtime._boxes)
    pool = WarmPool(world.states, world.runtime, world.home, settings=NEVER)
    pool.warm(world.state)
    learning = pool._hot[world.state.id].refill
    assert learning is not None
    await asyncio.wait([learning], timeout=0.5)
    await pool.close()
    assert len(world.runtime._boxes) == before
    assert pool.waiting == 0


async def test_the_second_validation_makes_a_state_warm(world: World) -> None:
    pool = WarmPool(world.states, world.runtime, world.home, settings=NEVER)
    validator = Validator(world.states, world.runtime, warm=pool)
    changes = [[], [FileChange(GREET, b"1 / 0\n")], [FileChange(GREET, b"2 / 0\n")]]
    try:
        for number in range(2):
            verdict = await validator.validate(world.state.id, changes[number])
            assert not verdict.warm
            assert bool(pool._hot) == (number == 1)
        await pool.settled()
        verdict = await validator.validate(world.state.id, changes[2])
        assert verdict.warm
        assert set(verdict.failing) == set(FAIL_TO_PASS)
    finally:
        await validator.close()
        await pool.close()


async def test_independent_looks_make_no_state_warm_and_use_one_that_is(world: World) -> None:
    pool = WarmPool(world.states, world.runtime, world.home, settings=NEVER)
    validator = Validator(world.states, world.runtime, warm=pool)
    try:
        for _ in range(3):
            verdict = await validator.validate(world.state.id, (), skip_cache_lookup=True)
            assert not verdict.warm
        assert not pool._hot
        pool.warm(world.state)
        await pool.settled()
        verdict = await validator.validate(world.state.id, (), skip_cache_lookup=True)
        assert verdict.warm
    finally:
        await validator.close()
        await pool.close()


@pytest.mark.parametrize("useful", [False, True])
async def test_a_state_whose_runs_are_all_done_anew_stays_cold(world: World, useful: bool) -> None:
    pool = WarmPool(world.states, world.runtime, world.home, settings=NEVER)
    try:
        pool.warm(world.state)
        pool.went(world.state.id, None if useful else Miss.SOURCE)
        for _ in range(FUTILE):
            assert not pool.why_off(world.state.id)
            pool.went(world.state.id, Miss.ANEW)
        why = pool.why_off(world.state.id)
        assert why == ("" if useful else "its runs have to be done anew")
    finally:
        await pool.close()

"""What it means for a verdict that the sandbox of a run has ended: by itself, or from outside."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest
import pytest_asyncio

from regreen.rpc.errors import InfraError
from sandbox_svc.backends.base import Command, ExecResult, Limits
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.backends.embedded_box import EmbeddedBox
from sandbox_svc.builders.base import FileChange
from sandbox_svc.builders.written import doubts
from sandbox_svc.validate import Outcome, ValidationOptions, Validator
from sandbox_svc.warm import WarmPool
from tests.fixtures.tasks.tiny_task import FAIL_TO_PASS
from tests.integration.sandbox_build.suite import FIX, GREET, Suite, open_suite
from tests.integration.sandbox_build.test_warm import NEVER

pytestmark = pytest.mark.asyncio(loop_scope="module")
SLOW = FileChange(GREET, FIX.content + b"\n\nimport time\n\ntime.sleep(1)\n")  # type: ignore[operator]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def suite() -> AsyncIterator[Suite]:
    async with open_suite() as found:
        yield found


@dataclass(slots=True)
class Mortal:
    """A runtime whose sandboxes lose their first process as soon as tests run in them."""

    inner: EmbeddedRuntime
    deaths: int
    end: "Callable[[EmbeddedBox], None]"

    async def create(self, layers: object, **more: object) -> object:
        box = await self.inner.create(layers, **more)  # type: ignore[arg-type]
        if layers and self.deaths:
            self.deaths -= 1
            assert isinstance(box, EmbeddedBox)
            return Doomed(box, self.end)
        return box

    def identity(self) -> str:
        return self.inner.identity()

    def disk_is_full(self) -> bool:
        return self.inner.disk_is_full()


@dataclass(slots=True)
class Doomed:
    """A sandbox whose first process ends under the command that has a result channel."""

    inner: EmbeddedBox
    end: "Callable[[EmbeddedBox], None]"

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    async def run(self, command: Command) -> ExecResult:
        if not command.channel:
            return await self.inner.run(command)

        ended = False

        async def end(_stream: str, _chunk: bytes) -> None:
            nonlocal ended
            if not ended:
                self.end(self.inner)
            ended = True

        return await self.inner.run(command, end)


def killed(box: EmbeddedBox) -> None:
    seat = box.seat
    assert seat is not None
    os.kill(seat.pid, signal.SIGKILL)


def confused(box: EmbeddedBox) -> None:
    """Have the first process end by itself: it does so when a request lacks a field."""
    seat = box.seat
    assert seat is not None
    seat.sock.send(b"7\0run\0")


async def test_a_run_that_ends_its_sandbox_twice_has_failed(suite: Suite) -> None:
    mortal = Mortal(suite.runtime, 1, confused)
    validator = Validator(suite.states, mortal)  # type: ignore[arg-type]
    once = await validator.validate(suite.state.id, [FIX])
    assert once.outcome is Outcome.PASSED
    mortal.deaths = 2
    twice = await validator.validate(suite.state.id, [FIX], skip_cache_lookup=True)
    assert (twice.outcome, twice.summary) == (Outcome.FAILED, "the run ended its sandbox, twice")
    assert set(FAIL_TO_PASS) <= set(twice.failing)
    assert (await validator.validate(suite.state.id, [FIX])).cached
    await validator.close()


async def test_a_run_whose_sandbox_is_killed_has_no_verdict(suite: Suite) -> None:
    mortal = Mortal(suite.runtime, 1, killed)
    validator = Validator(suite.states, mortal)  # type: ignore[arg-type]
    once = await validator.validate(suite.state.id, [FIX])
    assert once.outcome is Outcome.PASSED
    for deaths in (2, 5):
        mortal.deaths = deaths
        with pytest.raises(InfraError, match="ended from outside; validate again"):
            await validator.validate(suite.state.id, [FIX], skip_cache_lookup=True)
    ends = iter((confused, killed))
    mortal.deaths, mortal.end = 2, lambda box: next(ends)(box)
    with pytest.raises(InfraError, match="ended from outside"):
        await validator.validate(suite.state.id, [FIX], skip_cache_lookup=True)
    await validator.close()


async def _kill_spawners(runtime: EmbeddedRuntime, times: int, every_s: float) -> int:
    """Kill each spawner that the runtime starts, so many of them; how many it had."""
    seen: set[int] = set()
    while len(seen) < times:
        seats = runtime._seats
        assert seats is not None
        if seats.spawner not in seen:
            await asyncio.sleep(every_s)
            seen.add(seats.spawner)
            os.kill(seats.spawner, signal.SIGKILL)
        await asyncio.sleep(0.005)
    return len(seen)


@pytest.mark.parametrize("every_s", [0.02, 0.15, 0.4, 0.9])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
async def test_killed_spawners_are_no_verdict_however_many(
    suite: Suite, every_s: float, *, warm: bool
) -> None:
    ahead = None
    if warm:
        ahead = WarmPool(suite.states, suite.runtime, suite.home, settings=NEVER, limits=Limits())
        ahead.warm(suite.state)
        await ahead.settled()
    validator = Validator(suite.states, suite.runtime, warm=ahead)
    options = ValidationOptions(repeat=2)
    killing = asyncio.create_task(_kill_spawners(suite.runtime, 6, every_s))
    passed = troubles = 0
    try:
        while not killing.done():
            try:
                verdict = await validator.validate(
                    suite.state.id, [SLOW], options, skip_cache_lookup=True
                )
            except InfraError:
                troubles += 1
                continue
            passed += 1
            assert verdict.outcome is Outcome.PASSED, verdict.summary
        assert await killing == 6
        assert troubles >= 1, passed
        last = await validator.validate(suite.state.id, [SLOW], options)
        assert last.outcome is Outcome.PASSED
        assert last.cached == bool(passed)
    finally:
        killing.cancel()
        await validator.close()
        if ahead is not None:
            await ahead.close()


@pytest.mark.parametrize("lost", ["fresh", "later", "own"])
async def test_a_run_is_not_disbelieved_for_a_fork_that_was_lost(suite: Suite, lost: str) -> None:
    state = await suite.prepared(lost, {"tests/words.txt": "one\n"})

    async def forked() -> EmbeddedBox:
        return await suite.runtime.create(state.layers, limits=Limits(), mounts=state.mounts)

    dies = False

    @contextlib.asynccontextmanager
    async def pristine() -> AsyncIterator[EmbeddedBox]:
        fresh = await forked()
        if dies and lost == "fresh":
            await _kill(fresh)
        if dies and lost == "later":
            fresh = Later(fresh)  # type: ignore[assignment]
        try:
            yield fresh
        finally:
            await fresh.delete()

    box = await forked()
    try:
        for path, script in (
            ("tests/words.txt", "echo one > tests/words.txt"),
            ("test_greet", "ln -s greet test_greet"),
        ):
            assert (await box.run(Command(("sh", "-c", script), cwd="/work/repo"))).ok
            assert (path in await doubts(box, state.metadata, pristine)) == (path == "test_greet")
        dies = True
        if lost == "own":
            await _kill(box)
        else:
            assert (await box.run(Command(("rm", "test_greet"), cwd="/work/repo"))).ok
        with pytest.raises(InfraError):
            await doubts(box, state.metadata, pristine)
    finally:
        await box.delete()


@dataclass(slots=True)
class Later:
    """A fork that is lost once it was asked which files it has."""

    inner: EmbeddedBox

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    async def run(self, command: Command) -> ExecResult:
        result = await self.inner.run(command)
        await _kill(self.inner)
        return result


async def _kill(box: EmbeddedBox) -> None:
    """Kill the first process of a sandbox, and wait until the service knows."""
    killed(box)
    with contextlib.suppress(InfraError):
        while True:
            await box.run(Command(("true",), cwd="/"))

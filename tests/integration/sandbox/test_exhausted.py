"""A service without descriptors: it says so, answers nothing wrong and loses nothing."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from regreen.rpc.errors import ResourceExhausted
from sandbox_svc import diffs
from sandbox_svc.backends.base import Command, Limits, TerminalSize
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.sandbox import Sandbox
from sandbox_svc.sandboxes import Manager
from sandbox_svc.state_records import State
from sandbox_svc.states import StateStore
from tests.integration.sandbox.test_embedded_commands import only, opened

pytestmark = pytest.mark.asyncio(loop_scope="module")
_MOST = 24
"""With so many descriptors everything goes."""
_REMEDY = "; delete sandboxes, or start the service with a higher limit of open files than "


@dataclass(slots=True)
class Place:
    runtime: EmbeddedRuntime
    states: StateStore
    manager: Manager
    state: State


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place(tmp_path_factory) -> AsyncIterator[Place]:
    home: Path = tmp_path_factory.mktemp("exhausted")
    runtime = EmbeddedRuntime(home / "home", run_probes=False, warm_seats=0)
    await runtime.start()
    states = StateStore(home / "home", runtime)
    await states.open()
    box = await runtime.create([], limits=Limits())
    await box.write_file("/work/repo/first", b"first\n")
    state = await states.add([await box.freeze()], action="first")
    await box.delete()
    manager = Manager(runtime, states)
    yield Place(runtime, states, manager, state)
    await manager.close()
    await states.close()
    await runtime.close()


async def _snapshot(place: Place, sandbox: Sandbox) -> None:
    made = await place.manager.snapshot(sandbox.id)
    assert place.states.get(made.id).layers == sandbox.layers


async def _fork(place: Place, sandbox: Sandbox) -> None:
    _, forks = await place.manager.fork(sandbox.id, 1)
    for fork in forks:
        assert await fork.box.read_file("/work/repo/kept", 100) == b"kept\n"
        await place.manager.delete(fork.id)


async def _diff(place: Place, sandbox: Sandbox) -> None:
    found = await diffs.diff(place.manager, sandbox.id)
    assert {c.path: c.content for c in found.changes} == {"kept": b"kept\n", "d/e/f": b"deep\n"}


async def _changed(place: Place, sandbox: Sandbox) -> None:
    base = len(place.state.layers)
    found = await sandbox.box.changed_paths("/work/repo", since=base)
    assert set(found) == {"/work/repo/kept", "/work/repo/d/e/f"}


async def _measure(place: Place, sandbox: Sandbox) -> None:
    assert (await sandbox.box.measure()).whole  # else it is ended for the limit of its disk


async def _read(place: Place, sandbox: Sandbox) -> None:
    assert await sandbox.box.read_file("/work/repo/kept", 100) == b"kept\n"


async def _write(place: Place, sandbox: Sandbox) -> None:
    await sandbox.box.write_file("/work/repo/kept", b"kept\n")


async def _run(place: Place, sandbox: Sandbox) -> None:
    large = {"LARGE": "x" * 100_000}  # a request of this size takes a descriptor
    done = await sandbox.box.run(Command(("cat", "kept"), cwd="/work/repo", env=large))
    assert done.stdout.text == "kept\n"


async def _terminal(place: Place, sandbox: Sandbox) -> None:
    command = Command(("echo", "kept"), cwd="/", terminal=TerminalSize(rows=24, columns=80))
    process = await sandbox.box.start(command)
    await process.wait()
    assert process.stdout.read(0, 100) == (0, b"kept\r\n")


async def _create(place: Place, sandbox: Sandbox) -> None:
    made = await place.manager.create(place.state.id)
    await place.manager.delete(made.id)


async def _restore(place: Place, sandbox: Sandbox) -> None:
    other = await place.manager.create(place.state.id)
    await place.manager.restore(other.id, place.state.id)
    await place.manager.delete(other.id)


_CALLS = (_snapshot, _fork, _diff, _changed, _measure, _read, _write, _run, _terminal, _create)


@pytest.mark.parametrize("call", [*_CALLS, _restore], ids=lambda call: call.__name__)
async def test_what_takes_descriptors_is_refused_without_and_loses_nothing(place: Place, call):
    sandbox = await place.manager.create(place.state.id)
    script = "echo kept > kept; mkdir -p d/e; echo deep > d/e/f; sleep 60 & exit 0"
    if call in (_diff, _changed):  # an upper over a layer of its own
        await sandbox.box.run(Command(("sh", "-c", "echo was > kept"), cwd="/work/repo"))
        await place.manager.snapshot(sandbox.id)
        sandbox.state_id = place.state.id
    await sandbox.box.run(Command(("sh", "-c", script), cwd="/work/repo"))
    ended, refusals = [], set()
    for spare in range(_MOST):
        with only(spare):
            try:
                await call(place, sandbox)
                ended.append(True)
            except ResourceExhausted as refusal:
                ended.append(False)
                refusals.add((refusal.retry_after_s, _REMEDY in refusal.message))
        assert await sandbox.box.read_file("/work/repo/kept", 100) == b"kept\n"
        await place.runtime.settle()
    assert ended[-1], ended
    assert not ended[0], ended
    assert refusals == {(1.0, True)}
    done = await sandbox.box.run(Command(("cat", "kept", "d/e/f", "first"), cwd="/work/repo"))
    assert done.stdout.text == "kept\ndeep\nfirst\n"
    await place.manager.snapshot(sandbox.id)
    await place.manager.delete(sandbox.id)


async def test_nothing_is_left_open(place: Place):
    before = opened()
    for spare in range(_MOST):
        sandbox = await place.manager.create(place.state.id)
        with only(spare), contextlib.suppress(ResourceExhausted):
            await place.manager.fork(sandbox.id, 2)
        for left in place.manager.list():
            await place.manager.delete(left.id)
        await place.runtime.settle()
    kept = place.runtime._seats
    assert kept is not None
    assert opened() - sum(each.network >= 0 for each in kept._kept) <= before

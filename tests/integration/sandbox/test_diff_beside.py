"""A diff beside what takes a sandbox's files from under it: right, or asked to come again.

- Snapshot, restore and deletion may come at any moment of a diff; none is the platform's trouble.
- A diff that is answered is whole: it says what one of the contents that the sandbox had would say.
"""

import asyncio
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter

import pytest

from regreen.rpc.errors import InfraError, NotFound, RegreenError, Unavailable
from sandbox_svc.backends import uppers
from sandbox_svc.backends.embedded import EmbeddedRuntime
from tests.contract.runtimes import SMALL, started
from tests.integration.sandbox.overlay import prepared

_FILES = 40
_FILL = f"mkdir -p d && for i in $(seq {_FILES}); do echo {{0}} > d/f$i; done"


async def _diffs(
    sandboxes, box: str, over: asyncio.Event, found: Counter[int | str], *, to_end: bool
) -> None:
    """Ask for the diff again and again, and count what it says; `to_end`: until it is not found."""
    while to_end or not over.is_set():
        try:
            changes = (await sandboxes.diff(box)).changes
        except RegreenError as error:
            found[type(error).__name__] += 1
            if isinstance(error, NotFound):
                return
            if not isinstance(error, Unavailable):
                raise
            continue
        found[len(changes)] += 1


async def _beside(sandboxes, box: str, work, *, to_end: bool = False) -> Counter[int | str]:
    found, over = Counter[int | str](), asyncio.Event()
    diffs = [
        asyncio.create_task(_diffs(sandboxes, box, over, found, to_end=to_end)) for _ in range(3)
    ]
    try:
        await work()
    finally:
        over.set()
        await asyncio.gather(*diffs)
    return found


async def test_beside_snapshots_it_is_whole_or_asked_again(service):
    states, sandboxes, _ = service
    state = await prepared(states, a="1")
    box = (await sandboxes.create_sandbox(state.id)).id
    await sandboxes.run(box, ["sh", "-c", _FILL.format(1)])

    moments = random.Random(1)

    async def freeze() -> None:
        for _ in range(15):
            await sandboxes.snapshot_sandbox(box)
            await asyncio.sleep(moments.random() * 0.02)

    found = await _beside(sandboxes, box, freeze)
    assert set(found) <= {_FILES, "Unavailable"}
    assert found[_FILES] > 0
    assert len((await sandboxes.diff(box)).changes) == _FILES


async def test_beside_restores_it_is_that_of_one_state(service):
    states, sandboxes, _ = service
    few, many = await prepared(states, a="1"), await prepared(states, a="1")
    box = (await sandboxes.create_sandbox(few.id)).id
    await sandboxes.run(box, ["sh", "-c", _FILL.format(1)])
    many = await sandboxes.snapshot_sandbox(box)

    async def restore() -> None:
        for _ in range(10):
            for state in (few, many):
                await sandboxes.restore_sandbox(box, state.id)
                await sandboxes.run(box, ["sh", "-c", _FILL.format(2)])

    found = await _beside(sandboxes, box, restore)
    assert "NotFound" not in found
    assert found["Unavailable"] < sum(found.values())
    assert (await sandboxes.diff(box)).changes


@pytest.mark.parametrize("moment_s", [0.0, 0.002, 0.005, 0.01, 0.02])
async def test_beside_a_deletion_it_ends_in_not_found(service, moment_s):
    states, sandboxes, _ = service
    state = await prepared(states, a="1")
    for _ in range(4):
        box = (await sandboxes.create_sandbox(state.id)).id
        await sandboxes.run(box, ["sh", "-c", _FILL.format(1)])

        async def delete(box: str = box) -> None:
            await asyncio.sleep(moment_s)  # a moment of its own for each case, not a wait
            await sandboxes.delete_sandbox(box)

        found = await _beside(sandboxes, box, delete, to_end=True)
        assert found["NotFound"] == 3
        assert set(found) <= {_FILES, "Unavailable", "NotFound"}


@pytest.mark.parametrize(
    ("event", "answer"),
    [
        ("nothing", None),
        ("freeze", Unavailable),
        ("delete", Unavailable),
        ("loss", InfraError),
    ],
)
async def test_what_a_walk_answers_says_who_took_the_files(tmp_path, monkeypatch, event, answer):
    """The walk begins when the event is over, as it may when all threads are busy."""
    go, changed = threading.Event(), uppers.changed

    def later(*given):
        assert go.wait(30.0)
        return changed(*given)

    monkeypatch.setattr(uppers, "changed", later)
    async with started("embedded", tmp_path / "home") as runtime:
        box = await runtime.create([], limits=SMALL)
        await box.write_file("/work/repo/a", b"1")
        walk = asyncio.create_task(box.changed_paths("/work/repo"))
        await asyncio.sleep(0)  # it has chosen what to walk
        if event == "freeze":
            await box.freeze()
        elif event == "delete":
            await box.delete()
            await runtime.settle()
        elif event == "loss":
            shutil.rmtree(box.upper_path)
        go.set()
        if answer is None:
            assert list(await walk) == ["/work/repo/a"]
        else:
            with pytest.raises(answer):
                await walk
        if event == "freeze":
            assert list(await box.changed_paths("/work/repo")) == ["/work/repo/a"]


class _Held(EmbeddedRuntime):
    """Can hold the next first process where it has not made its upper yet."""

    hold = False

    def specification(self, box, seat):
        """What the seat is told; held before, it finds nothing where its upper is to be."""
        if self.hold:
            upper = self.layout.box(seat.name) / "u"
            while not upper.exists():
                time.sleep(0.001)
            os.kill(seat.pid, signal.SIGSTOP)
            upper.rename(upper.with_name("later"))
            self.held = seat, upper
            self.reached.set()
        return super().specification(box, seat)


async def test_beside_a_freeze_whose_next_upper_is_not_made_yet_it_is_asked_again(tmp_path):
    runtime = _Held(tmp_path / "home", run_probes=False, warm_seats=0)
    runtime.reached = asyncio.Event()
    await runtime.start()
    box = await runtime.create([], limits=SMALL)
    try:
        await box.write_file("/work/repo/made", b"1")
        runtime.hold = True
        freezing = asyncio.create_task(box.freeze())
        await asyncio.wait_for(runtime.reached.wait(), 20)
        runtime.hold = False
        with pytest.raises(Unavailable):
            await box.changed_paths("/work/repo")
        seat, upper = runtime.held
        upper.with_name("later").rename(upper)
        os.kill(seat.pid, signal.SIGCONT)
        await freezing
        assert list(await box.changed_paths("/work/repo")) == ["/work/repo/made"]
    finally:
        await box.delete()
        await runtime.close()

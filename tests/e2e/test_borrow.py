"""A stack that commands borrow: the last one stops it, unless somebody asked for it by name."""

import asyncio
import shutil
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from regreen.stack import control
from regreen.stack.borrow import borrowed_stack
from regreen.stack.layout import Layout
from tests.e2e.conftest import Local


@pytest.fixture
async def layout(local: Local, monkeypatch: pytest.MonkeyPatch):
    """A home of its own with the settings of the common stack."""
    for name, value in local.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("REGREEN_POLICY__ENGINE", "scripted")
    home = Path(tempfile.mkdtemp(prefix="regreen-borrow-"))
    home.chmod(0o711)
    found = Layout(home)
    yield found
    await control.down(found)
    shutil.rmtree(home, ignore_errors=True)


async def serving(layout: Layout) -> bool:
    return {row.state for row in await control.status(layout)} == {"serving"}


async def test_the_last_borrower_stops_the_stack(layout: Layout, local: Local) -> None:
    first, second = AsyncExitStack(), AsyncExitStack()
    async with asyncio.timeout(120):
        await asyncio.gather(
            first.enter_async_context(borrowed_stack(layout)),
            second.enter_async_context(borrowed_stack(layout)),
        )
        assert await serving(layout)
        await first.aclose()
        assert await serving(layout)
        await second.aclose()
    assert not layout.supervised()
    assert not layout.borrowed.exists()

    async with borrowed_stack(layout):
        asked = await asyncio.to_thread(local.cli, "up", home=layout.home)
        assert asked.returncode == 0, asked.stderr
    assert await serving(layout)
    async with borrowed_stack(layout):
        pass
    assert await serving(layout)


async def test_what_a_killed_borrower_left_is_stopped_by_the_next(layout: Layout) -> None:
    await control.up(layout)
    layout.borrowed.touch()
    async with borrowed_stack(layout):
        assert await serving(layout)
    assert not layout.supervised()


async def test_a_borrower_interrupted_at_its_start_leaves_nothing(layout: Layout) -> None:
    for pause_s in (0.0, 0.3, 1.0):
        exits = AsyncExitStack()
        entering = asyncio.create_task(exits.enter_async_context(borrowed_stack(layout)))
        while not layout.supervised():  # noqa: ASYNC110 - locks have no events
            await asyncio.sleep(0.01)
        await asyncio.sleep(pause_s)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        assert not layout.supervised()
        assert not layout.borrowed.exists()

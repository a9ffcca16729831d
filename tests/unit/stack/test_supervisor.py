"""The local stack: reused process ids, starts that fail, the order in which it ends.

- Real processes and a real lock; nothing of ours is replaced.
"""

import asyncio
import fcntl
import json
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from regreen.rpc.errors import FailedPrecondition, InvalidArgument, Unavailable
from regreen.stack import control, supervisor
from regreen.stack.borrow import borrowed_stack
from regreen.stack.layout import SERVICES, Layout
from regreen.stack.supervisor import Supervisor, _Running


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    found = Layout(tmp_path / "home")
    found.make()
    return found


@pytest.fixture
def stranger() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that has nothing to do with the stack."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


async def test_a_description_whose_process_id_was_reused_is_not_believed(layout, stranger):
    layout.lock.touch()
    layout.description.write_text(json.dumps({"pid": stranger.pid, "endpoints": {}}))
    assert control.describe(layout) is None
    assert not await control.down(layout)
    assert stranger.poll() is None


async def test_a_stack_runs_while_its_supervisor_holds_the_lock(layout, stranger):
    layout.description.write_text(json.dumps({"pid": stranger.pid, "endpoints": {}}))
    with layout.lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert control.describe(layout) == {"pid": stranger.pid, "endpoints": {}}
    assert control.describe(layout) is None


async def test_a_stack_is_stopped_however_young_it_is(layout):
    layout.description.write_text("{}")
    with layout.lock.open("a") as looks:
        fcntl.flock(looks, fcntl.LOCK_SH)
        assert control._start(layout, {}, False) is None  # somebody looks: later
    starter = control._start(layout, {}, False)
    assert starter is not None
    assert layout.supervised()
    assert not layout.description.exists()  # the one that was left behind
    assert control._start(layout, {}, False) is None
    assert await control.down(layout)
    assert starter.wait(5) == 0
    assert not layout.supervised()
    assert not await control.down(layout)


async def test_an_interrupted_up_leaves_nothing_running(layout):
    coming = asyncio.create_task(control.up(layout, fixed_ports=False))
    await until(layout.supervised)
    coming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await coming
    assert not layout.supervised()


def test_a_log_that_grew_large_makes_room_for_a_new_one(layout):
    log = layout.log("policy")
    with log.open("a") as service:
        service.write("old\n")
        service.flush()
        supervisor._make_room(log)
        assert log.read_text() == "old\n"
        service.truncate(supervisor._LOG_BYTES + 1)
        supervisor._make_room(log)
        service.write("new\n")
    assert log.read_text() == "new\n"
    assert log.with_suffix(".log.1").stat().st_size == supervisor._LOG_BYTES + 1
    assert control.tail(layout, "policy", 5) == "new"


async def test_a_file_of_the_home_that_cannot_be_opened_is_named(layout):
    layout.lock.mkdir()  # root may write wherever it likes, but not to a directory
    with pytest.raises(InvalidArgument, match=r"cannot be used .*supervisor\.lock"):
        await control.up(layout)
    layout.borrowers.mkdir()
    with pytest.raises(InvalidArgument, match=r"cannot be used .*borrowers\.lock"):
        async with borrowed_stack(layout):
            pass


@pytest.mark.parametrize("home", ["/dev/null/home", "/dev/null", "/proc/home"])
async def test_a_home_that_cannot_be_used_is_named(home):
    with pytest.raises(InvalidArgument, match=f"home: {home} cannot be used"):
        await control.up(Layout(Path(home)))


def script(path: Path, text: str) -> str:
    """An executable shell script."""
    staging = path.with_suffix(".new")
    staging.write_text(f"#!/bin/sh\n{text}\n")
    staging.chmod(staging.stat().st_mode | stat.S_IXUSR)
    staging.rename(path)
    return str(path)


async def until(holds) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - files have no events
            await asyncio.sleep(0.02)


def said(layout: Layout) -> str:
    log = layout.log("supervisor")
    return log.read_text() if log.exists() else ""


async def test_a_service_that_cannot_be_started_now_is_started_later(layout, tmp_path):
    keeper = Supervisor(layout)
    running = _Running(SERVICES[0], [str(tmp_path / "program")])
    keeper._services.append(running)
    watcher = asyncio.create_task(keeper._watch(running))
    await until(lambda: "cannot be started" in said(layout))
    script(tmp_path / "program", "exec sleep 60")
    await until((layout.run / "dataset.pid").exists)
    assert not watcher.done()
    keeper._stop.set()
    await keeper._shut_down([watcher])
    assert running.process is not None
    assert running.process.returncode is not None
    assert not (layout.run / "dataset.pid").exists()


async def test_a_service_that_refuses_its_settings_is_not_started_again(layout, tmp_path):
    keeper = Supervisor(layout)
    argv = [script(tmp_path / "program", f"echo start >> {tmp_path}/starts\nexit 2")]
    await keeper._watch(_Running(SERVICES[2], argv))
    assert (tmp_path / "starts").read_text() == "start\n"
    assert json.loads(layout.description.read_text()) == {"refusing": ["policy"]}
    assert "policy refuses its settings; it is not started again" in said(layout)


async def test_a_running_stack_is_not_asked_for_another(layout, stranger):
    running = {
        **{
            "pid": stranger.pid,
            "fixed_ports": True,
            "arguments": {"policy": ["--engine", "torch"]},
        },
        **{"endpoints": {item.name: "127.0.0.1:9" for item in SERVICES}, "metrics": {}, "http": {}},
    }
    layout.description.write_text(json.dumps(running))
    with layout.lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(
            FailedPrecondition, match=r"--engine torch, not with none; .*regreen down"
        ):
            await control.up(layout, arguments={"policy": []})
        with pytest.raises(FailedPrecondition, match=r"with ports fixed .*regreen down"):
            await control.up(layout, fixed_ports=False)
        with pytest.raises(Unavailable, match="not serving"):  # all the same: it waits for it
            await control.up(layout, fixed_ports=True, timeout_s=0)


async def test_the_database_is_stopped_after_all_others(layout, tmp_path):
    keeper, order = Supervisor(layout), tmp_path / "order"
    for service, pause in zip(SERVICES[:3], ("0", "0.3", "0.1"), strict=True):
        text = (
            f"trap 'sleep {pause}; echo {service.name} >> {order}; exit 0' TERM\n"
            f"touch {tmp_path}/{service.name}.up\nwhile :; do sleep 0.02; done"
        )
        argv = [script(tmp_path / service.name, text)]
        keeper._services.append(_Running(service, argv))
    watchers = [asyncio.create_task(keeper._watch(r)) for r in keeper._services]
    await until(lambda: len(list(tmp_path.glob("*.up"))) == 3)
    keeper._stop.set()
    await keeper._shut_down(watchers)
    assert order.read_text().split() == ["policy", "sandbox", "dataset"]

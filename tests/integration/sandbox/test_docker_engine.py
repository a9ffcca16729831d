"""The Docker runtime where its engine fails, hangs or is cut off: none is left, nobody hangs."""

import asyncio
import threading
import time

import pytest
import pytest_asyncio

from regreen.rpc.errors import (
    FailedPrecondition,
    InfraError,
    InvalidArgument,
    MissingDependency,
    Unavailable,
)
from sandbox_svc.backends.base import Command, EndReason
from sandbox_svc.backends.docker import DockerRuntime
from sandbox_svc.backends.docker_engine import Engine
from sandbox_svc.backends.docker_pool import PoolSize
from sandbox_svc.worker.docker import DockerWorker, WorkerOptions
from tests.contract.runtimes import DOCKER_IMAGE, SMALL, sh, started
from tests.fixtures.engine_proxy import EngineProxy

pytestmark = [pytest.mark.asyncio(loop_scope="function"), pytest.mark.slow]
CREATE, START, DELETE = r"POST /containers/create", r"POST /containers/\w+/start", r"DELETE /cont"
CHAIN = "perl -e 'while (1) { exit if fork(); setpgrp }' >/dev/null 2>&1 & while :; do :; done"


@pytest_asyncio.fixture
async def proxy(tmp_path, tmp_path_factory, monkeypatch):
    async with started("docker", tmp_path / "probe"):
        pass  # skips where no engine answers
    proxy = EngineProxy(tmp_path_factory.mktemp("e") / "s")
    monkeypatch.setenv("DOCKER_HOST", proxy.url)
    yield proxy
    proxy.close()


@pytest_asyncio.fixture
async def make(proxy, tmp_path):
    made = []

    async def make(**options) -> DockerRuntime:
        runtime = DockerRuntime(
            tmp_path / f"own{len(made)}", image=DOCKER_IMAGE, run_probes=False, **options
        )
        await runtime.start()
        made.append(runtime)
        return runtime

    yield make
    proxy.rules.clear()
    for runtime in made:
        if not runtime._closing:
            await asyncio.gather(*(box.delete() for box in list(runtime._boxes.values())))
            for layer in await runtime.layers():
                await runtime.drop_layer(layer)
        await runtime.close()


async def until(check, within_s: float = 30.0) -> None:
    async with asyncio.timeout(within_s):
        while not await check():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def seen(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 20)


async def nothing_left(runtime: DockerRuntime) -> None:
    async def empty() -> bool:
        return not await runtime._containers() and not runtime.engine.doomed

    await until(empty)


@pytest.mark.parametrize("how", [{"status": 500}, {"cut": True}])
async def test_a_container_that_cannot_be_started_does_not_stay(proxy, make, how):
    runtime = await make()
    proxy.rule(START, times=1, **how)
    with pytest.raises(InfraError):
        await runtime.create([], limits=SMALL)
    await nothing_left(runtime)
    box = await runtime.create([], limits=SMALL)
    assert (await sh(box, "echo on")).stdout.text == "on\n"


async def test_a_creation_whose_answer_is_lost_is_found_by_its_name(proxy, make):
    runtime = await make()
    runtime.api.timeout = 2.0
    rule = proxy.rule(CREATE, times=1, after=threading.Event())
    with pytest.raises(InfraError, match="does not answer"):
        await runtime.create([], limits=SMALL)
    await seen(rule.done)  # the engine has made one
    await nothing_left(runtime)


@pytest.mark.parametrize("step", [CREATE, START])
async def test_a_caller_that_goes_away_meanwhile_leaves_no_container(proxy, make, step):
    runtime = await make()
    rule = proxy.rule(step, times=1, after=threading.Event())
    creating = asyncio.create_task(runtime.create([], limits=SMALL))
    await seen(rule.done)
    creating.cancel()
    rule.after.set()
    with pytest.raises(asyncio.CancelledError):
        await creating
    await nothing_left(runtime)


async def test_closing_meanwhile_leaves_no_container(proxy, make):
    runtime = await make(pool=PoolSize(each=2))
    await runtime.create([], limits=SMALL)
    rule = proxy.rule(START, after=threading.Event())
    creating = asyncio.create_task(runtime.create([], limits=SMALL, env={"A": "b"}))
    await seen(rule.done)
    closing = asyncio.create_task(runtime.close())
    await asyncio.sleep(0.2)
    rule.after.set()
    await asyncio.wait_for(closing, 30)
    await asyncio.gather(creating, return_exceptions=True)
    with pytest.raises(Unavailable):
        await runtime.create([], limits=SMALL)
    again = DockerRuntime(runtime._home, image=DOCKER_IMAGE, run_probes=False)
    await again.engine.connect()
    assert await again._containers() == []
    await again.engine.close()


async def test_the_pool_fills_on_after_whatever_went_wrong(proxy, make):
    runtime = await make(pool=PoolSize(each=1))

    async def filled() -> bool:
        return runtime.pool.waiting == 1

    await runtime.create([], limits=SMALL)
    await until(filled)
    rule = proxy.rule(START, cut=True, times=1)
    await runtime.create([], limits=SMALL)
    await seen(rule.seen)
    await runtime.create([], limits=SMALL)
    await until(filled)
    taken = proxy.rule(r"GET /containers/\w+/json", cut=True, times=1)
    box = await runtime.create([], limits=SMALL)  # what waits cannot be asked for: a fresh one
    assert taken.seen.is_set()
    assert (await sh(box, "echo on")).ok
    await until(filled)
    assert (await runtime.orphans())["container"] == frozenset()


async def test_who_goes_away_while_taking_from_the_pool_leaves_none(proxy, make):
    runtime = await make(pool=PoolSize(each=1, total=1))

    async def filled() -> bool:
        return runtime.pool.waiting == 1

    box = await runtime.create([], limits=SMALL)
    await until(filled)
    rule = proxy.rule(r"GET /containers/\w+/json", times=1, after=threading.Event())
    taking = asyncio.create_task(runtime.create([], limits=SMALL))
    await seen(rule.done)
    taking.cancel()
    rule.after.set()
    with pytest.raises(asyncio.CancelledError):
        await taking
    await box.delete()
    await runtime.pool.close()
    await nothing_left(runtime)


async def test_an_engine_that_hangs_hangs_nobody(proxy, make):
    runtime = await make(pool=PoolSize(each=1))
    box = await runtime.create([], limits=SMALL)
    running = await box.start(Command(("sleep", "300"), cwd="/", timeout_s=3.0))
    waiting = asyncio.create_task(running.wait())
    runtime.api.timeout = runtime.engine.patient.timeout = 1.0
    rule = proxy.rule(r".*", before=threading.Event())
    slowest_s, began = 0.0, time.monotonic()

    async def beat() -> None:
        nonlocal slowest_s
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            slowest_s = max(slowest_s, time.monotonic() - before)

    beating = asyncio.create_task(beat())
    calls = [
        runtime.create([], limits=SMALL),
        sh(box, "true"),
        box.read_file("/etc/passwd", 1 << 20),
        box.write_file("/work/home/x", b"x"),
        box.freeze(),
        box.changed_paths("/work"),
        runtime.orphans(),
        waiting,
    ]
    ended = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 40)
    assert [type(error).__name__ for error in ended if not isinstance(error, InfraError)] == []
    with pytest.raises(InfraError):
        await box.delete()
    await asyncio.wait_for(runtime.close(), 60)
    beating.cancel()
    assert slowest_s < 0.8
    assert time.monotonic() - began < 90
    rule.before.set()
    fresh = DockerRuntime(runtime._home, image=DOCKER_IMAGE, run_probes=False)
    proxy.rule(r".*", cut=True)
    with pytest.raises(MissingDependency, match="no Docker engine answers"):
        await fresh.start()
    proxy.rules.clear()
    again = DockerRuntime(runtime._home, image=DOCKER_IMAGE, run_probes=False)
    await again.start()
    assert await again._containers() == []
    await again.close()


async def test_a_command_whose_start_was_not_answered_does_not_run_on(proxy, make):
    runtime = await make()
    box = await runtime.create([], limits=SMALL)
    assert (await sh(box, "true", cwd="/work/repo")).ok
    runtime.api.timeout = 2.0
    rule = proxy.rule(r"POST /exec/\w+/start", times=1, after=threading.Event())
    with pytest.raises(InfraError):
        await sh(box, "sleep 341", cwd="/work/repo")
    await seen(rule.done)
    runtime.api.timeout = 60.0
    seek = "grep -lzx '34[1]' /proc/[0-9]*/cmdline || echo none"

    async def gone() -> bool:
        return (await sh(box, seek)).stdout.text == "none\n"

    await until(gone)


async def test_a_name_is_not_given_back_before_its_command_is_ended(proxy, make):
    runtime = await make()
    box = await runtime.create([], limits=SMALL)
    assert (await sh(box, "true")).ok
    names = box._marks._running
    assert not names

    async def given_back() -> bool:
        return not names

    sleep, start = Command(("sleep", "351"), cwd="/"), r"POST /exec/\w+/start"
    rule = proxy.rule(start, times=1, before=threading.Event())
    starting = asyncio.create_task(box.start(sleep))
    await seen(rule.seen)
    starting.cancel()  # who wanted it has gone before it began
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert len(names) == 1
    rule.before.set()
    await until(given_back)
    runtime.api.timeout = 1.0
    rule = proxy.rule(start, times=1, after=threading.Event())
    with pytest.raises(InfraError):  # it runs, and nobody was told
        await box.start(sleep)
    assert len(names) == 1
    await until(given_back)
    runtime.api.timeout = 60.0
    waiting = asyncio.create_task((await box.start(sleep)).wait())
    await asyncio.sleep(0.2)
    rule = proxy.rule(r"POST /containers/\w+/exec", times=1, before=threading.Event())
    waiting.cancel()
    await seen(rule.seen)  # it is being ended
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert len(names) == 1
    rule.before.set()
    await until(given_back)
    seek = "grep -lzx '35[1]' /proc/[0-9]*/cmdline || echo none"
    assert (await sh(box, seek)).stdout.text == "none\n"


async def test_a_helper_that_begins_late_still_has_its_name_and_is_ended(proxy, make):
    runtime = await make()
    box = await runtime.create([], limits=SMALL)
    assert (await sh(box, "true")).ok
    names = box._marks._running
    rule = proxy.rule(r"POST /exec/\w+/start", times=1, before=threading.Event())
    listing = asyncio.create_task(box.listed("sleep 353"))
    await seen(rule.seen)
    listing.cancel()  # who wanted it has gone before it began
    with pytest.raises(asyncio.CancelledError):
        await listing
    await asyncio.sleep(1.0)
    assert len(names) == 1  # another command would get the name, and this process with it
    rule.before.set()
    async with asyncio.timeout(30):
        while names:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    seek = "grep -lzx '35[3]' /proc/[0-9]*/cmdline || echo none"
    assert (await sh(box, seek)).stdout.text == "none\n"


async def test_a_command_is_ended_that_the_engine_has_yet_to_start(make):
    """The engine answers a start before it makes the process."""
    runtime = await make()
    box = await runtime.create([], limits=SMALL)
    await asyncio.gather(*(_cut_short(box, Command(("sleep", "352"), cwd="/")) for _ in range(4)))
    await asyncio.sleep(0.5)  # for what comes late
    seek = "grep -lzx '35[2]' /proc/[0-9]*/cmdline || echo none"
    assert (await sh(box, seek)).stdout.text == "none\n"


async def _cut_short(box, command: Command) -> None:
    process = await box.start(command)
    waiting = asyncio.create_task(process.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_command_that_freezing_overtakes_is_one_that_it_ended(make):
    runtime = await make()
    box = await runtime.create([], limits=SMALL)
    for _ in range(3):
        process = await box.start(Command(("sleep", "300"), cwd="/work/repo"))
        waiting = asyncio.create_task(process.wait())
        await box.freeze()
        result = await asyncio.wait_for(waiting, 20)
        assert (result.reason, result.signal) == (EndReason.SIGNAL, 9)
    assert (await sh(box, "true")).ok


async def test_the_end_of_a_command_before_a_freeze_ends_none_after_it(make):
    runtime = await make()
    box = await runtime.create([], limits=SMALL)
    first = await box.start(Command(("sleep", "300"), cwd="/"))
    container, mark = first._container, first._mark
    waiting = asyncio.create_task(first.wait())
    await box.freeze()
    await waiting
    second = await box.start(Command(("sleep", "300"), cwd="/"))
    assert second._mark.gid == mark.gid
    await box.end(container, mark, EndReason.TIMEOUT)
    assert (await second._exec.look())["Running"]
    await box.end(second._container, second._mark, EndReason.TIMEOUT)
    assert (await second.wait()).signal == 9


async def test_a_deletion_that_failed_is_done_when_asked_again(proxy, make):
    runtime = await make()
    box = await runtime.create([], limits=SMALL)
    proxy.rule(DELETE, status=500, times=1)
    with pytest.raises(InfraError):
        await box.delete()
    await box.delete()
    assert await runtime._containers() == []


async def test_where_a_command_cannot_be_ended_alone_the_sandbox_ends(proxy, make):
    runtime = await make()
    box = await runtime.create([], limits=SMALL)
    process = await box.start(Command(("sleep", "300"), cwd="/", timeout_s=1.0))
    proxy.rule(r"POST /containers/\w+/exec", status=500)
    result = await asyncio.wait_for(process.wait(), 40)
    assert result.reason is EndReason.TIMEOUT
    proxy.rules.clear()
    with pytest.raises(FailedPrecondition, match="over a limit"):
        await sh(box, "true")
    assert not (await runtime.engine.state(box.container))["Running"]
    await box.delete()


async def test_processes_that_come_and_go_and_those_that_fill_the_table_are_ended(make):
    runtime = await make()
    box = await runtime.create([], limits=SMALL)
    if not (await sh(box, "command -v perl")).ok:
        pytest.skip("the image has no perl")
    other = asyncio.create_task(
        sh(box, "i=0; while [ $i -lt 300 ]; do i=$((i+1)); /bin/true; done")
    )
    result = await sh(box, CHAIN, timeout_s=1.0)
    assert result.reason is EndReason.TIMEOUT
    left = await sh(box, "cat /proc/[0-9]*/comm")
    assert "perl" not in left.stdout.text
    assert (await other).ok
    bomb = await sh(box, "perl -e 'while (1) { fork }'", timeout_s=2.0)
    assert bomb.reason is EndReason.TIMEOUT
    assert "perl" not in (await sh(box, "cat /proc/[0-9]*/comm")).stdout.text


async def test_names_come_round_and_a_daemon_keeps_its_own(make, monkeypatch):
    from sandbox_svc.backends import docker_marks

    monkeypatch.setattr(docker_marks, "COUNT", 4)
    runtime = await make()
    box = await runtime.create([], limits=SMALL)
    assert (await sh(box, "setsid sleep 321 > /dev/null 2>&1 & echo up")).ok
    for _ in range(12):
        assert (await sh(box, "sleep 300", timeout_s=0.2)).reason is EndReason.TIMEOUT
    assert (await sh(box, "grep -lzx '32[1]' /proc/[0-9]*/cmdline")).ok


async def test_a_way_that_is_gone_or_closed_is_told(make):
    runtime = await make()
    box = await runtime.create([], limits=SMALL)
    await sh(box, "mkdir /work/repo/d; cd /work/repo/d; echo x > f")
    assert (await sh(box, "pwd", cwd="/work/repo/d")).ok
    layer = await box.freeze()
    fork = await runtime.create([layer], limits=SMALL)
    await sh(fork, "cd /work/repo; echo y > d/f; chmod 000 d")
    assert "/work/repo/d/" in await fork.changed_paths("/work/repo")
    assert (await sh(box, "pwd; rm -r ../d", cwd="/work/repo/d")).ok
    with pytest.raises(InvalidArgument, match=r"cwd: no such directory"):
        await sh(box, "true", cwd="/work/repo/d")


async def test_another_service_whose_home_has_the_same_path_is_left_alone(make, tmp_path):
    runtime = await make()
    box = await runtime.create([], limits=SMALL)
    home = runtime._home.rename(tmp_path / "elsewhere")  # as in a container with its own volume
    other = DockerRuntime(runtime._home, image=DOCKER_IMAGE, run_probes=False)
    await other.start()
    assert (await sh(box, "echo alive")).stdout.text == "alive\n"
    successor = DockerRuntime(home, image=DOCKER_IMAGE, run_probes=False)
    await successor.start()
    assert await successor._containers() == []
    await other.close()
    await successor.close()


async def test_what_cannot_be_begun_for_want_of_processes_says_so(make):
    runtime = await make()
    box = await runtime.create([], limits=SMALL)
    await sh(box, "for i in $(seq 60); do sleep 20 & done")
    full = [await sh(box, "/bin/true; /bin/true") for _ in range(2)]
    assert all(not result.ok for result in full)
    assert all("fork" in r.stderr.text or r.reason is EndReason.PIDS for r in full)
    with pytest.raises(FailedPrecondition, match="limit of processes"):
        await box.read_file("/etc/passwd", 1 << 20)


async def test_an_oci_runtime_that_the_engine_lacks_is_named(proxy, tmp_path):
    runtime = DockerRuntime(tmp_path / "r", image=DOCKER_IMAGE, oci_runtime="no-such-runtime")
    with pytest.raises(MissingDependency, match=r"docker_runtime: .*'no-such-runtime'"):
        await runtime.start()
    other = DockerRuntime(
        tmp_path / "o", image=DOCKER_IMAGE, oci_runtime="io.containerd.runc.v2", run_probes=False
    )
    await other.start()
    box = await other.create([], limits=SMALL)
    told = await other.engine.blocking(other.api.inspect_container, box.container)
    assert told["HostConfig"]["Runtime"] == "io.containerd.runc.v2"
    await other.close()


async def test_what_is_proven_and_that_waiting_containers_are_no_leaks(proxy, tmp_path):
    runtime = DockerRuntime(tmp_path / "p", image=DOCKER_IMAGE, pool=PoolSize(each=1))
    await runtime.start()
    told = {found.name: found.proven for found in runtime.capabilities()}
    (memfd,) = (found for found in runtime.capabilities() if found.name == "memfd")
    assert memfd.proven or "has no python3" in memfd.detail  # without which it cannot be probed
    told["memfd"] = True
    assert {name for name, proven in told.items() if not proven} == {
        "cpu",
        "disk",
        "inodes",
        "inotify",
    }
    assert told["output"]
    try:
        await runtime.create([], limits=SMALL)

        async def settled() -> bool:  # what is on its way belongs to nobody yet
            return runtime.pool.waiting == 2 and not (await runtime.orphans())["container"]

        await until(settled)
    finally:
        await runtime.close()


async def test_a_worker_whose_start_is_cut_short_leaves_no_container(proxy, tmp_path):
    worker = DockerWorker(WorkerOptions(DOCKER_IMAGE, tmp_path / "w"))
    rule = proxy.rule(START, times=1, after=threading.Event())
    starting = asyncio.create_task(worker.__aenter__())
    await seen(rule.done)
    starting.cancel()
    rule.after.set()
    with pytest.raises(asyncio.CancelledError):
        await starting
    engine = Engine()
    await engine.connect()
    labels = {"label": f"regreen.worker={worker._name}"}
    assert not await engine.blocking(engine.api.containers, all=True, filters=labels)
    await engine.close()

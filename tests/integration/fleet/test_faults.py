"""What clients of a front see while pods die or stall, stores fill up or rot, and fronts meet."""

import asyncio
import contextlib
import signal
import subprocess
import time
from pathlib import Path

import pytest
import pytest_asyncio

from regreen.client.channel import connect
from regreen.client.sandbox import StateClient
from regreen.rpc.errors import (
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from regreen.sandbox import v1 as pb
from sandbox_svc.__main__ import serving
from sandbox_svc.fleet.archive import Archive
from sandbox_svc.fleet.calls import METHODS, Endpoint, Worker
from tests.integration.fleet.conftest import (
    eventually,
    holding,
    pods,
    prepared,
    ready_workers,
    spec,
    world,
)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240), pytest.mark.slow]


@pytest_asyncio.fixture(loop_scope="module")
async def front(plain):
    async with plain.front(kube_keep_workers=True) as front:
        yield front


@contextlib.asynccontextmanager
async def stalled(plain, name):
    """A pod whose probes fail, though it works; ready again afterwards."""
    before = ready_workers()
    plain.kubelet.unhealthy.add(name)
    try:
        await eventually(lambda: _count(before - 1))
        yield
    finally:
        plain.kubelet.unhealthy.discard(name)
    await eventually(lambda: _count(before))


async def _count(wanted: int) -> bool:
    return ready_workers() == wanted


@contextlib.contextmanager
def small_disk(path, size: str):
    """A file system of `size` at `path`."""
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs permission to mount a tmpfs")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


async def test_a_pod_deleted_in_the_middle_of_calls_ends_them_as_unavailable(plain, front):
    state = await prepared(front, "goes away\n")
    await eventually(lambda: _exists(front.settings.home / "blobs" / "names" / state.id))
    box = await front.sandboxes.create_sandbox(state.id)
    (name,) = await holding(plain, state.id)
    command = pb.Command(argv=["sh", "-c", "echo begun; sleep 300"])
    begun = asyncio.Event()

    async def stream():
        async for event in front.sandboxes.exec(box.id, command):
            if event.stdout:
                begun.set()

    calls = [
        asyncio.create_task(front.sandboxes.run(box.id, ["sleep", "300"])),
        asyncio.create_task(stream()),
    ]
    async with asyncio.timeout(30):
        await begun.wait()
    await plain.cluster.delete("pods", name, 1)
    async with asyncio.timeout(60):
        ended = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(error) for error in ended} <= {Unavailable, NotFound}, ended
    again = await eventually(lambda: front.sandboxes.create_sandbox(state.id))
    ran = await front.sandboxes.run(again.id, ["cat", "notes.txt"])
    assert ran.stdout.head == b"goes away\n"
    await eventually(lambda: _count(2))


async def test_a_process_killed_in_the_middle_of_a_call_ends_it(plain, front):
    state = await prepared(front, "process dies\n")
    box = await front.sandboxes.create_sandbox(state.id)
    (name,) = await holding(plain, state.id)
    call = asyncio.create_task(front.sandboxes.run(box.id, ["sleep", "300"]))
    await asyncio.sleep(0.5)
    plain.kubelet.processes[name].send_signal(signal.SIGKILL)
    async with asyncio.timeout(30):
        with pytest.raises((Unavailable, NotFound)):
            await call
    await eventually(lambda: _count(2))


async def test_a_worker_that_hangs_is_passed_over(plain, front):
    state = await prepared(front, "hangs\n")
    await eventually(lambda: _exists(front.settings.home / "blobs" / "names" / state.id))
    (name,) = await holding(plain, state.id)
    plain.kubelet.processes[name].send_signal(signal.SIGSTOP)
    try:
        box = await front.sandboxes.create_sandbox(state.id)
        ran = await front.sandboxes.run(box.id, ["cat", "notes.txt"])
        assert ran.stdout.head == b"hangs\n"
    finally:
        plain.kubelet.processes[name].send_signal(signal.SIGCONT)
    await eventually(lambda: _count(2))
    await front.sandboxes.delete_sandbox(box.id)


async def test_a_worker_that_is_not_ready_ends_what_it_runs_and_loses_nothing(plain, front):
    state = await prepared(front, "busy\n")
    box = await front.sandboxes.create_sandbox(state.id)
    (name,) = await holding(plain, state.id)
    gate = "until test -e /tmp/go; do sleep 0.1; done; cat notes.txt"
    call = asyncio.create_task(front.sandboxes.run(box.id, ["sh", "-c", gate]))
    await asyncio.sleep(0.5)
    async with stalled(plain, name):
        with pytest.raises(Unavailable, match=name):
            await front.sandboxes.run(box.id, ["true"])
        with pytest.raises(Unavailable, match="holds state"):
            await front.states.delete_state(state.id)
        assert not call.done()
    await front.sandboxes.run(box.id, ["touch", "/tmp/go"])
    async with asyncio.timeout(20):
        assert (await call).stdout.head == b"busy\n"
    await front.sandboxes.delete_sandbox(box.id)
    await front.states.delete_state(state.id)
    with pytest.raises(NotFound):
        await front.states.get_state(state.id)


async def test_what_a_worker_may_have_is_not_said_to_be_gone_before_it_was_asked(plain):
    async with plain.front(kube_keep_workers=True) as front:
        state = await prepared(front, "before\n")
        box = await front.sandboxes.create_sandbox(state.id)
        (name,) = await holding(plain, state.id)
        snapshot = await front.sandboxes.snapshot_sandbox(box.id)
    plain.kubelet.unhealthy.add(name)

    async def marked():
        return pods(plain)[name]["status"]["conditions"][0]["status"] == "False"

    try:
        await eventually(marked)
        async with serving(plain.settings(kube_keep_workers=True)) as server:
            channel = connect(server.address)
            worker = Worker(Endpoint("front", "", "", server.address))
            for path, request in (
                ("SandboxService/GetSandbox", pb.GetSandboxRequest(id=box.id)),
                ("SandboxService/DeleteSandbox", pb.DeleteSandboxRequest(id=box.id)),
                ("StateService/GetState", pb.GetStateRequest(id=snapshot.id)),
                ("StateService/DeleteState", pb.DeleteStateRequest(id=snapshot.id)),
            ):
                with pytest.raises(Unavailable, match=name):
                    await worker.call(METHODS[path], request)
            plain.kubelet.unhealthy.discard(name)

            async def known():
                get = METHODS["SandboxService/GetSandbox"]
                return await worker.call(get, pb.GetSandboxRequest(id=box.id))

            assert (await eventually(known)).sandbox.id == box.id
            assert (await StateClient(channel).get_state(snapshot.id)).id == snapshot.id
            with pytest.raises(NotFound):
                await worker.call(METHODS["StateService/GetState"], _absent())
            await worker.close()
            await channel.close()
    finally:
        plain.kubelet.unhealthy.discard(name)


def _absent() -> pb.GetStateRequest:
    return pb.GetStateRequest(id="st_" + "0" * 32)


async def test_a_state_dropped_behind_the_fronts_back_is_brought_again(plain, front):
    state = await prepared(front, "dropped\n")
    names = front.settings.home / "blobs" / "names"
    await eventually(lambda: _exists(names / state.id))
    other = await prepared(front, "of the sandbox\n")
    box = await front.sandboxes.create_sandbox(other.id)

    await drop_from_workers(plain, state.id)
    assert (await front.states.get_state(state.id)).id == state.id
    exported = [chunk async for chunk in front.states.export_state(state.id)]
    assert sum(map(len, exported)) > 512
    await drop_from_workers(plain, state.id)
    exported = [chunk async for chunk in front.states.export_state(state.id)]
    assert sum(map(len, exported)) > 512
    await drop_from_workers(plain, state.id)
    made = await front.sandboxes.create_sandbox(state.id)
    await front.sandboxes.delete_sandbox(made.id)
    await front.sandboxes.restore_sandbox(box.id, state.id)
    await front.sandboxes.delete_sandbox(box.id)
    await drop_from_workers(plain, state.id)
    box = await front.sandboxes.create_sandbox(other.id)
    await front.sandboxes.restore_sandbox(box.id, state.id)
    read = await front.sandboxes.read_file(box.id, "/work/repo/notes.txt")
    assert read.content == b"dropped\n"
    await front.sandboxes.delete_sandbox(box.id)
    await front.states.delete_state(other.id)
    await front.states.delete_state(state.id)


async def drop_from_workers(plain, state_id):
    """Delete a state on its workers, past the front."""
    for name in await holding(plain, state_id):
        channel = connect(f"{pods(plain)[name]['status']['podIP']}:50052")
        await StateClient(channel).delete_state(state_id)
        await channel.close()
    assert not await holding(plain, state_id)


async def _exists(path) -> bool:
    return path.exists()


async def test_a_damaged_archive_is_made_again_from_who_has_the_state(plain):
    async with plain.front(kube_keep_workers=True, max_sandboxes=2) as front:
        state = await prepared(front, "rots\n")
        blobs = front.settings.home / "blobs"
        await eventually(lambda: _exists(blobs / "names" / state.id))
        for path in blobs.glob("[0-9a-f][0-9a-f]/*"):
            if b"layers/0" in path.read_bytes()[:512]:
                path.unlink()
        boxes = [await front.sandboxes.create_sandbox(state.id) for _ in range(4)]
        assert len(await holding(plain, state.id)) == 2
        for box in boxes:
            ran = await front.sandboxes.run(box.id, ["cat", "notes.txt"])
            assert ran.stdout.head == b"rots\n"
            await front.sandboxes.delete_sandbox(box.id)
        for path in blobs.glob("[0-9a-f][0-9a-f]/*"):
            path.unlink()
        await drop_from_workers(plain, state.id)
        with pytest.raises((FailedPrecondition, NotFound)) as caught:
            await front.sandboxes.create_sandbox(state.id)
        assert caught.value.metadata["id"] == state.id
        assert (await prepared(front, "rots\n")).id == state.id
        box = await front.sandboxes.create_sandbox(state.id)
        await front.sandboxes.delete_sandbox(box.id)
        await front.states.delete_state(state.id)


async def test_an_archive_with_a_lost_layer_and_no_worker_is_a_failed_precondition(plain, front):
    state = await prepared(front, "half\n")
    blobs = front.settings.home / "blobs"
    await eventually(lambda: _exists(blobs / "names" / state.id))
    for path in blobs.glob("[0-9a-f][0-9a-f]/*"):
        if b"layers/0" in path.read_bytes()[:512]:
            path.unlink()
    await drop_from_workers(plain, state.id)
    with pytest.raises(FailedPrecondition, match="make it again") as caught:
        await front.sandboxes.create_sandbox(state.id)
    assert caught.value.metadata["id"] == state.id
    assert (await prepared(front, "half\n")).id == state.id
    await front.states.delete_state(state.id)


async def test_a_full_blob_store_costs_moves_and_nothing_else(plain, tmp_path):
    with small_disk(tmp_path / "blobs", "256k") as store:
        settings = {"kube_keep_workers": True, "max_sandboxes": 2, "blobs": str(store)}
        async with plain.front(**settings) as front:
            (store / "ballast").write_bytes(b"x" * 250_000)
            state = await prepared(front, "stays\n" * 20_000)
            boxes = [await front.sandboxes.create_sandbox(state.id) for _ in range(2)]
            assert len(await holding(plain, state.id)) == 1
            for _ in range(2):
                with pytest.raises(ResourceExhausted, match="2 of 2 sandboxes") as caught:
                    await front.sandboxes.create_sandbox(state.id)
                assert caught.value.retry_after_s is not None
            ran = await front.sandboxes.run(boxes[0].id, ["head", "-n1", "notes.txt"])
            assert ran.stdout.head == b"stays\n"
            assert not list((front.settings.home / "sandbox" / "moving").iterdir())
            (store / "ballast").unlink()
            third = await front.sandboxes.create_sandbox(state.id)
            for box in (*boxes, third):
                await front.sandboxes.delete_sandbox(box.id)
            await front.states.delete_state(state.id)


async def test_a_full_disk_of_the_front_is_named(plain, tmp_path):
    with small_disk(tmp_path / "home", "64k") as home:
        options = {"home": home, "blobs": str(tmp_path / "blobs"), "fleet_keep": "none"}
        async with plain.front(kube_keep_workers=True, max_sandboxes=2, **options) as front:
            state = await prepared(front, "too big to pass\n" * 20_000)
            one = await prepared(front, "of the other")
            await front.sandboxes.create_sandbox(state.id)
            full = await front.sandboxes.create_sandbox(state.id)
            with pytest.raises(ResourceExhausted):
                await front.sandboxes.create_sandbox(state.id)
            elsewhere = await _on_another_worker(plain, front, one, state)
            with pytest.raises(ResourceExhausted, match="no space left"):
                await front.sandboxes.restore_sandbox(elsewhere.id, state.id)
            await front.sandboxes.delete_sandbox(full.id)


async def _on_another_worker(plain, front, one, state):
    """A sandbox on a worker that does not hold `state`."""
    for number in range(20):
        one = await prepared(front, f"candidate {number}")
        if not await holding(plain, one.id) & await holding(plain, state.id):
            return await front.sandboxes.create_sandbox(one.id)
    raise AssertionError("all candidates went to one worker")


async def test_a_front_that_cannot_write_says_so_in_its_log_and_goes_on(plain, tmp_path, capfd):
    home = tmp_path / "home"
    (home / "sandbox").mkdir(parents=True)
    (home / "sandbox" / "moving").write_bytes(b"in the way")
    async with plain.front(kube_keep_workers=True, home=home) as front:
        state = await prepared(front, "not kept\n")

        async def told():
            return "state not kept" in capfd.readouterr().out

        await eventually(told)
        await front.states.delete_state(state.id)


async def test_a_full_fleet_brings_states_nowhere(plain):
    async with plain.front(kube_keep_workers=True, max_sandboxes=2) as front:
        state = await prepared(front, "fills all\n")
        boxes = [await front.sandboxes.create_sandbox(state.id) for _ in range(4)]
        late = await prepared(front, "came late\n")
        before = await holding(plain, late.id)
        assert len(before) == 1
        with pytest.raises(ResourceExhausted, match="2 of 2 sandboxes"):
            await front.sandboxes.create_sandbox(late.id)
        assert await holding(plain, late.id) == before
        for box in boxes:
            await front.sandboxes.delete_sandbox(box.id)
        await front.states.delete_state(late.id)
        await front.states.delete_state(state.id)


async def test_a_state_made_anew_replaces_its_copies(plain):
    async with plain.front(kube_keep_workers=True, max_sandboxes=2) as front:
        state = await prepared(front, "twice\n")
        boxes = [await front.sandboxes.create_sandbox(state.id) for _ in range(3)]
        assert len(await holding(plain, state.id)) == 2
        for box in boxes:
            await front.sandboxes.delete_sandbox(box.id)
        events = [e async for e in front.states.prepare_state(spec("twice\n"), rebuild=True)]
        assert events[-1].state.id == state.id
        assert len(await holding(plain, state.id)) == 1
        await front.states.delete_state(state.id)
        assert not await holding(plain, state.id)
        with pytest.raises(NotFound):
            await front.states.get_state(state.id)


async def test_what_is_moved_after_a_rebuild_is_the_new_build(plain, tmp_path):
    options = {"fleet_keep": "none", "max_sandboxes": 1, "blobs": str(tmp_path)}
    async with plain.front(kube_keep_workers=True, **options) as front:

        async def builds(state_id):
            """In which second the file was written, as a sandbox on either worker sees it."""
            boxes = [await front.sandboxes.create_sandbox(state_id) for _ in range(2)]
            assert len(await holding(plain, state_id)) == 2
            look = ["stat", "-c", "%Y", "notes.txt"]
            found = [int((await front.sandboxes.run(box.id, look)).stdout.head) for box in boxes]
            for box in boxes:
                await front.sandboxes.delete_sandbox(box.id)
            return found

        state = await prepared(front, "moved\n")
        one, same = await builds(state.id)
        assert one == same
        await eventually(lambda: _after(one))
        events = [e async for e in front.states.prepare_state(spec("moved\n"), rebuild=True)]
        assert events[-1].state.id == state.id
        two, moved = await builds(state.id)
        assert one != two == moved
        await front.states.delete_state(state.id)


async def _after(second: int) -> bool:
    return time.time() >= second + 1


async def test_a_state_is_not_brought_back_while_it_is_deleted(plain, tmp_path, monkeypatch):
    real, late = Archive.forget, []
    async with plain.front(kube_keep_workers=True, blobs=str(tmp_path)) as front:

        async def forget(archive, state_id):
            try:
                late.append((await front.sandboxes.create_sandbox(state_id)).id)
            except NotFound as refused:
                late.append(refused.message)
            await real(archive, state_id)

        state = await prepared(front, "going\n")
        await eventually(lambda: _exists(tmp_path / "names" / state.id))
        monkeypatch.setattr(Archive, "forget", forget)
        await front.states.delete_state(state.id)
        monkeypatch.undo()
        assert late == [f"state {state.id} is being deleted"]
        assert not await holding(plain, state.id)
        assert not (tmp_path / "names" / state.id).exists()
        assert (await prepared(front, "going\n")).id == state.id, "it can be made again"
        box = await front.sandboxes.create_sandbox(state.id)
        await front.sandboxes.delete_sandbox(box.id)
        await front.states.delete_state(state.id)


async def test_a_deleted_state_is_not_brought_back_by_what_was_under_way(plain, front):
    names = front.settings.home / "blobs" / "names"
    for number in range(4):
        events = front.states.prepare_state(spec(f"short life {number}\n" * 50_000))
        state = [event async for event in events][-1].state
        await front.states.delete_state(state.id)
        assert not (names / state.id).exists()
        with pytest.raises(NotFound):
            await front.states.get_state(state.id)
    await asyncio.sleep(0.5)
    assert not list(names.glob(state.id))


async def test_what_a_deleted_sandbox_asked_of_the_network_is_still_listed(front):
    state = await prepared(front, "asks\n")
    box = await front.sandboxes.create_sandbox(state.id, egress=["example.invalid"])
    # Whatever stands at the door of the sandbox notes what it is asked for.
    program = (
        "import os, urllib.request as u\n"
        "try: u.urlopen('http://example.invalid/x', timeout=10)\n"
        "except Exception as e: print(e)\n"
    )
    await front.sandboxes.run(box.id, ["python3", "-c", program])
    worker = Worker(Endpoint("front", "", "", front.address))
    listing = METHODS["EgressService/ListEgress"]
    request = pb.ListEgressRequest(sandbox_id=box.id)
    before = (await worker.call(listing, request)).records
    assert [record.host for record in before] == ["example.invalid"]
    await front.sandboxes.delete_sandbox(box.id)
    assert (await worker.call(listing, request)).records == before
    with pytest.raises(NotFound):
        await worker.call(listing, pb.ListEgressRequest(sandbox_id="sbx_" + "0" * 32))
    await worker.close()


def fill(home: Path) -> None:
    """Leave no room in a pod's volume."""
    with (home / "ballast").open("wb") as ballast, contextlib.suppress(OSError):
        while ballast.write(b"x" * (1 << 20)):
            ballast.flush()


async def test_a_preparation_goes_on_where_there_is_room(tmp_path):
    pytest.importorskip("lightkube", reason="regreen[kubernetes] is not installed")
    with small_disk(tmp_path, "1m"):
        pass  # or this cannot be tried here
    async with world(volume_bytes=64 << 20) as small, small.front(fleet_keep="none") as front:
        state = await prepared(front, "which way\n")
        (name,) = await holding(small, state.id)
        await front.states.delete_state(state.id)
        fill(small.kubelet.home_of(name))
        state = await prepared(front, "which way\n")
        (other,) = await holding(small, state.id)
        assert other != name
        fill(small.kubelet.home_of(other))
        with pytest.raises(ResourceExhausted):
            await prepared(front, "no way\n")

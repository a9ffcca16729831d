"""States as archives over gRPC: round trips, hostile archives, many and broken transfers."""

import asyncio
import io
import os
import tarfile
import time

import grpc
import pytest

from regreen.client.channel import connect
from regreen.client.sandbox import StateClient
from regreen.rpc.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
)
from regreen.rpc.wire import from_rpc_error
from regreen.sandbox import v1 as pb
from sandbox_svc import pace
from sandbox_svc.__main__ import serving
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.service import SandboxHost
from sandbox_svc.settings import SandboxSettings
from tests.integration.sandbox.overlay import OverlayBuilder, prepared


async def test_states_travel_as_archives(service, tmp_path):
    states, sandboxes, _ = service
    state = await prepared(states, a="1", **{"d/b": "2"})
    trunk = await sandboxes.create_sandbox(state.id)
    await sandboxes.run(trunk.id, ["sh", "-c", "rm a; rm -r d; mkdir d; ln -s x d/l; echo 3 > c"])
    child = await sandboxes.snapshot_sandbox(trunk.id)
    archive = b"".join([chunk async for chunk in states.export_state(child.id)])
    await sandboxes.delete_sandbox(trunk.id)
    await states.delete_state(child.id)
    imported = await states.import_state([archive[:1000], archive[1000:]])
    assert imported.id == child.id
    again = await states.import_state([archive])
    assert again.layers == imported.layers
    sandbox = await sandboxes.create_sandbox(imported.id)
    listed = await sandboxes.run(sandbox.id, ["sh", "-c", "find . | sort; readlink d/l; cat c"])
    assert listed.stdout.head == b".\n./c\n./d\n./d/l\nx\n3\n"


async def test_an_export_over_the_bound_is_refused_before_its_holes_are_read(service):
    """A terabyte of nothing costs a block here, and would cost a terabyte on the wire."""
    states, sandboxes, _ = service
    state = await prepared(states, a="1")
    box = await sandboxes.create_sandbox(state.id, limits=pb.Limits(disk_bytes=4 << 40))
    grown = await sandboxes.run(box.id, ["truncate", "-s", "1T", "holes"])
    assert grown.exit_code == 0, grown.stderr.head
    child = await sandboxes.snapshot_sandbox(box.id)
    async with asyncio.timeout(20):
        with pytest.raises(FailedPrecondition, match=r"holes.*import_bytes.*remove it"):
            async for _ in states.export_state(child.id):
                pass
    assert [chunk async for chunk in states.export_state(state.id)]
    await sandboxes.delete_sandbox(box.id)


def _hostile(record: bytes, *members: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo("state.json")
        info.size = len(record)
        archive.addfile(info, io.BytesIO(record))
        for member in (*members, tarfile.TarInfo("end")):
            archive.addfile(member, io.BytesIO(b"x" * member.size))
    return out.getvalue()


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, 0o755
    return info


async def test_hostile_archives_are_refused_and_leave_nothing(service, tmp_path):
    states, _, _ = service
    state = await prepared(states, a="1")
    archive = b"".join([chunk async for chunk in states.export_state(state.id)])
    with tarfile.open(fileobj=io.BytesIO(archive)) as good:
        record = good.extractfile("state.json").read()
    top = _member("layers/0", tarfile.DIRTYPE)
    device = _member("layers/0/dev", tarfile.CHRTYPE)
    device.devmajor = 8
    link = _member("layers/0/l", tarfile.SYMTYPE, "/etc")
    mounting = record.replace(b'"mounts": []', b'"mounts": [["/etc", "/x", true]]')
    assert mounting != record
    layers_before = sorted(path.name for path in (tmp_path / "home/sandbox/layers").iterdir())
    for bad in (
        b"",
        b"not a tar" * 1000,
        archive[: archive.index(b"end\0")],
        archive[:2000],
        _hostile(b"{}", top),
        _hostile(record, _member("layers/0/a"), top),
        _hostile(record, top, _member("layers/0/../../../../etc/x")),
        _hostile(record, top, _member("layers/0//etc/x")),
        _hostile(record, top, _member("/etc/x")),
        _hostile(record, top, link, _member("layers/0/l/x")),
        _hostile(record, top, _member("layers/0/h", tarfile.LNKTYPE, "/etc/passwd")),
        _hostile(record, top, _member("layers/0/p", tarfile.FIFOTYPE)),
        _hostile(record, top, device),
        _hostile(record, top, _member("layers/0/a"), _member("layers/0/a")),
        _hostile(record, top, _member("layers/1/a")),
        _hostile(record),
        _hostile(mounting.replace(state.id.encode(), b"st_" + b"1" * 32), top),
    ):
        with pytest.raises(InvalidArgument):
            await states.import_state([bad])
    until = time.monotonic() + 5
    while time.monotonic() < until:
        names = sorted(path.name for path in (tmp_path / "home/sandbox/layers").iterdir())
        if names == layers_before:
            break
    assert names == layers_before
    assert _drafts(tmp_path) == []


def _drafts(tmp_path) -> list[str]:
    """Half-unpacked layers."""
    trash = (tmp_path / "home/sandbox/trash").iterdir()
    return [path.name for path in trash if path.name.startswith("draft-")]


async def test_more_exports_at_once_than_threads_all_end(service):
    states, _, _ = service
    state = await prepared(states, a="1" * 300_000)

    async def export() -> bytes:
        return b"".join([chunk async for chunk in states.export_state(state.id)])

    async with asyncio.timeout(60):
        archives = await asyncio.gather(*(export() for _ in range(40)))
    assert len(set(archives)) == 1
    assert (await states.import_state([archives[0]])).id == state.id


async def test_exports_that_nobody_reads_do_not_stop_the_service(service):
    states, sandboxes, _ = service
    state = await prepared(states, a="1" * 8_000_000)
    streams = [states.export_state(state.id) for _ in range(12)]
    await asyncio.gather(*(anext(stream) for stream in streams[:6]))
    sandbox = await sandboxes.create_sandbox(state.id)
    assert (await sandboxes.diff(sandbox.id)).changes == []
    for stream in streams[:6]:
        await stream.aclose()
    await sandboxes.delete_sandbox(sandbox.id)
    async with asyncio.timeout(30):
        assert b"".join([chunk async for chunk in states.export_state(state.id)])


@pytest.fixture
async def restless(tmp_path):
    """A service that gives up a transfer that stands still for three seconds."""
    settings = SandboxSettings(
        home=tmp_path / "home",
        listen=f"unix:{tmp_path}/s",
        metrics="127.0.0.1:0",
        transfer_idle_s=3.0,
        drain_s=0.2,
    )
    runtime = EmbeddedRuntime(tmp_path / "home" / "sandbox", run_probes=False, warm_seats=1)
    host = SandboxHost(settings, runtime, [OverlayBuilder()])
    for places in (host.transfer.exports, host.transfer.imports):
        object.__setattr__(places, "wait_s", 0.2)
    async with serving(settings, host) as server, connect(server.address) as channel:
        client = StateClient(channel, patience_s=0.0)
        yield client, pb.StateServiceStub(channel), channel, server


async def drained(call) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def whole(states: StateClient, state_id: str) -> bytes:
    return b"".join([chunk async for chunk in states.export_state(state_id)])


async def test_exports_that_nobody_reads_are_refused_room_for_others_and_end(restless):
    states, _, channel, server = restless
    large = await prepared(states, a="1" * 8_000_000)
    small = await prepared(states, a="2")
    archive = await whole(states, small.id)
    # A window that grows with the delay, as it does by default, can hold all of an archive.
    slow = grpc.aio.insecure_channel(server.address, options=[("grpc.http2.bdp_probe", 0)])
    export = pb.StateServiceStub(slow).ExportState
    unread = [export(pb.ExportStateRequest(id=large.id)) for _ in range(pace.AT_ONCE)]
    await asyncio.gather(*(call.read() for call in unread))
    with pytest.raises(ResourceExhausted, match="8 exports are under way") as caught:
        await whole(states, small.id)
    assert caught.value.retry_after_s
    assert (await states.import_state([archive])).id == small.id
    async with asyncio.timeout(20):
        while server._calls._in_flight:
            await states.list_states()
    assert await whole(states, small.id) == archive
    for call in unread:
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await drained(call)
        error = from_rpc_error(ended.value)
        assert isinstance(error, DeadlineExceeded)
        assert "nothing of the stream was taken for 3 s" in error.message
    images = pb.ImageServiceStub(channel).ExportImage(pb.ExportImageRequest(state_id=small.id))
    with pytest.raises(grpc.aio.AioRpcError, match="stands on the programs of its host"):
        await images.read()
    await slow.close()


@pytest.mark.parametrize("kind", ["state", "image"])
async def test_imports_of_which_nothing_comes_end_and_leave_nothing(restless, tmp_path, kind):
    states, stub, channel, _ = restless
    state = await prepared(states, a="1" * 3_000_000)
    archive = await whole(states, state.id)
    layers = sorted(os.listdir(tmp_path / "home/sandbox/layers"))
    never = asyncio.Event()

    async def half():
        if kind == "image":
            yield pb.ImportImageRequest(options=pb.ImageOptions())
            yield pb.ImportImageRequest(chunk=archive[:2_000_000])
        else:
            yield pb.ImportStateRequest(chunk=archive[:2_000_000])
        await never.wait()

    async def idle() -> None:
        call = stub.ImportState if kind == "state" else pb.ImageServiceStub(channel).ImportImage
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await call(half(), timeout=20)
        error = from_rpc_error(ended.value)
        assert isinstance(error, DeadlineExceeded)
        assert "nothing of the archive came for 3 s" in error.message

    async with asyncio.timeout(30):
        calls = [asyncio.ensure_future(idle()) for _ in range(pace.AT_ONCE)]
        await asyncio.sleep(0.5)
        if kind == "state":
            with pytest.raises(ResourceExhausted, match="8 imports are under way"):
                await states.import_state([archive])
            assert await whole(states, state.id) == archive  # exports have places of their own
        await asyncio.gather(*calls)
    assert _drafts(tmp_path) == []
    assert sorted(os.listdir(tmp_path / "home/sandbox/layers")) == layers
    assert (await states.import_state([archive])).id == state.id


async def test_an_import_that_is_given_up_leaves_nothing(service, tmp_path):
    states, _, server = service
    channel = connect(server.address)
    stub = pb.StateServiceStub(channel)
    state = await prepared(states, a="1" * 3_000_000)
    archive = b"".join([chunk async for chunk in states.export_state(state.id)])
    await states.delete_state(state.id)
    layers = tmp_path / "home/sandbox/layers"
    before = sorted(os.listdir(layers)), len(os.listdir("/proc/self/fd"))
    never = asyncio.Event()

    async def half():
        yield pb.ImportStateRequest(chunk=archive[:2_000_000])
        await never.wait()

    for _ in range(8):
        call = stub.ImportState(half())
        async with asyncio.timeout(20):
            while not _drafts(tmp_path):
                await states.list_states()
        call.cancel()
        async with asyncio.timeout(20):
            while _drafts(tmp_path):
                await states.list_states()
    assert sorted(os.listdir(layers)) == before[0]
    assert len(os.listdir("/proc/self/fd")) <= before[1] + 2
    assert (await states.import_state([archive])).id == state.id
    await channel.close()

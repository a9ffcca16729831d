"""What one client asks for never takes all from the others: images, diffs, labels, lists."""

import asyncio
import re
import time

import grpc
import pytest

from regreen.client.channel import connect
from regreen.client.image import ImageClient
from regreen.client.sandbox import SandboxClient
from regreen.rpc.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    RegreenError,
    ResourceExhausted,
)
from regreen.rpc.wire import from_rpc_error
from regreen.sandbox import v1 as pb
from sandbox_svc import diffs, servicer
from sandbox_svc.images.store import AT_ONCE
from tests.integration.sandbox import images as made
from tests.integration.sandbox.overlay import prepared


async def test_images_have_places_each_way(service, tmp_path):
    states, _, server = service
    archive = made.docker_save(made.system())
    never = asyncio.Event()

    async def half():
        yield pb.ImportImageRequest(options=pb.ImageOptions())
        yield pb.ImportImageRequest(chunk=archive[:2048])
        await never.wait()

    async with connect(server.address) as channel:
        images, stub = ImageClient(channel, patience_s=0.0), pb.ImageServiceStub(channel)
        state = (await images.import_image([archive])).state
        open_ = [stub.ImportImage(half()) for _ in range(AT_ONCE)]
        spooled = tmp_path / "home/sandbox/trash"
        async with asyncio.timeout(20):
            while len(list(spooled.glob("draft-*"))) < AT_ONCE:
                await states.list_states()
        began = time.monotonic()
        with pytest.raises(ResourceExhausted, match=f"{AT_ONCE} imports of images") as caught:
            await images.import_image([archive])
        assert caught.value.retry_after_s
        assert time.monotonic() - began < 10
        assert len(list(spooled.glob("draft-*"))) == AT_ONCE
        assert b"".join([chunk async for chunk in images.export_image(state.id)])
        for call in open_:
            call.cancel()
        await asyncio.gather(*open_, return_exceptions=True)
        assert (await images.import_image([archive])).state.id == state.id
        request = pb.ExportImageRequest(state_id=state.id)
        unread = [stub.ExportImage(request) for _ in range(AT_ONCE)]
        await asyncio.gather(*(call.read() for call in unread))


@pytest.mark.parametrize("start", [bytes(1024), b"nonsense" * 128, b"BZh9" * 300])
async def test_what_is_no_archive_is_refused_by_its_first_block(service, tmp_path, start):
    _, _, server = service
    never = asyncio.Event()

    async def half():
        yield pb.ImportImageRequest(options=pb.ImageOptions())
        yield pb.ImportImageRequest(chunk=start)
        await never.wait()

    async with connect(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await pb.ImageServiceStub(channel).ImportImage(half(), timeout=10)
    error = from_rpc_error(ended.value)
    assert isinstance(error, InvalidArgument), error
    assert not list((tmp_path / "home/sandbox/trash").glob("draft-*"))


async def test_a_diff_over_its_bound_is_refused_before_it_looks(service):
    states, sandboxes, _ = service
    state = await prepared(states, a="1")
    box = (await sandboxes.create_sandbox(state.id)).id
    most = diffs.DiffLimits().max_paths
    script = f"import os\nfor i in range({most} + 1): os.symlink('x', 'l%d' % i)"
    assert (await sandboxes.run(box, ["python3", "-c", script])).exit_code == 0
    began = time.monotonic()
    with pytest.raises(ResourceExhausted, match=rf"{most + 1} paths .* at most {most}"):
        await sandboxes.diff(box)
    assert time.monotonic() - began < 2.0
    await sandboxes.run(box, ["rm", "l0"])
    found = await sandboxes.diff(box)
    assert (found.changes, found.left_out_total) == ([], most)


async def test_a_diff_ends_in_time_and_says_so(service, monkeypatch):
    states, sandboxes, _ = service
    state = await prepared(states, a="1")
    box = (await sandboxes.create_sandbox(state.id)).id
    script = "import os\nfor i in range(5000): os.symlink('x', 'l%d' % i)"
    await sandboxes.run(box, ["python3", "-c", script])
    monkeypatch.setattr(diffs, "DIFF_S", 0.1)
    with pytest.raises(ResourceExhausted, match=r"diff under /work/repo took more than 0.1 s"):
        await sandboxes.diff(box)


async def test_large_diffs_leave_places_to_small_ones(service):
    states, sandboxes, server = service
    state = await prepared(states, a="1")
    large, small = [(await sandboxes.create_sandbox(state.id)).id for _ in range(2)]
    script = "import os\nfor i in range(8000): os.symlink('x', 'l%d' % i)"
    await sandboxes.run(large, ["python3", "-c", script])
    await sandboxes.write_file(small, "/work/repo/b", b"2")
    async with connect(server.address) as channel:
        others = SandboxClient(channel, patience_s=0.0)
        began = time.monotonic()
        await others.diff(large)
        alone = time.monotonic() - began
        running = [asyncio.create_task(others.diff(large)) for _ in range(24)]
        await asyncio.sleep(0.3)
        took = []
        for _ in range(3):
            began = time.monotonic()
            assert [change.path for change in (await sandboxes.diff(small)).changes] == ["b"]
            took.append(time.monotonic() - began)
        ended = await asyncio.gather(*running, return_exceptions=True)
    assert max(took) < 12 * alone, (took, alone)  # 24 in two lanes would take as long
    refused = [error for error in ended if isinstance(error, RegreenError)]
    assert refused
    assert all("large diffs are under way" in str(error) for error in refused), refused
    assert len(refused) < len(ended)


_BAD_LABELS = {
    "count": ({f"k{number}": "" for number in range(65)}, "65 entries"),
    "key": ({"k" * 300: ""}, "300 bytes"),
    "empty key": ({"": "x"}, "empty"),
    "value": ({"key": "ä" * 3000}, r"labels\[.key.\].*6000 bytes"),
    "together": ({f"k{number}": "v" * 4000 for number in range(20)}, "together"),
}


@pytest.mark.parametrize("name", _BAD_LABELS)
async def test_labels_have_bounds_wherever_they_are_given(service, name):
    states, sandboxes, server = service
    labels, said = _BAD_LABELS[name]
    state = await prepared(states, a="1")
    box = (await sandboxes.create_sandbox(state.id)).id
    async with connect(server.address) as channel:
        images = ImageClient(channel, patience_s=0.0)
        for call in (
            sandboxes.create_sandbox(state.id, labels=labels),
            sandboxes.snapshot_sandbox(box, labels=labels),
            sandboxes.fork_sandbox(box, 1, labels=labels),
            sandboxes.list_sandboxes(labels=labels),
            images.import_image([made.docker_save(made.system())], labels=labels),
        ):
            with pytest.raises(InvalidArgument, match=said) as caught:
                await call
            assert caught.value.field.startswith(("labels", "options.labels"))
    assert len((await states.list_states()).states) == 1


async def test_labels_of_forks_of_forks_do_not_add_up(service):
    states, sandboxes, _ = service
    state = await prepared(states, a="1")
    first = {f"a{number}": "" for number in range(40)}
    box = (await sandboxes.create_sandbox(state.id, labels=first)).id
    with pytest.raises(InvalidArgument, match="80 entries"):
        await sandboxes.fork_sandbox(box, 1, labels={f"b{number}": "" for number in range(40)})


async def test_a_page_ends_where_a_message_would_be_full(service, monkeypatch):
    states, sandboxes, _ = service
    for name in ("_PAGE_BYTES", "_LINEAGE_BYTES"):
        monkeypatch.setattr(servicer, name, 20_000)
    state = await prepared(states, a="1")
    box = (await sandboxes.create_sandbox(state.id)).id
    ids = [state.id]
    for turn in range(6):
        await sandboxes.write_file(box, "/work/repo/t", str(turn).encode())
        labels = {f"k{number}": "v" * 4000 for number in range(3)}
        ids.append((await sandboxes.snapshot_sandbox(box, labels=labels)).id)
    found, token, pages = [], "", 0
    while pages == 0 or token:
        page = await states.list_states(page_token=token)
        assert page.ByteSize() < 26_000
        found += [one.id for one in page.states]
        token, pages = page.next_page_token, pages + 1
    assert found == ids
    assert pages > 2
    lineage = await states.lineage(ids[-1])
    assert lineage.ByteSize() < 26_000
    assert lineage.states[-1].id == ids[-1]
    assert list(lineage.ancestor_ids) == ids[:-1]


async def test_a_full_service_tells_what_its_places_are_for(service):
    states, sandboxes, server = service
    state = await prepared(states, a="1")
    await sandboxes.create_sandbox(state.id)
    async with connect(server.address) as channel:
        others = SandboxClient(channel, patience_s=0.0)
        asked = (others.create_sandbox(state.id) for _ in range(12))
        ended = await asyncio.gather(*asked, return_exceptions=True)
    refused = [error.message for error in ended if isinstance(error, ResourceExhausted)]
    assert len(refused) == 9
    for message in refused:
        told = re.match(
            r"(\d+) of 4 sandboxes are in use and (\d+) are starting; .* 1 more", message
        )
        assert told, message
        assert int(told[1]) + int(told[2]) == 4


@pytest.mark.parametrize("how", ["create", "restore"])
async def test_a_state_on_which_a_sandbox_starts_is_not_deleted(service, how):
    states, sandboxes, _ = service
    state = await prepared(states, a="1")
    other = (await sandboxes.create_sandbox(state.id)).id
    deleted = 0
    for _ in range(8):
        below = (await sandboxes.snapshot_sandbox(other)).id
        await sandboxes.restore_sandbox(other, state.id)
        box = other if how == "restore" else ""
        starting = sandboxes.restore_sandbox(box, below) if box else sandboxes.create_sandbox(below)
        started, gone = await asyncio.gather(
            starting, states.delete_state(below), return_exceptions=True
        )
        if gone is None:
            deleted += 1
            assert isinstance(started, NotFound)
            continue
        assert isinstance(gone, FailedPrecondition)
        assert not isinstance(started, BaseException)
        await sandboxes.snapshot_sandbox(started.id)
        if box:
            await sandboxes.restore_sandbox(box, state.id)
        else:
            await sandboxes.delete_sandbox(started.id)
    assert deleted < 8

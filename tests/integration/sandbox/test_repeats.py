"""Repeated requests over gRPC: done once, whoever leaves and whatever is loud."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY

from regreen.client.channel import connect, new_request_id
from regreen.rpc.errors import Aborted, InvalidArgument, NotFound
from regreen.rpc.wire import from_rpc_error
from regreen.sandbox import v1 as pb
from sandbox_svc.__main__ import serving
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.service import SandboxHost
from tests.integration.sandbox.overlay import OverlayBuilder, prepared


@pytest.fixture
async def raw(service):
    """Stubs without retries, and a sandbox with enough in it that a snapshot takes a while."""
    states, sandboxes, server = service
    box = await sandboxes.create_sandbox((await prepared(states, a="1")).id)
    await sandboxes.run(
        box.id,
        [
            "sh",
            "-c",
            "head -c 30000000 /dev/urandom > f; for i in $(seq 3000); do echo > x$i; done",
        ],
    )
    async with connect(server.address) as channel:
        yield pb.SandboxServiceStub(channel), box, states, sandboxes


async def impatient(call: Callable[..., Awaitable[Any]], request: Any) -> tuple[Any, int]:
    """The answer to one request that is sent again and again, and how often it was sent."""
    for tries in range(1, 2000):
        try:
            return await call(request, timeout=0.002 * tries), tries
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
    raise AssertionError("never answered")


def snapshots_begun() -> float:
    """How many snapshots the services of this process were asked for so far."""
    call = {
        "grpc_type": "unary",
        "grpc_service": "regreen.sandbox.v1.SandboxService",
        "grpc_method": "SnapshotSandbox",
    }
    return REGISTRY.get_sample_value("grpc_server_started_total", call) or 0.0


async def snapshots(states) -> int:
    """How many states there are beside the one that was prepared."""
    return len((await states.list_states()).states) - 1


async def test_a_snapshot_asked_for_impatiently_is_one(raw):
    stub, box, states, _ = raw
    request = pb.SnapshotSandboxRequest(id=box.id, request_id=new_request_id())
    answer, tries = await impatient(stub.SnapshotSandbox, request)
    assert tries > 2
    again = await stub.SnapshotSandbox(request)
    assert again.state.id == answer.state.id
    assert await snapshots(states) == 1


async def test_a_fork_asked_for_impatiently_is_one(raw):
    stub, box, states, sandboxes = raw
    request = pb.ForkSandboxRequest(id=box.id, count=2, request_id=new_request_id())
    answer, tries = await impatient(stub.ForkSandbox, request)
    assert tries > 2
    assert len((await sandboxes.list_sandboxes()).sandboxes) == 3
    assert await snapshots(states) == 1
    assert {fork.parent_id for fork in answer.sandboxes} == {box.id}


async def test_a_sandbox_asked_for_by_who_never_comes_back_ends_by_itself(raw):
    stub, box, _, sandboxes = raw
    request = pb.CreateSandboxRequest(state_id=box.state_id, request_id=new_request_id())
    request.ttl.FromMilliseconds(500)
    call = stub.CreateSandbox(request)
    await asyncio.sleep(0.002)
    call.cancel()
    async with asyncio.timeout(20):
        while len((await sandboxes.list_sandboxes()).sandboxes) != 1:
            pass


async def test_a_command_ends_with_its_caller_and_is_not_run_again(raw):
    stub, box, _, sandboxes = raw
    script = "echo x >> n; exec sleep 4321"
    request = pb.RunRequest(
        sandbox_id=box.id,
        request_id=new_request_id(),
        command=pb.Command(argv=["sh", "-c", script]),
    )
    call = stub.Run(request)
    waiting = "while [ ! -e n ]; do sleep 0.02; done"
    await sandboxes.run(box.id, ["sh", "-c", waiting], timeout_s=20)
    call.cancel()
    for _ in range(2):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Run(request, timeout=20)
        error = from_rpc_error(caught.value)
        assert isinstance(error, Aborted)
        assert error.metadata == {"request_id": request.request_id}
        assert "begun, and broken off" in error.message
        assert error.retry_after_s is None
    gone = "grep -q '[s]leep.4321' /proc/[0-9]*/cmdline || cat n"
    assert (await sandboxes.run(box.id, ["sh", "-c", gone])).stdout.head == b"x\n"


async def test_loud_commands_push_out_nobody_elses_answers(service):
    states, sandboxes, _ = service
    state = await prepared(states)
    created = await sandboxes.create_sandbox(state.id, request_id="create")
    await sandboxes.run(created.id, ["sh", "-c", "echo x >> n"], request_id="quiet")
    half = 17_000_000
    loud = ["sh", "-c", f"echo x >> m; head -c {half} /dev/zero; head -c {half} /dev/zero >&2"]
    for number in range(5):
        await sandboxes.run(created.id, loud, output_bytes=16 << 20, request_id=f"loud{number}")
    again = await sandboxes.create_sandbox(state.id, request_id="create")
    assert again.id == created.id
    await sandboxes.run(created.id, ["sh", "-c", "echo x >> n"], request_id="quiet")
    with pytest.raises(Aborted, match="'loud0' was done, and its answer is no longer kept"):
        await sandboxes.run(created.id, loud, output_bytes=16 << 20, request_id="loud0")
    with pytest.raises(InvalidArgument, match="another request"):
        await sandboxes.run(created.id, ["true"], request_id="loud0")
    await sandboxes.run(created.id, loud, output_bytes=16 << 20, request_id="loud4")
    counted = await sandboxes.run(created.id, ["sh", "-c", "wc -l < n; wc -l < m"])
    assert counted.stdout.head == b"1\n5\n"


async def test_a_failure_is_not_kept(service):
    states, sandboxes, _ = service
    state = await prepared(states)
    missing = "sbx_" + "0" * 32
    for _ in range(2):
        with pytest.raises(NotFound):
            await sandboxes.run(missing, ["true"], request_id="r")
    held = [await sandboxes.create_sandbox(state.id) for _ in range(4)]
    client_id = new_request_id()
    with pytest.raises(Exception, match="4 of 4 sandboxes are in use"):
        await sandboxes.create_sandbox(state.id, request_id=client_id)
    await sandboxes.delete_sandbox(held[0].id)
    made = await sandboxes.create_sandbox(state.id, request_id=client_id)
    assert made.id not in {box.id for box in held}


async def test_the_service_ends_while_work_goes_on_for_who_left(service, tmp_path):
    _, _, first = service
    settings = first._settings.model_copy(
        update={"home": tmp_path / "other", "listen": f"unix:{tmp_path}/t", "drain_s": 5.0}
    )
    runtime = EmbeddedRuntime(tmp_path / "other/sandbox", run_probes=False, warm_seats=1)
    host = SandboxHost(settings, runtime, [OverlayBuilder()])
    async with serving(settings, host) as server, connect(server.address) as channel:
        state = await prepared_on(channel)
        stub = pb.SandboxServiceStub(channel)
        box = (await stub.CreateSandbox(pb.CreateSandboxRequest(state_id=state.id))).sandbox
        fill = ["sh", "-c", "for i in $(seq 3000); do echo > x$i; done"]
        await stub.Run(pb.RunRequest(sandbox_id=box.id, command=pb.Command(argv=fill)))
        request = pb.SnapshotSandboxRequest(id=box.id, request_id=new_request_id())
        before = snapshots_begun()
        call = stub.SnapshotSandbox(request)
        async with asyncio.timeout(20):
            while snapshots_begun() == before:  # noqa: ASYNC110 - a call tells nobody
                await asyncio.sleep(0)
        call.cancel()
        await channel.close()
    runtime = EmbeddedRuntime(tmp_path / "other/sandbox", run_probes=False, warm_seats=1)
    host = SandboxHost(settings, runtime, [OverlayBuilder()])
    async with serving(settings, host) as server, connect(server.address) as channel:
        listed = await pb.StateServiceStub(channel).ListStates(
            pb.ListStatesRequest(parent_id=state.id)
        )
        assert len(listed.states) == 1  # begun, so it was done


async def prepared_on(channel: grpc.aio.Channel) -> pb.State:
    from regreen.client.sandbox import StateClient

    return await prepared(StateClient(channel), a="1")

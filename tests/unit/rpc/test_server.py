"""The server toolkit, through a real server on port 0: errors, metrics, health, idempotency."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from regreen.client.channel import Caller, connect, stream
from regreen.client.policy import PolicyClient
from regreen.client.sandbox import StateClient
from regreen.policy import v1 as policy_pb
from regreen.rpc.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InfraError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    error_classes,
)
from regreen.rpc.logging import get
from regreen.rpc.server import Server
from regreen.rpc.wire import from_rpc_error
from regreen.sandbox import v1 as pb
from regreen.settings import ServiceSettings

NAME = "regreen.sandbox.v1.StateService"


LONG = {
    "plain": NotFound("no state " + "x" * 100_000 + " here", metadata={"ids": "y" * 100_000}),
    "umlauts": NotFound("no state " + "ü\n" * 50_000 + " here"),
    "symbols": InvalidArgument("f" * 9000, "is wrong " + "\U0001f600" * 9000, "give another"),
    "crowded": NotFound(
        "no state here", metadata={f"name{n}": "z" * 300 for n in range(200)} | {"count": "200"}
    ),
    "half": NotFound("no state \ud800 here"),
}
"""Errors that would not fit into the trailers of an answer, or not into UTF-8."""


class States(pb.StateServiceServicer):
    """A servicer with one method of each call kind, whose behaviour the request chooses."""

    def __init__(self) -> None:
        self.calls = 0
        self.metadata: list[dict] = []
        self.cancelled, self.started = asyncio.Event(), asyncio.Event()

    async def GetState(self, request, context):
        self.metadata.append(dict(context.invocation_metadata()))
        self.calls += 1
        if request.id == "wrong":
            raise InvalidArgument("id", "is wrong", "give a right one")
        if request.id == "full":
            raise ResourceExhausted("no room", retry_after_s=0.05)
        if request.id in LONG:
            raise LONG[request.id]
        if request.id == "bug":
            raise ZeroDivisionError
        if request.id == "slow":
            await asyncio.sleep(60)
        return pb.GetStateResponse(state=pb.State(id=request.id))

    async def DeleteState(self, request, context):
        self.calls += 1
        await asyncio.sleep(0.05)
        if request.id == "gone":
            raise NotFound("no such state")
        return pb.DeleteStateResponse()

    async def ExportState(self, request, context) -> AsyncIterator[pb.ExportStateResponse]:
        self.metadata.append(dict(context.invocation_metadata()))
        self.started.set()
        try:
            for number in range(20 if request.id == "short" else 1000):
                if request.id == "stuck" and number == 2:
                    await asyncio.sleep(60)
                if request.id == "broken" and number == 2:
                    raise InfraError("layer lost")
                chunk = bytes(1 << 20) if request.id == "large" else b"x"
                yield pb.ExportStateResponse(chunk=chunk)
                await asyncio.sleep(0.01)
        finally:
            self.cancelled.set()

    async def ImportState(self, request_iterator, context):
        size = 0
        async for part in request_iterator:
            size += len(part.chunk)
        if not size:
            raise InvalidArgument("chunk", "is empty")
        return pb.ImportStateResponse(state=pb.State(size_bytes=size))


async def read_all(call) -> None:
    """Read a stream to its end."""
    async with stream(call) as parts:
        async for _ in parts:
            pass


@pytest.fixture
async def served():
    servicer = States()
    server = Server(ServiceSettings(drain_s=0.2), [NAME])
    pb.add_StateServiceServicer_to_server(servicer, server.grpc)
    async with server:
        channel = connect(server.address)
        yield servicer, server, pb.StateServiceStub(channel), Caller(channel, patience_s=0.5)
        await channel.close()


async def test_errors_keep_their_class_field_and_hint(served):
    _, _, stub, caller = served
    with pytest.raises(InvalidArgument) as wrong:
        await caller._call(stub.GetState, pb.GetStateRequest(id="wrong"), 5)
    assert (wrong.value.field, wrong.value.remedy) == ("id", "give a right one")
    with pytest.raises(ResourceExhausted) as full:
        await caller._call(stub.GetState, pb.GetStateRequest(id="full"), 5)
    assert full.value.retry_after_s == pytest.approx(0.05)
    with pytest.raises(InfraError, match="ZeroDivisionError"):
        await caller._call(stub.GetState, pb.GetStateRequest(id="bug"), 5)
    with pytest.raises(DeadlineExceeded):
        await caller._call(stub.GetState, pb.GetStateRequest(id="slow"), 0.2)


@pytest.mark.parametrize("name", LONG)
async def test_an_error_fits_into_the_trailers(served, name):
    _, _, stub, caller = served
    with pytest.raises(type(LONG[name])) as caught:
        await caller._call(stub.GetState, pb.GetStateRequest(id=name), 5)
    assert len(caught.value.message.encode()) <= 2000
    if name == "symbols":
        assert caught.value.remedy == "give another"
    else:
        assert caught.value.message.startswith("no state ")
        assert caught.value.message.endswith(" here")
    assert (caught.value.metadata.get("count") == "200") == (name == "crowded")


async def test_a_repeated_request_runs_once(served):
    servicer, _, stub, caller = served
    request = pb.DeleteStateRequest(id="a", request_id="r1")
    await asyncio.gather(*(caller._call(stub.DeleteState, request, 5) for _ in range(5)))
    await caller._call(stub.DeleteState, request, 5)
    assert servicer.calls == 1
    other = pb.DeleteStateRequest(id="b", request_id="r1")
    with pytest.raises(InvalidArgument, match="another request"):
        await caller._call(stub.DeleteState, other, 5)


async def test_a_failure_is_not_remembered(served):
    servicer, _, stub, caller = served
    request = pb.DeleteStateRequest(id="gone", request_id="r2")
    for _ in range(2):
        with pytest.raises(NotFound):
            await caller._call(stub.DeleteState, request, 5)
    assert servicer.calls == 2


async def test_one_waiter_leaving_does_not_stop_the_others(served):
    servicer, _, stub, caller = served
    request = pb.DeleteStateRequest(id="a", request_id="r3")
    first = asyncio.create_task(caller._call(stub.DeleteState, request, 5))
    await asyncio.sleep(0.02)
    second = asyncio.create_task(caller._call(stub.DeleteState, request, 5))
    await asyncio.sleep(0.01)
    first.cancel()
    await second
    assert servicer.calls == 1


async def test_streams_are_typed_and_cancelled(served):
    servicer, _, stub, _ = served
    with pytest.raises(InfraError, match="layer lost"):
        await read_all(stub.ExportState(pb.ExportStateRequest(id="broken"), timeout=5))
    servicer.cancelled.clear()
    call = stub.ExportState(pb.ExportStateRequest(id="a"), timeout=60)
    seen = weakref.ref(call)
    async with stream(call) as parts:
        async for _ in parts:
            break
    await asyncio.wait_for(servicer.cancelled.wait(), 5)
    del call, parts
    for _ in range(10):
        gc.collect()
        await asyncio.sleep(0.02)
    assert seen() is None


async def test_client_streams_work(served):
    _, _, stub, _ = served

    async def parts():
        for _ in range(3):
            yield pb.ImportStateRequest(chunk=b"abc")

    assert (await stub.ImportState(parts(), timeout=5)).state.size_bytes == 9


async def test_health_reflection_and_metrics(served):
    _, server, stub, caller = served
    await caller._call(stub.GetState, pb.GetStateRequest(id="x"), 5)
    async with grpc.aio.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(service=NAME), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)

        async def ask():
            yield reflection_pb2.ServerReflectionRequest(list_services="")

        async with stream(reflection.ServerReflectionInfo(ask(), timeout=5)) as answers:
            async for item in answers:
                names = [service.name for service in item.list_services_response.service]
                break
        assert NAME in names
    async with httpx.AsyncClient() as http:
        base = f"http://127.0.0.1:{server.metrics_port}"
        text = (await http.get(f"{base}/metrics")).text
        assert 'grpc_server_handled_total{grpc_code="OK",grpc_method="GetState"' in text
        assert (await http.get(f"{base}/healthz")).status_code == 200
        assert (await http.get(f"{base}/else")).status_code == 404


async def test_overload_is_refused_with_a_status():
    servicer = States()
    server = Server(ServiceSettings(max_rpcs=2, drain_s=0), [NAME])
    pb.add_StateServiceServicer_to_server(servicer, server.grpc)
    async with server, grpc.aio.insecure_channel(server.address) as channel:
        stub = pb.StateServiceStub(channel)
        caller = Caller(channel, patience_s=0)
        slow = [
            asyncio.create_task(caller._call(stub.GetState, pb.GetStateRequest(id="slow"), 1))
            for _ in range(2)
        ]
        await asyncio.sleep(0.2)
        with pytest.raises(ResourceExhausted, match="max_rpcs: 2 calls") as refused:
            await caller._call(stub.GetState, pb.GetStateRequest(id="x"), 1)
        assert refused.value.retry_after_s == 1.0
        await asyncio.gather(*slow, return_exceptions=True)
        await caller._call(stub.GetState, pb.GetStateRequest(id="x"), 5)
        await caller._call(stub.GetState, pb.GetStateRequest(id="x"), 5)


async def test_a_missing_server_is_unavailable():
    channel = connect("127.0.0.1:1")
    stub = pb.StateServiceStub(channel)
    with pytest.raises(Unavailable):
        await Caller(channel, patience_s=0)._call(stub.GetState, pb.GetStateRequest(id="x"), 2)
    await channel.close()


def test_every_error_class_is_a_reason_of_the_contract():
    from regreen.common.v1 import ErrorReason

    known = {name.removeprefix("ERROR_REASON_") for name, _ in ErrorReason.items()}
    assert {reason for _, reason in error_classes()} <= known


async def test_a_stream_without_end_is_ended():
    servicer = States()
    server = Server(ServiceSettings(drain_s=0.2, stream_timeout_s=0.3), [NAME])
    pb.add_StateServiceServicer_to_server(servicer, server.grpc)
    async with server, connect(server.address) as channel:
        stub = pb.StateServiceStub(channel)
        for name in ("stuck", "endless"):
            servicer.cancelled.clear()
            with pytest.raises(DeadlineExceeded, match=r"0\.3 s"):
                await read_all(stub.ExportState(pb.ExportStateRequest(id=name)))
            async with asyncio.timeout(5):
                await servicer.cancelled.wait()


async def test_a_metrics_address_that_is_taken_is_a_typed_error():
    async with Server(ServiceSettings(drain_s=0.1), []) as server:
        taken = f"127.0.0.1:{server.metrics_port}"
        with pytest.raises(FailedPrecondition, match=f"metrics: cannot bind {taken}"):
            Server(ServiceSettings(metrics=taken), [])


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this host has no IPv6")
async def test_metrics_are_served_on_ipv6():
    settings = ServiceSettings(metrics="[::1]:0", drain_s=0.1)
    async with Server(settings, []) as server, httpx.AsyncClient() as client:
        answer = await client.get(f"http://[::1]:{server.metrics_port}/healthz")
        assert answer.status_code == 200


async def test_a_drain_lets_running_calls_end_and_takes_no_new_ones():
    servicer = States()
    server = Server(ServiceSettings(drain_s=5.0), [NAME])
    pb.add_StateServiceServicer_to_server(servicer, server.grpc)
    async with connect(f"127.0.0.1:{await _entered(server)}") as channel:
        stub = pb.StateServiceStub(channel)
        running = asyncio.ensure_future(
            read_all(stub.ExportState(pb.ExportStateRequest(id="short")))
        )
        async with asyncio.timeout(5):
            await servicer.started.wait()
        ending = asyncio.ensure_future(server.__aexit__(None, None, None))
        await running
        await ending
        with pytest.raises(Unavailable):
            await Caller(channel, patience_s=0)._call(
                stub.GetState, pb.GetStateRequest(id="late"), 5
            )


async def _entered(server: Server) -> int:
    return (await server.__aenter__()).port


async def test_calls_and_streams_say_their_trajectory_and_trace(served):
    servicer, server, _, _ = served
    trajectory_id, trace_id = "trj_" + "ab" * 16, "cd" * 16
    async with connect(server.address) as channel:
        client = StateClient(channel)
        with structlog.contextvars.bound_contextvars(trajectory_id=trajectory_id):
            await client.get_state("a")
            with structlog.contextvars.bound_contextvars(trace_id=trace_id):
                assert [chunk async for chunk in client.export_state("short")]
    assert [seen["x-regreen-trajectory-id"] for seen in servicer.metadata] == [trajectory_id] * 2
    assert [seen["traceparent"][:36] for seen in servicer.metadata] == [
        f"00-{'ab' * 16}-",
        f"00-{trace_id}-",
    ]


class Sampler(policy_pb.PolicyServiceServicer):
    """Logs when it is asked, and fails."""

    async def Generate(self, request, context):
        get().info("asked")
        raise ZeroDivisionError


async def test_logs_say_the_trajectory_that_a_request_names():
    trajectory_id = "trj_" + "ab" * 16
    server = Server(ServiceSettings(drain_s=0.2), ["regreen.policy.v1.PolicyService"])
    policy_pb.add_PolicyServiceServicer_to_server(Sampler(), server.grpc)
    merge = structlog.contextvars.merge_contextvars
    async with server, connect(server.address) as channel:
        with structlog.testing.capture_logs(processors=[merge]) as lines:
            for named in (trajectory_id, "x" * 1000):
                with pytest.raises(InfraError):
                    await PolicyClient(channel).generate(
                        [1], sampling=policy_pb.Sampling(), trajectory_id=named
                    )
    seen = [
        (line["event"], line["trajectory_id"], line["trace_id"])
        for line in lines
        if line["event"] in ("asked", "call failed")
    ]
    assert seen == [
        ("asked", trajectory_id, "ab" * 16),
        ("call failed", trajectory_id, "ab" * 16),
        ("asked", "x" * 100, ""),
        ("call failed", "x" * 100, ""),
    ]


async def test_bytes_that_are_no_message_are_a_typed_error(served):
    _, server, _, _ = served
    path = f"/{NAME}/"
    async with connect(server.address) as channel:
        answers = (
            channel.unary_unary(path + "GetState")(b"\xff" * 9, timeout=5),
            channel.stream_unary(path + "ImportState")(iter([b"\xff" * 9]), timeout=5),
            channel.unary_stream(path + "ExportState")(b"\xff" * 9, timeout=5).read(),
        )
        for answer in answers:
            with pytest.raises(grpc.aio.AioRpcError, match="request: cannot be decoded") as caught:
                await answer
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert isinstance(from_rpc_error(caught.value), InvalidArgument)

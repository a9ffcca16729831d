"""Where a target stands for several servers, calls take turns among them."""

import contextlib
from collections import Counter

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from regreen.client.channel import check_answers, connect


class Counted(HealthServicer):
    """Health that counts who was asked."""

    def __init__(self, name: str, asked: Counter) -> None:
        super().__init__()
        self._name, self._asked = name, asked

    async def Check(self, request, context):
        self._asked[self._name] += 1
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


@contextlib.asynccontextmanager
async def serving(name: str, asked: Counter):
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(Counted(name, asked), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield server, port
    finally:
        await server.stop(None)


@pytest.mark.parametrize(("scheme", "shared"), [("ipv4:", True), ("", False)])
async def test_calls_take_turns_only_where_many_are_meant(scheme: str, shared: bool):
    asked: Counter = Counter()
    async with serving("one", asked) as (_, one), serving("two", asked) as (_, two):
        both = f"127.0.0.1:{one},127.0.0.1:{two}"
        target = scheme + (both if shared else f"127.0.0.1:{one}")
        async with connect(target) as channel:
            await check_answers(channel, target)
            stub = health_pb2_grpc.HealthStub(channel)
            for _ in range(40):
                await stub.Check(health_pb2.HealthCheckRequest(), timeout=5, wait_for_ready=True)
    assert sum(asked.values()) == 40
    assert (min(asked["one"], asked["two"]) >= 10) is shared


async def test_a_server_that_goes_leaves_its_turns_to_the_other():
    asked: Counter = Counter()
    async with (
        serving("one", asked) as (first, one),
        serving("two", asked) as (_, two),
        connect(f"ipv4:127.0.0.1:{one},127.0.0.1:{two}") as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        for _ in range(20):
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=5, wait_for_ready=True)
        await first.stop(None)
        before = asked["two"]
        for _ in range(20):
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=5, wait_for_ready=True)
        assert asked["two"] - before == 20

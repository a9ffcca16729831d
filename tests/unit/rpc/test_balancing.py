"""Where a target stands for several servers, calls take turns among them."""

import asyncio
import contextlib
import socket
import struct
from collections import Counter

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from regreen.client.channel import _IN_TURN, check_answers, connect
from regreen.rpc import server as rpc_server
from regreen.rpc.channels import open_channel
from regreen.rpc.server import Server
from regreen.sandbox import v1 as pb
from regreen.settings import ServiceSettings


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


class Names(asyncio.DatagramProtocol):
    """A name server whose every name has the addresses `hosts`."""

    hosts: tuple[str, ...] = ()

    def connection_made(self, transport):
        self._transport = transport

    def datagram_received(self, data, addr):
        end = data.index(b"\0", 12) + 5
        hosts = self.hosts if data[end - 4 : end - 2] == b"\0\1" else ()  # of an A record
        answers = (
            b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 0, 4) + socket.inet_aton(host)
            for host in hosts
        )
        head = data[:2] + struct.pack("!5H", 0x8580, 1, len(hosts), 0, 0)
        self._transport.sendto(head + data[12:end] + b"".join(answers), addr)


class States(pb.StateServiceServicer):
    """Counts who was asked; a stream of it ends when it may."""

    def __init__(self, name: str, asked: Counter, may_end: asyncio.Event) -> None:
        self._name, self._asked, self._may_end = name, asked, may_end

    async def GetState(self, request, context):
        self._asked[self._name] += 1
        return pb.GetStateResponse()

    async def PrepareState(self, request, context):
        yield pb.PrepareStateResponse()
        await self._may_end.wait()
        yield pb.PrepareStateResponse()


@contextlib.asynccontextmanager
async def service(listen: str, name: str, asked: Counter, may_end: asyncio.Event):
    settings = ServiceSettings(listen=listen, metrics="127.0.0.1:0", drain_s=0.2)
    server = Server(settings, ["regreen.sandbox.v1.StateService"])
    pb.add_StateServiceServicer_to_server(States(name, asked, may_end), server.grpc)
    async with server:
        yield server


async def test_a_server_that_comes_later_has_its_turns_and_no_call_fails_for_it(monkeypatch):
    monkeypatch.setattr(rpc_server, "_CONNECTION_AGE_MS", 1000)
    asked, may_end = Counter(), asyncio.Event()
    transport, names = await asyncio.get_running_loop().create_datagram_endpoint(
        Names, local_addr=("127.0.0.1", 0)
    )
    names.hosts = ("127.0.0.2",)
    async with service("127.0.0.2:0", "one", asked, may_end) as one:
        named = f"dns://127.0.0.1:{transport.get_extra_info('sockname')[1]}/all.test:{one.port}"
        soon = ("grpc.dns_min_time_between_resolutions_ms", 100)
        async with open_channel(named, None, [("grpc.service_config", _IN_TURN), soon]) as channel:
            stub = pb.StateServiceStub(channel)
            stream = stub.PrepareState(pb.PrepareStateRequest(), timeout=60)
            await stream.read()
            names.hosts = ("127.0.0.2", "127.0.0.3")
            async with (
                service(f"127.0.0.3:{one.port}", "two", asked, may_end),
                asyncio.timeout(30),
            ):
                while not asked["two"]:
                    await stub.GetState(pb.GetStateRequest(), timeout=10)
                    await asyncio.sleep(0.02)
                may_end.set()  # what began on the connection that had its time goes on to its end
                await stream.read()
                assert await stream.read() is grpc.aio.EOF
    assert asked["one"]
    transport.close()

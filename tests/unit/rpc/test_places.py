"""Calls that end in any way free their place among `max_rpcs`, through real servers and callers."""

import asyncio
import sys

import grpc
import pytest

from regreen.rpc.errors import DeadlineExceeded, InfraError
from regreen.rpc.server import Server
from regreen.sandbox import v1 as pb
from regreen.settings import ServiceSettings
from tests.unit.rpc.test_server import NAME, States, read_all


async def settled(server: Server, within_s: float = 10.0) -> int:
    """How many calls a server still takes for being served, once none is."""
    until = asyncio.get_running_loop().time() + within_s
    while server._calls._in_flight and asyncio.get_running_loop().time() < until:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    return server._calls._in_flight


_CALLER = """
import asyncio, sys
import grpc
from regreen.sandbox import v1 as pb

async def nothing():
    await asyncio.Event().wait()
    yield pb.ImportStateRequest()

async def main(address, kind, end):
    channel = grpc.aio.insecure_channel(address)
    stub, limit = pb.StateServiceStub(channel), {"timeout": 0.5} if end == "deadline" else {}

    def one():
        if kind in ("unary", "flood"):
            return stub.GetState(pb.GetStateRequest(id="slow"), **limit)
        if kind == "unsent":
            return stub.ImportState(nothing(), **limit)
        wanted = {"blocked": "stuck", "full": "large"}.get(kind, "long")
        return stub.ExportState(pb.ExportStateRequest(id=wanted), **limit)

    calls = [one() for _ in range(64 if kind == "flood" else 8)]
    for call in calls if kind in ("read", "blocked") else ():
        await call.read()
        await call.read()
    await asyncio.sleep(0.2)
    print("called", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    if end == "cancel":
        for call in calls:
            call.cancel()
        await asyncio.sleep(0.2)
        print("cancelled", flush=True)
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""
"""A caller in a process of its own, which may die."""


@pytest.mark.parametrize("end", ["cancel", "deadline", "kill"])
@pytest.mark.parametrize("kind", ["unary", "unread", "read", "blocked", "full", "unsent", "flood"])
async def test_calls_that_end_in_any_way_free_their_place(kind, end):
    servicer = States()
    server = Server(ServiceSettings(max_rpcs=8, drain_s=0), [NAME])
    pb.add_StateServiceServicer_to_server(servicer, server.grpc)
    async with server:
        caller = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _CALLER, server.address, kind, end),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert caller.stdin is not None
        assert caller.stdout is not None
        try:
            assert await caller.stdout.readline() == b"called\n"
            if end != "deadline":
                assert server._calls._in_flight == 8
            if end == "cancel":
                caller.stdin.write(b"\n")
                assert await caller.stdout.readline() == b"cancelled\n"
            elif end == "kill":
                caller.kill()
            assert await settled(server) == 0
        finally:
            if end != "kill":
                caller.kill()
            await caller.wait()
        async with grpc.aio.insecure_channel(server.address) as again:
            stub = pb.StateServiceStub(again)
            for _ in range(9):
                await stub.GetState(pb.GetStateRequest(id="x"), timeout=5)


async def test_a_stream_that_nobody_reads_ends_in_its_time():
    servicer = States()
    server = Server(ServiceSettings(max_rpcs=8, drain_s=0, stream_timeout_s=0.5), [NAME])
    pb.add_StateServiceServicer_to_server(servicer, server.grpc)
    async with server, grpc.aio.insecure_channel(server.address) as channel:
        call = pb.StateServiceStub(channel).ExportState(pb.ExportStateRequest(id="large"))
        await asyncio.wait_for(servicer.started.wait(), 5)
        assert await settled(server) == 0
        assert servicer.cancelled.is_set()
        with pytest.raises(DeadlineExceeded):
            await read_all(call)


async def test_a_stream_that_nobody_reads_ends_when_nothing_was_taken_for_a_while():
    servicer = States()
    idle_s = {f"{NAME}/ExportState": 0.5}
    server = Server(ServiceSettings(max_rpcs=8, drain_s=0), [NAME], idle_s=idle_s)
    pb.add_StateServiceServicer_to_server(servicer, server.grpc)
    async with server, grpc.aio.insecure_channel(server.address) as channel:
        stub = pb.StateServiceStub(channel)
        call = stub.ExportState(pb.ExportStateRequest(id="large"))
        await asyncio.wait_for(servicer.started.wait(), 5)
        assert await settled(server) == 0
        assert servicer.cancelled.is_set()
        with pytest.raises(DeadlineExceeded, match=r"nothing of the stream was taken for 0\.5 s"):
            await read_all(call)
        slow = stub.ExportState(pb.ExportStateRequest(id="short"))  # takes all, only seldom
        taken = 0
        async for _ in slow:
            taken += 1
            await asyncio.sleep(0.06)
        assert taken == 20


async def test_calls_that_fail_or_never_begin_free_their_place():
    servicer = States()
    server = Server(ServiceSettings(max_rpcs=2, drain_s=0, stream_timeout_s=0.2), [NAME])
    pb.add_StateServiceServicer_to_server(servicer, server.grpc)
    async with server, grpc.aio.insecure_channel(server.address) as channel:
        stub = pb.StateServiceStub(channel)
        raw = channel.unary_unary(f"/{NAME}/GetState")
        for _ in range(6):
            for id in ("wrong", "bug", "full"):
                with pytest.raises(grpc.aio.AioRpcError):
                    await stub.GetState(pb.GetStateRequest(id=id), timeout=5)
            with pytest.raises(grpc.aio.AioRpcError, match="cannot be decoded"):
                await raw(b"\xff\xff", timeout=5)
            for id in ("broken", "stuck"):
                with pytest.raises((InfraError, DeadlineExceeded)):
                    await read_all(stub.ExportState(pb.ExportStateRequest(id=id), timeout=5))
            begun = stub.GetState(pb.GetStateRequest(id="x"), timeout=5)
            begun.cancel()  # before it is sent, perhaps
            assert await settled(server) == 0
        await stub.GetState(pb.GetStateRequest(id="x"), timeout=5)

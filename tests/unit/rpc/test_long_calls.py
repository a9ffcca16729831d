"""Calls that take long: answered, whatever pings keep them up, or given up by name."""

import asyncio

import grpc
import pytest

from regreen.client.sandbox import StateClient
from regreen.rpc.errors import DeadlineExceeded
from regreen.rpc.server import Server
from regreen.sandbox import v1 as pb
from regreen.settings import ServiceSettings
from tests.unit.rpc.test_server import NAME

_PING_S = 11
_CALL_S = 6 * _PING_S
"""gRPC ends the connection at the third ping that it does not permit; nothing is told of one."""


class _Late(pb.StateServiceServicer):
    async def GetState(self, request: pb.GetStateRequest, context: object) -> pb.GetStateResponse:
        await asyncio.sleep(_CALL_S)
        return pb.GetStateResponse()


@pytest.mark.slow
async def test_a_long_call_is_not_ended_for_the_pings_of_its_caller() -> None:
    server = Server(ServiceSettings(drain_s=0), [NAME])
    pb.add_StateServiceServicer_to_server(_Late(), server.grpc)
    often = [("grpc.keepalive_time_ms", 1000 * _PING_S), ("grpc.http2.max_pings_without_data", 0)]
    async with server, grpc.aio.insecure_channel(server.address, options=often) as channel:
        stub = pb.StateServiceStub(channel)
        await stub.GetState(pb.GetStateRequest(id="late"), timeout=2 * _CALL_S)


async def test_a_call_that_is_given_up_says_which_it_was() -> None:
    server = Server(ServiceSettings(drain_s=0), [NAME])
    pb.add_StateServiceServicer_to_server(_Late(), server.grpc)
    async with server, grpc.aio.insecure_channel(server.address) as channel:
        late = pb.GetStateRequest(id="late")
        with pytest.raises(DeadlineExceeded, match=r"^GetState was not answered within 0\.2 s$"):
            await StateClient(channel)._call(pb.StateServiceStub(channel).GetState, late, 0.2)

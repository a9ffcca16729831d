"""Children that are forked while gRPC is at work become other programs unharmed."""

import asyncio
import subprocess

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from regreen.rpc.server import Server
from regreen.settings import ServiceSettings

_CALLERS, _CHILDREN = 8, 60


def _child() -> tuple[int, bytes]:
    # what runs between fork and exec makes it a whole fork, as setting a user does
    done = subprocess.run(["true"], preexec_fn=lambda: None, capture_output=True, check=False)
    return done.returncode, done.stderr


async def test_a_child_forked_between_calls_lives(tmp_path):
    settings = ServiceSettings(listen=f"unix:{tmp_path / 's'}", drain_s=0, insecure=True)
    server = Server(settings, [])
    async with server, grpc.aio.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        async def call() -> None:
            while True:
                await health.Check(health_pb2.HealthCheckRequest())

        callers = [asyncio.create_task(call()) for _ in range(_CALLERS)]
        ended = [await asyncio.to_thread(_child) for _ in range(_CHILDREN)]
        assert not any(caller.done() for caller in callers)
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
    assert set(ended) == {(0, b"")}

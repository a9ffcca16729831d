"""`python -m policy_svc`: the policy service.

- gRPC, metrics and the OpenAI-compatible endpoint stop together, the engine last.
"""

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import uvicorn
from starlette.applications import Starlette

from policy_svc.assemble import open_policy
from policy_svc.openai_http import OpenAiHttp
from policy_svc.policy import Policy
from policy_svc.servicer import PolicyServicer
from policy_svc.sessions import Sessions
from policy_svc.settings import PolicySettings
from regreen.policy import v1 as pb
from regreen.rpc import logging
from regreen.rpc.errors import FailedPrecondition, RegreenError
from regreen.rpc.idempotency import Leaving
from regreen.rpc.server import Server
from regreen.rpc.tokens import Guard

SERVICE = "regreen.policy.v1.PolicyService"


@dataclass(frozen=True, slots=True)
class Running:
    """A started service; `http_port` is 0 without the HTTP endpoint."""

    server: Server
    policy: Policy
    http_port: int


class _Uvicorn(uvicorn.Server):
    """Leaves signals to the gRPC server."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


@contextlib.asynccontextmanager
async def running(settings: PolicySettings) -> AsyncIterator[Running]:
    """A started service; drained and closed on the way out."""
    policy = await open_policy(settings)
    try:
        sessions = Sessions(settings.home / "policy" / "sessions", settings.max_sessions)
        sessions.prune(settings.session_keep_days * 86400)
        guard = Guard(settings.tokens) if settings.tokens else None
        app = OpenAiHttp(policy, sessions, settings.http_key.get_secret_value(), guard).app()
        server = Server(settings, [SERVICE], leaving={f"{SERVICE}/Generate": Leaving.ENDS})
        pb.add_PolicyServiceServicer_to_server(PolicyServicer(policy), server.grpc)
        http = _http(settings.http, app, settings.drain_s)
        async with policy.usage.kept(), http as http_port, server:
            yield Running(server, policy, http_port)
    finally:
        await policy.engine.close()


@contextlib.asynccontextmanager
async def _http(address: str, app: Starlette, drain_s: float) -> AsyncIterator[int]:
    if not address:
        yield 0
        return
    host, _, port = address.rpartition(":")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), int(port)))
    except OSError as error:
        listener.close()
        raise FailedPrecondition(f"http: cannot bind {address} ({error})") from error
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=max(1, round(drain_s)),
    )
    server = _Uvicorn(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="http")
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task
        listener.close()


async def main(settings: PolicySettings) -> None:
    """Serve until asked to end."""
    async with running(settings) as service:
        await service.server.wait()


if __name__ == "__main__":
    loaded = PolicySettings.load()
    logging.configure("policy", loaded.log_level)
    try:
        asyncio.run(main(loaded))
    except RegreenError as error:
        logging.get().error("the service cannot start", problem=error.message)
        sys.exit(1)

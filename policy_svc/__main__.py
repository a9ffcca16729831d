"""`python -m policy_svc`: the policy service.

- gRPC, metrics and the OpenAI-compatible endpoint stop together, the engine last.
"""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.applications import Starlette

from policy_svc.assemble import open_policy
from policy_svc.http_server import served
from policy_svc.openai_http import OpenAiHttp
from policy_svc.policy import Policy
from policy_svc.servicer import PolicyServicer
from policy_svc.sessions import Sessions
from policy_svc.settings import PolicySettings
from regreen.policy import v1 as pb
from regreen.rpc import logging
from regreen.rpc.errors import RegreenError
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


@contextlib.asynccontextmanager
async def running(settings: PolicySettings) -> AsyncIterator[Running]:
    """A started service; drained and closed on the way out."""
    policy = await open_policy(settings)
    try:
        sessions = Sessions(settings.home / "policy" / "sessions", settings.max_sessions)
        sessions.prune(settings.session_keep_days * 86400)
        guard = Guard(settings.tokens) if settings.tokens else None
        server = Server(settings, [SERVICE], leaving={f"{SERVICE}/Generate": Leaving.ENDS})
        pb.add_PolicyServiceServicer_to_server(PolicyServicer(policy), server.grpc)
        key = settings.http_key.get_secret_value()
        app = OpenAiHttp(policy, sessions, key, guard, server.audit).app()
        async with policy.usage.kept(), _http(settings, app) as http_port, server:
            yield Running(server, policy, http_port)
    finally:
        await policy.engine.close()


@contextlib.asynccontextmanager
async def _http(settings: PolicySettings, app: Starlette) -> AsyncIterator[int]:
    if not settings.http:
        yield 0
        return
    async with served(settings.http, app, settings.drain_s) as port:
        yield port


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

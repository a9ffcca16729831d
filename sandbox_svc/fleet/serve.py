"""Brings a front up and down: cluster, workers, routes, server.

- It serves from the moment that a worker is ready, or says why none is and ends.
- At the end the workers go, unless they are to stay; states that were to be kept are kept first.
"""

import contextlib
import functools
from collections.abc import AsyncIterator
from dataclasses import replace

from regreen.blobs import ready_blobs
from regreen.rpc.errors import InvalidArgument, MissingDependency
from regreen.rpc.quotas import Quotas
from regreen.rpc.server import Server
from sandbox_svc import manners, metrics
from sandbox_svc.fleet.archive import Archive
from sandbox_svc.fleet.calls import SERVICES
from sandbox_svc.fleet.front import Front
from sandbox_svc.fleet.kube import KubeWorkers
from sandbox_svc.fleet.manifests import TLS_NAME, Plan
from sandbox_svc.fleet.registry import Registry
from sandbox_svc.fleet.router import Router
from sandbox_svc.settings import SandboxSettings


@contextlib.asynccontextmanager
async def serving(settings: SandboxSettings) -> AsyncIterator[Server]:
    """The running front.

    Raises:
        InvalidArgument: a setting that a front cannot give to its workers.
        MissingDependency: no usable cluster, or no worker in time.
    """
    if settings.egress_upstream:
        raise InvalidArgument(
            "egress_upstream",
            "would stand in the pods' specs with its password",
            "leave it out; name a Secret with REGREEN_SANDBOX__EGRESS_UPSTREAM in kube_env_secrets",
        )
    home = settings.home / "sandbox"
    home.mkdir(parents=True, exist_ok=True)
    tls = settings.tls if settings.kube_tls_secret else None
    registry = Registry(
        max_message_bytes=settings.max_message_bytes,
        tls=replace(tls, server_name=TLS_NAME) if tls else None,
    )

    for state in ("ready", "waiting"):
        metrics.WORKERS.labels(state).set_function(functools.partial(registry.count, state))
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(registry.close)
        workers = KubeWorkers(Plan(settings), registry.update)
        stack.push_async_callback(workers.close)
        await workers.start()
        if not await registry.wait_ready(settings.kube_start_s):
            raise MissingDependency(
                f"no worker was ready within {settings.kube_start_s:.0f} s ({workers.explain()}); "
                "look at the pods, or wait longer with kube_start_s"
            )
        blobs = await ready_blobs(settings.blobs or settings.home / "blobs")
        router = Router(
            registry,
            Archive(blobs, home / "moving"),
            keep=settings.fleet_keep,
            max_sandboxes=settings.max_sandboxes,
        )
        stack.push_async_callback(router.close)
        idle_s = manners.idle_s(settings)
        server = Server(settings, SERVICES, leaving=manners.LEAVING, idle_s=idle_s)
        Front(router, Quotas(settings.quotas)).add_to(server.grpc)
        async with server:
            yield server

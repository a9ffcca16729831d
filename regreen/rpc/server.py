"""The aio gRPC server that every service runs in.

- Health and reflection are always there; health says NOT_SERVING before a drain begins.
- `/metrics` and `/healthz` answer on an address of their own.
- SIGTERM and SIGINT drain: no new calls, running ones get `drain_s`, then the process ends.
- Plain text is served on loopback and unix sockets alone, unless the settings say `insecure`;
  certificates are read anew when their files change. Where tokens are asked for, a call without
  one that covers it is refused before anything of it is read.
"""

import asyncio
import contextlib
import errno
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from regreen.rpc import traces
from regreen.rpc.audit import Audit
from regreen.rpc.errors import FailedPrecondition
from regreen.rpc.idempotency import Leaving
from regreen.rpc.interceptors import CallInterceptor
from regreen.rpc.logging import get
from regreen.rpc.metrics import MetricsServer
from regreen.rpc.ports import check_free, is_local
from regreen.rpc.tls import server_credentials
from regreen.rpc.tokens import Guard
from regreen.settings import ServiceSettings

_FLOOD = 8
"""Times `max_rpcs` that are taken in to be refused with a delay; more are cut off without one."""
_HANDSHAKE_MS = 10_000
"""A connection that has not said by then who it is and what it speaks is closed."""
_RECEIVE_S = 60.0
"""What a request may take to arrive whole; on loopback nobody's network is slow."""
_CONNECTION_AGE_MS = 5 * 60_000
"""Connections are made anew: certificates are looked at again, and names resolved, without which a
process that came later gets no load. gRPC spreads it by a tenth to either side, so that clients do
not all come back at once. Calls and streams on an old connection go on to their own ends: their
grace has no bound unless `max_connection_age_grace_ms` is set."""
_SERVING = health_pb2.HealthCheckResponse.SERVING


class Server:
    """One service's server; add servicers to `grpc` before entering it.

    `services` are full names such as "regreen.sandbox.v1.SandboxService". `remember` answers
    repeated requests by their ids; off for a service that remembers them itself. By method
    ("regreen.sandbox.v1.SandboxService/Run"), `leaving` says what becomes of work whose callers
    have left, where it does not go on, and `idle_s` how long a stream waits for a caller that takes
    nothing. `behind_front` says that only a front calls, which says whose its calls are.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        services: Sequence[str],
        *,
        remember: bool = True,
        leaving: Mapping[str, Leaving] | None = None,
        idle_s: Mapping[str, float] | None = None,
        behind_front: bool = False,
    ) -> None:
        self._settings, self._services = settings, tuple(services)
        self._log = get()
        traces.prepare()
        self.audit = Audit(settings.audit) if settings.audit else None
        """Where mutations are written down, for those too that come by another way than gRPC."""
        self._calls = CallInterceptor(
            settings.call_timeout_s,
            stream_timeout_s=settings.stream_timeout_s,
            max_rpcs=settings.max_rpcs,
            remember=remember,
            leaving=leaving,
            idle_s=idle_s,
            guard=Guard(settings.tokens) if settings.tokens else None,
            audit=self.audit,
            receive_s=None if is_local(settings.listen) else _RECEIVE_S,
            behind_front=behind_front,
        )
        self.grpc: grpc.aio.Server = grpc.aio.server(
            interceptors=[self._calls],
            maximum_concurrent_rpcs=_FLOOD * settings.max_rpcs,
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", settings.max_message_bytes),
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
                ("grpc.max_connection_age_ms", _CONNECTION_AGE_MS),
            ],
        )
        self._health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        names = (*services, "grpc.health.v1.Health", reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.grpc)
        self._serving = False
        self._metrics = MetricsServer(settings.metrics, lambda: self._serving)
        self._stop = asyncio.Event()
        self.port = 0

    @property
    def metrics_port(self) -> int:
        """Port of `/metrics` and `/healthz`."""
        return self._metrics.port

    @property
    def address(self) -> str:
        """Address that clients connect to."""
        listen = self._settings.listen
        if listen.startswith("unix:"):
            return listen
        return f"{listen.rpartition(':')[0]}:{self.port}"

    async def __aenter__(self) -> "Server":
        self.port = self._bind()
        await self.grpc.start()
        self._metrics.start()
        for name in ("", *self._services):
            await self._health.set(name, _SERVING)
        self._serving = True
        self._log.info("serving", address=self.address, metrics_port=self.metrics_port)
        return self

    async def __aexit__(self, *exc: Any) -> None:
        self._serving = False
        await self._health.enter_graceful_shutdown()
        self._log.info("draining", seconds=self._settings.drain_s)
        end_s = asyncio.get_running_loop().time() + self._settings.drain_s
        await self.grpc.stop(self._settings.drain_s)
        await self._calls.close(end_s - asyncio.get_running_loop().time())
        await traces.flush()
        self._metrics.close()

    async def wait(self) -> None:
        """Return when the process is asked to end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        try:
            await self._stop.wait()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                with contextlib.suppress(ValueError):
                    loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Make `wait` return."""
        self._stop.set()

    def _bind(self) -> int:
        settings = self._settings
        try:
            check_free(settings.listen)
            if tls := settings.tls:
                port = self.grpc.add_secure_port(settings.listen, server_credentials(tls))
            else:
                port = self.grpc.add_insecure_port(settings.listen)
        except (OSError, RuntimeError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            raise FailedPrecondition(
                f"listen: cannot bind {settings.listen}"
                f"{'; is another instance running?' if taken else ';'} "
                f"--listen takes another address, port 0 a free one ({error})"
            ) from error
        return port

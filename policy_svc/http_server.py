"""The server of the HTTP endpoint: uvicorn, with bounds on what a connection may keep.

- A connection that is not being answered has 10 s to ask for something, headers whole; what
  trickles in keeps it no longer. Bodies have a bound of their own, once the caller is known.
- The number of connections is bounded, by what the process may open too. One too many has the
  oldest shut that is not being answered: a flood of silent ones drives itself out.
- An answer that nobody takes for a minute is given up.
"""

import asyncio
import contextlib
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from regreen.rpc.errors import FailedPrecondition

_SILENT_S, _UNTAKEN_S, _CONNECTIONS, _BACKLOG = 10.0, 60.0, 1024, 2048
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)


class _Connection(H11Protocol):
    """A connection that ends when it is owed nothing and asks for nothing."""

    _since = 0.0
    """When it was made, or last answered in full."""
    _left, _taken = 0, 0.0
    """Bytes that nobody has taken yet, and when there were others."""
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, and have another make room for it."""
        super().connection_made(transport)
        self._since = self.loop.time()
        if len(self.connections) > _most():
            others = [one for one in self.connections if isinstance(one, _Connection)]
            free = [one for one in others if one is not self and not one.answering]
            if free:
                min(free, key=lambda one: one._since).transport.abort()
            else:
                transport.write(_FULL)
                transport.close()
                return
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    @property
    def answering(self) -> bool:
        """Whether a request is whole up to its body, and its answer was not yet taken."""
        open_request = self.cycle is not None and not self.cycle.response_complete
        return open_request or self.transport.get_write_buffer_size() > 0

    def on_response_complete(self) -> None:
        """An answer was given in full."""
        self._since = self.loop.time()
        super().on_response_complete()

    def _look(self) -> None:
        now, left = self.loop.time(), self.transport.get_write_buffer_size()
        if left != self._left:
            self._left, self._taken = left, now
        silent = not self.answering and now >= max(self._since, self._taken) + _SILENT_S
        untaken = left > 0 and now >= self._taken + _UNTAKEN_S
        if silent or untaken:
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(_SILENT_S / 4, self._look)


def _most() -> int:
    """Connections that are kept; half of the descriptors are for everything else."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _CONNECTIONS if soft == resource.RLIM_INFINITY else min(_CONNECTIONS, soft // 2)


class _Uvicorn(uvicorn.Server):
    """Leaves signals to the gRPC server."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


@contextlib.asynccontextmanager
async def served(address: str, app: Starlette, drain_s: float) -> AsyncIterator[int]:
    """Serve an application at an address (port 0: a free one); gives the port.

    Raises:
        FailedPrecondition: the address cannot be bound.
    """
    host, _, port = address.rpartition(":")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), int(port)))
        listener.listen(_BACKLOG)  # now: a second service would bind a port that nobody listens at
    except OSError as error:
        listener.close()
        raise FailedPrecondition(f"http: cannot bind {address} ({error})") from error
    config = uvicorn.Config(
        app,
        http=_Connection,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=max(1, round(drain_s)),
    )
    server = _Uvicorn(config)
    task: asyncio.Task[Any] = asyncio.create_task(server.serve(sockets=[listener]), name="http")
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task
        listener.close()

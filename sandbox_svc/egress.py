"""The only way out of a sandbox: a proxy of the service, for sandboxes that were given one.

- A sandbox has loopback and nothing else. Its first process listens there and hands the listening
  socket out; the service accepts on it from outside. No process of the proxy runs inside, and the
  sandbox's network namespace has no route, whatever runs in it.
- A door belongs to one sandbox and outlives its boxes: freeze and restore change what is behind
  it. Closing it ends every connection at once.
- What one sandbox may use at a time and in all is bounded; beyond it, it waits or is refused.
"""

import asyncio
import contextlib
import socket
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import structlog

from regreen.allowlist import AllowList
from regreen.rpc.errors import FailedPrecondition
from regreen.rpc.tenants import charged
from sandbox_svc import metrics
from sandbox_svc.backends.base import PROXY_PORT
from sandbox_svc.egress_exchange import Bounds, Exchange
from sandbox_svc.egress_log import Ledger, Record
from sandbox_svc.egress_route import Resolver, Route, SystemResolver, Upstream, abort
from sandbox_svc.egress_rules import AddressRules, Network

_PROXY = f"http://127.0.0.1:{PROXY_PORT}"
_DIRECT = "localhost,127.0.0.1,::1"
_BUFFER_BYTES = 1 << 16
_BACK_OFF_S = 0.1
ENVIRONMENT: Mapping[str, str] = {
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), _PROXY),
    **dict.fromkeys(("no_proxy", "NO_PROXY"), _DIRECT),
}
"""Of commands in a sandbox that has a way out."""


class Egress:
    """The proxy of one service."""

    def __init__(
        self,
        *,
        private: Sequence[Network] = (),
        upstream: Upstream | None = None,
        bounds: Bounds | None = None,
        resolver: Resolver | None = None,
        ledger: Ledger | None = None,
        enabled: bool = True,
        ceiling: AllowList | None = None,
    ) -> None:
        self.ledger = ledger or Ledger()
        self.bounds = bounds or Bounds()
        self._enabled, self._ceiling = enabled, ceiling
        self._system = SystemResolver()
        self.route = Route(
            AddressRules(private),
            resolver or self._system,
            upstream=upstream,
            buffer_bytes=_BUFFER_BYTES,
        )
        self._doors: dict[str, Door] = {}
        self.ending: set[asyncio.Task[None]] = set()

    def door(self, sandbox_id: str, allow: AllowList) -> "Door":
        """A way out for a sandbox; whoever asks for it closes it.

        Raises:
            FailedPrecondition: this service gives none, or none to a host of the list.
        """
        if not self._enabled:
            raise FailedPrecondition(
                "egress: this service gives sandboxes no network; set egress=true to allow it"
            )
        self._check_ceiling(allow)
        door = self._doors[sandbox_id] = Door(self, sandbox_id, allow)
        return door

    def _check_ceiling(self, allow: AllowList) -> None:
        if self._ceiling is None:
            return
        for at, rule in enumerate(allow.rules):
            if not self._ceiling.covers(rule):
                ports = " and ".join(str(port) for port in sorted(rule.ports))
                raise FailedPrecondition(
                    f"egress.allow[{at}]: {'*.' * rule.below}{rule.host} on {ports} is not among "
                    "the hosts that this service gives a way to; leave it out, or have its "
                    "operator add it to the setting egress_hosts"
                )

    def forget(self, door: "Door") -> None:
        """A door was closed."""
        if self._doors.pop(door.sandbox_id, None) is not None:
            self.ledger.closed(door.sandbox_id)

    @property
    def open_for(self) -> frozenset[str]:
        """Sandboxes that have a door."""
        return frozenset(self._doors)

    async def close(self) -> None:
        """Close every door and wait until its connections have ended."""
        for door in list(self._doors.values()):
            door.close()
        await asyncio.gather(*self.ending, return_exceptions=True)
        self._system.close()


class Door:
    """The way out of one sandbox; see `backends.base.Door` and `egress_exchange.Account`."""

    def __init__(self, egress: Egress, sandbox_id: str, allow: AllowList) -> None:
        self.sandbox_id, self.allow, self._tenant = sandbox_id, allow, charged()
        self.bounds, self.route = egress.bounds, egress.route
        self.environment = ENVIRONMENT
        self._egress = egress
        self._left_bytes = egress.bounds.transfer_bytes
        self._gates: set[_Gate] = set()
        self._closed = False

    def open(self, listener: socket.socket) -> "_Gate":
        """Begin to accept on the listening socket of a box; the gate owns it."""
        gate = _Gate(self, listener, self._egress.ending)
        if self._closed:
            gate.close()
        else:
            self._gates.add(gate)
        return gate

    def gone(self, gate: "_Gate") -> None:
        """A gate was closed."""
        self._gates.discard(gate)

    def close(self) -> None:
        """End every connection; safe to call twice."""
        self._closed = True
        for gate in list(self._gates):
            gate.close()
        self._egress.forget(self)

    def begin(self) -> Record:
        """A record of a request that begins."""
        ledger = self._egress.ledger
        return ledger.begin(self.sandbox_id, tenant=self._tenant, keep=not self._closed)

    def end(self, record: Record) -> None:
        """The request has ended."""
        self._egress.ledger.end(record)

    def spend(self, size_bytes: int) -> bool:
        """Count bytes; whether the sandbox may still have them."""
        self._left_bytes -= size_bytes
        return self._left_bytes > 0


class _Gate:
    """Accepts on one listening socket and serves what comes."""

    def __init__(
        self, door: Door, listener: socket.socket, ending: set[asyncio.Task[None]]
    ) -> None:
        listener.setblocking(False)
        self._door, self._listener, self._ending = door, listener, ending
        self._room = asyncio.Semaphore(door.bounds.connections)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._credit, self._counted_s = door.bounds.per_second, 0.0
        self._closed = False
        self._start(self._accept())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        for tasks in (self._tasks, self._ending):
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def _accept(self) -> None:
        """One at a time while there is room: the rest waits in the kernel, or is refused there."""
        structlog.contextvars.unbind_contextvars("method")  # of the call that made the sandbox
        loop = asyncio.get_running_loop()
        while not self._closed:
            await self._paced(loop)
            await self._room.acquire()
            try:
                sock, _ = await loop.sock_accept(self._listener)
            except OSError:  # out of descriptors, or a client that went away
                self._room.release()
                await asyncio.sleep(_BACK_OFF_S)
                continue
            except BaseException:
                self._room.release()
                raise
            self._start(self._serve(sock))

    async def _paced(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait while connections come faster than the bound, so that a flood costs little."""
        rate = self._door.bounds.per_second
        now = loop.time()
        gained = (now - self._counted_s) * rate
        self._credit, self._counted_s = min(rate, self._credit + gained) - 1.0, now
        if self._credit < 0.0:
            await asyncio.sleep(-self._credit / rate)

    async def _serve(self, sock: socket.socket) -> None:
        try:
            with metrics.EGRESS_CONNECTIONS.track_inprogress():
                streams = await asyncio.open_connection(sock=sock, limit=_BUFFER_BYTES)
                self._writers.add(streams[1])
                try:
                    await Exchange(self._door, streams).serve()
                finally:
                    self._writers.discard(streams[1])
        except OSError:
            sock.close()
        finally:
            self._room.release()

    def close(self) -> None:
        """Stop accepting and end every connection now; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        for writer in self._writers:
            abort(writer)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._door.gone(self)

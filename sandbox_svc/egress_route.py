"""The way from the proxy to a host: resolve, judge every address, connect to one of those.

- A name is resolved once for each request, and the connection goes to an address that was judged:
  a name server that changes its answer in between gains nothing.
- One bad address among those of a name refuses the name.
- Behind an upstream proxy that proxy resolves and connects; what resolves here is judged all the
  same. Its credentials are in the requests to it and nowhere else.
"""

import asyncio
import base64
import contextlib
import functools
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from sandbox_svc.egress_rules import AddressRules

Resolver = Callable[[str], Awaitable[Sequence[str]]]
"""Addresses of a host name; raises OSError when there are none."""
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
_MAX_ADDRESSES = 4
_RESOLVER_THREADS = 8
_ANSWER_BYTES = 16 << 10


class AddressRefused(Exception):
    """The host has an address that is never connected to."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """A proxy of the service's own network."""

    host: str
    port: int
    tls: bool = False
    authorization: str = ""

    @classmethod
    def parse(cls, url: str) -> "Upstream":
        """The proxy of `http://user:password@host:port` or `https://...`.

        Raises:
            ValueError: malformed; the message does not repeat the URL, which may hold a password.
        """
        form = "give http://host:port or https://host:port, a user and password before an @"
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            raise ValueError(f"is no URL; {form}") from None
        if parts.scheme not in ("http", "https") or not host or parts.path.strip("/"):
            raise ValueError(f"is no URL of a proxy; {form}")
        tls = parts.scheme == "https"
        authorization = ""
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            authorization = "Basic " + base64.b64encode(pair.encode()).decode("ascii")
        return cls(host, port or (443 if tls else 80), tls, authorization)


@dataclass(frozen=True, slots=True)
class Line:
    """A connection on which a plain request may be sent."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    absolute: bool = False
    """Whether the request names the whole URL, as to a proxy."""
    headers: tuple[tuple[bytes, bytes], ...] = ()


class SystemResolver:
    """Asks the host's resolver, in threads of its own: slow name servers hold up nothing else."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_RESOLVER_THREADS, thread_name_prefix="egress-names")

    async def __call__(self, host: str) -> Sequence[str]:
        ask = functools.partial(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, ask)
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))

    def close(self) -> None:
        """Let the threads end; none is waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class Route:
    """Connects to hosts for sandboxes."""

    def __init__(
        self,
        rules: AddressRules,
        resolver: Resolver,
        *,
        upstream: Upstream | None = None,
        buffer_bytes: int = 1 << 16,
    ) -> None:
        self._rules, self._resolver, self._upstream = rules, resolver, upstream
        self._buffer_bytes = buffer_bytes

    async def tunnel(self, host: str, port: int) -> Streams:
        """A connection to a host through which anything may go.

        Raises:
            AddressRefused: an address of it is never connected to.
            OSError: it cannot be resolved or reached.
        """
        addresses = await self._judged(host)
        if self._upstream is None:
            return await self._dial(addresses, port)
        return await self._through(self._upstream, host, port)

    async def line(self, host: str, port: int) -> Line:
        """A connection for one plain request to a host.

        Raises:
            AddressRefused: an address of it is never connected to.
            OSError: it cannot be resolved or reached.
        """
        addresses = await self._judged(host)
        if self._upstream is None:
            return Line(*await self._dial(addresses, port))
        given = self._upstream.authorization
        headers = ((b"Proxy-Authorization", given.encode("ascii")),) if given else ()
        return Line(*await self._open(self._upstream), absolute=True, headers=headers)

    async def _judged(self, host: str) -> Sequence[str]:
        try:
            addresses: Sequence[str] = [str(ipaddress.ip_address(host))]
        except ValueError:
            try:
                addresses = await self._resolver(host)
            except OSError:
                if self._upstream is None:
                    raise
                addresses = ()
        for address in addresses:
            if problem := self._rules.problem(address):
                raise AddressRefused(f"{address} {problem}")
        if not addresses and self._upstream is None:
            raise OSError("the name has no address")
        return addresses[:_MAX_ADDRESSES]

    async def _dial(self, addresses: Sequence[str], port: int) -> Streams:
        failure = OSError("no address was tried")
        for address in addresses:
            try:
                return await asyncio.open_connection(address, port, limit=self._buffer_bytes)
            except OSError as error:
                failure = error
        raise failure

    async def _open(self, upstream: Upstream) -> Streams:
        context = ssl.create_default_context() if upstream.tls else None
        return await asyncio.open_connection(
            upstream.host, upstream.port, ssl=context, limit=self._buffer_bytes
        )

    async def _through(self, upstream: Upstream, host: str, port: int) -> Streams:
        reader, writer = await self._open(upstream)
        try:
            place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}"]
            if upstream.authorization:
                lines.append(f"Proxy-Authorization: {upstream.authorization}")
            writer.write("\r\n".join([*lines, "", ""]).encode("ascii"))
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
                raise OSError("the upstream proxy gave no answer") from error
            status = head.split(b"\r\n", 1)[0].split(b" ", 2)
            if len(head) > _ANSWER_BYTES or len(status) < 2 or status[1] != b"200":
                raise OSError(f"the upstream proxy answered {status[1:2]!r}")
        except BaseException:
            abort(writer)
            raise
        return reader, writer


def abort(writer: asyncio.StreamWriter) -> None:
    """End a connection at once; what was not sent yet is dropped."""
    with contextlib.suppress(RuntimeError):
        writer.transport.abort()

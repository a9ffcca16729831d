"""One connection of a sandbox to the proxy: a plain request, or a tunnel.

- A connection carries one request; what a client sends after it is dropped with the connection.
- Framing is read and written anew (h11): what two parties could read differently never passes.
- The target decides where a request goes; a `Host` that says otherwise is refused.
- A TLS greeting that asks for a server that is not allowed ends its tunnel; the rest is opaque.
- `Proxy-*`, hop-by-hop headers and upgrades do not pass; nor does a user name in a URL.
- Every phase has a time, and the whole has one; every byte counts against the sandbox's bound.
"""

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

import h11

from regreen.allowlist import AllowList, normal_host, split_authority
from regreen.rpc import logging
from sandbox_svc.egress_log import Decision, Record, Tally, cut
from sandbox_svc.egress_route import AddressRefused, Route, Streams, abort
from sandbox_svc.egress_tls import Incomplete, begins_like_tls, server_name

_CHUNK = 1 << 16
_MAX_GREETING_BYTES, _MAX_GREETING_READS = 1 << 15, 32
_MAX_REASON_CHARS = 200
_LINGER_S, _LINGER_BYTES = 1.0, 1 << 20
_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"te", b"trailer", b"upgrade", b"expect", b"host")
)
_TUNNEL_OPEN = b"HTTP/1.1 200 Connection established\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one sandbox may use of the proxy."""

    connections: int = 32
    """At once; more wait to be accepted."""
    transfer_bytes: int = 4 << 30
    """Both ways together, over the sandbox's life."""
    head_bytes: int = 32 << 10
    head_s: float = 10.0
    """Until the head of a request is whole, however it trickles."""
    connect_s: float = 15.0
    idle_s: float = 60.0
    """Without a byte in either direction."""
    total_s: float = 3600.0
    per_second: float = 200.0
    """Connections accepted, after a burst of as many."""


class Account(Protocol):
    """What the exchanges of one sandbox share."""

    allow: AllowList
    bounds: Bounds
    route: Route

    def begin(self) -> Record:
        """A record of a request that begins."""
        ...

    def end(self, record: Record) -> None:
        """The request has ended."""
        ...

    def spend(self, size_bytes: int) -> bool:
        """Count bytes; whether the sandbox may still have them."""
        ...


class _Refused(Exception):
    """The request goes nowhere."""

    def __init__(self, decision: Decision, detail: str, status: int) -> None:
        super().__init__(detail)
        self.decision, self.detail, self.status = decision, detail, status


@dataclass(frozen=True, slots=True)
class _Target:
    method: str
    host: str
    port: int
    path: str = ""

    @property
    def authority(self) -> str:
        """As a `Host` header has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == 80 else f"{host}:{self.port}"


class Exchange:
    """Serves one accepted connection to its end."""

    def __init__(self, account: Account, streams: Streams) -> None:
        self._account = account
        self._reader, self._writer = streams
        self._inside = h11.Connection(
            h11.SERVER, max_incomplete_event_size=account.bounds.head_bytes
        )
        self._record: Record | None = None
        self._phase = "the head of the request"
        self._timer = asyncio.timeout(account.bounds.head_s)
        self._end_s = asyncio.get_running_loop().time() + account.bounds.total_s
        self._answered = False

    async def serve(self) -> None:
        """Read a request and see it through; whatever happens, it is recorded and ended."""
        try:
            await self._timed()
        except _Refused as refusal:
            self._note(refusal.decision, refusal.detail)
            await self._answer(refusal.status, refusal.detail)
        except (OSError, h11.ProtocolError) as error:
            self._note(Decision.FAILED, f"{self._phase}: {error or type(error).__name__}")
            await self._answer(502, "the connection failed")
        except Exception as error:  # noqa: BLE001  (a hostile peer must not end the accept loop)
            logging.get().error("egress failed", exc_info=error)
            self._note(Decision.FAILED, f"internal: {type(error).__name__}")
        except asyncio.CancelledError:
            if self._record is not None:
                self._note(Decision.FAILED, "the sandbox ended")
            raise
        finally:
            abort(self._writer)
            if self._record is not None:
                self._account.end(self._record)

    async def _timed(self) -> None:
        try:
            async with self._timer:
                await self._run()
        except TimeoutError:
            waited = f"no end of {self._phase} in time"
            if self._record is None or not self._record.method:
                raise _Refused(Decision.MALFORMED, waited, 408) from None
            raise _Refused(Decision.FAILED, waited, 504) from None
        except BaseExceptionGroup as group:
            raise _first(group) from None

    async def _run(self) -> None:
        request = await self._head()
        if request is None:
            return
        self._record = record = self._record or self._account.begin()
        target = _target(request)
        record.method, record.host, record.port = target.method, target.host, target.port
        record.path = cut(target.path)
        if not self._account.allow.permits(target.host, target.port):
            raise _Refused(Decision.HOST, "is not on the sandbox's allow list", 403)
        if not self._account.spend(0):
            raise _over()
        self._next("connecting", self._account.bounds.connect_s)
        try:
            await (self._tunnel if target.method == "CONNECT" else self._forward)(target, request)
        except AddressRefused as error:
            raise _Refused(Decision.ADDRESS, str(error), 403) from error

    def _next(self, phase: str, seconds: float) -> None:
        """Begin a phase, or give the present one more time."""
        self._phase = phase
        now = asyncio.get_running_loop().time()
        self._timer.reschedule(min(self._end_s, now + seconds))

    def _note(self, decision: Decision, detail: str) -> None:
        if self._record is None:
            self._record = self._account.begin()
        if self._record.decision is Decision.ALLOWED:
            self._record.decision, self._record.detail = decision, detail[:500]

    async def _head(self) -> h11.Request | None:
        """The request; None when the client went away without one."""
        began = False
        while True:
            try:
                event = self._inside.next_event()
            except h11.RemoteProtocolError as error:
                status = error.error_status_hint
                raise _Refused(Decision.MALFORMED, str(error), status) from error
            if isinstance(event, h11.Request):
                return event
            if not isinstance(event, type(h11.NEED_DATA)):
                return None
            data = await self._reader.read(_CHUNK)
            if data and not began:
                began, self._record = True, self._account.begin()
            if not data and not began:
                return None
            self._inside.receive_data(data)

    # ---- tunnels

    async def _tunnel(self, target: _Target, request: h11.Request) -> None:
        reader, writer = await self._account.route.tunnel(target.host, target.port)
        record = self._recorded()
        try:
            self._writer.write(_TUNNEL_OPEN)
            record.status, self._answered = 200, True
            self._next("the tunnel", self._account.bounds.idle_s)
            while not isinstance(self._inside.next_event(), type(h11.PAUSED)):
                pass
            early, _ = self._inside.trailing_data
            async with asyncio.TaskGroup() as both:
                both.create_task(self._sent(early, writer, target))
                both.create_task(self._pump(reader, self._writer, record.received))
        except* ConnectionError:  # as many clients hang up; what went through is counted
            record.detail = "ended by a reset"
        finally:
            abort(writer)

    async def _sent(self, early: bytes, writer: asyncio.StreamWriter, target: _Target) -> None:
        """What the client sends; a TLS greeting must ask for a server that is allowed."""
        data, reads = early or await self._reader.read(_CHUNK), 0
        while begins_like_tls(data):
            try:
                self._check_name(server_name(data), target)
                break
            except Incomplete:
                more, reads = await self._reader.read(_CHUNK), reads + 1
                if not more or len(data) > _MAX_GREETING_BYTES or reads > _MAX_GREETING_READS:
                    raise _Refused(Decision.MALFORMED, "the TLS greeting has no end", 400) from None
                data += more
            except ValueError as error:
                raise _Refused(Decision.MALFORMED, f"the TLS greeting {error}", 400) from error
        await self._move(data, writer, self._recorded().sent)
        await self._pump(self._reader, writer, self._recorded().sent)

    def _check_name(self, name: str | None, target: _Target) -> None:
        """Servers behind one address are told apart by this name alone."""
        host = normal_host(name) if name else target.host
        if host != target.host and not self._account.allow.permits(host, target.port):
            detail = f"TLS asks for {host}, which is not on the sandbox's allow list"
            raise _Refused(Decision.HOST, detail, 403)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tally: Tally
    ) -> None:
        while data := await reader.read(_CHUNK):
            await self._move(data, writer, tally)
        if writer.can_write_eof():
            writer.write_eof()

    async def _move(self, data: bytes, writer: asyncio.StreamWriter, tally: Tally) -> None:
        if not data:
            return
        self._count(data, tally)
        writer.write(data)
        await writer.drain()

    def _count(self, data: bytes, tally: Tally) -> None:
        if not self._account.spend(len(data)):
            raise _over()
        tally.add(data)
        self._next(self._phase, self._account.bounds.idle_s)

    # ---- plain requests

    async def _forward(self, target: _Target, request: h11.Request) -> None:
        line = await self._account.route.line(target.host, target.port)
        try:
            self._next("the answer", self._account.bounds.idle_s)
            outside = h11.Connection(
                h11.CLIENT, max_incomplete_event_size=2 * self._account.bounds.head_bytes
            )
            place = f"http://{target.authority}{target.path}" if line.absolute else target.path
            headers = [
                (b"Host", target.authority.encode("ascii")),
                *_passing(request.headers),
                *line.headers,
                (b"Connection", b"close"),
            ]
            head = h11.Request(method=target.method, target=place, headers=headers)
            line.writer.write(outside.send(head))
            async with asyncio.TaskGroup() as both:
                upload = both.create_task(self._upload(outside, line.writer))
                await self._download(outside, line.reader)
                upload.cancel()
        finally:
            abort(line.writer)
        await self._drained()

    async def _upload(self, outside: h11.Connection, writer: asyncio.StreamWriter) -> None:
        record = self._recorded()
        while True:
            event = self._inside.next_event()
            if isinstance(event, h11.Data):
                data = bytes(event.data)
                self._count(data, record.sent)
                writer.write(outside.send(h11.Data(data=data)))
                try:
                    await writer.drain()
                except ConnectionError:
                    return  # whether there is an answer all the same, the other direction sees
            elif isinstance(event, h11.EndOfMessage):
                writer.write(outside.send(h11.EndOfMessage()))
                return
            elif isinstance(event, type(h11.NEED_DATA)):
                if self._inside.they_are_waiting_for_100_continue:
                    self._send(h11.InformationalResponse(status_code=100, headers=[]))
                self._inside.receive_data(await self._reader.read(_CHUNK))
            else:
                raise ConnectionError("the request was cut short")

    async def _download(self, outside: h11.Connection, reader: asyncio.StreamReader) -> None:
        record = self._recorded()
        while True:
            event = outside.next_event()
            if isinstance(event, h11.Response):
                record.status, self._answered = event.status_code, True
                headers = [*_passing(event.headers), (b"Connection", b"close")]
                self._send(h11.Response(status_code=event.status_code, headers=headers))
            elif isinstance(event, h11.Data):
                data = bytes(event.data)
                self._count(data, record.received)
                self._send(h11.Data(data=data))
                await self._writer.drain()
            elif isinstance(event, h11.EndOfMessage):
                return self._send(h11.EndOfMessage())
            elif isinstance(event, type(h11.NEED_DATA)):
                outside.receive_data(await reader.read(_CHUNK))
            elif not isinstance(event, h11.InformationalResponse):
                raise ConnectionError("the answer was cut short")

    # ---- answers of the proxy itself

    def _send(self, event: h11.Event) -> None:
        data = self._inside.send(event)
        if data:
            self._writer.write(data)

    async def _answer(self, status: int, detail: str) -> None:
        """Tell the client why it got nothing, if it can still be told."""
        if self._answered:
            return
        body = f"regreen egress: {detail}\n".encode("ascii", "replace")
        headers = [
            ("Content-Type", "text/plain"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        if self._record is not None:
            self._record.status = status
        try:
            reason = _printable(detail)
            self._send(h11.Response(status_code=status, headers=headers, reason=reason))
            self._send(h11.Data(data=body))
            self._send(h11.EndOfMessage())
            await self._drained()
        except (h11.LocalProtocolError, OSError):
            return

    async def _drained(self) -> None:
        """Let the client read the answer: unread input would turn the end into a reset."""
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(_LINGER_S):
                await self._writer.drain()
                if self._writer.can_write_eof():
                    self._writer.write_eof()
                left = _LINGER_BYTES
                while left > 0 and (data := await self._reader.read(_CHUNK)):
                    left -= len(data)

    def _recorded(self) -> Record:
        if self._record is None:
            raise RuntimeError("no request was read")
        return self._record


def _printable(detail: str) -> bytes:
    """As a reason phrase: all that many clients show of a refused tunnel."""
    text = "".join(char if " " <= char <= "~" else "?" for char in detail)
    return f"regreen egress: {text[:_MAX_REASON_CHARS]}".encode("ascii")


def _over() -> _Refused:
    return _Refused(Decision.BOUND, "the sandbox has used up its transfer", 403)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What ended a tunnel: its own bound rather than what followed from that."""
    for error in _leaves(group):
        if isinstance(error, _Refused):
            return error
    return next(iter(_leaves(group)))


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _target(request: h11.Request) -> _Target:
    """Where a request goes.

    Raises:
        _Refused: it does not say so in one way only.
    """
    method = request.method.decode("ascii")
    try:
        text = request.target.decode("utf-8")
        found = _tunnel_target(text) if method == "CONNECT" else _plain_target(method, text)
        for name, value in request.headers:
            default = found.port if method == "CONNECT" else 80
            given = split_authority(value.decode("utf-8"), default) if name == b"host" else None
            if given is not None and given != (found.host, found.port):
                raise ValueError("does not agree with the Host header")
    except ValueError as error:
        raise _Refused(Decision.MALFORMED, f"the target {error}", 400) from error
    return found


def _tunnel_target(text: str) -> _Target:
    host, port = split_authority(text, None)
    return _Target("CONNECT", host, port)


def _plain_target(method: str, text: str) -> _Target:
    if text.startswith("/") or text == "*":
        raise ValueError("is no absolute URL; this is a proxy")
    parts = urlsplit(text)
    if parts.scheme != "http":
        raise ValueError("is no http URL; use CONNECT for anything else")
    authority = text.partition("://")[2]
    for mark in "/?#":
        authority = authority.partition(mark)[0]
    host, port = split_authority(authority, 80)
    path = parts.path or "/"
    return _Target(method, host, port, f"{path}?{parts.query}" if parts.query else path)


def _passing(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers that go on to the other side."""
    found = [(bytes(name).lower(), bytes(value)) for name, value in headers]
    named = {
        token.strip().lower()
        for name, value in found
        if name in (b"connection", b"proxy-connection")
        for token in value.split(b",")
    }
    framing = {b"content-length", b"transfer-encoding"}
    dropped = _HOP_BY_HOP | (named - framing)
    if any(name == b"transfer-encoding" for name, _ in found):
        dropped |= {b"content-length"}
    return [
        (name, value)
        for name, value in found
        if name not in dropped and not name.startswith(b"proxy-")
    ]

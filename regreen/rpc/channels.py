"""A channel that is made anew when its certificates are, without a call that fails for it.

- The new connection stands before the old one is left; calls that have begun stay where they are.
- Where the old connection is gone, the new one is taken at once.
- Every call carries the bearer token of its file, which is read anew when it changes.
- Calls are those of `grpc.aio`: stubs, deadlines and streams know no difference.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc

from regreen.rpc.certificates import Pem, Tls, Watched
from regreen.rpc.errors import FailedPrecondition
from regreen.rpc.ports import is_local
from regreen.rpc.tls import channel_credentials
from regreen.rpc.tokens import HEADER

Options = Sequence[tuple[str, int | str]]
_READY = grpc.ChannelConnectivity.READY


class BearerFile:
    """The token in a file.

    Raises:
        FailedPrecondition: it cannot be read, or holds none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen, self._header = self._stamp(), ("", "")
        self._header = self._read()

    def header(self) -> tuple[str, str]:
        """The header of a call that begins now."""
        if (stamp := self._stamp()) != self._seen:
            with contextlib.suppress(FailedPrecondition):  # it is being replaced
                self._header = self._read()
                self._seen = stamp
        return self._header

    def _read(self) -> tuple[str, str]:
        try:
            text = self._path.read_text("ascii").strip()
        except (OSError, ValueError) as error:
            raise FailedPrecondition(
                f"token_file: {self._path} cannot be read ({error})"
            ) from error
        if not text.isprintable() or not text:
            raise FailedPrecondition(
                f"token_file: {self._path} holds no token; `regreen tokens create --out` makes one"
            )
        return HEADER, f"Bearer {text}"

    def _stamp(self) -> object:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size


def open_channel(
    target: str, tls: Tls | None, options: Options = (), token: BearerFile | None = None
) -> grpc.aio.Channel:
    """A channel that follows the certificates and the token in their files.

    Raises:
        FailedPrecondition: they cannot be used, or the token would cross a network in plain text.
    """
    if tls is None:
        channel = grpc.aio.insecure_channel(target, options=options)
        if token is None:
            return channel
        if not is_local(target):
            raise FailedPrecondition(
                f"the token would go to {target} in plain text; REGREEN_TLS names the certificates"
            )
        return RenewedChannel(channel, token=token)
    files = Watched(tls)
    named = [*options]
    name = tls.server_name or ("localhost" if target.startswith("unix:") else "")
    if name:
        named.append(("grpc.ssl_target_name_override", name))

    def make(pem: Pem) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(target, channel_credentials(pem), options=named)

    return RenewedChannel(make(files.pem), files, make, token)


class _Link:
    """One underlying channel and how many calls are on it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self._methods: dict[tuple[str, str], Callable[..., Any]] = {}
        self._calls, self._left = 0, False
        self._closing: asyncio.Task[None] | None = None

    def call(self, kind: str, method: str, codecs: dict[str, Any], given: Any) -> Any:
        """Begin a call of a method."""
        make = self._methods.get((kind, method))
        if make is None:
            make = self._methods[kind, method] = getattr(self.channel, kind)(method, **codecs)
        args, options = given
        call = make(*args, **options)
        self._calls += 1
        call.add_done_callback(self._ended)
        return call

    def leave(self) -> None:
        """Close it as soon as no call is on it."""
        self._left = True
        if not self._calls and self._closing is None:
            self._closing = asyncio.ensure_future(self.channel.close())

    def _ended(self, _: Any) -> None:
        self._calls -= 1
        if self._left:
            self.leave()

    @property
    def closed(self) -> bool:
        """Whether nothing of it is left."""
        return self._closing is not None and self._closing.done()

    async def close(self, grace_s: float | None) -> None:
        """Close it now."""
        if self._closing is not None:
            await self._closing
        else:
            await self.channel.close(grace_s)


class RenewedChannel(grpc.aio.Channel):
    """See the module."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        files: Watched | None = None,
        make: Callable[[Pem], grpc.aio.Channel] | None = None,
        token: BearerFile | None = None,
    ) -> None:
        self._link, self._files, self._make, self._token = _Link(channel), files, make, token
        self._former: list[_Link] = []
        self._next: _Link | None = None
        self._taking: asyncio.Task[None] | None = None

    def _now(self) -> _Link:
        """The link for a call that begins now."""
        pem = self._files.renewed() if self._files else None
        if pem is not None and self._make is not None:
            self._drop_next()
            self._next = _Link(self._make(pem))
        if self._next is not None:
            if self._link.channel.get_state() is not _READY:
                self._take(self._next)
            elif self._taking is None:
                self._taking = asyncio.ensure_future(self._take_ready(self._next))
        return self._link

    async def _take_ready(self, link: _Link) -> None:
        await link.channel.channel_ready()
        self._taking = None
        self._take(link)

    def _take(self, link: _Link) -> None:
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None
        former, self._link, self._next = self._link, link, None
        former.leave()
        self._former = [*(one for one in self._former if not one.closed), former]

    def _drop_next(self) -> None:
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None
        if self._next is not None:
            self._next.leave()
            self._former.append(self._next)
            self._next = None

    def _method(self, kind: str, method: str, codecs: Sequence[Any]) -> Any:
        named = dict(zip(("request_serializer", "response_deserializer"), codecs, strict=False))

        def begin(*args: Any, **options: Any) -> Any:
            if self._token is not None:
                options["metadata"] = (*(options.get("metadata") or ()), self._token.header())
            return self._now().call(kind, method, named, (args, options))

        return begin

    def unary_unary(self, method: str, *codecs: Any, **named: Any) -> Any:  # type: ignore[override]
        """One request, one response."""
        return self._method("unary_unary", method, _codecs(codecs, named))

    def unary_stream(self, method: str, *codecs: Any, **named: Any) -> Any:  # type: ignore[override]
        """One request, a stream of responses."""
        return self._method("unary_stream", method, _codecs(codecs, named))

    def stream_unary(self, method: str, *codecs: Any, **named: Any) -> Any:  # type: ignore[override]
        """A stream of requests, one response."""
        return self._method("stream_unary", method, _codecs(codecs, named))

    def stream_stream(self, method: str, *codecs: Any, **named: Any) -> Any:  # type: ignore[override]
        """A stream of requests, a stream of responses."""
        return self._method("stream_stream", method, _codecs(codecs, named))

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """State of the connection."""
        return self._now().channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Return when the state is another one."""
        await self._link.channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Return when the connection stands."""
        await self._now().channel.channel_ready()

    async def close(self, grace: float | None = None) -> None:
        """Close the channel; calls in progress get `grace` seconds."""
        self._drop_next()
        for link in (*self._former, self._link):
            await link.close(grace)

    async def __aenter__(self) -> "RenewedChannel":
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self.close()


def _codecs(given: Sequence[Any], named: dict[str, Any]) -> list[Any]:
    """Serializer and deserializer, however they were given."""
    names = ("request_serializer", "response_deserializer")
    return [*given, *(named.get(name) for name in names[len(given) :])]

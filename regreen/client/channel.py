"""Channels and calls: deadlines, retries and typed errors for every client.

- Every call has a deadline, and says which trajectory and trace it belongs to where one is known.
- UNAVAILABLE is retried with backoff within the client's patience, because every mutation carries
  a `request_id` and so may be sent twice; nothing else is retried.
- Where a target stands for many addresses, calls take turns among them (client-side balancing).
- A stream is read inside `stream(...)`, which always cancels: a dropped one would never be
  collected (grpc#43462).
"""

import asyncio
import contextlib
import json
import random
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import grpc
import structlog

from regreen.client.access import Access
from regreen.rpc.channels import BearerFile, open_channel
from regreen.rpc.errors import DeadlineExceeded, RegreenError, ResourceExhausted, Unavailable
from regreen.rpc.logging import TRACE_HEADER, TRAJECTORY_HEADER
from regreen.rpc.spans import SAMPLED
from regreen.rpc.tenants import named
from regreen.rpc.traces import root_of, trace_of
from regreen.rpc.wire import NOBODY, from_rpc_error

T = TypeVar("T")
_TRACE_ID = re.compile(r"(?!0{32})[0-9a-f]{32}")
_GIVEN_UP = re.compile(r"Deadline Exceeded$|the call took longer than ")
_MANY = ("dns:", "ipv4:", "ipv6:")
_IN_TURN = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})
READ_S = 15.0
"""Deadline of reads."""
WRITE_S = 60.0
"""Deadline of mutations."""


def new_request_id() -> str:
    """A fresh id for one mutation; repeat it to repeat the request safely."""
    return uuid.uuid4().hex


def connect(target: str, access: Access | None = None) -> grpc.aio.Channel:
    """A channel to `host:port`, `unix:/path` or `dns:///name:port`.

    With a scheme of names or addresses (`dns:`, `ipv4:`, `ipv6:`) calls take turns among all
    addresses that there are, as those of a headless Service; else they go to the first.
    Without `access`, the environment says what this client shows (`Access.of_environment`).

    Raises:
        FailedPrecondition: the certificates cannot be used.
    """
    access = Access.of_environment() if access is None else access
    options: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", 64 << 20),
        ("grpc.max_send_message_length", 64 << 20),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]
    if target.startswith(_MANY):
        options.append(("grpc.service_config", _IN_TURN))
    token = BearerFile(access.token_file) if access.token_file else None
    return open_channel(target, access.tls, options, token)


async def check_answers(channel: grpc.aio.Channel, target: str, within_s: float = 3.0) -> None:
    """Connect now, and say so at once where that does not work.

    Raises:
        Unavailable: nobody takes the connection; names the address.
    """
    try:
        async with asyncio.timeout(within_s):
            state = channel.get_state(try_to_connect=True)
            while state is not grpc.ChannelConnectivity.READY:
                if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                    raise Unavailable(f"{NOBODY} {target}")
                await channel.wait_for_state_change(state)
                state = channel.get_state(try_to_connect=True)
    except TimeoutError:
        raise Unavailable(f"{NOBODY} {target} within {within_s:.0f} s") from None


class _Absent:
    """Stands for the channel to a service that is not run: every call says so."""

    def __init__(self, name: str) -> None:
        self._name = name

    def get_state(self, *_: Any, **__: Any) -> Any:
        """Refused, as every call is."""
        raise Unavailable(
            f"this stack runs no {self._name} service; `regreen down`, then `regreen up`, "
            "starts all five"
        )

    def unary_unary(self, *_: Any, **__: Any) -> Callable[..., Any]:
        """A call that is refused."""
        return self.get_state

    unary_stream = stream_unary = stream_stream = unary_unary

    async def close(self) -> None:
        """There is nothing to close."""


def absent(name: str) -> grpc.aio.Channel:
    """The channel to a service that is not run; calls raise `Unavailable` at once."""
    return cast("grpc.aio.Channel", _Absent(name))


@dataclass(slots=True)
class Away:
    """How long calls have waited for services that were away."""

    seconds: float = 0.0


_AWAY: ContextVar[Away | None] = ContextVar("away", default=None)


@contextlib.contextmanager
def counting_away() -> Iterator[Away]:
    """Count what calls made inside, in tasks begun inside too, wait for services to come back."""
    found = Away()
    token = _AWAY.set(found)
    try:
        yield found
    finally:
        _AWAY.reset(token)


class Caller:
    """Makes calls on one channel; base of the typed clients."""

    def __init__(self, channel: grpc.aio.Channel, *, patience_s: float = 30.0) -> None:
        self.channel = self._channel = channel
        self.patience_s = patience_s
        """How long UNAVAILABLE is retried."""

    async def _call(self, method: Callable[..., Any], request: Any, timeout_s: float) -> Any:
        give_up_s = time.monotonic() + self.patience_s
        delay_s = 0.1
        away = _AWAY.get()
        while True:
            began_s = time.monotonic()
            try:
                return await method(request, timeout=timeout_s, metadata=call_metadata())
            except grpc.aio.AioRpcError as raw:
                error = _named(from_rpc_error(raw), request, timeout_s)
                wait_s = error.retry_after_s or delay_s * (0.5 + random.random())
                soonest_s = time.monotonic() + max(wait_s, delay_s)
                if not _retryable(error) or soonest_s > give_up_s:
                    raise error from raw
            await asyncio.sleep(wait_s)
            if away is not None:
                away.seconds += time.monotonic() - began_s
            delay_s = min(delay_s * 2, 2.0)


async def pages(ask: Callable[[str], Awaitable[Any]]) -> AsyncIterator[Any]:
    """Every page of a list; `ask` gets the page of a token."""
    token = ""
    while True:
        page = await ask(token)
        yield page
        token = page.next_page_token
        if not token:
            return


@contextlib.asynccontextmanager
async def stream(call: Any) -> AsyncIterator[AsyncIterator[Any]]:
    """Read a streaming call; it is cancelled on the way out, and its errors are typed."""
    try:
        yield call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
    finally:
        call.cancel()


def _named(error: RegreenError, request: Any, timeout_s: float) -> RegreenError:
    """The error, with the call in it where the words of gRPC, or of a server, name nothing."""
    if not isinstance(error, DeadlineExceeded) or not _GIVEN_UP.match(error.message):
        return error
    call = type(request).__name__.removesuffix("Request")
    return DeadlineExceeded(f"{call} was not answered within {timeout_s:g} s")


def _retryable(error: RegreenError) -> bool:
    if isinstance(error, ResourceExhausted):
        return error.retry_after_s is not None or "Concurrent RPC limit" in error.message
    return isinstance(error, Unavailable)


def call_metadata() -> tuple[tuple[str, str], ...]:
    """What every call says of its context: the trajectory, whom it is charged to, and the trace.

    A trace that a caller began goes on; else a trajectory is a trace of its own.
    """
    bound = structlog.contextvars.get_contextvars()
    trajectory_id = str(bound.get("trajectory_id", ""))
    trace_id = str(bound.get("trace_id", "")) or trace_of(trajectory_id)
    found = [*named()]
    if trajectory_id:
        found.append((TRAJECTORY_HEADER, trajectory_id))
    if _TRACE_ID.fullmatch(trace_id):
        span_id = str(bound.get("span_id", "")) or root_of(trace_id)
        found.append((TRACE_HEADER, f"00-{trace_id}-{span_id}-{SAMPLED.get():02x}"))
    return tuple(found)

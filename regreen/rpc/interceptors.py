"""What happens around every call: metrics, log context, deadline, idempotency, error mapping.

- One interceptor wraps all four call kinds, so that no call goes uncounted or unmapped.
- Bytes that are no message of the call's type are an INVALID_ARGUMENT, as any wrong field is.
- Logs carry the trajectory that the request or the caller's header names, and its trace; each call
  is a span of it (`spans`).
- `CancelledError` is always raised on: swallowing it leaks the call in grpc's core (grpc#43360).
- A `request_id` in a unary request makes it idempotent without the servicer knowing, unless the
  service keeps its own, lasting memory of requests.
- A stream of a method that is bounded so ends when its caller has taken nothing of it for a while.
- Beyond loopback a request that does not arrive whole in its time ends its call.
- Where tokens are asked for, they come first: a call that is refused is not read.
- Beyond `max_rpcs` at once a call is refused with a delay; health and reflection go on.
- What is not a `RegreenError` is our own trouble: logged with its stack, answered INTERNAL/INFRA;
  an `InfraError` that somebody raised says itself what went wrong, and is logged without one.
- In grpc.aio the code of a call that went well is unset; it is recorded as OK.
"""

import asyncio
import hashlib
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from logging import DEBUG
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from regreen.rpc import metrics, traces, wire
from regreen.rpc.audit import Audit
from regreen.rpc.errors import (
    DeadlineExceeded,
    InfraError,
    InvalidArgument,
    PermissionDenied,
    RegreenError,
    ResourceExhausted,
    Unauthenticated,
)
from regreen.rpc.idempotency import Idempotency, Leaving
from regreen.rpc.logging import TRACE_HEADER, TRAJECTORY_HEADER, get
from regreen.rpc.scopes import SCOPES
from regreen.rpc.spans import SAMPLED, Span
from regreen.rpc.tenants import CHARGED, believe
from regreen.rpc.tenants import HEADER as TENANT_HEADER
from regreen.rpc.tokens import HEADER, Guard, caller

Context = grpc.aio.ServicerContext[Any, Any]
_END = object()
_MAX_ID_CHARS = 100
"""Of an id that a caller made up, so much is logged."""
_OWN_ID_CHARS = 32
_RETRY_S = 1.0
"""What a refused call is told to wait."""
_COUNTED = ("OK", "INTERNAL", "RESOURCE_EXHAUSTED")
"""Codes that a method shows from the start: the first of them is an increase too."""
_UNCOUNTED = ("grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection")


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler of a server."""

    def __init__(
        self,
        call_timeout_s: float,
        *,
        stream_timeout_s: float,
        max_rpcs: int,
        remember: bool = True,
        leaving: Mapping[str, Leaving] | None = None,
        idle_s: Mapping[str, float] | None = None,
        guard: Guard | None = None,
        audit: Audit | None = None,
        receive_s: float | None = None,
        behind_front: bool = False,
    ) -> None:
        self._guard, self._audit, self._receive_s = guard, audit, receive_s
        self._behind_front = behind_front
        self._call_timeout_s, self._stream_timeout_s = call_timeout_s, stream_timeout_s
        self._max_rpcs, self._in_flight = max_rpcs, 0
        self._leaving, self._idle_s = dict(leaving or {}), dict(idle_s or {})
        self._idempotency: Idempotency[Any] | None = None
        if remember:
            self._idempotency = Idempotency(max_flights=2 * max_rpcs, flight_s=call_timeout_s)
        self._log = get().bind()
        self._wrapped: dict[str, tuple[Any, Any]] = {}
        """By method: the handler that it wraps, and the wrapped one."""

    async def close(self, patience_s: float) -> None:
        """Let what goes on for callers that have left end for so long; forget what was answered."""
        if self._idempotency is not None:
            await self._idempotency.finish(patience_s)
            self._idempotency.close()
        if self._audit is not None:
            self._audit.close()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Replace the handler's behaviour by the wrapped one."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        if self._guard is not None:
            name = handler_call_details.method.lstrip("/")
            try:
                named = _header(handler_call_details, CHARGED)
                self._guard.admit(name, _header(handler_call_details, HEADER), named)
            except (Unauthenticated, PermissionDenied) as error:
                return self._refusing(name, handler, error)
        elif self._behind_front:
            believe(*(_header(handler_call_details, name) for name in (TENANT_HEADER, CHARGED)))
        found = self._wrapped.get(handler_call_details.method)
        if found is None or found[0] is not handler:
            found = handler, self._wrap(handler_call_details.method, handler)
            self._wrapped[handler_call_details.method] = found
        return found[1]

    def _refusing(self, name: str, handler: Any, error: RegreenError) -> Any:
        """A handler that answers with an error and reads nothing of the request."""
        service, _, method = name.partition("/")
        counts = _Counts(_kind(handler), service, method)

        async def refuse(_: Any, context: Context) -> None:
            counts.started.inc()
            counts.ended(error.status, 0.0)
            self._log.info("call refused", method=name, code=error.status, why=error.message)
            await context.abort_with_status(wire.to_status(error))

        return grpc.stream_stream_rpc_method_handler(refuse)

    def _wrap(self, name: str, handler: Any) -> Any:
        service, _, method = name.lstrip("/").partition("/")
        if service in _UNCOUNTED:
            return handler
        call, kind = _Call(self, service, method), _kind(handler)
        if handler.request_streaming and handler.response_streaming:
            wrapped = call.streaming(handler.stream_stream, kind)
            return grpc.stream_stream_rpc_method_handler(wrapped, *_codecs(handler))
        if handler.response_streaming:
            wrapped = call.streaming(handler.unary_stream, kind)
            if self._receive_s is not None:
                received = _received(wrapped, self._receive_s)
                return grpc.stream_stream_rpc_method_handler(received, *_codecs(handler))
            return grpc.unary_stream_rpc_method_handler(wrapped, *_codecs(handler))
        if handler.request_streaming:
            single = call.single(handler.stream_unary, kind, merge=False)
            return grpc.stream_unary_rpc_method_handler(single, *_codecs(handler))
        single = call.single(handler.unary_unary, kind, merge=True)
        if self._receive_s is not None:
            received = _received(single, self._receive_s)
            return grpc.stream_unary_rpc_method_handler(received, *_codecs(handler))
        return grpc.unary_unary_rpc_method_handler(single, *_codecs(handler))


def _kind(handler: Any) -> str:
    """The kind of a method's calls, as metrics name it."""
    if handler.request_streaming:
        return "bidi_stream" if handler.response_streaming else "client_stream"
    return "server_stream" if handler.response_streaming else "unary"


def _header(details: grpc.HandlerCallDetails, name: str) -> str:
    """The last header of a name; empty without one."""
    found = ""
    for key, value in details.invocation_metadata or ():
        if key == name:
            found = str(value)
    return found


def _received(
    behaviour: Callable[[Any, Context], Awaitable[Any]], within_s: float
) -> Callable[[Any, Context], Awaitable[Any]]:
    """A handler that takes its one request itself: gRPC would wait for the rest of it for ever."""

    async def handle(requests: AsyncIterator[Any], context: Context) -> Any:
        request = None
        try:
            async with asyncio.timeout(within_s):
                request = await anext(aiter(requests), None)
        except TimeoutError:
            late = DeadlineExceeded(f"the request did not arrive whole within {within_s:.0f} s")
            await context.abort_with_status(wire.to_status(late))
        if request is None:
            missing = InvalidArgument("request", "is missing", "send one message")
            await context.abort_with_status(wire.to_status(missing))
        return await behaviour(request, context)

    return handle


class _Counts:
    """A method's metrics; a lookup by labels for each call would cost more than the counting."""

    def __init__(self, *labels: str) -> None:
        self._labels = labels
        self.started = metrics.STARTED.labels(*labels)
        self._seconds = metrics.SECONDS.labels(*labels)
        self._handled: dict[str, Any] = {
            code: metrics.HANDLED.labels(*labels, code) for code in _COUNTED
        }

    def ended(self, code: str, seconds: float) -> None:
        """One call more has ended."""
        self._seconds.observe(seconds)
        handled = self._handled.get(code)
        if handled is None:
            handled = self._handled[code] = metrics.HANDLED.labels(*self._labels, code)
        handled.inc()


class _Call:
    """One method's handler, wrapped."""

    def __init__(self, owner: CallInterceptor, service: str, method: str) -> None:
        self._owner, self._service, self._method = owner, service, method
        self._name = f"{service}/{method}"
        reads = SCOPES.get(self._name, "").endswith(":read")
        self._audit = None if reads else owner._audit

    def single(
        self, behaviour: Callable[..., Awaitable[Any]], kind: str, *, merge: bool
    ) -> Callable[[Any, Context], Awaitable[Any]]:
        """Wrap a handler with one response."""
        counts = _Counts(kind, self._service, self._method)
        limit_s = self._owner._call_timeout_s

        async def handle(request: Any, context: Context) -> Any:
            async with _Observed(self, counts, request, context, limit_s) as observed:
                async with asyncio.timeout(observed.timeout_s):
                    request = _readable(request)
                    response = await self._once(behaviour, request, context, merge=merge)
                observed.span.saw(response)
                return response

        return handle

    async def _once(
        self,
        behaviour: Callable[..., Awaitable[Any]],
        request: Any,
        context: Context,
        *,
        merge: bool,
    ) -> Any:
        """The answer of a handler, or the remembered one of an equal request."""
        request_id = getattr(request, "request_id", "") if merge else ""
        memory = self._owner._idempotency
        if not request_id or memory is None:
            return await behaviour(request, context)
        leaving = self._owner._leaving.get(self._name, Leaving.GOES_ON)
        return await memory.once(
            self._name, request_id, request, lambda: behaviour(request, context), leaving
        )

    def streaming(
        self, behaviour: Callable[..., Any], kind: str
    ) -> Callable[[Any, Context], Awaitable[None]]:
        """Wrap a handler with a stream of responses.

        It writes them itself: a generator whose caller went away is closed when the collector finds
        it, and keeps its place, and what it runs, until then.
        """
        counts = _Counts(kind, self._service, self._method)
        limit_s = self._owner._stream_timeout_s
        idle_s = self._owner._idle_s.get(self._name, limit_s)

        async def handle(request: Any, context: Context) -> None:
            async with _Observed(self, counts, request, context, limit_s) as observed:
                now_s = asyncio.get_running_loop().time
                end_s = now_s() + observed.timeout_s
                responses = behaviour(_readable(request), context)
                if inspect.isawaitable(responses):
                    async with asyncio.timeout_at(end_s):
                        await responses
                    return
                try:
                    while True:
                        async with asyncio.timeout_at(end_s):
                            response = await anext(responses, _END)
                        if response is _END:
                            return
                        observed.span.saw(response)
                        until_s = now_s() + idle_s
                        try:
                            async with asyncio.timeout_at(min(end_s, until_s)):
                                await context.write(response)
                        except TimeoutError:
                            if until_s < end_s:
                                raise _unread(idle_s) from None
                            raise
                finally:
                    await responses.aclose()

        return handle


class _Observed:
    """Counts one call, binds its log context and maps what it raises."""

    def __init__(
        self, call: _Call, counts: _Counts, request: Any, context: Context, limit_s: float
    ) -> None:
        self._call, self._counts, self._context = call, counts, context
        trace, trajectory = _headers(context)
        self.span = Span.after(trace)
        self._ids = _ids(request, self.span.trace_id, trajectory)
        self.span.saw(request)
        remaining_s = context.time_remaining()
        self.timeout_s = limit_s if remaining_s is None else min(remaining_s, limit_s)
        self._start_s, self._start_ns = 0.0, 0
        self._identity: dict[str, str] = {}
        if call._audit is not None:
            who = caller()
            self._identity = {
                "method": call._name,
                "tenant": who.tenant if who else "",
                "token": who.token_id if who else "",
                **({"charged": who.charged} if who and who.charged else {}),
                "peer": _peer(context),
                "request_id": str(getattr(request, "request_id", ""))[:_MAX_ID_CHARS],
                "span_id": self.span.span_id,
            }

    async def __aenter__(self) -> "_Observed":
        structlog.contextvars.bind_contextvars(
            method=self._call._name,
            span_id=self.span.span_id,
            **self._ids,
        )
        SAMPLED.set(self.span.sampled)
        self._start_s, self._start_ns = time.monotonic(), time.time_ns()
        self._counts.started.inc()
        owner = self._call._owner
        if owner._in_flight >= owner._max_rpcs:
            full = ResourceExhausted(
                f"max_rpcs: {owner._in_flight} calls are being served", retry_after_s=_RETRY_S
            )
            self._counts.ended(full.status, 0.0)
            await self._context.abort_with_status(wire.to_status(full))
        if self._call._audit is not None:
            try:
                self._call._audit.begin(**self._identity)
            except ResourceExhausted as error:
                self._counts.ended(error.status, 0.0)
                await self._context.abort_with_status(wire.to_status(error))
        owner._in_flight += 1
        return self

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._call._owner._in_flight -= 1
        seconds = time.monotonic() - self._start_s
        mapped = self._map(error)
        code = mapped.status if mapped else ("CANCELLED" if error else "OK")
        self._counts.ended(code, seconds)
        if self.span.sampled:
            who = caller()
            ids = self._ids | {"tenant": who.tenant if who else ""}
            traces.served(self._call._name, self.span, ids, code, self._start_ns)
        if self._call._audit is not None:
            self._call._audit.end(**self._identity, code=code, **self.span.subjects)
        log = self._call._owner._log
        if isinstance(error, InfraError):
            log.error("call failed", **self._facts(code, seconds), error=error.message)
        elif isinstance(mapped, InfraError):
            log.error("call failed", **self._facts(code, seconds), exc_info=error)
        elif self.span.sampled:
            log.info("call", **self._facts(code, seconds))
        elif log.is_enabled_for(DEBUG):
            log.debug("call", **self._facts(code, seconds))
        if mapped:
            await self._context.abort_with_status(wire.to_status(mapped))

    def _facts(self, code: str, seconds: float) -> dict[str, Any]:
        return {"code": code, "seconds": round(seconds, 4), **self.span.fields()}

    def _map(self, error: BaseException | None) -> RegreenError | None:
        if error is None or isinstance(error, asyncio.CancelledError | GeneratorExit):
            return None
        if isinstance(error, RegreenError):
            return error
        if isinstance(error, TimeoutError):
            return DeadlineExceeded(f"the call took longer than {self.timeout_s:.1f} s")
        if isinstance(error, grpc.aio.AbortError) or not isinstance(error, Exception):
            return None
        return InfraError(f"internal error: {type(error).__name__}")


def _unread(idle_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"nothing of the stream was taken for {idle_s:g} s; read it without a pause, from its start"
    )


def _headers(context: Context) -> tuple[str, str]:
    """What the caller's headers say of the trace and of the trajectory."""
    trace = trajectory = ""
    for key, value in context.invocation_metadata() or ():
        if key == TRACE_HEADER:
            trace = str(value)
        elif key == TRAJECTORY_HEADER:
            trajectory = str(value)
    return trace, trajectory


def _peer(context: Context) -> str:
    """Name in the caller's certificate; empty without one."""
    names = context.auth_context().get("x509_common_name", ())
    return ",".join(name.decode(errors="replace") for name in names)


def _ids(request: Any, trace_id: str, trajectory: str) -> dict[str, str]:
    """Ids of a call for its logs; a trajectory without a trace is a trace of its own."""
    trajectory_id = getattr(request, "trajectory_id", "") or trajectory
    trace_id = trace_id or traces.trace_of(trajectory_id)
    return {"trajectory_id": trajectory_id[:_MAX_ID_CHARS], "trace_id": trace_id}


class _Unreadable:
    """Stands for a request whose bytes could not be decoded; the call then says so."""

    def __init__(self, problem: str) -> None:
        self.problem = problem


def _readable(request: Any) -> Any:
    """A request that was decoded, or a stream of such.

    Raises:
        InvalidArgument: its bytes are no message of its type.
    """
    if hasattr(request, "__aiter__"):
        return _each_readable(request)
    if isinstance(request, _Unreadable):
        raise InvalidArgument(
            "request",
            f"cannot be decoded: {request.problem}",
            "send a message of this call's type, nested at most 100 deep",
        )
    return _own_id(request)


def _own_id(request: Any) -> Any:
    """The request with an id that no other tenant's can equal."""
    if given := getattr(request, "request_id", ""):
        request.request_id = own_id(given)
    return request


def own_id(given: str) -> str:
    """A request's id among all tenants': no answer is ever replayed to another."""
    who = caller()
    if who is None or not given:
        return given
    whose = f"{who.tenant}\n{who.charged}" if who.charged else who.tenant
    text = f"{whose}\n{given}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()[:_OWN_ID_CHARS]


async def _each_readable(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _readable(request)


def _codecs(handler: Any) -> tuple[Any, Any]:
    decode = handler.request_deserializer

    def decoded(content: bytes) -> Any:
        try:
            return decode(content)
        except DecodeError as error:
            return _Unreadable(str(error))

    return decoded, handler.response_serializer

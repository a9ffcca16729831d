"""Calls to the sandbox service of one worker, by method, with typed errors.

- Methods come from the compiled contracts: what a worker serves needs no code here.
- Every call has a deadline and carries on whose behalf it is made; nothing is retried here.
- A stream is always cancelled on the way out (grpc#43462).
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import descriptor_pool, message_factory

from regreen.rpc.errors import FailedPrecondition, Unavailable
from regreen.rpc.wire import from_rpc_error
from regreen.sandbox import v1 as pb

PACKAGE = "regreen.sandbox.v1"
SERVICES = tuple(
    f"{PACKAGE}.{name}Service"
    for name in ("State", "Sandbox", "Exec", "Action", "Image", "Egress")
    if hasattr(pb, f"{name}ServiceStub")
)
"""What a front serves: everything that a worker may serve."""
ASK_S = 10.0
"""Deadline of the front's own questions."""
_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
Metadata = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Method:
    """One method of the contracts."""

    service: str
    name: str
    request: type[Any]
    response: type[Any]
    streams_in: bool
    streams_out: bool

    @property
    def path(self) -> str:
        """Its name on the wire."""
        return f"/{self.service}/{self.name}"

    def has(self, field: str) -> bool:
        """Whether its request has a field of this name."""
        return field in self.request.DESCRIPTOR.fields_by_name


def methods() -> Mapping[str, Method]:
    """Every method of `SERVICES`, by `Service/Method`."""
    pool, found = descriptor_pool.Default(), {}  # type: ignore[no-untyped-call]
    for service in SERVICES:
        for method in pool.FindServiceByName(service).methods:
            name = f"{service.removeprefix(PACKAGE + '.')}/{method.name}"
            found[name] = Method(
                service,
                method.name,
                message_factory.GetMessageClass(method.input_type),
                message_factory.GetMessageClass(method.output_type),
                method.client_streaming,
                method.server_streaming,
            )
    return found


METHODS = methods()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A worker as the cluster tells of it."""

    name: str
    incarnation: str
    """Changes when a worker of this name is another one, with nothing of the former's."""
    process: str
    """Changes when its process began anew, with the states of the former but no sandboxes."""
    address: str
    ready: bool = True


class Worker:
    """One sandbox service and the channel to it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.name = endpoint.name
        self._channel = grpc.aio.insecure_channel(endpoint.address, options=_OPTIONS)

    async def close(self) -> None:
        """End the channel; calls in progress fail."""
        await self._channel.close()

    async def call(
        self, method: Method, request: Any, timeout_s: float = ASK_S, metadata: Metadata = ()
    ) -> Any:
        """One request, one response."""
        make = self._channel.unary_unary(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )
        try:
            return await make(request, timeout=timeout_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise self._typed(error) from error

    async def stream(
        self, method: Method, request: Any, timeout_s: float, metadata: Metadata = ()
    ) -> AsyncIterator[Any]:
        """One request, a stream of responses."""
        make = self._channel.unary_stream(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )
        call = make(request, timeout=timeout_s, metadata=metadata)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise self._typed(error) from error
        finally:
            call.cancel()

    async def send(
        self,
        method: Method,
        requests: AsyncIterator[Any],
        timeout_s: float,
        metadata: Metadata = (),
    ) -> Any:
        """A stream of requests, one response."""
        make = self._channel.stream_unary(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )
        call = make(requests, timeout=timeout_s, metadata=metadata)
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise self._typed(error) from error
        finally:
            call.cancel()

    def _typed(self, error: grpc.aio.AioRpcError) -> Exception:
        typed = from_rpc_error(error)
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return FailedPrecondition(
                f"worker {self.name} does not know this call; run front and workers from one image",
                metadata={"worker": self.name},
            )
        if isinstance(typed, Unavailable):
            return Unavailable(
                f"worker {self.name} does not answer ({typed.message}); try again",
                metadata={**typed.metadata, "worker": self.name},
                retry_after_s=typed.retry_after_s or 1.0,
            )
        return typed

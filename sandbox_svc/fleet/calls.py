"""Calls to the sandbox service of one worker, by method, with typed errors.

- Methods come from the compiled contracts: what a worker serves needs no code here.
- Every call has a deadline and says for which tenant it is made, by a header that workers believe;
  within `tenants.for_all` it is the platform's own. Nothing is retried here.
- A stream is always cancelled on the way out (grpc#43462).
- `CancelledError` means that the caller was cancelled, nothing else: grpc also raises it where a
  channel closes under a call and where the iterator of requests fails, which are errors here.
- A worker that is left takes no more calls; those in progress may go on for a while.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import descriptor_pool, message_factory

from regreen.rpc.certificates import Tls
from regreen.rpc.channels import open_channel
from regreen.rpc.errors import DeadlineExceeded, FailedPrecondition, RegreenError, Unavailable
from regreen.rpc.tenants import on_behalf
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

    def __init__(
        self, endpoint: Endpoint, *, max_message_bytes: int = 64 << 20, tls: Tls | None = None
    ) -> None:
        self.endpoint = endpoint
        self.name = endpoint.name
        options = [
            *_OPTIONS,
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
        ]
        self._channel = open_channel(endpoint.address, tls, options)
        self._calls: set[Any] = set()
        self._idle = asyncio.Event()
        self._left = False

    async def close(self, grace_s: float = 0.0) -> None:
        """Take no more calls; those in progress fail as unavailable after `grace_s`."""
        self._left = True
        try:
            if grace_s and self._calls:
                self._idle.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(grace_s):
                        await self._idle.wait()
        finally:
            for call in list(self._calls):
                call.cancel()
            await self._channel.close()

    async def call(
        self, method: Method, request: Any, timeout_s: float = ASK_S, metadata: Metadata = ()
    ) -> Any:
        """One request, one response."""
        make = self._channel.unary_unary(*_codecs(method))
        metadata = (*metadata, *on_behalf())
        with self._making(lambda: make(request, timeout=timeout_s, metadata=metadata)) as call:
            return await call

    async def ask(
        self, method: Method, request: Any, timeout_s: float = ASK_S, metadata: Metadata = ()
    ) -> Any:
        """A call that takes no time; a worker that does not answer soon is unavailable."""
        try:
            return await self.call(method, request, timeout_s, metadata)
        except DeadlineExceeded as error:
            raise Unavailable(
                f"worker {self.name} does not answer within {timeout_s:.0f} s; try again",
                metadata={"worker": self.name},
                retry_after_s=1.0,
            ) from error

    async def stream(
        self, method: Method, request: Any, timeout_s: float, metadata: Metadata = ()
    ) -> AsyncGenerator[Any, None]:
        """One request, a stream of responses."""
        make = self._channel.unary_stream(*_codecs(method))
        metadata = (*metadata, *on_behalf())
        with self._making(lambda: make(request, timeout=timeout_s, metadata=metadata)) as call:
            async for response in call:
                yield response

    async def send(
        self,
        method: Method,
        requests: AsyncIterator[Any],
        timeout_s: float,
        metadata: Metadata = (),
    ) -> Any:
        """A stream of requests, one response; what `requests` raises is raised here."""
        make = self._channel.stream_unary(*_codecs(method))
        metadata = (*metadata, *on_behalf())
        failed: list[Exception] = []

        async def watched() -> AsyncIterator[Any]:
            try:
                async for request in requests:
                    yield request
            except Exception as error:
                failed.append(error)
                raise

        try:
            with self._making(
                lambda: make(watched(), timeout=timeout_s, metadata=metadata)
            ) as call:
                return await call
        except RegreenError as error:
            if failed:
                raise failed[0] from error
            raise

    @contextlib.contextmanager
    def _making(self, make: Callable[[], Any]) -> Iterator[Any]:
        """A call of this worker; its errors are typed, and it is cancelled on the way out.

        Raises:
            Unavailable: the worker was left, before or meanwhile.
        """
        if self._left:
            raise self._gone()
        call = make()
        self._calls.add(call)
        try:
            yield call
        except grpc.aio.AioRpcError as error:
            raise self._typed(error) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise self._gone() from error
        finally:
            call.cancel()
            self._calls.discard(call)
            if not self._calls:
                self._idle.set()

    def _gone(self) -> Unavailable:
        return Unavailable(
            f"worker {self.name} left during the call; try again",
            metadata={"worker": self.name},
            retry_after_s=1.0,
        )

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


def _codecs(method: Method) -> tuple[str, Callable[[Any], bytes], Callable[[bytes], Any]]:
    return method.path, method.request.SerializeToString, method.response.FromString

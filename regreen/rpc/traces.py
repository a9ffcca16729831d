"""Spans for an OpenTelemetry collector, where the environment names one.

- `OTEL_EXPORTER_OTLP_ENDPOINT` turns it on; the other variables of OpenTelemetry for exporters and
  batches are read by its SDK. Without one nothing of it is loaded.
- One trace per trajectory: its trace id is the trajectory's, and the id of its first span follows
  from that, so that every process finds it from the trajectory alone.
- `OTEL_TRACES_SAMPLER_ARG` is the share of traces that are sent, the same ones by every process.
- No call waits for a collector: spans go in batches from a thread of their own. The oldest go when
  its queue is full, and a batch that is not taken in time goes too.
- A span tells ids, names, times and codes; nothing else of a message ever leaves.
"""

import asyncio
import contextlib
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import structlog

from regreen import __version__
from regreen.rpc.errors import FailedPrecondition, InvalidArgument, RegreenError
from regreen.rpc.spans import SAMPLED, Span

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.trace import SpanContext

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_ENDPOINTS = (ENDPOINT, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_SHARE = "OTEL_TRACES_SAMPLER_ARG"
_OFF, _EXPORTER = "OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER"
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
_RANDOM_BITS = 56
"""Of a trace id, from the right: those that W3C's Trace Context calls random. The bits before them
tell the time and the version in an id of ours (UUIDv7)."""
_TRACE_ID = re.compile(r"(?!0{32})[0-9a-f]{32}")
_OF_CALL = ("trajectory_id", "tenant")
_LEAVE_S = 2.0
"""What whoever ends waits for the last spans to be taken."""
DRIVER = "driver"
"""The component of what no service does."""


@dataclass(slots=True)
class Link:
    """A span that is open, or that a span of another trace belongs to."""

    trace_id: str
    span_id: str
    start_ns: int
    error: str = ""
    """What went wrong in it, as far as nothing is raised; whoever opened the span says so."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A span that has ended. Ids are lower-case hex, times are nanoseconds since the epoch."""

    name: str
    component: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, str | int] = field(default_factory=dict)
    error: str = ""
    """What went wrong; empty if nothing did."""
    serves: bool = False
    """Whether it is a call as its server saw it."""
    links: Sequence[Link] = ()


def prepare() -> None:
    """Load the exporter if the environment asks for it, so that a mistake is told at once.

    Raises:
        FailedPrecondition: OpenTelemetry's packages are not installed.
        InvalidArgument: a variable holds what it cannot; names it.
    """
    _sender()


def send(span: Ended) -> None:
    """Hand a span to the exporter; nothing where there is none."""
    sender = _sender()
    if sender is not None:
        sender.send(span)


def served(name: str, span: Span, ids: Mapping[str, str], code: str, start_ns: int) -> None:
    """Send the span of a call that a server has answered; `name` is `package.Service/Method`."""
    if _sender() is None:
        return
    service, _, method = name.partition("/")
    about = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
    found = {"regreen.code": code, **{key: ids[key] for key in _OF_CALL}, **span.subjects}
    send(
        Ended(
            name,
            service.removeprefix("regreen.").partition(".")[0],
            span.trace_id,
            span.span_id,
            span.parent_id,
            start_ns,
            time.time_ns(),
            about | {key: value for key, value in found.items() if value},
            "" if code == "OK" else code,
            serves=True,
        )
    )


async def flush() -> None:
    """Hand over what waits, within a short while; a collector that is away holds nobody up."""
    sender = _sender()
    if sender is not None:
        await asyncio.to_thread(sender.flush().join, _LEAVE_S)


def trace_of(trajectory_id: str) -> str:
    """The id of a trajectory's own trace; empty if what it is called is no id of ours."""
    found = trajectory_id.removeprefix("trj_")
    return found if _TRACE_ID.fullmatch(found) else ""


def root_of(trace_id: str) -> str:
    """The id of the first span of a trajectory's trace."""
    # The last half: the first begins with the time, which neighbours share.
    return trace_id[16:] if trace_id[16:].strip("0") else "f" * 16


@contextlib.contextmanager
def span(name: str, trajectory_id: str = "", **attributes: str | int) -> Iterator[Link]:
    """What happens inside is a span: of the open trace, of the trajectory's, or of a new one.

    Calls made inside carry it as their parent, and log lines name it.
    """
    bound = structlog.contextvars.get_contextvars()
    trace_id, parent_id = str(bound.get("trace_id", "")), ""
    fresh = not trace_id
    if not fresh:
        parent_id = str(bound.get("span_id", "")) or root_of(trace_id)
        span_id = secrets.token_hex(8)
    else:
        trace_id = trace_of(trajectory_id) or secrets.token_hex(16)
        span_id = root_of(trace_id)
    ids = {"trace_id": trace_id, "span_id": span_id}
    if trajectory_id:
        ids["trajectory_id"] = attributes["trajectory_id"] = trajectory_id
    link = Link(trace_id, span_id, start_ns=time.time_ns())
    before = SAMPLED.set(fresh or SAMPLED.get())
    try:
        with structlog.contextvars.bound_contextvars(**ids):
            yield link
    except BaseException as error:
        link.error = error.status if isinstance(error, RegreenError) else type(error).__name__
        raise
    finally:
        end_ns, sampled = time.time_ns(), SAMPLED.get()
        SAMPLED.reset(before)
        if sampled:
            times, wrong = (link.start_ns, end_ns), link.error
            send(Ended(name, DRIVER, trace_id, span_id, parent_id, *times, attributes, wrong))


def joined(name: str, link: Link, trajectory_ids: Sequence[str], **attributes: str | int) -> None:
    """Tell in each trajectory's trace what was done with all of them in a trace of its own."""
    end_ns = time.time_ns()
    for trajectory_id in trajectory_ids:
        if trace_id := trace_of(trajectory_id):
            found = attributes | {"trajectory_id": trajectory_id}
            own, root = secrets.token_hex(8), root_of(trace_id)
            send(
                Ended(
                    name, DRIVER, trace_id, own, root, link.start_ns, end_ns, found, links=(link,)
                )
            )


@lru_cache(maxsize=1)
def _sender() -> "_Sender | None":
    if os.environ.get(_OFF, "").lower() == "true" or not any(map(os.environ.get, _ENDPOINTS)):
        return None
    if os.environ.get(_EXPORTER, "").lower() == "none":
        return None
    share = _share(os.environ.get(_SHARE, "") or "1")
    for name in filter(os.environ.get, _ENDPOINTS):
        if not os.environ[name].startswith(("http://", "https://")):
            problem = f"{os.environ[name][:200]!r} is no address"
            raise InvalidArgument(name, problem, "give one such as http://collector:4318")
    for name in filter(os.environ.get, _PROTOCOLS):
        if os.environ[name] != "http/protobuf":
            problem = f"{os.environ[name][:200]!r} is not spoken"
            raise InvalidArgument(name, problem, "leave it out and name an endpoint for HTTP")
    try:
        return _Sender(share)
    except (ValueError, OSError) as error:
        problem = f"are not understood ({error})"
        raise InvalidArgument("OTEL_*", problem, "see docs/operations/traces.md") from error
    except ImportError as error:
        raise FailedPrecondition(
            f"{ENDPOINT} asks for traces, but {error.name} is not installed; "
            "install the extra `otel`, or unset the variable"
        ) from error


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.0 <= float(text) <= 1.0:
            return float(text)
    raise InvalidArgument(_SHARE, f"{text!r} is no share", "give a number from 0 to 1")


class _Sender:
    """OpenTelemetry's exporter behind its queue."""

    def __init__(self, share: float) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._bound = round(share * (1 << _RANDOM_BITS))
        self._resources: dict[str, Resource] = {}
        self._queue = BatchSpanProcessor(OTLPSpanExporter())
        self._flushing: threading.Thread | None = None

    def flush(self) -> threading.Thread:
        """The thread that hands over what waits: one at a time, however long that takes."""
        if self._flushing is None or not self._flushing.is_alive():
            self._flushing = threading.Thread(target=self._queue.force_flush, daemon=True)
            self._flushing.start()
        return self._flushing

    def send(self, ended: Ended) -> None:
        from opentelemetry import trace as api
        from opentelemetry.sdk.trace import ReadableSpan

        if int(ended.trace_id, 16) % (1 << _RANDOM_BITS) >= self._bound:
            return
        failed = api.StatusCode.ERROR if ended.error else api.StatusCode.UNSET
        self._queue.on_end(
            ReadableSpan(
                ended.name,
                context=_context(ended.trace_id, ended.span_id),
                parent=_context(ended.trace_id, ended.parent_id) if ended.parent_id else None,
                resource=self._resource(ended.component),
                attributes=dict(ended.attributes),
                links=[api.Link(_context(one.trace_id, one.span_id)) for one in ended.links],
                kind=api.SpanKind.SERVER if ended.serves else api.SpanKind.INTERNAL,
                status=api.Status(failed, ended.error or None),
                start_time=ended.start_ns,
                end_time=ended.end_ns,
            )
        )

    def _resource(self, component: str) -> Any:
        found = self._resources.get(component)
        if found is None:
            from opentelemetry.sdk.resources import Resource

            names = {"service.namespace": "regreen", "service.name": component}
            found = Resource.create({**names, "service.version": __version__})
            self._resources[component] = found
        return found


def _context(trace_id: str, span_id: str) -> "SpanContext":
    from opentelemetry.trace import SpanContext, TraceFlags

    flags = TraceFlags(TraceFlags.SAMPLED)
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=flags)

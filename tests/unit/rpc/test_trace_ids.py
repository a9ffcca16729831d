"""Traces: ids that follow from the trajectory, and mistakes that are told at once."""

import asyncio
import sys

import pytest
import structlog

from regreen.client.channel import call_metadata
from regreen.ids import new_id
from regreen.rpc import traces
from regreen.rpc.errors import FailedPrecondition, InvalidArgument
from regreen.rpc.server import Server
from regreen.rpc.spans import SAMPLED
from regreen.settings import ServiceSettings


@pytest.fixture
def asked(monkeypatch):
    """An environment that asks for traces; nobody listens there."""
    monkeypatch.setenv(traces.ENDPOINT, "http://127.0.0.1:9")
    traces._sender.cache_clear()
    yield monkeypatch
    traces._sender.cache_clear()


def test_a_span_is_the_parent_of_the_calls_and_spans_within():
    trajectory_id = new_id("trj")
    trace_id = traces.trace_of(trajectory_id)
    before = dict(structlog.contextvars.get_contextvars())
    with traces.span("rollout", trajectory_id) as root:
        assert (root.trace_id, root.span_id) == (trace_id, traces.root_of(trace_id))
        with traces.span("turn") as turn:
            assert turn.trace_id == trace_id
            assert turn.span_id != root.span_id
            assert dict(call_metadata()) == {
                "traceparent": f"00-{trace_id}-{turn.span_id}-01",
                "x-regreen-trajectory-id": trajectory_id,
            }
    assert structlog.contextvars.get_contextvars() == before


def test_a_trace_that_a_caller_began_goes_on():
    mine = {"trace_id": "ab" * 16, "span_id": "cd" * 8}
    with structlog.contextvars.bound_contextvars(**mine), traces.span("x", new_id("trj")) as link:
        assert link.trace_id == "ab" * 16


def test_ids_that_are_none_of_ours_have_no_trace_of_their_own():
    assert traces.trace_of("trj_" + "0" * 32) == traces.trace_of("mine") == ""
    assert traces.root_of("a" * 16 + "0" * 16) != "0" * 16
    with traces.span("rollout", "mine") as link:
        assert len(link.trace_id) == 32


def test_a_share_that_is_none_is_refused_by_a_server_that_starts(asked):
    asked.setenv("OTEL_TRACES_SAMPLER_ARG", "2")
    with pytest.raises(InvalidArgument, match=r"OTEL_TRACES_SAMPLER_ARG.*0 to 1"):
        Server(ServiceSettings(), [])


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        (traces.ENDPOINT, "collector:4318", "http://collector:4318"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "name an endpoint for HTTP"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "100", "less than or equal"),
    ],
)
def test_what_the_exporter_could_not_use_is_told_at_once(asked, name, value, says):
    asked.setenv(name, value)
    with pytest.raises(InvalidArgument, match=says):
        traces.prepare()


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_share_is_one_of_real_ids(asked, share):
    """The first bits of an id tell the time, those after them the version: they are no lottery."""
    asked.setenv("OTEL_TRACES_SAMPLER_ARG", str(share))
    sender, sent = traces._sender(), []
    asked.setattr(sender._queue, "on_end", sent.append)
    for _ in range(2000):
        with traces.span("rollout", new_id("trj")):
            pass
    assert abs(len(sent) / 2000 - share) < 0.05


@pytest.mark.parametrize("kept", [True, False])
def test_a_trace_that_is_not_kept_stays_so_downstream(asked, kept):
    sent = []
    asked.setattr(traces._sender()._queue, "on_end", sent.append)
    mine = {"trace_id": "ab" * 16, "span_id": "cd" * 8}
    before = SAMPLED.set(kept)
    try:
        with structlog.contextvars.bound_contextvars(**mine), traces.span("x"):
            assert dict(call_metadata())["traceparent"].endswith("-01" if kept else "-00")
    finally:
        SAMPLED.reset(before)
    assert len(sent) == kept


async def test_a_collector_that_hangs_holds_nobody_up_and_keeps_one_thread(asked):
    released = asyncio.Event()

    async def hang(reader, writer):
        await released.wait()
        writer.close()

    async with await asyncio.start_server(hang, "127.0.0.1", 0) as hung:
        port = hung.sockets[0].getsockname()[1]
        asked.setenv(traces.ENDPOINT, f"http://127.0.0.1:{port}")
        asked.setattr(traces, "_LEAVE_S", 0.2)
        with traces.span("rollout", new_id("trj")):
            pass
        await traces.flush()
        held = traces._sender().flush()
        assert held.is_alive()
        await traces.flush()
        assert traces._sender().flush() is held
        released.set()


def test_packages_that_are_missing_are_named(asked):
    asked.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(FailedPrecondition, match="install the extra `otel`"):
        traces.prepare()


def test_without_an_endpoint_nothing_is_loaded(asked):
    asked.setenv("OTEL_SDK_DISABLED", "true")
    traces.prepare()
    assert traces._sender() is None

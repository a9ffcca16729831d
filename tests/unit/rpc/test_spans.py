"""Spans: ids of the trace and of what a call was of, on the line that every call leaves."""

import structlog

from regreen.client.channel import call_metadata, connect
from regreen.client.sandbox import StateClient
from regreen.rpc.server import Server
from regreen.rpc.spans import Span
from regreen.sandbox import v1 as pb
from regreen.settings import ServiceSettings

TRACE, PARENT = "ab" * 16, "cd" * 8


class Echo(pb.StateServiceServicer):
    """Answers with a state of another id, and says what a call of its own would carry."""

    def __init__(self) -> None:
        self.onward: list[str] = []

    async def GetState(self, request, context):
        self.onward.append(dict(call_metadata())["traceparent"])
        return pb.GetStateResponse(state=pb.State(id="st_1", parent_id="st_0"))


def test_a_header_of_a_trace_is_read_and_any_other_is_none():
    span = Span.after(f"00-{TRACE}-{PARENT}-01")
    assert (span.trace_id, span.parent_id, span.sampled) == (TRACE, PARENT, True)
    assert not Span.after(f"00-{TRACE}-{PARENT}-00").sampled
    zeros = (f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01")
    for bad in ("", "x", f"00-{TRACE}-{PARENT}", f"00-{TRACE.upper()}-{PARENT}-01", *zeros):
        assert Span.after(bad).trace_id == ""
    assert len({Span.after("").span_id for _ in range(100)}) == 100


def test_only_ids_are_taken_from_messages():
    span = Span()
    secret = pb.Command(argv=["sh", "-c", "secret"])
    span.saw(pb.RunRequest(sandbox_id="sbx_1", request_id="r", command=secret))
    span.saw(pb.CreateSandboxResponse(sandbox=pb.Sandbox(id="sbx_2", state_id="st_1")))
    span.saw(pb.GetStateRequest(id="x" * 1000))
    assert span.subjects == {"sandbox_id": "sbx_1", "state_id": "st_1"}
    span.saw(object())
    long = Span()
    long.saw(pb.RunRequest(sandbox_id="y" * 1000))
    assert long.subjects == {"sandbox_id": "y" * 100}


async def test_every_call_leaves_its_span(tmp_path):
    server = Server(ServiceSettings(drain_s=0.2), ["regreen.sandbox.v1.StateService"])
    echo = Echo()
    pb.add_StateServiceServicer_to_server(echo, server.grpc)
    merge = structlog.contextvars.merge_contextvars
    async with server, connect(server.address) as channel:
        with (
            structlog.testing.capture_logs(processors=[merge]) as lines,
            structlog.contextvars.bound_contextvars(trace_id=TRACE, span_id=PARENT),
        ):
            await StateClient(channel).get_state("st_1")
    (line,) = [line for line in lines if line["event"] == "call"]
    assert (line["log_level"], line["code"]) == ("info", "OK")
    assert (line["trace_id"], line["parent_span_id"]) == (TRACE, PARENT)
    assert (line["state_id"], line["parent_id"]) == ("st_1", "st_0")
    assert line["method"] == "regreen.sandbox.v1.StateService/GetState"
    assert line["seconds"] >= 0
    assert echo.onward == [f"00-{TRACE}-{line['span_id']}-01"]


async def test_calls_of_a_trace_that_is_not_sampled_say_so_further_on():
    server = Server(ServiceSettings(drain_s=0.2), ["regreen.sandbox.v1.StateService"])
    echo = Echo()
    pb.add_StateServiceServicer_to_server(echo, server.grpc)
    async with server, connect(server.address) as channel:
        stub = pb.StateServiceStub(channel)
        for flags in ("00", "01"):
            header = ("traceparent", f"00-{TRACE}-{PARENT}-{flags}")
            await stub.GetState(pb.GetStateRequest(id="st_1"), metadata=(header,), timeout=5)
    assert [onward[-3:] for onward in echo.onward] == ["-00", "-01"]


async def test_a_call_without_a_sampled_trace_is_for_debugging():
    server = Server(ServiceSettings(drain_s=0.2), ["regreen.sandbox.v1.StateService"])
    pb.add_StateServiceServicer_to_server(Quiet(), server.grpc)
    async with server, connect(server.address) as channel:
        stub = pb.StateServiceStub(channel)
        for metadata in ((), (("traceparent", f"00-{TRACE}-{PARENT}-00"),)):
            with structlog.testing.capture_logs() as lines:
                await stub.GetState(pb.GetStateRequest(id="st_1"), metadata=metadata, timeout=5)
            assert [line["log_level"] for line in lines if line["event"] == "call"] == ["debug"]


class Quiet(pb.StateServiceServicer):
    """Answers with nothing."""

    async def GetState(self, request, context):
        return pb.GetStateResponse()

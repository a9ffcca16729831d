"""Connections and requests that say little or too much: bounded, and others are served."""

import asyncio
import contextlib
import socket
import struct
import threading

import grpc
import httpx
import pytest

from regreen.client.access import Access
from regreen.client.channel import Caller, connect
from regreen.rpc import metrics, server
from regreen.rpc.server import Server
from regreen.sandbox import v1 as pb
from regreen.settings import ServiceSettings
from tests.fixtures.certs import Certs

NAME = "regreen.sandbox.v1.StateService"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class States(pb.StateServiceServicer):
    """Answers at once."""

    async def GetState(self, request, context):
        return pb.GetStateResponse(state=pb.State(id=request.id))

    async def PrepareState(self, request, context):
        yield pb.PrepareStateResponse()
        yield pb.PrepareStateResponse()


@contextlib.asynccontextmanager
async def serving(**settings):
    made = Server(ServiceSettings(drain_s=0.2, **settings), [NAME])
    pb.add_StateServiceServicer_to_server(States(), made.grpc)
    async with made:
        yield made


async def answers(address: str, access: Access | None = None, **fields) -> bool:
    async with connect(address, access or Access()) as channel:
        stub = pb.StateServiceStub(channel)
        request = pb.GetStateRequest(**(fields or {"id": "st_1"}))
        return bool((await stub.GetState(request, timeout=20)).state.id)


def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    """An HTTP/2 frame."""
    head = struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream)
    return head + body


def literal(name: str, value: str) -> bytes:
    """A header that is not indexed (RFC 7541, 6.2.2)."""
    parts = (name.encode(), value.encode())
    return b"\x00" + b"".join(bytes([len(part)]) + part for part in parts)


def half_request(path: str) -> bytes:
    """A call whose message of 1000 bytes never arrives whole."""
    headers = {
        ":method": "POST", ":scheme": "http", ":path": path, ":authority": "localhost",
        "te": "trailers", "content-type": "application/grpc",
    }  # fmt: skip
    block = b"".join(literal(name, value) for name, value in headers.items())
    message = b"\x00" + struct.pack(">I", 1000) + b"\x0a"
    return frame(1, 4, 1, block) + frame(0, 0, 1, message)


async def answered_kind(reader: asyncio.StreamReader) -> int:
    """Kind of the next frame about the call; 0 of one about the connection."""
    head = await reader.readexactly(9)
    await reader.readexactly(int.from_bytes(head[:3]))
    return head[3] if int.from_bytes(head[5:]) == 1 else 0


async def ends(reader: asyncio.StreamReader) -> None:
    """Return when the other end has closed."""
    with contextlib.suppress(ConnectionError):
        while await reader.read(1 << 16):
            pass


async def opened(made: Server, first: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
    writer.write(first)
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("tls", [False, True])
async def test_connections_that_say_nothing_are_closed(tls, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "_HANDSHAKE_MS", 1000)
    certs = Certs.make(tmp_path / "certs")
    access = Access(certs.tls("client")) if tls else None
    async with serving(**(certs.settings() if tls else {})) as made:
        first = (b"", PREFACE[:9], b"\x16\x03\x01\x02") if tls else (b"", PREFACE[:9], PREFACE)
        silent = [await opened(made, first[number % 3]) for number in range(150)]
        assert await answers(made.address, access)
        async with asyncio.timeout(60):
            await asyncio.gather(*(ends(reader) for reader, _ in silent))
        assert await answers(made.address, access)
        for _, writer in silent:
            writer.close()


async def test_messages_over_the_limit_are_refused_and_the_service_goes_on(monkeypatch):
    async with serving(max_message_bytes=1 << 16) as made:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await answers(made.address, id="x" * (1 << 17))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await answers(made.address, id="x" * (1 << 15))
    monkeypatch.setattr(server, "_RECEIVE_S", 1.0)
    async with serving(max_message_bytes=1 << 16, listen="0.0.0.0:0", insecure=True) as made:
        # A length of 4 GiB is announced: nobody waits for that.
        head = half_request("/regreen.sandbox.v1.StateService/GetState")
        lying = head[:-5] + b"\xff\xff\xff\xff" + b"\x0a"
        reader, writer = await opened(made, PREFACE + frame(4, 0, 0, b"") + lying)
        async with asyncio.timeout(20):
            while await answered_kind(reader) not in (1, 3):  # an end of the call, or of its stream
                pass
        assert await answers(f"127.0.0.1:{made.port}")
        writer.close()


async def test_the_metrics_page_answers_amid_more_silence_than_it_has_places_for():
    """Each that asks is answered, though every place is taken by those that say less than all."""
    async with serving() as made, httpx.AsyncClient(timeout=20) as http:
        silent: list[socket.socket] = []
        for number in range(20):
            for _ in range(metrics._CONNECTIONS // 4 if number else 3 * metrics._CONNECTIONS):
                silent.append(socket.create_connection(("127.0.0.1", made.metrics_port)))
                silent[-1].sendall(b"GET /met" if len(silent) % 2 else b"")
            page = await http.get(f"http://127.0.0.1:{made.metrics_port}/healthz")
            assert page.text == "ok\n"
        first = [await asyncio.open_connection(sock=one) for one in silent[: metrics._CONNECTIONS]]
        async with asyncio.timeout(5):  # long before a read has waited for too long
            await asyncio.gather(*(ends(reader) for reader, _ in first))
        threads = [one for one in threading.enumerate() if "process_request_thread" in one.name]
        assert len(threads) <= metrics._CONNECTIONS + 1
        for _, writer in first:
            writer.close()
        for one in silent[metrics._CONNECTIONS :]:
            one.close()


async def test_silent_connections_to_the_metrics_page_end(monkeypatch):
    monkeypatch.setattr(metrics._Quiet, "timeout", 1.0)
    async with serving() as made:
        reader, writer = await asyncio.open_connection("127.0.0.1", made.metrics_port)
        async with asyncio.timeout(20):
            await ends(reader)
        writer.close()


async def test_requests_that_never_arrive_whole_give_their_places_back(monkeypatch):
    monkeypatch.setattr(server, "_RECEIVE_S", 1.0)
    async with serving(listen="0.0.0.0:0", insecure=True, max_rpcs=2) as made:
        half = half_request("/regreen.sandbox.v1.StateService/GetState")
        slow = [await opened(made, PREFACE + frame(4, 0, 0, b"") + half) for _ in range(40)]
        address = f"127.0.0.1:{made.port}"
        async with asyncio.timeout(60), connect(address, Access()) as channel:
            caller = Caller(channel, patience_s=60.0)
            stub = pb.StateServiceStub(channel)
            answer = await caller._call(stub.GetState, pb.GetStateRequest(id="st_1"), 20)
            assert answer.state.id == "st_1"
        for _, writer in slow:
            writer.close()


async def test_calls_of_every_kind_go_on_where_requests_are_waited_for():
    async with serving(listen="0.0.0.0:0", insecure=True) as made:
        address = f"127.0.0.1:{made.port}"
        assert await answers(address)
        async with connect(address, Access()) as channel:
            call = pb.StateServiceStub(channel).PrepareState(pb.PrepareStateRequest(), timeout=20)
            assert [type(event) async for event in call] == [pb.PrepareStateResponse] * 2
            empty = channel.stream_unary(f"/{NAME}/GetState", None, None)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await empty(iter(()), timeout=20)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT

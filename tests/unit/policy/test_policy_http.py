"""The HTTP endpoint's server under connections that say nothing, say it slowly, or take nothing."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from policy_svc import http_server
from policy_svc.http_server import served
from regreen.rpc.errors import FailedPrecondition

HALF = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"


@asynccontextmanager
async def site(go_on: asyncio.Event) -> AsyncIterator[int]:
    async def small(http: Request) -> Response:
        return Response("ok")

    async def waits(http: Request) -> Response:
        await go_on.wait()
        return Response("waited")

    async def big(http: Request) -> Response:
        return Response(b"x" * (64 << 20))

    routes = [Route("/small", small), Route("/waits", waits), Route("/big", big)]
    async with served("127.0.0.1:0", Starlette(routes=routes), 1.0) as port:
        yield port


async def get(port: int, path: str) -> int:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
        return (await http.get(path)).status_code


async def open_silent(
    port: int, count: int
) -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    made = []
    for number in range(count):
        made.append(await asyncio.open_connection("127.0.0.1", port))
        made[-1][1].write(HALF if number % 2 else b"")
    return made


async def ended(reader: asyncio.StreamReader) -> bool:
    try:
        return await asyncio.wait_for(reader.read(1), 0.5) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


async def trickle(writer: asyncio.StreamWriter) -> None:
    """Send a header's bytes one by one until nobody takes them."""
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)


def read_all(client: socket.socket) -> int:
    """Take what comes to the end, whichever that is."""
    taken = 0
    with contextlib.suppress(ConnectionError):
        while more := client.recv(1 << 20):
            taken += len(more)
    return taken


async def test_a_flood_of_silence_drives_itself_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_CONNECTIONS", 16)
    go_on = asyncio.Event()
    async with site(go_on) as port:
        working = asyncio.create_task(get(port, "/waits"))
        await asyncio.sleep(0.2)
        silent = await open_silent(port, 60)
        assert await get(port, "/small") == 200
        assert [await ended(reader) for reader, _ in silent[:40]] == [True] * 40
        assert [await ended(reader) for reader, _ in silent[-4:]] == [False] * 4
        go_on.set()
        assert await working == 200, "who is being answered keeps its place"
        for _, writer in silent:
            writer.close()


async def test_where_all_are_being_answered_one_more_is_told_to_come_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_server, "_CONNECTIONS", 4)
    go_on = asyncio.Event()
    async with site(go_on) as port:
        working = [asyncio.create_task(get(port, "/waits")) for _ in range(4)]
        await asyncio.sleep(0.5)
        assert await get(port, "/small") == 503
        go_on.set()
        assert await asyncio.gather(*working) == [200] * 4
        assert await get(port, "/small") == 200


async def test_what_trickles_in_keeps_a_connection_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_server, "_SILENT_S", 0.5)
    async with site(asyncio.Event()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(10):
            await trickle(writer)
        assert await ended(reader)
        writer.close()


async def test_an_answer_that_nobody_takes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_SILENT_S", 0.2)
    monkeypatch.setattr(http_server, "_UNTAKEN_S", 0.5)
    async with site(asyncio.Event()) as port:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.sendall(b"GET /big HTTP/1.1\r\nhost: x\r\n\r\n")
            await asyncio.sleep(2)
            client.settimeout(5)
            taken = await asyncio.to_thread(read_all, client)
            assert taken < 64 << 20
        async with httpx.AsyncClient(timeout=20) as http:
            whole = await http.get(f"http://127.0.0.1:{port}/big")
            assert len(whole.content) == 64 << 20, "who takes it gets all of it"


async def test_an_address_in_use_is_told() -> None:
    async with site(asyncio.Event()) as port:
        with pytest.raises(FailedPrecondition, match=f"cannot bind 127.0.0.1:{port}"):
            async with served(f"127.0.0.1:{port}", Starlette(), 1.0):
                pass

"""The proxy's reading of hostile bytes, over socket pairs: every exchange ends, and says why."""

import asyncio
import random
import socket

import structlog

from regreen.allowlist import AllowList
from sandbox_svc.egress import Egress
from sandbox_svc.egress_exchange import Bounds, Exchange
from sandbox_svc.egress_log import Decision
from sandbox_svc.egress_rules import parse_networks

_SEED, _ROUNDS, _AT_ONCE = 7, 1500, 20
_BOUNDS = Bounds(head_s=5.0, connect_s=5.0, idle_s=5.0)


async def resolved(host: str) -> list[str]:
    return ["127.0.0.1"]


async def exchanged(door, sent: bytes) -> bytes:
    """What a client gets for these bytes."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    serving = asyncio.create_task(
        Exchange(door, await asyncio.open_connection(sock=theirs)).serve()
    )
    writer.write(sent)
    writer.write_eof()
    got = b""
    try:
        while data := await reader.read(65536):
            got += data
    except ConnectionError:
        pass
    await serving
    writer.close()
    return got


def mutants(seed: bytes, count: int, rng: random.Random):
    """Variations of a request: bytes changed, pieces cut, doubled and put elsewhere."""
    pieces = (b"\r\n", b"\n", b"\0", b" ", b"@", b":", b"%00", b"//", b"#", b"[", b"]", b"\xff",
              b"Host: other.test\r\n", b"Content-Length: 5\r\n", b"Content-Length: -1\r\n",
              b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: identity\r\n",
              b"HTTP/0.9", b"HTTP/2.0", b"9" * 40, b"x" * 5000)  # fmt: skip
    for _ in range(count):
        data = bytearray(seed)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(data) + 1)
            match rng.randrange(4):
                case 0:
                    data[place : place + 1] = bytes([rng.randrange(256)])
                case 1:
                    data[place:place] = rng.choice(pieces)
                case 2:
                    del data[place : place + rng.randint(1, 30)]
                case _:
                    cut = data[place : place + rng.randint(1, 30)]
                    where = rng.randrange(len(data) + 1)
                    data[where:where] = cut
        yield bytes(data)


async def test_whatever_is_sent_ends_and_reaches_only_what_is_allowed():
    heads: list[bytes] = []

    async def answer(reader, writer):
        heads.append(await reader.read(65536))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        place = f"index.test:{port}"
        egress = Egress(private=parse_networks("127.0.0.0/8"), resolver=resolved, bounds=_BOUNDS)
        door = egress.door("sbx_fuzz", AllowList.parse([place]))
        host = f"Host: {place}\r\n"
        seeds = (
            f"GET http://{place}/a?b HTTP/1.1\r\n{host}X: y\r\n\r\n",
            f"POST http://{place}/ HTTP/1.1\r\n{host}Content-Length: 5\r\n\r\nhello",
            f"PUT http://{place}/ HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\n"
            "5\r\nhello\r\n0\r\n\r\n",
            f"CONNECT {place} HTTP/1.1\r\n{host}\r\nGET / HTTP/1.1\r\n{host}\r\n",
        )
        for seed in seeds:
            assert (await exchanged(door, seed.encode())).startswith(b"HTTP/1.1 200")
        seeds += ("GET http://other.test/ HTTP/1.1\r\nHost: other.test\r\nX: y\r\n\r\n",)
        rng, room = random.Random(_SEED), asyncio.Semaphore(_AT_ONCE)

        async def one(data: bytes) -> bytes:
            async with room:
                return await asyncio.wait_for(exchanged(door, data), 30)

        with structlog.testing.capture_logs() as lines:
            work = [
                one(data)
                for seed in seeds
                for data in mutants(seed.encode(), _ROUNDS // len(seeds), rng)
            ]
            answers = await asyncio.gather(*work)
        await egress.close()
    events = [line for line in lines if line["event"] == "egress"]
    assert [line for line in lines if line["log_level"] == "error"] == []
    statuses = {answer.split(b" ")[1] for answer in answers if answer}
    assert statuses <= {b"200", b"400", b"403", b"408", b"431", b"501", b"502", b"505"}
    assert {b"200", b"400", b"403"} <= statuses
    reached = [line for line in events if line["decision"] in ("allowed", "failed")]
    assert {(line["host"], line["port"]) for line in reached} == {("index.test", port)}
    assert len(heads) <= len(reached) + len(seeds)
    plain = [head for head in heads if b"\r\nConnection: close\r\n\r\n" in head]
    assert plain
    for head in plain:  # what went into a tunnel is not the proxy's
        names = [line for line in head.lower().split(b"\r\n") if line.startswith(b"host:")]
        assert names == [f"host: {place}".encode()]
    assert {Decision.MALFORMED.value, Decision.HOST.value} <= {line["decision"] for line in events}

"""A sandbox service whose sandboxes may be given a way out, and servers for them to reach.

- Names are answered by a stand-in that the test writes; every server is on loopback, which the
  service is told to allow as a private network.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from regreen.client.channel import connect
from regreen.client.egress import EgressClient
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.rpc.server import Server
from regreen.sandbox import v1 as pb
from sandbox_svc.__main__ import serving
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.egress import Egress
from sandbox_svc.egress_exchange import Bounds
from sandbox_svc.egress_rules import parse_networks
from sandbox_svc.service import SandboxHost
from sandbox_svc.settings import SandboxSettings
from tests.integration.sandbox.overlay import OverlayBuilder, prepared

LOOPBACK = parse_networks("127.0.0.0/8")
FETCH = """
import sys, urllib.error, urllib.request
data = sys.argv[2].encode() if len(sys.argv) > 2 else None
try:
    with urllib.request.urlopen(urllib.request.Request(sys.argv[1], data), timeout=20) as answer:
        print(answer.status, answer.read().decode())
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
"""
TALK = """
import socket, sys
way = socket.create_connection(("127.0.0.1", 3128), timeout=20)
way.sendall(sys.stdin.buffer.read())
while data := way.recv(65536):
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
"""


class Names:
    """A name server's stand-in: each name has answers, given in turn; the last one stays."""

    def __init__(self) -> None:
        self.answers: dict[str, list[Sequence[str]]] = {}
        self.asked: list[str] = []

    async def __call__(self, host: str) -> Sequence[str]:
        self.asked.append(host)
        answers = self.answers.get(host)
        if not answers:
            raise OSError(f"no such name: {host}")
        return answers.pop(0) if len(answers) > 1 else answers[0]


@dataclass
class World:
    """What a test of the proxy holds."""

    states: StateClient
    sandboxes: SandboxClient
    records: EgressClient
    server: Server
    host: SandboxHost
    names: Names
    state: pb.State

    async def sandbox(self, *allow: str, **options) -> pb.Sandbox:
        return await self.sandboxes.create_sandbox(self.state.id, egress=allow, **options)

    async def fetch(self, sandbox: pb.Sandbox, url: str, *data: str) -> str:
        """What urllib prints inside, proxies from its environment."""
        argv = ["/usr/bin/python3", "-I", "-S", "-c", FETCH, url, *data]
        result = await self.sandboxes.run(sandbox.id, argv, timeout_s=30)
        assert result.exit_code == 0, result.stderr.head.decode()
        return result.stdout.head.decode().strip()

    async def talk(self, sandbox: pb.Sandbox, sent: bytes, timeout_s: float = 30) -> bytes:
        """What the proxy answers to these bytes."""
        argv = ["/usr/bin/python3", "-I", "-S", "-c", TALK]
        result = await self.sandboxes.run(sandbox.id, argv, stdin=sent, timeout_s=timeout_s)
        return result.stdout.head

    async def asked(self, sandbox: pb.Sandbox) -> list[pb.EgressRecord]:
        return [record async for record in self.records.egress_records(sandbox.id)]


@contextlib.asynccontextmanager
async def world(home: Path, *, bounds: Bounds | None = None, private=LOOPBACK, **egress):
    """A running service with one state."""
    settings = SandboxSettings(
        home=home / "home", listen=f"unix:{home}/s", metrics="127.0.0.1:0",
        max_sandboxes=8, drain_s=0.2, self_check_s=0.1,
    )  # fmt: skip
    names = Names()
    runtime = EmbeddedRuntime(home / "home" / "sandbox", run_probes=False, warm_seats=1)
    way = Egress(private=private, bounds=bounds, resolver=names, **egress)
    host = SandboxHost(settings, runtime, [OverlayBuilder()], egress=way)
    async with serving(settings, host) as server, connect(server.address) as channel:
        states = StateClient(channel, patience_s=0.0)
        state = await prepared(states, **{"a.txt": "a"})
        sandboxes, records = SandboxClient(channel, patience_s=0.0), EgressClient(channel)
        yield World(states, sandboxes, records, server, host, names, state)


@dataclass
class Seen:
    """A server of a test and what came to it."""

    port: int
    heads: list[bytes] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    open: int = 0
    most_open: int = 0


@contextlib.asynccontextmanager
async def web(
    body: bytes = b"hello", *, tls=None, extra: bytes = b"", host: str = "127.0.0.1"
) -> AsyncIterator[Seen]:
    """A server that answers every request with `body`."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            seen.heads.append(head)
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
            seen.bodies.append(await reader.readexactly(int(fields.get(b"content-length", 0))))
            length = str(len(body)).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: " + length + b"\r\n" + extra)
            writer.write(b"\r\n" + body)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, host, 0, ssl=tls)
    seen = Seen(server.sockets[0].getsockname()[1])
    async with server:
        yield seen


@contextlib.asynccontextmanager
async def echo() -> AsyncIterator[Seen]:
    """A server of no protocol: it gives back what it gets."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got = bytearray()
        seen.open += 1
        seen.most_open = max(seen.most_open, seen.open)
        try:
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(65536):
                    got += data
                    writer.write(data)
                    await writer.drain()
        finally:
            seen.open -= 1
            seen.bodies.append(bytes(got))
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    seen = Seen(server.sockets[0].getsockname()[1])
    async with server:
        yield seen


async def until(condition, timeout_s: float = 10.0) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  (others make it hold)
            await asyncio.sleep(0.01)

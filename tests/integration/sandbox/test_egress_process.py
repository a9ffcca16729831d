"""The proxy of a service: what its start proves, its upstream, its operator's list, its death."""

import asyncio
import base64
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from regreen.allowlist import AllowList
from regreen.client.channel import connect
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.rpc.errors import FailedPrecondition
from regreen.sandbox import v1 as pb
from sandbox_svc.settings import SandboxSettings
from tests.integration.sandbox.egressing import TALK, echo, until, web, world
from tests.integration.sandbox.test_crash import _gone, _processes_below
from tests.load import processes

_ROOT = Path(__file__).parents[3]


def _service(home: Path, *flags: str) -> subprocess.Popen:
    address = ["--listen", f"unix:{home}/s", "--metrics", "127.0.0.1:0", "--warm-seats", "1"]
    return subprocess.Popen(
        [sys.executable, "-m", "sandbox_svc", "--home", str(home), *address, *flags],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        stderr=subprocess.PIPE,
    )


async def _prepared(states: StateClient) -> str:
    events = [event async for event in states.prepare_state(pb.EnvironmentSpec(builder="system"))]
    return events[-1].state.id


async def test_killed_it_leaves_no_tunnel_and_no_process(tmp_path):
    async with echo() as seen:
        child = _service(tmp_path, "--egress-private", "127.0.0.0/8")
        try:
            async with connect(f"unix:{tmp_path}/s") as channel:
                sandboxes = SandboxClient(channel, patience_s=60.0)
                capabilities = await sandboxes.get_capabilities()
                proven = {c.name: c.proven for c in capabilities.capabilities}
                assert proven["egress"], capabilities
                state = await _prepared(StateClient(channel))
                place = f"127.0.0.1:{seen.port}"
                sandbox = await sandboxes.create_sandbox(state, egress=[place])
                tunnel = f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n\r\nhi".encode()
                argv = ["/usr/bin/python3", "-I", "-S", "-c", TALK]
                running = asyncio.create_task(
                    SandboxClient(channel, patience_s=0.0).run(sandbox.id, argv, stdin=tunnel)
                )
                await until(lambda: seen.open)
                before = set(os.listdir(tmp_path / "sandbox/run"))
                lived = await asyncio.to_thread(processes.family, child.pid)
                child.send_signal(signal.SIGKILL)
                await until(lambda: not seen.open)
                await asyncio.gather(running, return_exceptions=True)
        finally:
            child.kill()
            await asyncio.to_thread(child.communicate)
    assert seen.bodies == [b"hi"]
    home = tmp_path / "sandbox"
    assert await asyncio.to_thread(_gone, home, lived, 10.0), _processes_below(home, lived)
    again = _service(tmp_path)
    try:
        async with connect(f"unix:{tmp_path}/s") as channel:
            await SandboxClient(channel, patience_s=60.0).get_capabilities()
            assert before
            assert not before & set(os.listdir(home / "run"))
    finally:
        again.terminate()
        await asyncio.to_thread(again.communicate)
    assert await asyncio.to_thread(_processes_below, home, {}) == []


@dataclass
class Office:
    """A proxy of a company, which asks for a password."""

    port: int = 0
    heads: list[bytes] = field(default_factory=list)


@contextlib.asynccontextmanager
async def office(target_port: int) -> AsyncIterator[Office]:
    """Whatever is asked for, it is the server on `target_port` that answers."""
    wanted = b"Basic " + base64.b64encode(b"user:pass word")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        seen.heads.append(head)
        if b"Proxy-Authorization: " + wanted not in head:
            writer.write(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n")
            writer.close()
            return
        there, onward = await asyncio.open_connection("127.0.0.1", target_port)
        if head.startswith(b"CONNECT"):
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        else:
            onward.write(head)
        await asyncio.gather(_copied(reader, onward), _copied(there, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    seen = Office(server.sockets[0].getsockname()[1])
    async with server:
        yield seen


async def _copied(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def test_an_upstream_proxy_is_used_and_its_password_stays_outside(tmp_path):
    async with web(b"through the office") as seen, office(seen.port) as found:
        url = f"http://user:pass%20word@127.0.0.1:{found.port}"
        settings = SandboxSettings(home=tmp_path, egress_upstream=url)
        upstream = settings.make_egress().route._upstream
        async with world(tmp_path, private=(), upstream=upstream) as here:
            here.names.answers["lan.test"] = [["10.0.0.1"]]
            sandbox = await here.sandbox("index.test", "raw.test:8443", "lan.test", "10.0.0.1")
            got = await here.fetch(sandbox, "http://index.test/simple/")
            assert got == "200 through the office"
            tunnel = b"CONNECT raw.test:8443 HTTP/1.1\r\nHost: raw.test:8443\r\n\r\n"
            answer = await here.talk(sandbox, tunnel + b"GET / HTTP/1.1\r\n\r\n")
            assert answer.endswith(b"through the office")
            for place in ("lan.test", "10.0.0.1"):
                assert (await here.fetch(sandbox, f"http://{place}/"))[:3] == "403"
            records = await here.asked(sandbox)
            env = (await here.sandboxes.run(sandbox.id, ["env"])).stdout.head
    assert [record.allowed for record in records] == [True, True, False, False]
    assert found.heads[0].startswith(b"GET http://index.test/simple/ HTTP/1.1\r\nHost: index.test")
    assert found.heads[1].startswith(b"CONNECT raw.test:8443 HTTP/1.1\r\n")
    assert len(found.heads) == 2
    assert b"pass" not in env
    assert b"127.0.0.1:3128" in env
    assert "pass" not in "".join(str(record) for record in records)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("egress_private", "10.0.0.1/8", "give networks such as"),
        ("egress_upstream", "socks5://u:hunter2@p:1", "give http://host:port"),
    ],
)
def test_bad_settings_are_refused_at_once(field, value, said, capsys, tmp_path):
    flag = "--" + field.replace("_", "-")
    with pytest.raises(SystemExit) as caught:
        SandboxSettings.load(["--home", str(tmp_path), flag, value, "--check"])
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert field in error
    assert said in error
    assert "hunter2" not in error


async def test_no_request_goes_beyond_what_the_operator_allows(tmp_path):
    ceiling = AllowList.parse(["*.index.test:80"])
    async with world(tmp_path, ceiling=ceiling) as here:
        before = here.host.egress.open_for
        for allow in (["index.test:80"], ["*.test:80"], ["a.index.test"], ["*.index.test"]):
            with pytest.raises(FailedPrecondition, match=r"egress\.allow\[1\].*egress_hosts"):
                await here.sandbox("a.index.test:80", *allow)
        assert here.host.egress.open_for == before
        sandbox = await here.sandbox("a.index.test:80", "*.b.index.test:80")
        assert (await here.fetch(sandbox, "http://c.index.test/")).startswith("403")
        assert (await here.fetch(sandbox, "http://a.index.test/")).startswith("502")

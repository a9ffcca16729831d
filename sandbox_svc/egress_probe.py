"""Proves at start that the proxy is the only way out of a sandbox, and that it guards it.

- A sandbox asks for a server of this process: by the proxy, which must refuse the address, and
  straight, which must fail. The server must see neither.
- The counterpart: where that network is allowed by name, the same request comes through. Without
  it, silence would prove nothing.
"""

import asyncio
import ipaddress

from regreen.allowlist import AllowList
from regreen.rpc.errors import FailedPrecondition, RegreenError
from sandbox_svc.backends.base import PROXY_PORT, Capability, Command, Door, Limits, Runtime
from sandbox_svc.egress import Egress
from sandbox_svc.egress_log import Ledger

_ASK = """
import socket, sys
host, port, proxy = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with socket.create_connection(("127.0.0.1", proxy), timeout=5) as way:
    head = f"GET http://{host}:{port}/ HTTP/1.1\\r\\nHost: {host}:{port}\\r\\n\\r\\n"
    way.sendall(head.encode())
    print("proxy", way.recv(100).split()[1].decode())
try:
    socket.create_connection((host, port), timeout=5)
    print("straight connected")
except OSError:
    print("straight refused")
"""
_LOOPBACK = ipaddress.ip_network("127.0.0.0/8")
_TIMEOUT_S = 15.0


async def prove(runtime: Runtime, *, enabled: bool) -> Capability:
    """The capability `egress`."""
    if not enabled:
        return Capability("egress", False, "none", "switched off by the setting egress")
    try:
        guarded, opened = await asyncio.gather(
            _asked(runtime, Egress(ledger=Ledger(quiet=True))),
            _asked(runtime, Egress(private=[_LOOPBACK], ledger=Ledger(quiet=True))),
        )
    except FailedPrecondition as error:
        return Capability("egress", False, "none", error.message)
    except (OSError, RegreenError) as error:
        return Capability("egress", False, "proxy", f"the probe failed: {error}")
    guards = guarded == (["proxy 403", "straight refused"], 0)
    leads = opened == (["proxy 204", "straight refused"], 1)
    detail = f"guarded: {', '.join(guarded[0])}; allowed by name: {', '.join(opened[0])}"
    return Capability("egress", guards and leads, "proxy", detail)


async def _asked(runtime: Runtime, egress: Egress) -> tuple[list[str], int]:
    """What a sandbox says of its requests to a server of ours, and how many that server saw."""
    seen: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readline())
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        door = egress.door(f"probe-{port}", AllowList.parse([f"127.0.0.1:{port}"]))
        try:
            said = await _said(runtime, door, port)
        finally:
            await egress.close()
    return said, len(seen)


async def _said(runtime: Runtime, door: Door, port: int) -> list[str]:
    box = await runtime.create([], limits=Limits(), door=door)
    try:
        where = ("127.0.0.1", str(port), str(PROXY_PORT))
        argv = ("/usr/bin/python3", "-I", "-S", "-c", _ASK, *where)
        result = await box.run(Command(argv, cwd="/", timeout_s=_TIMEOUT_S))
    finally:
        await box.delete()
    return result.stdout.text.splitlines()

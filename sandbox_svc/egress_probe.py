"""Proves at start that the proxy is the only way out of a sandbox, and that it guards it.

- A sandbox asks for a server of this process: by the proxy, which must refuse the address, and
  straight, which must fail. The server must see neither.
- The counterpart: where that network is allowed by name, the same request comes through. Without
  it, silence would prove nothing.
"""

import asyncio
import ipaddress
import secrets

from regreen.rpc.errors import FailedPrecondition, RegreenError
from sandbox_svc.backends.base import Capability, Command, Limits, Runtime
from sandbox_svc.egress import Egress
from sandbox_svc.egress_rules import AllowList

_ASK = """
import socket, sys, urllib.error, urllib.request
place = sys.argv[1]
try:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({"http": sys.argv[2]}))
    print("proxy", opener.open(f"http://{place}/", timeout=5).status)
except urllib.error.HTTPError as error:
    print("proxy", error.code)
host, _, port = place.rpartition(":")
try:
    socket.create_connection((host, int(port)), timeout=5)
    print("straight connected")
except OSError as error:
    print("straight refused")
"""
_LOOPBACK = ipaddress.ip_network("127.0.0.0/8")
_TIMEOUT_S = 15.0


async def prove(runtime: Runtime, *, enabled: bool) -> Capability:
    """The capability `egress`."""
    if not enabled:
        return Capability("egress", False, "none", "switched off by the setting egress")
    seen: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append((await reader.readline()).decode("latin-1"))
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        place = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            guarded = await _asked(runtime, place, Egress())
            touched = len(seen)
            opened = await _asked(runtime, place, Egress(private=[_LOOPBACK]))
        except FailedPrecondition as error:
            return Capability("egress", False, "none", error.message)
        except RegreenError as error:
            return Capability("egress", False, "proxy", f"the probe failed: {error}")
    guards = guarded == ["proxy 403", "straight refused"] and touched == 0
    leads = opened == ["proxy 204", "straight refused"] and len(seen) == 1
    detail = f"guarded: {', '.join(guarded)}; allowed by name: {', '.join(opened)}"
    return Capability("egress", guards and leads, "proxy", detail)


async def _asked(runtime: Runtime, place: str, egress: Egress) -> list[str]:
    """What a sandbox says of its requests to a place that is on its allow list."""
    door = egress.door(f"probe-{secrets.token_hex(4)}", AllowList.parse([place]))
    try:
        box = await runtime.create([], limits=Limits(), door=door)
        try:
            argv = ("/usr/bin/python3", "-I", "-S", "-c", _ASK, place)
            argv += (door.environment["http_proxy"],)
            result = await box.run(Command(argv, cwd="/", timeout_s=_TIMEOUT_S))
        finally:
            await box.delete()
    finally:
        await egress.close()
    return result.stdout.text.splitlines()

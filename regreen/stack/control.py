"""Starts, stops and looks at a local stack from outside.

- `up` returns when every service answers SERVING, or says which one did not and shows its log.
- `up` on a running stack changes nothing; `down` on a stopped one succeeds.
- Stopping goes through the supervisor; one that does not end is killed, and its services with it.
- Whether a stack runs is told by its supervisor's lock; a process id that was left behind is never
  trusted, since another process may have it now.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from regreen.rpc.errors import Unavailable
from regreen.stack.layout import SERVICES, Layout, Service

_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """What one service answers right now."""

    name: str
    address: str
    metrics: str
    http: str
    state: str
    """"serving", "starting" or "down"."""
    pid: int


def describe(layout: Layout) -> dict[str, Any] | None:
    """The description of the running stack, or None."""
    if not layout.supervised():
        return None
    try:
        found: dict[str, Any] = json.loads(layout.description.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found


async def status(layout: Layout) -> list[ServiceStatus]:
    """One row per service."""
    found = describe(layout)
    if found is None:
        return [ServiceStatus(item.name, "", "", "", "down", 0) for item in SERVICES]
    return list(await asyncio.gather(*(_ask(layout, found, item) for item in SERVICES)))


async def up(
    layout: Layout,
    *,
    arguments: Mapping[str, list[str]] | None = None,
    fixed_ports: bool = True,
    timeout_s: float = 180.0,
    progress: Callable[[list[ServiceStatus]], None] | None = None,
) -> list[ServiceStatus]:
    """Start the stack of this home, or find it running.

    Raises:
        Unavailable: a service did not come up in time; the message ends with its log.
    """
    layout.make()
    starter: subprocess.Popen[bytes] | None = None
    if not layout.supervised():
        starter = _start(layout, arguments or {}, fixed_ports)
    give_up_s = time.monotonic() + timeout_s
    while True:
        rows = await status(layout)
        if progress:
            progress(rows)
        if all(row.state == "serving" for row in rows):
            return rows
        ended = starter is not None and starter.poll() is not None
        if ended or time.monotonic() > give_up_s:
            raise Unavailable(_complaint(layout, rows, ended))
        await asyncio.sleep(_POLL_S)


async def down(layout: Layout, timeout_s: float = 40.0) -> bool:
    """Stop the stack of this home; whether one was running."""
    found = describe(layout)
    if found is None:
        return False
    pid = int(found["pid"])
    number = signal.SIGTERM
    give_up_s = time.monotonic() + timeout_s
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    while layout.supervised():
        if time.monotonic() > give_up_s and number == signal.SIGTERM:
            number = signal.SIGKILL
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        await asyncio.sleep(_POLL_S)
    layout.description.unlink(missing_ok=True)
    return True


def _start(
    layout: Layout, arguments: Mapping[str, list[str]], fixed_ports: bool
) -> "subprocess.Popen[bytes]":
    options = {
        "home": str(layout.home.resolve()),
        "arguments": dict(arguments),
        "fixed_ports": fixed_ports,
    }
    with layout.log("supervisor").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "regreen.stack.supervisor", json.dumps(options)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


async def _ask(layout: Layout, found: Mapping[str, Any], service: Service) -> ServiceStatus:
    address = found["endpoints"][service.name]
    state = "starting"
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        with contextlib.suppress(grpc.aio.AioRpcError):
            request = health_pb2.HealthCheckRequest(service=service.health)
            answer = await stub.Check(request, timeout=2.0)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                state = "serving"
    pid_file = layout.run / f"{service.name}.pid"
    pid = 0
    with contextlib.suppress(FileNotFoundError, ValueError):
        pid = int(pid_file.read_text())
    metrics = found["metrics"].get(service.name, "")
    return ServiceStatus(
        service.name, address, metrics, found["http"].get(service.name, ""), state, pid
    )


def _complaint(layout: Layout, rows: list[ServiceStatus], ended: bool) -> str:
    missing = [row.name for row in rows if row.state != "serving"]
    name = "supervisor" if ended else missing[0]
    return f"{', '.join(missing)}: not serving; end of {name}.log:\n{tail(layout, name, 15)}"


def tail(layout: Layout, name: str, lines: int) -> str:
    """The last lines of a log."""
    try:
        text = layout.log(name).read_text(errors="replace")
    except FileNotFoundError:
        return "(no log)"
    return "\n".join(text.splitlines()[-lines:])

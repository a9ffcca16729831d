"""Starts, stops and looks at a local stack from outside.

- `up` returns when every service answers SERVING, or says which one did not and shows its log.
- What is not installed, settings that a service refuses and a service that ends again and again
  fail `up` at once. However it fails, what it started is stopped.
- `up` on a running stack changes nothing; asked for other arguments, it refuses. `down` on a
  stopped one succeeds.
- Stopping goes through the supervisor; one that does not end is killed, and its services with it.
- A home may use services that others run (`regreen.stack.elsewhere`): `up` waits for them, `down`
  refuses.
- Whether a stack runs is told by its supervisor's lock, held from before that process begins; a
  process id that was left behind is never trusted, since another process may have it now.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from regreen.client.access import Access
from regreen.client.channel import connect
from regreen.rpc.errors import FailedPrecondition, InvalidArgument, Unavailable
from regreen.settings import BAD_SETTINGS
from regreen.stack.layout import ELSEWHERE, SERVICES, Layout, Service
from regreen.stack.parts import check_installed, chosen

Progress = Callable[[str, float, float, str], None]
"""Called with stage, done, total and a line of text."""
_POLL_S = 0.2
_CHECK_S = 60.0
"""A service reads its settings in about a second."""
_KILLED_S = 20.0
"""What the kernel may take to end a killed supervisor and its services."""
_MOST_ENDS = 5
"""A service that ended so often without having served does not come up by itself."""


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
    ours = layout.supervised()
    try:
        found: dict[str, Any] = json.loads(layout.description.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found if ours or found.get(ELSEWHERE) else None


async def status(layout: Layout) -> list[ServiceStatus]:
    """One row per service."""
    return await _rows(layout, describe(layout))


async def _rows(
    layout: Layout, found: Mapping[str, Any] | None, wanted: Sequence[Service] = SERVICES
) -> list[ServiceStatus]:
    if found is None:
        return [ServiceStatus(item.name, "", "", "", "down", 0) for item in wanted]
    items = [item for item in SERVICES if found["endpoints"].get(item.name)]
    return list(await asyncio.gather(*(_ask(layout, found, item) for item in items)))


async def up(
    layout: Layout,
    *,
    arguments: Mapping[str, list[str]] | None = None,
    fixed_ports: bool | None = None,
    only: Sequence[str] = (),
    tls: bool | None = None,
    tokens: bool | None = None,
    timeout_s: float = 180.0,
    progress: Progress | None = None,
) -> list[ServiceStatus]:
    """Start the stack of this home, or find it running; without `fixed_ports`, on fixed ones.

    With `only`, the services of these names and no other. With `tls`, they and their clients show
    each other certificates, which are made in this home where there are none; False starts them in
    plain text, and None, which does that too, takes a running stack as it is. So with `tokens`.

    Raises:
        InvalidArgument: a service refuses its settings, or there is none of a name in `only`;
            names the setting and the service.
        MissingDependency: a service is not installed here; says what to install.
        FailedPrecondition: the stack runs with other arguments, services or ports.
        Unavailable: a service did not read its settings or come up in time; the message ends
            with its log's last line.
    """
    services, asked = chosen(only), dict(arguments or {})
    found = describe(layout)
    if found is not None and found.get(ELSEWHERE):
        if any(asked.values()) or only or fixed_ports is not None:
            raise FailedPrecondition(f"the services of {layout.home} {_by(found)}: set it there")
        return await _wait_for(layout, found, timeout_s, progress)
    for name in asked:
        if asked[name] and name not in [service.name for service in services]:
            raise InvalidArgument("only", f"has no {name}, which is given arguments", "name it too")
    check_installed(services)
    await asyncio.to_thread(_check_settings, asked)
    layout.make()
    starter: subprocess.Popen[bytes] | None = None
    mine = False  # known before it is started: an interrupt may come while it is
    give_up_s = time.monotonic() + timeout_s
    try:
        while True:
            if starter is None and not layout.supervised():
                mine = True
                starter = _start(
                    layout, asked, fixed_ports is not False, services, bool(tls), bool(tokens)
                )
                mine = starter is not None
            found = describe(layout)
            if found is not None and starter is None:
                _check_same(found, asked, fixed_ports, services, tls, tokens)
            rows = await _rows(layout, found, services)
            _show(rows, progress)
            if all(row.state == "serving" for row in rows):
                return rows
            if found is not None and found.get("refusing"):
                name = found["refusing"][0]
                raise _refusal(name, tail(layout, name, 1), running=starter is None)
            if starter is not None and starter.poll() is not None:
                raise Unavailable(_complaint(layout, rows, "supervisor"))
            ends = found.get("ends", {}) if found is not None and starter is not None else {}
            failing = [row.name for row in rows if ends.get(row.name, 0) >= _MOST_ENDS]
            if failing or time.monotonic() > give_up_s:
                raise Unavailable(_complaint(layout, rows, *failing[:1]))
            await asyncio.sleep(_POLL_S)
    except BaseException:
        if mine:
            await down(layout)
        raise


async def _wait_for(
    layout: Layout, found: Mapping[str, Any], timeout_s: float, progress: Progress | None
) -> list[ServiceStatus]:
    """Services that others run, once all of them serve.

    Raises:
        Unavailable: one does not in time.
    """
    give_up_s = time.monotonic() + timeout_s
    while True:
        rows = await _rows(layout, found)
        _show(rows, progress)
        missing = [f"{row.name} ({row.address})" for row in rows if row.state != "serving"]
        if not missing:
            return rows
        if time.monotonic() > give_up_s:
            raise Unavailable(f"{', '.join(missing)}: not serving; they {_by(found)}: look there")
        await asyncio.sleep(_POLL_S)


def _by(found: Mapping[str, Any]) -> str:
    return f"are run by {found[ELSEWHERE]}"


def _show(rows: list[ServiceStatus], progress: Progress | None) -> None:
    if progress:
        waiting = [row.name for row in rows if row.state != "serving"]
        text = f"waiting for {', '.join(waiting)}" if waiting else ""
        progress("start services", len(rows) - len(waiting), len(rows), text)


async def down(layout: Layout, timeout_s: float = 40.0) -> bool:
    """Stop the stack of this home; whether one was running.

    Raises:
        Unavailable: it was killed and has not ended.
        FailedPrecondition: others run the services.
    """
    ran = layout.supervised()
    found = None if ran else describe(layout)
    if found is not None:
        raise FailedPrecondition(f"the services of {layout.home} {_by(found)}: stop them there")
    for number, patience_s in ((signal.SIGTERM, timeout_s), (signal.SIGKILL, _KILLED_S)):
        give_up_s = time.monotonic() + patience_s
        told = False
        while layout.supervised() and time.monotonic() < give_up_s:
            told = told or _tell(layout, number)
            await asyncio.sleep(_POLL_S)
    if layout.supervised():
        raise Unavailable(f"the supervisor of {layout.home} was killed and has not ended yet")
    layout.description.unlink(missing_ok=True)
    layout.borrowed.unlink(missing_ok=True)
    return ran


def _tell(layout: Layout, number: int) -> bool:
    """Send the supervisor a signal; False while it does not take orders yet."""
    with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
        os.kill(int(layout.lock.read_text()), number)
        return True
    return False


def _check_settings(arguments: Mapping[str, list[str]]) -> None:
    """Have every service that is given arguments read its settings, before anything is started."""
    for name, words in arguments.items():
        if words:
            command = [sys.executable, "-m", f"{name}_svc", "--check", *words]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, check=False, timeout=_CHECK_S
                )
            except subprocess.TimeoutExpired:
                raise Unavailable(
                    f"{shlex.join(command)} did not end in {_CHECK_S:.0f} s"
                ) from None
            if done.returncode == BAD_SETTINGS:
                raise _refusal(name, done.stderr)


def _refusal(name: str, said: str, *, running: bool = False) -> InvalidArgument:
    """What a service said last, `NAME_svc: FIELD: PROBLEM`, as an error."""
    again = "; then `regreen down` and `regreen up`" if running else ""
    last = said.strip().rpartition("\n")[2].removeprefix(f"{name}_svc: ")
    setting, _, problem = last.partition(": ")
    return InvalidArgument(setting, problem, f"mend this setting of the {name} service{again}")


def _check_same(
    found: Mapping[str, Any],
    asked: Mapping[str, list[str]],
    fixed_ports: bool | None,
    services: Sequence[Service],
    tls: bool | None,
    tokens: bool | None,
) -> None:
    remedy = "stop it with `regreen down` first"
    names = [service.name for service in services]
    if names != [item.name for item in SERVICES if item.name in found["endpoints"]]:
        raise FailedPrecondition(f"the stack runs {', '.join(found['endpoints'])} alone; {remedy}")
    for name, words in asked.items():
        running = found.get("arguments", {}).get(name, [])
        if running != words:
            raise FailedPrecondition(
                f"the stack runs its {name} service with {shlex.join(running) or 'no arguments'}, "
                f"not with {shlex.join(words) or 'none'}; {remedy}"
            )
    for what, key, wanted in (("TLS", "tls", tls), ("tokens", "token_file", tokens)):
        runs = bool(found.get(key))
        if wanted is not None and wanted != runs:
            raise FailedPrecondition(f"the stack runs with{'' if runs else 'out'} {what}; {remedy}")
    if fixed_ports is not None and fixed_ports != found.get("fixed_ports", fixed_ports):
        was = "fixed (free ones where those were taken)" if found["fixed_ports"] else "any"
        raise FailedPrecondition(f"the stack was started with ports {was}; {remedy}")


def _start(
    layout: Layout,
    arguments: Mapping[str, list[str]],
    fixed_ports: bool,
    services: Sequence[Service] = SERVICES,
    tls: bool = False,
    tokens: bool = False,
) -> "subprocess.Popen[bytes] | None":
    """Start a supervisor under the lock; None if the lock is taken, be it by one who looks."""
    with layout.open(layout.lock) as lock, layout.open(layout.log("supervisor")) as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        lock.truncate(0)
        layout.description.unlink(missing_ok=True)
        options = {
            "home": str(layout.home.resolve()),
            "arguments": dict(arguments),
            "fixed_ports": fixed_ports,
            "services": [service.name for service in services],
            "tls": tls,
            "tokens": tokens,
            "lock": lock.fileno(),
        }
        return subprocess.Popen(
            [sys.executable, "-m", "regreen.stack.supervisor", json.dumps(options)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=[lock.fileno()],
        )


async def _ask(layout: Layout, found: Mapping[str, Any], service: Service) -> ServiceStatus:
    address = found["endpoints"][service.name]
    state = "down" if service.name in found.get("refusing", ()) else "starting"
    with contextlib.suppress(grpc.aio.AioRpcError, FailedPrecondition):
        async with connect(address, Access.of_stack(found)) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
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


def _complaint(layout: Layout, rows: list[ServiceStatus], name: str = "") -> str:
    """What did not come up, and the last that it, or `name`, has said."""
    missing = [row.name for row in rows if row.state != "serving"]
    name = name or missing[0]
    said = tail(layout, name, 1).strip()
    with contextlib.suppress(json.JSONDecodeError, AttributeError):
        line = json.loads(said)
        said = line.get("problem") or line.get("event") or said
    return (
        f"{', '.join(missing)}: not serving; {name} said last: {said}; more in {layout.log(name)}"
    )


def tail(layout: Layout, name: str, lines: int) -> str:
    """The last lines of a log.

    Raises:
        InvalidArgument: the home cannot be read.
    """
    try:
        with layout.log(name).open(errors="replace") as log:
            return "".join(deque(log, maxlen=lines)).rstrip("\n")
    except FileNotFoundError:
        return "(no log)"
    except OSError as error:
        raise layout.unusable(error) from error

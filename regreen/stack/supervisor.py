"""Runs the local stack: starts the services, restarts what dies, stops everything in order.

- One supervisor per home: it holds a lock that it is born with for as long as it lives.
- Every service dies with the supervisor, whichever way it ends (parent-death signal).
- A service that dies, or cannot be started now, is started again on its ports with growing delay;
  clients retry meanwhile. One that refuses its settings is not: `stack.json` names it instead.
- `stack.json` is written before the services start and removed when the stack is down.
- What a service prints goes to its log file, never to the terminal; a log that grew large makes
  room for a new one.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regreen.rpc.certificates import CA
from regreen.rpc.errors import RegreenError
from regreen.settings import BAD_SETTINGS
from regreen.stack.layout import SERVICES, Layout, Service, tls_words
from regreen.stack.parts import chosen
from regreen.stack.ports import Ports
from regreen.stack.tokens import prepare_tokens

_PR_SET_PDEATHSIG = 1
_STOP_S = 15.0
_LOG_BYTES = 64 << 20
"""A log longer than this becomes `NAME.log.1`."""
_LOGS_S = 30.0
_CERTIFICATES_S = 3600.0
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
"""Defaults of the services: threads that wait must not spin on cores that others need."""
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class _Running:
    service: Service
    argv: list[str]
    process: asyncio.subprocess.Process | None = None
    restarts: int = 0
    started_s: float = field(default_factory=time.monotonic)


class Supervisor:
    """Keeps the services of one home running."""

    def __init__(
        self,
        layout: Layout,
        *,
        arguments: Mapping[str, list[str]] | None = None,
        fixed_ports: bool = True,
        services: Sequence[Service] = SERVICES,
        tls: bool = False,
        tokens: bool = False,
        lock: int | None = None,
    ) -> None:
        """`lock` is a descriptor that holds the layout's lock; process id goes to its file."""
        self._chosen, self._tls, self._tokens = services, tls, tokens
        self._layout = layout
        self._arguments = dict(arguments or {})
        self._fixed_ports, self._ports = fixed_ports, Ports()
        self._services: list[_Running] = []
        self._description: dict[str, Any] = {}
        self._refusing: list[str] = []
        self._ends: dict[str, int] = {}
        self._stop = asyncio.Event()
        self._lock = lock

    async def run(self) -> None:
        """Run the stack until SIGTERM or SIGINT."""
        self._layout.make()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop.set)
        if self._lock is not None:
            os.write(self._lock, f"{os.getpid()}\n".encode())
        try:
            if self._tls:
                from regreen.certs.local import prepare  # only where there is TLS

                prepare(self._layout.certs, [service.name for service in self._chosen])
            if self._tokens:
                prepare_tokens(self._layout)
            self._plan()
            watchers = [asyncio.create_task(self._watch(running)) for running in self._services]
            watchers.append(asyncio.create_task(self._watch_logs()))
            if self._tls:
                watchers.append(asyncio.create_task(self._renew_certificates()))
            await self._stop.wait()
            await self._shut_down(watchers)
        finally:
            self._ports.close()
            self._layout.description.unlink(missing_ok=True)

    def _plan(self) -> None:
        endpoints: dict[str, str] = {}
        metrics: dict[str, str] = {}
        http: dict[str, str] = {}
        for service in self._chosen:
            preferred = (service.port, service.metrics_port, service.http_port)
            wanted = preferred if self._fixed_ports else (0, 0, 0)
            port, metrics_port = self._ports.pick(wanted[0]), self._ports.pick(wanted[1])
            endpoints[service.name] = f"127.0.0.1:{port}"
            metrics[service.name] = f"http://127.0.0.1:{metrics_port}"
            argv = ["--listen", endpoints[service.name], "--metrics", f"127.0.0.1:{metrics_port}"]
            argv += ["--home", str(self._layout.home)]
            if service.http_port:
                http_port = self._ports.pick(wanted[2])
                http[service.name] = f"http://127.0.0.1:{http_port}"
                argv += ["--http", f"127.0.0.1:{http_port}"]
            argv += self._security(service)
            argv += self._arguments.get(service.name, [])
            command = [sys.executable, "-m", service.module, *argv]
            self._services.append(_Running(service, command))
        self._describe(
            pid=os.getpid(),
            arguments=self._arguments,
            fixed_ports=self._fixed_ports,
            endpoints=endpoints,
            metrics=metrics,
            http=http,
            tls=str(self._layout.client_certs) if self._tls else "",
            token_file=str(self._layout.client_token) if self._tokens else "",
        )

    def _security(self, service: Service) -> list[str]:
        """Flags for certificates and tokens."""
        layout, judges = self._layout, service.name == "judge"
        words = tls_words(layout.certs / service.name) if self._tls else []
        if self._tls and judges:
            words += ["--policy-tls-ca", str(layout.certs / service.name / CA)]
        if self._tokens:
            words += ["--tokens", str(layout.tokens), "--audit", str(layout.audit(service.name))]
        if self._tokens and judges:
            words += ["--policy-token-file", str(layout.judge_token)]
        return words

    def _describe(self, **facts: Any) -> None:
        self._description |= facts
        temporary = self._layout.description.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._description, indent=2) + "\n")
        temporary.replace(self._layout.description)

    async def _watch(self, running: _Running) -> None:
        """Keep one service running, unless it refuses its settings."""
        name, code = running.service.name, 0
        while not self._stop.is_set():
            running.started_s = time.monotonic()
            try:
                code = await self._run_once(running)
                ended = f"ended with {code}"
            except OSError as error:  # a full disk, no process left: it may pass
                ended = f"cannot be started ({error})"
            if self._stop.is_set():
                return
            if code == BAD_SETTINGS:
                self._note(name, f"{name} refuses its settings; it is not started again")
                self._refusing.append(name)
                self._describe(refusing=self._refusing)
                return
            lived_s = time.monotonic() - running.started_s
            running.restarts = 0 if lived_s > 60 else running.restarts + 1
            self._ends[name] = running.restarts
            with contextlib.suppress(OSError):  # on a full disk nobody is told
                self._describe(ends=self._ends)
            delay_s = min(0.2 * 2 ** min(running.restarts, 7), 15.0)
            self._note(name, f"{name} {ended}; starting it again in {delay_s:.1f} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), delay_s)

    async def _run_once(self, running: _Running) -> int:
        """Start a service and wait for its end; its exit code."""
        pid_file = self._layout.run / f"{running.service.name}.pid"
        pid_file.unlink(missing_ok=True)
        running.process = await self._spawn(running)
        try:
            pid_file.write_text(f"{running.process.pid}\n")
        except OSError as error:
            self._note(running.service.name, f"cannot write {pid_file}: {error}")
        try:
            return await running.process.wait()
        finally:
            pid_file.unlink(missing_ok=True)

    async def _spawn(self, running: _Running) -> asyncio.subprocess.Process:
        log = os.open(
            self._layout.log(running.service.name),
            os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC,
            0o644,
        )
        parent = os.getpid()

        def die_with_parent() -> None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)

        try:
            # preexec_fn is safe here: the supervisor is single-threaded.
            return await asyncio.create_subprocess_exec(
                *running.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**_ENVIRONMENT, **os.environ, "REGREEN_HOME": str(self._layout.home)},
                preexec_fn=die_with_parent,
                start_new_session=True,
            )
        finally:
            os.close(log)

    async def _shut_down(self, watchers: list[asyncio.Task[None]]) -> None:
        """Stop what uses the database, then the database."""
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)
        last = [running for running in self._services if running.service.name == SERVICES[0].name]
        others = [running for running in self._services if running not in last]
        for together in (others, last):
            await asyncio.gather(*(self._end(running) for running in together))

    async def _end(self, running: _Running) -> None:
        process, name = running.process, running.service.name
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), _STOP_S)
            except TimeoutError:
                self._note(name, f"{name} did not end; killing it")
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    async def _renew_certificates(self) -> None:
        """Renew what is due, long before it ends; services and clients take it up as they run."""
        from regreen.certs.local import renew_due

        while True:
            await asyncio.sleep(_CERTIFICATES_S)
            try:
                renewed = await asyncio.to_thread(renew_due, self._layout.certs)
            except (OSError, RegreenError) as error:
                self._note("supervisor", f"certificates cannot be renewed: {error}")
                continue
            if renewed:
                self._note("supervisor", f"certificates renewed: {', '.join(renewed)}")

    async def _watch_logs(self) -> None:
        while True:
            for name in (*(service.name for service in SERVICES), "supervisor"):
                await asyncio.to_thread(_make_room, self._layout.log(name))
            await asyncio.sleep(_LOGS_S)

    def _note(self, name: str, text: str) -> None:
        line = json.dumps({"event": text, "service": name, "time": time.time()})
        try:
            with self._layout.log("supervisor").open("a") as log:
                log.write(line + "\n")
        except OSError:
            sys.stderr.write(line + "\n")


def _make_room(log: Path) -> None:
    """Keep one former log; whoever appends to this one goes on at its new beginning."""
    with contextlib.suppress(OSError):
        if log.stat().st_size > _LOG_BYTES:
            with contextlib.suppress(OSError):  # on a full disk room matters more
                shutil.copyfile(log, log.with_suffix(".log.1"))
            os.truncate(log, 0)


def main() -> None:
    """Run the stack described by JSON on the command line; used by `regreen up`."""
    options = json.loads(sys.argv[1])
    supervisor = Supervisor(
        Layout(Path(options["home"])),
        arguments=options.get("arguments", {}),
        fixed_ports=options.get("fixed_ports", True),
        services=chosen(options.get("services", ())),
        tls=options.get("tls", False),
        tokens=options.get("tokens", False),
        lock=options.get("lock"),
    )
    asyncio.run(supervisor.run())


if __name__ == "__main__":
    main()

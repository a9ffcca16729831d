"""All processes of a training run, each of which may be killed: started, found, kept running.

- A process that was killed is started again at once, as it was; one that ends unasked is a fault.
- Ranks of the learner, the engine of the policy, spawners and first processes of sandboxes are
  found by their parents; whoever started them is to replace them.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.load import processes
from tests.load.postgres import Postgres

SERVICES = ("dataset", "sandbox", "policy", "judge", "learner")
KINDS = (*SERVICES, "driver", "postgres", "rank", "engine", "spawner", "first process")
_LOOK_S = 0.05
_MOST_UNASKED = 5
_TAIL = 1500


class Party:
    """The services of one run, its driver and Postgres."""

    def __init__(
        self,
        home: Path,
        postgres: Postgres,
        flags: Mapping[str, Sequence[str]],
        job: Path,
        driver: str = "tests.load.train_driver",
    ) -> None:
        """`flags` are those of each service that is run; `job` is the driver's, a module."""
        self.home, self.postgres = home, postgres
        home.mkdir(exist_ok=True)
        self.endpoints = {name: f"unix:{home}/{name}.sock" for name in flags}
        self._commands = {name: self._service(name, given) for name, given in flags.items()}
        self._commands["driver"] = [sys.executable, "-m", driver, str(job)]
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._asked: set[int] = set()
        self.done = asyncio.Event()
        """The driver has come to its end."""
        self.faults: list[str] = []

    def _service(self, name: str, flags: Sequence[str]) -> list[str]:
        command = [sys.executable, "-m", f"{name}_svc", f"--listen={self.endpoints[name]}"]
        command += ["--metrics=127.0.0.1:0", "--log-level=warning"]
        return [*command, *([] if "--home" in flags else ["--home", str(self.home)]), *flags]

    def start(self, *names: str) -> None:
        """Start these, or all."""
        for name in names or self._commands:
            with self.log(name).open("ab") as log:
                self._running[name] = subprocess.Popen(
                    self._commands[name],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )

    def log(self, name: str) -> Path:
        """What a process has said."""
        return self.home / f"{name}.log"

    def stop(self) -> None:
        """End all but Postgres, the driver first; safe to call twice."""
        for name in ("driver", *SERVICES[::-1]):
            process = self._running.pop(name, None)
            if process is None:
                continue
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    async def keep(self) -> None:
        """Start again what was killed, until the driver is done."""
        unasked = 0
        while not self.done.is_set():
            if not self.postgres.pid:
                with contextlib.suppress(RuntimeError):  # its old processes are not gone yet
                    await asyncio.to_thread(self.postgres.start)
            for name, process in list(self._running.items()):
                code = process.poll()
                if code is None:
                    continue
                if name == "driver" and code == 0:
                    self.done.set()
                    return
                if process.pid not in self._asked:
                    unasked += 1
                    tail = self.log(name).read_text("utf-8", "replace")[-_TAIL:]
                    self.faults.append(f"{name} ended by itself with {code}: {tail}")
                    if unasked >= _MOST_UNASKED:
                        self.done.set()
                        return
                self.start(name)
            await asyncio.sleep(_LOOK_S)

    def found(self, kind: str) -> list[int]:
        """Process ids of a kind that live now."""
        if kind == "postgres":
            return [pid] if (pid := self.postgres.pid) else []
        if kind == "rank":
            return self._children("learner", "learner_svc.worker")
        if kind == "engine":
            return self._children("policy", "policy_svc.engines")
        if kind == "spawner":
            return self._children("sandbox", "")
        if kind == "first process":
            return [
                first for one in self._children("sandbox", "") for first in processes.children(one)
            ]
        process = self._running.get(kind)
        return [process.pid] if process is not None and process.poll() is None else []

    def _children(self, name: str, word: str) -> list[int]:
        own = self.found(name)
        return [
            child for pid in own for child in processes.children(pid) if word in _arguments(child)
        ]

    def kill(self, kind: str, pid: int) -> bool:
        """`kill -9`; False if it has just ended."""
        self._asked.add(pid)
        orphans = processes.children(pid) if kind == "postgres" else []
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        for orphan in orphans:  # as after the loss of a host: no process of the server goes on
            with contextlib.suppress(ProcessLookupError):
                os.kill(orphan, signal.SIGKILL)
        return True


def _arguments(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text("utf-8", "replace").replace("\0", " ")
    except OSError:
        return ""

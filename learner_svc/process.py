"""The service's handle on a run's worker processes.

- One command at a time; a second waits for the first, within its own deadline.
- A worker that died answers every call with an `InfraError` that says how it ended.
- Start-up has a deadline: a worker that hangs is killed, and the end of its log is in the error.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from learner_svc import launch
from learner_svc.launch import Call
from learner_svc.record import replace_text
from learner_svc.wire import MAX_FRAME_BYTES, encode, error_from_json
from regreen.rpc.errors import InfraError, RegreenError

Progress = Callable[[int, int], None]


class WorkerProcess:
    """The ranks of one run on this machine, and the call to those of others."""

    def __init__(self, log: Path, calls: Path) -> None:
        self._log, self._calls = log, calls
        self._call: Call | None = None
        self._processes: list[asyncio.subprocess.Process] = []
        self._lock = asyncio.Lock()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    @property
    def pids(self) -> list[int]:
        """Process ids, rank 0 first."""
        return [process.pid for process in self._processes]

    @property
    def alive(self) -> bool:
        """Whether rank 0 runs."""
        return bool(self._processes) and self._processes[0].returncode is None

    async def spawn(self, processes: int, *, nodes: int = 1, address: str = "127.0.0.1") -> None:
        """Start the ranks of this machine; call those of the others, if there are any."""
        self._call = call = Call.make(address, _free_port(), processes, nodes)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        if nodes > 1:
            replace_text(self._calls, call.to_json())
        ours, theirs = socket.socketpair()
        with self._log.open("ab") as log, theirs:
            for rank in call.ranks(0):
                fd = theirs.fileno() if rank == 0 else None
                self._processes.append(
                    await asyncio.create_subprocess_exec(
                        *launch.command(fd, os.getpid()),
                        env=launch.environment(os.environ, call, rank),
                        stdin=asyncio.subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        pass_fds=[] if fd is None else [fd],
                    )
                )
        self._reader, self._writer = await asyncio.open_connection(sock=ours)

    async def call(
        self,
        message: dict[str, Any],
        *,
        timeout_s: float,
        progress: Progress = lambda done, total: None,
    ) -> dict[str, Any]:
        """Send a command and wait for its answer.

        Raises:
            RegreenError: what the worker answered.
            InfraError: the worker died, or `timeout_s` passed (it is then killed).
        """
        try:
            async with asyncio.timeout(timeout_s), self._lock:
                return await self._exchange(message, progress)
        except TimeoutError:
            await self.kill()
            raise InfraError(
                f"the worker did not finish {message['op']} within {timeout_s:g} s and was "
                f"ended; its log ends: {self._tail()}"
            ) from None

    async def _exchange(self, message: dict[str, Any], progress: Progress) -> dict[str, Any]:
        if self._reader is None or self._writer is None:
            raise InfraError("the worker was not started")
        try:
            self._writer.write(encode(message))
            await self._writer.drain()
            while True:
                answer = await self._receive(self._reader)
                if "progress" in answer:
                    progress(*answer["progress"])
                    continue
                if "error" in answer:
                    raise error_from_json(answer["error"])
                ok: dict[str, Any] = answer["ok"]
                return ok
        except (OSError, asyncio.IncompleteReadError):
            raise await self._died() from None

    async def _receive(self, reader: asyncio.StreamReader) -> dict[str, Any]:
        size = int.from_bytes(await reader.readexactly(4), "big")
        if size > MAX_FRAME_BYTES:
            raise InfraError(f"the worker sent a frame of {size} bytes")
        answer: dict[str, Any] = json.loads(await reader.readexactly(size))
        return answer

    async def _died(self) -> RegreenError:
        code = await self._processes[0].wait()
        await self.kill()
        how = f"exited with {code}"
        if code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += " (out of memory, if nobody sent it)"
        return InfraError(f"the worker {how}; its log ends: {self._tail()}", retry_after_s=1.0)

    def _tail(self, size_bytes: int = 600) -> str:
        try:
            text = self._log.read_bytes()[-size_bytes:].decode(errors="replace")
        except OSError:
            return ""
        return text.strip()

    async def kill(self) -> None:
        """End every rank at once and reap it; those of other machines end with the call."""
        for process in self._processes:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        for process in self._processes:
            await process.wait()
        with contextlib.suppress(OSError):  # the volume is away; the next call ends those ranks
            if self._call is not None and Call.read(self._calls) == self._call:
                self._calls.unlink(missing_ok=True)
        if self._writer is not None:
            self._writer.close()

    async def stop(self, grace_s: float = 20.0) -> None:
        """Ask the worker to end, then end it."""
        if self.alive:
            with contextlib.suppress(RegreenError):
                await self.call({"op": "stop"}, timeout_s=grace_s)
        await self.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

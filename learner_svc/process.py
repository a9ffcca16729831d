"""The service's handle on a run's worker processes.

- One command at a time; a second waits for the first, within its own deadline.
- The ranks of a run live and die together: when one is lost, of whatever machine, all are ended,
  and every call answers with an `InfraError` that says which one was lost and how.
- Start-up has a deadline: a worker that hangs is killed, and the end of its log is in the error.
"""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from learner_svc import launch
from learner_svc.launch import Call
from learner_svc.link import Machines, listener
from learner_svc.record import replace_text
from learner_svc.wire import MAX_FRAME_BYTES, encode, error_from_json
from regreen.rpc.errors import InfraError, RegreenError

Progress = Callable[[int, int], None]
_CUT = (OSError, asyncio.IncompleteReadError)
_SETTLE_S = 1.0
"""Time in which the rank that others died of is heard of, on whatever machine it was."""


class MachineAway(InfraError):
    """A machine did not answer the call; waiting for it was the try."""


class WorkerProcess:
    """The ranks of one run on this machine, and the call to those of others."""

    def __init__(self, log: Path, calls: Path) -> None:
        self._log, self._calls = log, calls
        self._call: Call | None = None
        self._machines: Machines | None = None
        self._processes: list[asyncio.subprocess.Process] = []
        self._watches: list[asyncio.Task[None]] = []
        self._lock = asyncio.Lock()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._ended = False
        self._codes: dict[int, int] = {}
        self._loss: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def pids(self) -> list[int]:
        """Process ids, rank 0 first."""
        return [process.pid for process in self._processes]

    @property
    def alive(self) -> bool:
        """Whether its ranks run, all of them as far as is known."""
        return bool(self._processes) and not (self._ended or self._codes or self._loss.done())

    async def spawn(
        self,
        processes: int,
        *,
        nodes: int = 1,
        address: str = "127.0.0.1",
        silence_s: float = 30.0,
        timeout_s: float = 600.0,
    ) -> None:
        """Start the ranks of this machine, once those of the others were called and are there.

        Raises:
            MachineAway: a machine did not answer within `timeout_s`.
            InfraError: ended meanwhile.
        """
        self._log.parent.mkdir(parents=True, exist_ok=True)
        if nodes > 1:
            await self._gather(processes, nodes, address, silence_s, timeout_s)
        else:
            self._call = Call.make(address, _free_port(), processes, nodes)
        if not self._ended:
            await self._start_ranks()
        if self._ended:
            await self.kill()
            raise InfraError("the run was ended while its ranks were started")

    async def _gather(
        self, processes: int, nodes: int, address: str, silence_s: float, timeout_s: float
    ) -> None:
        sock = listener()
        link: int = sock.getsockname()[1]
        self._call = call = Call.make(
            address, _free_port(), processes, nodes, link=link, silence_s=silence_s
        )
        self._machines = machines = Machines(call, sock, self._lose)
        replace_text(self._calls, call.to_json())
        gathering = asyncio.create_task(machines.gather())
        try:
            await _first(gathering, self._loss, timeout_s=timeout_s)
            missing = machines.missing
            if gathering.done():
                gathering.result()
        finally:
            gathering.cancel()
        if missing and not self._ended:
            await self.kill()
            names = ", ".join(str(node) for node in missing)
            raise MachineAway(
                f"machine {names} of {nodes} did not answer within {timeout_s:g} s; see that "
                f"learner_svc.node --follower {missing[0] - 1} runs there, in the same home, and "
                f"reaches {address}:{link}"
            )

    async def _start_ranks(self) -> None:
        assert self._call is not None
        ours, theirs = socket.socketpair()
        with self._log.open("ab") as log, theirs:
            for rank in self._call.ranks(0):
                fd = theirs.fileno() if rank == 0 else None
                process = await asyncio.create_subprocess_exec(
                    *launch.command(fd, os.getpid()),
                    env=launch.environment(os.environ, self._call, rank),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[] if fd is None else [fd],
                )
                self._processes.append(process)
                self._watches.append(asyncio.create_task(self._watch(rank, process)))
        self._reader, self._writer = await asyncio.open_connection(sock=ours)

    async def _watch(self, rank: int, process: asyncio.subprocess.Process) -> None:
        """Note a rank that ends unasked, and, when all is known, that the ranks are lost."""
        code = await process.wait()
        if self._ended:
            return
        self._codes[rank] = code
        if code >= 0:
            await asyncio.sleep(_SETTLE_S)
        self._lose(launch.how_ended(self._codes))

    def _lose(self, why: str) -> None:
        """The first word counts."""
        if not self._ended and not self._loss.done():
            self._loss.set_result(why)

    async def lost(self) -> str:
        """Wait until a rank or a machine is lost; what was lost. Cancelled by `kill`."""
        return await asyncio.shield(self._loss)

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
                return await self._answered(message, progress)
        except TimeoutError:
            await self.kill()
            raise InfraError(
                f"the worker did not finish {message['op']} within {timeout_s:g} s and was "
                f"ended; its log ends: {self._tail()}"
            ) from None

    async def _answered(self, message: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """The answer of rank 0, unless ranks are lost before it comes."""
        exchange = asyncio.create_task(self._exchange(message, progress))
        try:
            await _first(exchange, self._loss)
            if exchange.done() and not isinstance(exchange.exception(), _CUT):
                return exchange.result()
            raise await self._died()
        finally:
            exchange.cancel()

    async def _exchange(self, message: dict[str, Any], progress: Progress) -> dict[str, Any]:
        if self._reader is None or self._writer is None:
            raise InfraError("the worker was not started")
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

    async def _receive(self, reader: asyncio.StreamReader) -> dict[str, Any]:
        size = int.from_bytes(await reader.readexactly(4), "big")
        if size > MAX_FRAME_BYTES:
            raise InfraError(f"the worker sent a frame of {size} bytes")
        answer: dict[str, Any] = json.loads(await reader.readexactly(size))
        return answer

    async def _died(self) -> RegreenError:
        """Wait for what is known of the loss, and end what is left."""
        await asyncio.wait({self._loss})
        why = "it was ended" if self._loss.cancelled() else self._loss.result()
        await self.kill()
        return InfraError(
            f"the run lost ranks: {why}; its log ends: {self._tail()}", retry_after_s=1.0
        )

    def _tail(self, size_bytes: int = 600) -> str:
        try:
            text = self._log.read_bytes()[-size_bytes:].decode(errors="replace")
        except OSError:
            return ""
        return text.strip()

    async def kill(self) -> None:
        """End every rank at once and reap it; those of other machines end with the call."""
        self._ended = True
        with contextlib.suppress(OSError):  # the volume is away; the next call ends those ranks
            if self._call is not None and Call.read(self._calls) == self._call:
                self._calls.unlink(missing_ok=True)
        if self._machines is not None:
            self._machines.close()
        for process in self._processes:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        for process in self._processes:
            await process.wait()
        self._loss.cancel()
        if self._writer is not None:
            self._writer.close()

    async def stop(self, grace_s: float = 20.0) -> None:
        """Ask the worker to end, then end it."""
        if self.alive:
            with contextlib.suppress(RegreenError):
                await self.call({"op": "stop"}, timeout_s=grace_s)
        await self.kill()


async def _first(*events: asyncio.Future[Any], timeout_s: float | None = None) -> None:
    """Wait for one of several, or not longer than so."""
    await asyncio.wait(events, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

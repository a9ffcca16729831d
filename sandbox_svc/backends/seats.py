"""The spawner process and its seats: first processes that wait for a sandbox to become.

- Joining control groups and making namespaces takes most of a sandbox's start (the kernel waits
  for grace periods); seats do it ahead of time, so that a fork takes a few milliseconds.
- A seat is used once. It has no file system of a sandbox yet and has run no code of one.
- Each seat has a control group, made with the usual limits (whoever takes it for others sets
  those), and directories for an upper, both of its name. A seat that is not made, for whatever
  reason, leaves neither, and no descriptor.
- Groups and directories that a sandbox with the usual limits has left as new (`spawner/clear.c`)
  are kept for seats to come, a few of them.
- A spawner that was killed is started again; its sandboxes have died with it and say so.
"""

import asyncio
import contextlib
import os
import secrets
import select
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from regreen.rpc.errors import InfraError, RegreenError, SandboxLost
from sandbox_svc.backends import cgroups, seccomp, wire
from sandbox_svc.backends.base import Limits
from sandbox_svc.backends.cgroups import CgroupV1, CgroupV2, NoCgroup
from sandbox_svc.backends.fds import exhausted, writing
from sandbox_svc.backends.link import Link, LinkClosed, close_all

log = structlog.get_logger(__name__)

_END_S, _REPLY_S = 10.0, 60.0
AT_ONCE = 32
"""Names that the spawner is asked to clear at a time: meanwhile nobody gets a seat."""
_KEPT = 64
Spawner = subprocess.Popen[bytes]


class Part(StrEnum):
    """What of a seat that has ended is to go; by the letter that `spawner/clear.c` knows."""

    UPPER = "d"
    GROUP = "g"
    BOTH = "b"
    USUAL = "k"
    """Both, or neither where they are as new."""


class Left(NamedTuple):
    """What a seat has left."""

    name: str
    part: Part
    network: int = -1
    """A descriptor of its network namespace."""


class _Kept(NamedTuple):
    name: str
    network: int


@dataclass(frozen=True, slots=True)
class Seat:
    """A first process that has settled in its namespaces and control group."""

    name: str
    """Of its control group, and of its directories."""
    limits: Limits
    """What its control group was made with."""
    pid: int
    pidfd: int
    sock: socket.socket
    spawner: Link
    """To the spawner that made it, with which it ends."""

    @property
    def alive(self) -> bool:
        """Whether the process still waits."""
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        return not poller.poll(0)


class Seats:
    """Owns the spawner; hands out seats and keeps a few warm."""

    def __init__(
        self,
        cgroups: CgroupV1 | CgroupV2 | NoCgroup,
        limits: Limits,
        *,
        warm: int,
        clear: Callable[[str], None],
    ) -> None:
        """`clear` removes, blocking, what a seat of a name has left."""
        self._cgroups, self._limits, self._wanted, self._clear = cgroups, limits, warm, clear
        self._process: Spawner | None = None
        self._link: Link | None = None
        self._warm: deque[Seat] = deque()
        self._kept: list[_Kept] = []
        self._refill: asyncio.Task[None] | None = None
        self._home = Path()
        self._host_id: int | None = None
        self._program = Path()
        self._closing = False
        self._undoing: set[asyncio.Task[None]] = set()

    def start(self, home: Path, host_id: int | None, program: Path) -> None:
        """Start the spawner."""
        self._home, self._host_id, self._program = home, host_id, program
        self._begin()

    def _begin(self) -> None:
        """Start a spawner; a dead predecessor's seats and sandboxes have ended with it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        with writing("the spawner"), contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(ours.close)
            undo.callback(theirs.close)
            rules = wire.memfd(seccomp.deny_list())
            undo.pop_all()
        try:
            with writing("the spawner"), theirs:
                self._process = subprocess.Popen(
                    ["regreen-spawner", str(theirs.fileno())],
                    executable=self._program,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env={},
                    start_new_session=True,
                )
            host_id = -1 if self._host_id is None else self._host_id
            wire.send(ours, [str(self._home), host_id], (rules,))
        except RegreenError:
            ours.close()
            raise
        except OSError as error:
            ours.close()
            raise InfraError(
                f"the spawner cannot be started: {error}; start the service anew"
            ) from error
        finally:
            os.close(rules)
        self._link = Link(ours)

    @property
    def spawner(self) -> int:
        """Process id of the spawner; 0 when there is none."""
        return self._process.pid if self._process is not None else 0

    @property
    def warm(self) -> Sequence[Seat]:
        """Seats that wait to be taken."""
        return tuple(self._warm)

    @property
    def kept(self) -> Sequence[str]:
        """Names of groups and directories that wait for a seat."""
        return tuple(kept.name for kept in self._kept)

    async def take(self) -> Seat:
        """A seat: a warm one, or a new one when there is none."""
        seat = None
        while self._warm and seat is None:
            seat = self._warm.popleft()
            if self._link is None or self._link.closed or not seat.alive:
                self._in_background(self._discard(seat))
                seat = None
        self._refill_later()
        return seat or await self._make()

    async def _make(self) -> Seat:
        if self._link is None or self._closing:
            raise InfraError("the runtime is not running")
        if self._link.closed:
            self._begin()
        kept = bool(self._kept)
        name, network = self._kept.pop() if kept else (secrets.token_hex(6), -1)
        plan = self._cgroups.plan(name, self._limits, kept=kept)
        request = [name, int(kept), *wire.counted(plan.directories)]
        request += cgroups.fields(plan.writes)
        process = self._process
        making = asyncio.create_task(self._settled(self._link, name, request, network))
        try:
            async with asyncio.timeout(_REPLY_S):
                return await asyncio.shield(making)
        except asyncio.CancelledError:
            self._in_background(self._unmake(making, process, name))
            raise
        except TimeoutError as error:
            self._in_background(self._unmake(making, process, name))
            raise InfraError("the spawner does not answer") from error
        except RegreenError:
            self._in_background(self._undo(process, name))
            raise

    async def _settled(
        self, link: Link, name: str, request: Sequence[wire.Field], network: int
    ) -> Seat:
        given = (network,) if network >= 0 else ()
        try:
            reply, fds = await link.request("seat", *request, fds=given, timeout_s=None)
        except LinkClosed as error:
            raise SandboxLost("the spawner has ended") from error
        finally:
            close_all(given)
        if len(fds) != 2:
            close_all(fds)
            if "pid" in reply:  # it ends as its socket does
                await asyncio.to_thread(_wait_without_descriptor, int(reply["pid"]))
            if "error" in reply:
                raise InfraError(f"the spawner refused: {reply['error']}")
            self._give_networks_up()
            raise exhausted("the sandbox")
        sock = socket.socket(fileno=fds[0])
        return Seat(name, self._limits, int(reply["pid"]), fds[1], sock, link)

    def _give_networks_up(self) -> None:
        """Close the descriptors that are kept; names without one are as good."""
        kept, self._kept = self._kept, [_Kept(name, -1) for name, _ in self._kept]
        close_all(network for _, network in kept if network >= 0)

    async def _unmake(
        self, making: "asyncio.Task[Seat]", process: Spawner | None, name: str
    ) -> None:
        """End a seat that nobody waits for any more, as soon as it is there."""
        try:
            seat = await making
        except RegreenError:
            await self._undo(process, name)
        else:
            await self._discard(seat)

    async def _undo(self, process: Spawner | None, name: str) -> None:
        """Remove what a seat has that is on its way or dead; it dies with its spawner."""

        def undo() -> None:
            if process is not None and self._link is not None and self._link.closed:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_END_S)
            self._clear(name)

        await asyncio.to_thread(undo)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        def ended(task: "asyncio.Task[None]") -> None:
            self._undoing.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                log.warning("a seat was not cleared; the next start does it", error=str(error))

        task = asyncio.create_task(work)
        self._undoing.add(task)
        task.add_done_callback(ended)

    def _refill_later(self) -> None:
        busy = self._refill is not None and not self._refill.done()
        if not busy and not self._closing and len(self._warm) < self._wanted:
            self._refill = asyncio.create_task(self._fill())

    async def _fill(self) -> None:
        with contextlib.suppress(RegreenError):
            while len(self._warm) < self._wanted and not self._closing:
                self._warm.append(await self._make())

    async def leave(self, seat: Seat) -> None:
        """Kill a seat's process and wait until the kernel has ended everything below it."""
        try:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(seat.pidfd, signal.SIGKILL)
            await _readable(seat.pidfd, _END_S)
        finally:
            os.close(seat.pidfd)

    def give_up(self, seat: Seat) -> None:
        """End a seat that nobody took, in the background."""
        self._in_background(self._discard(seat))

    async def ended_itself(self, seat: Seat) -> bool:
        """Whether a seat's process has come to an end of its own: by no kill from outside, which
        nobody in a sandbox is, and not with its spawner. False where that is not known."""
        try:
            await _readable(seat.pidfd, _END_S)
            reply, _ = await seat.spawner.request("end", seat.pid)
        except (LinkClosed, TimeoutError, InfraError):
            return False
        return reply.get("killed") is False

    async def cleared(self, left: Sequence[Left]) -> Sequence[Left]:
        """Let the spawner remove what seats have left, or keep it; what it could not remove.

        At most `AT_ONCE`.
        """
        kept: Sequence[Left] = ()
        try:
            for_good, kept = await self._cleared(left)
            if self._closing:  # meanwhile, perhaps
                for_good, kept = (*for_good, *kept), ()
        finally:
            self._kept += [_Kept(each.name, each.network) for each in kept]
            gone = {each.network for each in left} - {each.network for each in kept}
            close_all(gone - {-1})
        return for_good

    async def _cleared(self, left: Sequence[Left]) -> tuple[Sequence[Left], Sequence[Left]]:
        """What the spawner could not remove, and what it kept."""
        if self._link is None:
            return left, ()
        room = _KEPT - len(self._kept) >= len(left) and not self._closing
        parts = [Part.BOTH if e.part is Part.USUAL and not room else e.part for e in left]
        entries = [f"{part}{each.name}" for each, part in zip(left, parts, strict=True)]
        signs = self._cgroups.signs
        request: list[wire.Field] = [*wire.counted(self._cgroups.places), len(signs)]
        request += [field for sign in signs for field in sign]
        try:
            reply, _ = await self._link.request("clear", *request, *wire.counted(entries))
        except (LinkClosed, TimeoutError):
            return left, ()
        return [left[n] for n in reply["left"]], [left[n] for n in reply["kept"]]

    async def _discard(self, seat: Seat) -> None:
        try:
            await self.leave(seat)
        finally:
            seat.sock.close()
            await asyncio.to_thread(self._clear, seat.name)

    async def close(self) -> None:
        """End the warm seats and the spawner."""
        self._closing = True
        if self._refill is not None:
            await asyncio.gather(self._refill, return_exceptions=True)
        while self._warm:
            await self._discard(self._warm.popleft())
        while self._kept:
            name, network = self._kept.pop()
            close_all([network] if network >= 0 else [])
            await asyncio.to_thread(self._clear, name)
        if self._link is not None:
            self._link.close()
        await asyncio.gather(*self._undoing, return_exceptions=True)
        process, self._process = self._process, None
        if process is None:
            return
        try:
            await asyncio.to_thread(process.wait, _END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait, _END_S)


def _wait_without_descriptor(pid: int) -> None:
    """Wait until a process that cannot be held by a descriptor, for want of one, has ended."""
    until_s = time.monotonic() + _END_S
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < until_s:
        time.sleep(0.01)


async def _readable(fd: int, timeout_s: float) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, lambda: None if future.done() else future.set_result(None))
    try:
        async with asyncio.timeout(timeout_s):
            await future
    except TimeoutError as error:
        raise InfraError("a sandbox did not end within its time") from error
    finally:
        loop.remove_reader(fd)

"""The link between the service's machine and each further one: who is there, and who was lost.

- Lines of JSON over TCP, a beat a second from both sides. Whoever hears nothing for `silence_s`
  takes the other for lost, so that a network or a machine that is gone ends a run in bounded time:
  the ranks themselves would wait for each other much longer.
- A machine that shows the id of the call, which only the home tells, is let in once; ranks start
  when all of them are there. A link that ends ends the call.
- Ranks do not speak over it: they may be busy for minutes, their machine never is.
"""

import asyncio
import contextlib
import json
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from learner_svc.launch import Call

BEAT_S = 1.0
_CONNECT_S = 5.0
_LINE_BYTES = 4096
_GO = "go"
_LOST = "lost"


def listener() -> socket.socket:
    """A socket at which other machines may answer, on a port of the kernel's choice."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


class Machines:
    """The further machines of a call, as the service sees them."""

    def __init__(self, call: Call, sock: socket.socket, lost: Callable[[str], None]) -> None:
        self._call, self._sock, self._tell = call, sock, lost
        self._links: dict[int, asyncio.StreamWriter] = {}
        self._changed = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._beats: asyncio.Task[None] | None = None
        self._gone = False

    @property
    def missing(self) -> list[int]:
        """Machines that have not answered; 1 is the first of the further ones."""
        return [node for node in range(1, self._call.nodes) if node not in self._links]

    async def gather(self) -> None:
        """Wait until every machine is there, then let them start their ranks."""
        self._server = await asyncio.start_server(self._meet, sock=self._sock, limit=_LINE_BYTES)
        self._beats = asyncio.create_task(self._beat())
        while self.missing:
            self._changed.clear()
            await self._changed.wait()
        self._gone = True
        for writer in self._links.values():
            writer.write(_line({_GO: True}))

    def close(self) -> None:
        """End the call: every machine ends its ranks."""
        if self._beats is not None:
            self._beats.cancel()
        if self._server is not None:
            self._server.close()
        self._sock.close()
        for writer in self._links.values():
            writer.close()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_beat_s(self._call))
            for writer in [*self._links.values()]:
                writer.write(_line({}))

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One machine, from its answer to its end."""
        node = 0
        try:
            hello = await self._hear(reader)
            if not self._admits(hello):
                return
            node = hello["node"]
            self._links[node] = writer
            self._changed.set()
            why = await self._listen(reader, node)
        except TimeoutError:
            why = f"machine {node} has not been heard of for {self._call.silence_s:g} s"
        except (OSError, asyncio.IncompleteReadError):
            why = f"machine {node} closed its link: its learner_svc.node has ended"
        except ValueError as error:
            why = f"machine {node} said what no learner_svc.node says ({error})"
        finally:
            writer.close()
        if node and self._links.get(node) is writer:
            del self._links[node]  # before all are there it may come again
            if self._gone:
                self._tell(why)

    def _admits(self, hello: Mapping[str, Any]) -> bool:
        shown = str(hello.get("call")).encode("utf-8", "surrogatepass")
        known = secrets.compare_digest(shown, self._call.id.encode())
        node = hello.get("node")
        return known and type(node) is int and node in self.missing and not self._gone

    async def _listen(self, reader: asyncio.StreamReader, node: int) -> str:
        while True:
            said = await self._hear(reader)
            if _LOST in said:
                return f"machine {node}: {str(said[_LOST])[:500]}"

    async def _hear(self, reader: asyncio.StreamReader) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self._call.silence_s):
                return _said(await reader.readuntil(b"\n"))
        except asyncio.LimitOverrunError as error:
            raise ValueError("a line without an end") from error


class LinkEnded(Exception):
    """The service's machine ended the call, or cannot be heard any more."""


class Link:
    """A further machine's end; it never blocks once it is open."""

    def __init__(self, call: Call, node: int) -> None:
        """Answer a call.

        Raises:
            OSError: the service's machine cannot be reached.
        """
        self._call = call
        self._sock = socket.create_connection((call.address, call.link), timeout=_CONNECT_S)
        self._sock.sendall(_line({"call": call.id, "node": node}))
        self._sock.setblocking(False)
        self._heard_s = self._sent_s = time.monotonic()
        self._rest = b""

    def exchange(self) -> bool:
        """Give a sign of life and take what was said; whether the ranks are to start.

        Raises:
            LinkEnded: the call is over, or the other side is silent.
        """
        now_s = time.monotonic()
        if now_s - self._sent_s >= _beat_s(self._call):
            self._sent_s = now_s
            self._say({})
        try:
            while more := self._sock.recv(_LINE_BYTES):
                self._rest += more
                self._heard_s = now_s
            raise LinkEnded("the learner ended the call")
        except BlockingIOError:
            pass
        except OSError as error:
            raise LinkEnded(str(error)) from error
        if now_s - self._heard_s > self._call.silence_s:
            raise LinkEnded(f"the learner has not been heard of for {self._call.silence_s:g} s")
        *lines, self._rest = self._rest.split(b"\n")
        with contextlib.suppress(ValueError):
            if len(self._rest) <= _LINE_BYTES:
                return any(_GO in _said(line) for line in lines)
        raise LinkEnded("what answers is no learner")

    def lost(self, why: str) -> None:
        """Say that ranks of this machine have ended."""
        with contextlib.suppress(LinkEnded):
            self._say({_LOST: why})

    def _say(self, message: Mapping[str, Any]) -> None:
        try:
            self._sock.sendall(_line(message))
        except OSError as error:  # a full buffer too: nobody reads
            raise LinkEnded(str(error)) from error

    def close(self) -> None:
        """Leave the call."""
        self._sock.close()


def _beat_s(call: Call) -> float:
    return min(BEAT_S, call.silence_s / 5)


def _said(line: bytes) -> dict[str, Any]:
    """What a line says.

    Raises:
        ValueError: it is none of this link's.
    """
    try:
        said = json.loads(line)
    except RecursionError as error:
        raise ValueError("not a line of JSON") from error
    if not isinstance(said, dict):
        raise ValueError("not an object")
    return said


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"

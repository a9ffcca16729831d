"""A pipe into which one command in a container may write, apart from what it prints.

- It has a name for a moment, in a directory that nobody can list, and one reader: root's.
- The reader tells its process number before the command starts; whatever still holds the pipe
  when the command has ended, the reader ends with it.
"""

import asyncio
import contextlib
import secrets
from typing import TYPE_CHECKING

from regreen.rpc.errors import InfraError
from sandbox_svc.backends.docker_exec import HELPER_PATH, ROOT, Exec, Wish, within
from sandbox_svc.backends.output import Collector

if TYPE_CHECKING:
    from sandbox_svc.backends.docker_box import DockerBox

_READ = (
    "mkdir -p -m 711 /run/regreen && mkfifo -m 622 $1 && echo $$ >&2 && exec 3<$1 && rm $1 "
    "&& exec cat <&3"
)
_READY_S = 30.0
_FINISH_S = 1.0


class Channel:
    """The result pipe of one command."""

    def __init__(self, box: "DockerBox", limit_bytes: int) -> None:
        self.path = f"/run/regreen/{secrets.token_hex(8)}"
        self._box = box
        self._out = Collector(limit_bytes, head_only=True)
        self._said = b""
        self._ready = asyncio.Event()
        argv = ("/bin/sh", "-c", _READ, "-", self.path)
        self._exec = Exec(box.engine, Wish(argv, ROOT, {"PATH": HELPER_PATH}), self._feed)

    def _feed(self, name: str, data: bytes) -> None:
        if name == "stdout":
            self._out.feed(data)
            return
        self._said = (self._said + data)[:1024]
        if b"\n" in self._said:
            self._ready.set()

    async def open(self) -> None:
        """Make the pipe and its reader.

        Raises:
            InfraError: it could not be made.
        """
        await self._exec.open(self._box.container, lambda _: self.close())
        await within(self._ready, _READY_S)
        if not self._said.strip().isdigit():
            await self.close()
            told = self._said.decode("utf-8", "replace")
            raise InfraError(f"cannot make a result channel: {told}")

    async def finish(self) -> bytes:
        """What was written until now."""
        await within(self._exec.drained, _FINISH_S)
        return self._out.captured().head

    async def close(self) -> None:
        """End the reader; safe to call twice."""
        reader, drained = self._said.strip().decode("utf-8", "replace"), self._exec.drained.is_set()
        self._exec.close()
        if not drained and reader.isdigit():
            with contextlib.suppress(InfraError):
                await self._box.root('kill -9 "$1"; rm -f "$2"', reader, self.path)

"""One command in a container: started, read, stopped; blocking, for worker threads.

- The stream of a docker exec lives as long as any process holds it; the command's own end is asked
  for separately, so that a daemon cannot hold a call.
- Standard streams arrive in frames of eight header bytes; nothing is trusted about their sizes.
- Each command carries a mark in its environment, by which its processes are found and killed.
"""

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sandbox_svc.backends.base import Captured
from sandbox_svc.backends.output import Collector

MARK = "REGREEN_JOB"
_POLL_S = 0.1
_GRACE_S = 0.2
KILL = (
    "for p in /proc/[0-9]*; do "
    f'if tr "\\0" "\\n" < $p/environ 2>/dev/null | grep -qx "{MARK}=$1"; '
    "then kill -9 ${p#/proc/}; fi; done 2>/dev/null; true"
)

Api = Any
"""`docker.APIClient`, which has no types."""


class ContainerExec:
    """One running command."""

    def __init__(
        self,
        api: Api,
        container: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str,
        user: str,
        stdin: bytes = b"",
    ) -> None:
        self._api, self._container, self._user = api, container, user
        self._mark = env.get(MARK, "")
        created = api.exec_create(
            container,
            list(argv),
            stdin=bool(stdin),
            environment=dict(env),
            workdir=cwd,
            user=user,
        )
        self.id: str = created["Id"]
        stream = api.exec_start(self.id, socket=True)
        self._sock: socket.socket = getattr(stream, "_sock", stream)
        self._stdin = stdin

    def run(
        self,
        out: Collector,
        err: Collector,
        *,
        timeout_s: float,
        sink: Callable[[str, bytes], None] | None,
        stop: threading.Event,
    ) -> tuple[int | None, bool]:
        """Read until the command's end; its exit code (None: unknown) and whether time ran out."""
        writer = threading.Thread(target=self._write, name="sandbox-docker-stdin", daemon=True)
        if self._stdin:
            writer.start()
        until = time.monotonic() + timeout_s
        timed_out = False
        buffer = b""
        ended_at = 0.0
        while True:
            ready, _, _ = select.select([self._sock], [], [], _POLL_S)
            if ready:
                data = self._receive()
                if not data:
                    break
                buffer = self._frames(buffer + data, out, err, sink)
            now = time.monotonic()
            if ended_at and (not ready or now > ended_at + _GRACE_S):
                break
            if not ended_at and not ready and not self._running():
                ended_at = now
            if not timed_out and (now > until or stop.is_set()):
                timed_out = True
                self.kill()
                ended_at = ended_at or now + _GRACE_S
        with contextlib.suppress(OSError):
            self._sock.close()
        return self._exit_code(), timed_out

    def _receive(self) -> bytes:
        try:
            return self._sock.recv(65_536)
        except OSError:
            return b""

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.sendall(self._stdin)
            self._sock.shutdown(socket.SHUT_WR)

    @staticmethod
    def _frames(
        buffer: bytes,
        out: Collector,
        err: Collector,
        sink: Callable[[str, bytes], None] | None,
    ) -> bytes:
        while len(buffer) >= 8:
            kind, size = struct.unpack(">BxxxL", buffer[:8])
            if len(buffer) < 8 + size:
                break
            data, buffer = buffer[8 : 8 + size], buffer[8 + size :]
            collector, name = (err, "stderr") if kind == 2 else (out, "stdout")
            kept = not collector.over
            collector.feed(data)
            if sink is not None and kept:
                sink(name, data)
        return buffer

    def _running(self) -> bool:
        return bool(self._api.exec_inspect(self.id)["Running"])

    def _exit_code(self) -> int | None:
        for _ in range(50):
            code = self._api.exec_inspect(self.id)["ExitCode"]
            if code is not None:
                return int(code)
            time.sleep(_POLL_S / 5)
        return None

    def kill(self) -> None:
        """Kill the processes that carry this command's mark."""
        argv = ["/bin/sh", "-c", KILL, "-", self._mark]
        capture(self._api, self._container, argv, user=self._user)


def capture(
    api: Api,
    container: str,
    argv: Sequence[str],
    *,
    user: str,
    stdin: bytes = b"",
    limit_bytes: int = 1 << 20,
    timeout_s: float = 60.0,
) -> tuple[int, Captured, Captured]:
    """Run a short helper command; its exit code and output."""
    out, err = Collector(limit_bytes, head_only=True), Collector(1 << 16)
    helper = ContainerExec(api, container, argv, env={}, cwd="/", user=user, stdin=stdin)
    code, _ = helper.run(out, err, timeout_s=timeout_s, sink=None, stop=threading.Event())
    return (-1 if code is None else code), out.captured(), err.captured()

"""Reading what a command prints, bounded in memory and in time.

- At most the head and tail of a stream are kept; the rest is counted and dropped.
- A kept byte has one place in its stream for ever: readers ask by place, and see what is missing.
- A stream past its cap is read slowly, so that a flood cannot occupy the event loop.
- With a sink, reading waits for the sink: a slow consumer slows the command, not the service.
- `finish` takes what is in the pipe at that moment and never waits for its end: a daemon may
  hold the other side for ever.
"""

import asyncio
import errno
import os

from sandbox_svc.backends.base import Captured, OutputSink

_CHUNK_BYTES = 65_536
_FINISH_BYTES = 4 << 20
_FLOOD_PAUSE_S = 0.002
_FIRST_LOOK_S = 0.003
"""From which on the event loop watches a pipe: commands that have ended by then cost it nothing."""
_SINK_CHUNKS = 16


class Collector:
    """Keeps the first and last `limit / 2` bytes of a stream."""

    def __init__(self, limit_bytes: int, *, head_only: bool = False) -> None:
        self._head_limit = limit_bytes if head_only else limit_bytes // 2
        self._tail_limit = limit_bytes - self._head_limit
        self._head = bytearray()
        self._tail = bytearray()
        self.total_bytes = 0

    @property
    def over(self) -> bool:
        """Whether anything had to be dropped."""
        return self.total_bytes > self._head_limit + self._tail_limit

    @property
    def kept_bytes(self) -> int:
        """Bytes held in memory."""
        return len(self._head) + len(self._tail)

    def feed(self, data: bytes) -> None:
        """Add one chunk."""
        self.total_bytes += len(data)
        room = self._head_limit - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        if data and self._tail_limit:
            self._tail += data
            excess = len(self._tail) - self._tail_limit
            if excess > 0:
                del self._tail[:excess]

    def captured(self) -> Captured:
        """What was kept."""
        return Captured(bytes(self._head), bytes(self._tail), self.total_bytes)


class Pulse:
    """Wakes all who wait, each time something happens."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def beat(self) -> None:
        """Something happened."""
        self._event.set()
        self._event = asyncio.Event()

    def next(self) -> asyncio.Event:
        """Set by the next beat; taken before looking, nothing that happens later is missed."""
        return self._event


class OutputLog(Collector):
    """What is kept of a stream, for any number of readers, each at a place of its own."""

    def __init__(self, limit_bytes: int, pulse: Pulse) -> None:
        super().__init__(limit_bytes)
        self._pulse = pulse

    def feed(self, data: bytes) -> None:
        """Add one chunk."""
        super().feed(data)
        self._pulse.beat()

    def read(self, offset: int, max_bytes: int) -> tuple[int, bytes]:
        """Kept bytes from a place on, and the place of the first: later where some were dropped."""
        if offset < len(self._head):
            return offset, bytes(self._head[offset : offset + max_bytes])
        first = self.total_bytes - len(self._tail)
        start = max(offset, first)
        return start, bytes(self._tail[start - first : start - first + max_bytes])


class PipeReader:
    """Reads one pipe on the event loop into a `Collector` and, if given, a sink.

    Given the descriptor of a terminal, it reads that instead, and owns it.
    """

    def __init__(
        self, name: str, collector: Collector, sink: OutputSink | None, terminal_fd: int = -1
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._name, self.collector, self._sink = name, collector, sink
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._pump: asyncio.Task[None] | None = None
        self._resume: asyncio.TimerHandle | None = None
        self._reading = False
        self._fd, self._write_fd = terminal_fd, -1
        if terminal_fd < 0:
            self._fd, self._write_fd = os.pipe2(os.O_CLOEXEC)
        try:
            os.set_blocking(self._fd, False)
            if sink is not None:
                self._pump = self._loop.create_task(self._deliver(sink))
            self._resume = self._loop.call_later(_FIRST_LOOK_S, self._watch)
        except BaseException:
            self.close()
            raise

    @property
    def write_fd(self) -> int:
        """The end to hand to the command."""
        return self._write_fd

    def handed_over(self) -> None:
        """Close this process's copy of the command's end."""
        if self._write_fd >= 0:
            os.close(self._write_fd)
            self._write_fd = -1

    def _watch(self) -> None:
        self._resume = None
        if self._fd >= 0 and not self._reading:
            self._loop.add_reader(self._fd, self._on_readable)
            self._reading = True

    def _unwatch(self) -> None:
        if self._reading:
            self._loop.remove_reader(self._fd)
            self._reading = False

    def _on_readable(self) -> None:
        data = self._read_some()
        if data is None:
            return
        if not data:
            self._unwatch()
        elif self.collector.over:
            self._unwatch()
            self._resume = self._loop.call_later(_FLOOD_PAUSE_S, self._watch)
        elif self._queue.qsize() >= _SINK_CHUNKS:
            self._unwatch()

    def _read_some(self) -> bytes | None:
        try:
            data = os.read(self._fd, _CHUNK_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return b""  # how a terminal says that nothing holds its other side
        if data:
            kept_all = not self.collector.over
            self.collector.feed(data)
            if self._sink is not None and kept_all:
                self._queue.put_nowait(data)
        return data

    async def _deliver(self, sink: OutputSink) -> None:
        while (data := await self._queue.get()) is not None:
            await sink(self._name, data)
            if self._queue.qsize() < _SINK_CHUNKS and self._resume is None:
                self._watch()

    async def finish(self) -> Captured:
        """Take what is left in the pipe, stop reading, return what was kept."""
        self._unwatch()
        taken = 0
        while taken < _FINISH_BYTES:
            data = self._read_some()
            if not data:
                break
            taken += len(data)
        if self._pump is not None:
            pump, self._pump = self._pump, None
            self._queue.put_nowait(None)
            self._fd_done()
            await pump
        self.close()
        return self.collector.captured()

    def _fd_done(self) -> None:
        if self._resume is not None:
            self._resume.cancel()
        self._unwatch()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        """Release everything; safe to call twice."""
        self._fd_done()
        self.handed_over()
        if self._pump is not None:
            self._pump.cancel()
            self._pump = None

"""Client of the exec service: commands that outlive a call.

- Each method is one RPC, but for `follow_exec` and `exec_stream`, which go on over dropped
  connections: output is taken up again where it was, and input given again from what was taken.
- Patience is counted from the last thing that was heard, not from the start of the command.
- Whoever stops reading ends the stream, not the command; `signal_exec` ends that.
"""

import asyncio
import contextlib
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Mapping,
    Sequence,
)

import grpc

from regreen.client.channel import READ_S, WRITE_S, Caller, call_metadata, new_request_id, stream
from regreen.client.sandbox import duration
from regreen.rpc.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    Unavailable,
)
from regreen.sandbox import v1 as pb

_ATTACH_S = 3600.0
_PIECE_BYTES = 256 << 10
_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0


class ExecClient(Caller):
    """`regreen.sandbox.v1.ExecService`."""

    def __init__(self, channel: grpc.aio.Channel, *, patience_s: float = 30.0) -> None:
        super().__init__(channel, patience_s=patience_s)
        self._stub = pb.ExecServiceStub(channel)

    async def start_exec(
        self,
        sandbox_id: str,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        cwd: str = "",
        stdin: bytes = b"",
        timeout_s: float | None = None,
        output_bytes: int = 0,
        open_stdin: bool = False,
        terminal: pb.TerminalSize | None = None,
        request_id: str = "",
    ) -> pb.Execution:
        """Start a command."""
        command = pb.Command(
            argv=argv,
            environment=environment or {},
            cwd=cwd,
            stdin=stdin,
            timeout=duration(timeout_s),
            output_bytes=output_bytes,
        )
        request = pb.StartExecRequest(
            request_id=request_id or new_request_id(),
            sandbox_id=sandbox_id,
            command=command,
            open_stdin=open_stdin,
            terminal=terminal,
        )
        response: pb.StartExecResponse = await self._call(self._stub.StartExec, request, WRITE_S)
        return response.execution

    async def attach_exec(
        self,
        sandbox_id: str,
        exec_id: str,
        *,
        stdout_offset: int = 0,
        stderr_offset: int = 0,
        timeout_s: float = _ATTACH_S,
    ) -> AsyncGenerator[pb.AttachExecResponse, None]:
        """Output of a command from two offsets on, then how it ended; over one connection."""
        request = pb.AttachExecRequest(
            sandbox_id=sandbox_id,
            exec_id=exec_id,
            stdout_offset=stdout_offset,
            stderr_offset=stderr_offset,
        )
        async with stream(
            self._stub.AttachExec(request, timeout=timeout_s, metadata=call_metadata())
        ) as events:
            async for event in events:
                yield event

    async def write_stdin(
        self,
        sandbox_id: str,
        exec_id: str,
        offset: int,
        data: bytes = b"",
        *,
        close: bool = False,
        timeout_s: float = WRITE_S,
    ) -> int:
        """Give a command input; waits until it is taken. The bytes taken so far.

        Raises:
            DeadlineExceeded: the command did not read; call again with the same arguments.
        """
        request = pb.WriteStdinRequest(
            sandbox_id=sandbox_id, exec_id=exec_id, offset=offset, data=data, close=close
        )
        response = await self._call(self._stub.WriteStdin, request, timeout_s)
        return int(response.stdin_bytes)

    async def signal_exec(self, sandbox_id: str, exec_id: str, signal: int) -> bool:
        """Send a signal to a command's process group; whether it still ran.

        Not repeated after a dropped connection: the command may have had it.
        """
        request = pb.SignalExecRequest(sandbox_id=sandbox_id, exec_id=exec_id, signal=signal)
        once = Caller(self._channel, patience_s=0.0)
        response = await once._call(self._stub.SignalExec, request, READ_S)
        return bool(response.delivered)

    async def resize_terminal(self, sandbox_id: str, exec_id: str, rows: int, columns: int) -> None:
        """Set the size of a command's terminal."""
        request = pb.ResizeTerminalRequest(
            sandbox_id=sandbox_id,
            exec_id=exec_id,
            size=pb.TerminalSize(rows=rows, columns=columns),
        )
        await self._call(self._stub.ResizeTerminal, request, READ_S)

    async def list_execs(self, sandbox_id: str) -> Sequence[pb.Execution]:
        """Commands of a sandbox that run or are kept, oldest first."""
        response = await self._call(
            self._stub.ListExecs, pb.ListExecsRequest(sandbox_id=sandbox_id), READ_S
        )
        executions: Sequence[pb.Execution] = response.executions
        return executions

    async def follow_exec(
        self,
        sandbox_id: str,
        exec_id: str,
        *,
        stdout_offset: int = 0,
        stderr_offset: int = 0,
    ) -> AsyncGenerator[pb.AttachExecResponse, None]:
        """As `attach_exec`, over as many connections as it takes."""
        places = {"stdout": stdout_offset, "stderr": stderr_offset}
        heard_s, pause_s = time.monotonic(), _PAUSE_S
        while True:
            events = self.attach_exec(
                sandbox_id,
                exec_id,
                stdout_offset=places["stdout"],
                stderr_offset=places["stderr"],
            )
            try:
                async with contextlib.aclosing(events):
                    async for event in events:
                        heard_s, pause_s = time.monotonic(), _PAUSE_S
                        kind = event.WhichOneof("event")
                        if kind in places:
                            chunk = getattr(event, kind)
                            places[kind] = chunk.offset + len(chunk.data)
                        yield event
                        if kind == "ended":
                            return
            except DeadlineExceeded:
                heard_s = time.monotonic()
            except Unavailable:
                if time.monotonic() - heard_s > self.patience_s:
                    raise
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def exec_stream(
        self,
        sandbox_id: str,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        cwd: str = "",
        stdin: AsyncIterable[bytes] | bytes = b"",
        timeout_s: float | None = None,
        output_bytes: int = 0,
        terminal: pb.TerminalSize | None = None,
        on_start: Callable[[pb.Execution], None] | None = None,
    ) -> AsyncGenerator[pb.AttachExecResponse, None]:
        """Run a command with input as it comes; its output without loss, then how it ended.

        `on_start` is told the command's id, for signals and the size of its terminal.
        """
        given = stdin if isinstance(stdin, bytes) else b""
        execution = await self.start_exec(
            sandbox_id,
            argv,
            environment=environment,
            cwd=cwd,
            stdin=given,
            timeout_s=timeout_s,
            output_bytes=output_bytes,
            open_stdin=not isinstance(stdin, bytes),
            terminal=terminal,
        )
        if on_start is not None:
            on_start(execution)
        feeder = None
        if not isinstance(stdin, bytes):
            feeder = asyncio.create_task(self._feed(execution, stdin))
        try:
            events = self.follow_exec(sandbox_id, execution.id)
            async with contextlib.aclosing(events):
                while (event := await _next(events, feeder)) is not None:
                    yield event
                    if event.WhichOneof("event") != "ended":
                        _raise_of(feeder)
        finally:
            if feeder is not None:
                feeder.cancel()
                await asyncio.gather(feeder, return_exceptions=True)

    async def _feed(self, execution: pb.Execution, source: AsyncIterable[bytes]) -> None:
        """Give a command what comes, until it reads no more or there is no more."""
        offset = execution.stdin_bytes
        with contextlib.suppress(FailedPrecondition, NotFound):
            async for data in source:
                for start in range(0, len(data), _PIECE_BYTES):
                    piece = data[start : start + _PIECE_BYTES]
                    offset = await self._give(execution, offset, piece)
            await self._give(execution, offset, b"", close=True)

    async def _give(
        self, execution: pb.Execution, offset: int, data: bytes, *, close: bool = False
    ) -> int:
        """Give bytes, however long the command takes to read them."""
        while True:
            try:
                return await self.write_stdin(
                    execution.sandbox_id, execution.id, offset, data, close=close
                )
            except DeadlineExceeded:
                continue


async def _next(
    events: AsyncIterator[pb.AttachExecResponse], feeder: "asyncio.Task[None] | None"
) -> pb.AttachExecResponse | None:
    """The next event; None at the end. A feeder that fails is not waited past: nothing may come."""
    coming = asyncio.ensure_future(anext(events, None))
    try:
        if feeder is not None and not feeder.done():
            await asyncio.wait({coming, feeder}, return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            _raise_of(feeder)
        return await coming
    finally:
        if not coming.done():
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


def _raise_of(task: "asyncio.Task[None] | None") -> None:
    """Raise what went wrong in a task that has ended."""
    if task is None or not task.done() or task.cancelled():
        return
    error = task.exception()
    if error is not None:
        raise error

"""`regreen.sandbox.v1.ExecService` over a `SandboxHost`: it translates, nothing else.

- A dropped call ends nothing but itself; a command is ended by what the contract names.
- Listings say how much a command printed, not what: its output is read by attaching.
"""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc

from regreen.ids import check_id
from regreen.rpc.errors import InvalidArgument
from regreen.sandbox import v1 as pb
from sandbox_svc import translate
from sandbox_svc.backends.base import ExecResult, TerminalSize
from sandbox_svc.executions import Chunk, Execution
from sandbox_svc.service import SandboxHost

_ROWS, _COLUMNS, _MOST = 24, 80, 65_535

Context = grpc.aio.ServicerContext[Any, Any]


class ExecServicer(pb.ExecServiceServicer):
    """`regreen.sandbox.v1.ExecService`."""

    def __init__(self, host: SandboxHost) -> None:
        self._manager, self._executions = host.manager, host.executions

    async def StartExec(
        self, request: pb.StartExecRequest, context: Context
    ) -> pb.StartExecResponse:
        """Start a command."""
        sandbox = self._manager.get(check_id(request.sandbox_id, "sbx", "sandbox_id"))
        terminal = _size(request.terminal, "terminal") if request.HasField("terminal") else None
        command = replace(
            translate.command_from(request.command, sandbox.limits, sandbox.cwd),
            open_stdin=request.open_stdin,
            terminal=terminal,
        )
        execution = await self._executions.start(sandbox.id, command, request_id=request.request_id)
        return pb.StartExecResponse(execution=_execution_to(execution))

    async def AttachExec(
        self, request: pb.AttachExecRequest, context: Context
    ) -> AsyncIterator[pb.AttachExecResponse]:
        """Stream a command's output, then how it ended."""
        events = self._executions.attach(
            *_ids(request), stdout=request.stdout_offset, stderr=request.stderr_offset
        )
        async with contextlib.aclosing(events):
            async for event in events:
                yield _event_to(event)

    async def WriteStdin(
        self, request: pb.WriteStdinRequest, context: Context
    ) -> pb.WriteStdinResponse:
        """Give a command input."""
        taken = await self._executions.write(
            *_ids(request), request.offset, request.data, close=request.close
        )
        return pb.WriteStdinResponse(stdin_bytes=taken)

    async def SignalExec(
        self, request: pb.SignalExecRequest, context: Context
    ) -> pb.SignalExecResponse:
        """Send a signal to a command."""
        delivered = await self._executions.signal(*_ids(request), request.signal)
        return pb.SignalExecResponse(delivered=delivered)

    async def ResizeTerminal(
        self, request: pb.ResizeTerminalRequest, context: Context
    ) -> pb.ResizeTerminalResponse:
        """Set the size of a command's terminal."""
        await self._executions.resize(*_ids(request), _size(request.size, "size"))
        return pb.ResizeTerminalResponse()

    async def ListExecs(
        self, request: pb.ListExecsRequest, context: Context
    ) -> pb.ListExecsResponse:
        """List the commands of a sandbox."""
        sandbox_id = check_id(request.sandbox_id, "sbx", "sandbox_id")
        found = self._executions.list(sandbox_id)
        return pb.ListExecsResponse(executions=[_execution_to(execution) for execution in found])


def _ids(request: Any) -> tuple[str, str]:
    return (
        check_id(request.sandbox_id, "sbx", "sandbox_id"),
        check_id(request.exec_id, "exe", "exec_id"),
    )


def _size(message: pb.TerminalSize, field: str) -> TerminalSize:
    for name in ("rows", "columns"):
        value = getattr(message, name)
        if value > _MOST:
            raise InvalidArgument(f"{field}.{name}", f"is {value}", f"give at most {_MOST}")
    return TerminalSize(message.rows or _ROWS, message.columns or _COLUMNS)


def _event_to(event: Chunk | ExecResult) -> pb.AttachExecResponse:
    if isinstance(event, ExecResult):
        return pb.AttachExecResponse(ended=translate.result_to(event))
    chunk = pb.OutputChunk(offset=event.offset, data=event.data)
    if event.stream == "stdout":
        return pb.AttachExecResponse(stdout=chunk)
    return pb.AttachExecResponse(stderr=chunk)


def _execution_to(execution: Execution) -> pb.Execution:
    message = pb.Execution(
        id=execution.id,
        sandbox_id=execution.sandbox_id,
        argv=execution.command.argv,
        create_time=translate.timestamp(execution.created_s),
        terminal=execution.command.terminal is not None,
        stdin_bytes=execution.input_bytes,
    )
    if execution.result is not None:
        message.result.CopyFrom(translate.result_to(execution.result))
    return message

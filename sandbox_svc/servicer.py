"""The two gRPC services over a `SandboxHost`: they translate, nothing else.

- Mutations with a `request_id` answer a repeated request from memory (`regreen.rpc.interceptors`).
- Lists are paged by position in a stable order; a token names the last entry that was sent.
- A preparation repeats its last progress event every 10 s, so that a caller sees it live.
- A command's stream is backpressure all the way: a slow reader slows the command.
"""

import asyncio
import bisect
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, TypeVar

import grpc

from regreen.ids import check_id
from regreen.rpc.errors import InvalidArgument
from regreen.sandbox import v1 as pb
from sandbox_svc import diffs, files, metrics, translate
from sandbox_svc.backends.base import ExecResult
from sandbox_svc.builders.base import Stage
from sandbox_svc.labels import check_labels
from sandbox_svc.sandbox import Sandbox
from sandbox_svc.service import SandboxHost
from sandbox_svc.specs import changes_from_proto, spec_from_proto
from sandbox_svc.state_records import State

_HEARTBEAT_S = 10.0
DEFAULT_PAGE, _MAX_PAGE = 100, 1000
_PAGE_BYTES = 3 << 20
"""Of the entries of one page: less than a client takes that sets no limit (4 MiB)."""
_LINEAGE_BYTES = 32 << 20
"""Of the states of one lineage, which has no pages: less than a message may have."""
_READ_BYTES = 1 << 20
_MAX_TRANSFER_BYTES = 48 << 20

M = TypeVar("M", bound=Any)
T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]


def page(
    items: Sequence[T], key: Callable[[T], tuple[float, str]], size: int, token: str
) -> tuple[Sequence[T], str]:
    """One page of `items`, which are sorted by `key`, and the next token.

    A token names a place in the order, so it holds when the entry at that place is gone.

    Raises:
        InvalidArgument: bad size or token.
    """
    if not 0 <= size <= _MAX_PAGE:
        raise InvalidArgument("page_size", f"{size}", f"give 0 to {_MAX_PAGE}")
    start = bisect.bisect_right(items, place_of(token), key=key) if token else 0
    chosen = items[start : start + (size or DEFAULT_PAGE)]
    if not chosen or start + len(chosen) >= len(items):
        return chosen, ""
    return chosen, token_of(key(chosen[-1]))


def filled_page(
    items: Sequence[T],
    message: Callable[[T], M],
    key: Callable[[T], tuple[float, str]],
    size: int,
    token: str,
) -> tuple[Sequence[M], str]:
    """One page of `items` as messages, and the next token; it ends early where it gets too large.

    Raises:
        InvalidArgument: bad size or token.
    """
    chosen, token = page(items, key, size, token)
    messages = fitting(chosen, message, _PAGE_BYTES)
    cut = len(messages) < len(chosen)
    return messages, token_of(key(chosen[len(messages) - 1])) if cut else token


def fitting(items: Iterable[T], message: Callable[[T], M], room_bytes: int) -> Sequence[M]:
    """The first of `items` as messages, at least one, as many as there is room for."""
    messages: list[M] = []
    for item in items:
        made = message(item)
        room_bytes -= made.ByteSize()
        if messages and room_bytes < 0:
            break
        messages.append(made)
    return messages


def place_of(token: str) -> tuple[float, str]:
    """The place in an order that a token names.

    Raises:
        InvalidArgument: it names none.
    """
    seconds, _, name = token.partition("_")
    with contextlib.suppress(ValueError, OverflowError):
        if math.isfinite(found := float.fromhex(seconds)):
            return found, name
    raise InvalidArgument("page_token", "is none of this service", "start from the first page")


def token_of(place: tuple[float, str]) -> str:
    """The token that names a place in an order."""
    return f"{place[0].hex()}_{place[1]}"


def _place(item: State | Sandbox) -> tuple[float, str]:
    return float(item.created_s), item.id


class _Servicer:
    def __init__(self, host: SandboxHost) -> None:
        self._host = host


class StateServicer(_Servicer, pb.StateServiceServicer):
    """`regreen.sandbox.v1.StateService`."""

    async def PrepareState(
        self, request: pb.PrepareStateRequest, context: Context
    ) -> AsyncIterator[pb.PrepareStateResponse]:
        """Build or find the state of a spec."""
        spec = spec_from_proto(request.spec)
        began = time.monotonic()
        events: asyncio.Queue[Stage] = asyncio.Queue()
        task = asyncio.create_task(
            self._host.prepare(spec, rebuild=request.rebuild, progress=events.put_nowait)
        )
        task.add_done_callback(lambda _: events.put_nowait(Stage("done", 1, 1)))
        last = Stage("start", 0, 0)
        try:
            while not (task.done() and events.empty()):
                try:
                    stage = await asyncio.wait_for(events.get(), _HEARTBEAT_S)
                except TimeoutError:
                    stage = last
                if stage.stage != "done":
                    last = stage
                    yield translate.progress_to(stage, time.monotonic() - began)
            yield pb.PrepareStateResponse(state=translate.state_to(await task))
        finally:
            task.cancel()

    async def GetState(self, request: pb.GetStateRequest, context: Context) -> pb.GetStateResponse:
        """Read one state."""
        state = self._host.states.get(check_id(request.id, "st", "id"))
        return pb.GetStateResponse(state=translate.state_to(state))

    async def ListStates(
        self, request: pb.ListStatesRequest, context: Context
    ) -> pb.ListStatesResponse:
        """List states, oldest first."""
        states = self._host.states.list(
            spec_sha256=request.spec_sha256, parent_id=request.parent_id
        )
        messages, token = filled_page(
            states, translate.state_to, _place, request.page_size, request.page_token
        )
        return pb.ListStatesResponse(states=messages, next_page_token=token)

    async def GetLineage(
        self, request: pb.GetLineageRequest, context: Context
    ) -> pb.GetLineageResponse:
        """Read a state and those that it was made from."""
        states, id = self._host.states, check_id(request.id, "st", "id")
        nearest = fitting(reversed(states.lineage(id)), translate.state_to, _LINEAGE_BYTES)
        return pb.GetLineageResponse(states=nearest[::-1], ancestor_ids=states.ancestors(id))

    async def DeleteState(
        self, request: pb.DeleteStateRequest, context: Context
    ) -> pb.DeleteStateResponse:
        """Forget a state and the layers that only it uses."""
        await self._host.delete_state(check_id(request.id, "st", "id"))
        return pb.DeleteStateResponse()

    async def ExportState(
        self, request: pb.ExportStateRequest, context: Context
    ) -> AsyncIterator[pb.ExportStateResponse]:
        """Stream a state as an archive."""
        check_id(request.id, "st", "id")
        async with contextlib.aclosing(self._host.transfer.export(request.id)) as chunks:
            async for chunk in chunks:
                yield pb.ExportStateResponse(chunk=chunk)

    async def ImportState(
        self, requests: AsyncIterator[pb.ImportStateRequest], context: Context
    ) -> pb.ImportStateResponse:
        """Take an archive."""

        async def chunks() -> AsyncIterator[bytes]:
            async for request in requests:
                yield request.chunk

        state, notes = await self._host.transfer.import_(chunks())
        return pb.ImportStateResponse(state=translate.state_to(state), notes=notes)


class SandboxServicer(_Servicer, pb.SandboxServiceServicer):
    """`regreen.sandbox.v1.SandboxService`."""

    async def CreateSandbox(
        self, request: pb.CreateSandboxRequest, context: Context
    ) -> pb.CreateSandboxResponse:
        """Fork a state."""
        check_id(request.state_id, "st", "state_id")
        sandbox = await self._host.manager.create(
            request.state_id,
            limits=translate.limits_from(request.limits),
            labels=check_labels(request.labels),
            ttl_s=translate.seconds(request.ttl, "ttl", self._host.manager.pool.max_ttl_s),
            allow=request.egress.allow,
        )
        return pb.CreateSandboxResponse(sandbox=translate.sandbox_to(sandbox))

    async def GetSandbox(
        self, request: pb.GetSandboxRequest, context: Context
    ) -> pb.GetSandboxResponse:
        """Read one sandbox."""
        sandbox = self._host.manager.get(check_id(request.id, "sbx", "id"))
        return pb.GetSandboxResponse(sandbox=translate.sandbox_to(sandbox))

    async def ListSandboxes(
        self, request: pb.ListSandboxesRequest, context: Context
    ) -> pb.ListSandboxesResponse:
        """List sandboxes, oldest first."""
        sandboxes = self._host.manager.list(check_labels(request.labels))
        messages, token = filled_page(
            sandboxes, translate.sandbox_to, _place, request.page_size, request.page_token
        )
        return pb.ListSandboxesResponse(sandboxes=messages, next_page_token=token)

    async def DeleteSandbox(
        self, request: pb.DeleteSandboxRequest, context: Context
    ) -> pb.DeleteSandboxResponse:
        """Kill everything in a sandbox and remove it."""
        await self._host.manager.delete(check_id(request.id, "sbx", "id"))
        return pb.DeleteSandboxResponse()

    async def ForkSandbox(
        self, request: pb.ForkSandboxRequest, context: Context
    ) -> pb.ForkSandboxResponse:
        """Snapshot a sandbox and start more from there."""
        check_id(request.id, "sbx", "id")
        labels = check_labels(request.labels)
        state, forks = await self._host.manager.fork(request.id, request.count, labels)
        return pb.ForkSandboxResponse(
            state=translate.state_to(state),
            sandboxes=[translate.sandbox_to(fork) for fork in forks],
        )

    async def SnapshotSandbox(
        self, request: pb.SnapshotSandboxRequest, context: Context
    ) -> pb.SnapshotSandboxResponse:
        """Freeze a sandbox into a state."""
        check_id(request.id, "sbx", "id")
        state = await self._host.manager.snapshot(request.id, check_labels(request.labels))
        return pb.SnapshotSandboxResponse(state=translate.state_to(state))

    async def RestoreSandbox(
        self, request: pb.RestoreSandboxRequest, context: Context
    ) -> pb.RestoreSandboxResponse:
        """Put a sandbox on another state."""
        check_id(request.id, "sbx", "id")
        check_id(request.state_id, "st", "state_id")
        sandbox = await self._host.manager.restore(request.id, request.state_id)
        return pb.RestoreSandboxResponse(sandbox=translate.sandbox_to(sandbox))

    async def KeepAlive(
        self, request: pb.KeepAliveRequest, context: Context
    ) -> pb.KeepAliveResponse:
        """Move the expiry of a sandbox."""
        ttl_s = translate.seconds(request.ttl, "ttl", self._host.manager.pool.max_ttl_s)
        sandbox = self._host.manager.keep_alive(check_id(request.id, "sbx", "id"), ttl_s)
        return pb.KeepAliveResponse(sandbox=translate.sandbox_to(sandbox))

    async def Exec(
        self, request: pb.ExecRequest, context: Context
    ) -> AsyncIterator[pb.ExecResponse]:
        """Run a command and stream its output."""
        check_id(request.sandbox_id, "sbx", "sandbox_id")
        events: asyncio.Queue[pb.ExecResponse] = asyncio.Queue(maxsize=8)

        async def sink(stream: str, data: bytes) -> None:
            event = pb.ExecResponse(stdout=data) if stream == "stdout" else None
            await events.put(event or pb.ExecResponse(stderr=data))

        with self._host.manager.using(request.sandbox_id) as sandbox:
            command = translate.command_from(request.command, sandbox.limits, sandbox.cwd)
            task = asyncio.create_task(sandbox.box.run(command, sink))
            try:
                while not (task.done() and events.empty()):
                    getter = asyncio.ensure_future(events.get())
                    await asyncio.wait({getter, task}, return_when=asyncio.FIRST_COMPLETED)
                    if getter.done():
                        yield getter.result()
                    else:
                        getter.cancel()
                yield pb.ExecResponse(ended=_ended(await task))
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def Run(self, request: pb.RunRequest, context: Context) -> pb.RunResponse:
        """Run a command to its end."""
        check_id(request.sandbox_id, "sbx", "sandbox_id")
        with self._host.manager.using(request.sandbox_id) as sandbox:
            command = translate.command_from(request.command, sandbox.limits, sandbox.cwd)
            return pb.RunResponse(result=_ended(await sandbox.box.run(command)))

    async def ReadFile(self, request: pb.ReadFileRequest, context: Context) -> pb.ReadFileResponse:
        """Read part of a regular file."""
        check_id(request.sandbox_id, "sbx", "sandbox_id")
        size = request.max_bytes or _READ_BYTES
        if not 0 < size <= _MAX_TRANSFER_BYTES:
            raise InvalidArgument(
                "max_bytes",
                f"is {size}",
                f"give 1 to {_MAX_TRANSFER_BYTES}, or 0 for {_READ_BYTES}",
            )
        if request.offset < 0:
            raise InvalidArgument("offset", f"is {request.offset}", "give 0 or more")
        with self._host.manager.using(request.sandbox_id) as sandbox:
            content, info = await sandbox.box.read_range(
                request.path, offset=request.offset, max_bytes=size
            )
        return pb.ReadFileResponse(content=content, size_bytes=info.size_bytes)

    async def WriteFile(
        self, request: pb.WriteFileRequest, context: Context
    ) -> pb.WriteFileResponse:
        """Write a whole regular file."""
        check_id(request.sandbox_id, "sbx", "sandbox_id")
        if len(request.content) > _MAX_TRANSFER_BYTES:
            raise InvalidArgument(
                "content", f"{len(request.content)} bytes", f"give at most {_MAX_TRANSFER_BYTES}"
            )
        if request.mode > 0o777:
            raise InvalidArgument("mode", f"is 0o{request.mode:o}", "give at most 0o777")
        with self._host.manager.using(request.sandbox_id) as sandbox:
            mode = request.mode or 0o644
            await sandbox.box.write_file(request.path, request.content, mode)
        return pb.WriteFileResponse()

    async def ListFiles(
        self, request: pb.ListFilesRequest, context: Context
    ) -> pb.ListFilesResponse:
        """List files that match a glob."""
        check_id(request.sandbox_id, "sbx", "sandbox_id")
        with self._host.manager.using(request.sandbox_id) as sandbox:
            root = request.root or sandbox.cwd
            found = await files.list_files(sandbox.box, root, request.glob, request.limit)
        return translate.entries_to(*found)

    async def FindText(self, request: pb.FindTextRequest, context: Context) -> pb.FindTextResponse:
        """Find lines that contain a text."""
        check_id(request.sandbox_id, "sbx", "sandbox_id")
        with self._host.manager.using(request.sandbox_id) as sandbox:
            root = request.root or sandbox.cwd
            found = await files.find_text(
                sandbox.box, request.text, root, request.glob, request.limit
            )
        return translate.matches_to(*found)

    async def Diff(self, request: pb.DiffRequest, context: Context) -> pb.DiffResponse:
        """List what changed since a state."""
        check_id(request.sandbox_id, "sbx", "sandbox_id")
        diff = await diffs.diff(
            self._host.manager,
            request.sandbox_id,
            root=request.root or self._host.manager.get(request.sandbox_id).cwd,
            base_state_id=request.base_state_id,
        )
        return translate.diff_to(diff)

    async def Validate(self, request: pb.ValidateRequest, context: Context) -> pb.ValidateResponse:
        """Judge a diff in a fresh fork of a state."""
        check_id(request.state_id, "st", "state_id")
        changes = changes_from_proto(list(request.changes))
        verdict = await self._host.validate(
            request.state_id,
            changes,
            translate.options_from(request),
            skip_cache_lookup=request.skip_cache_lookup,
        )
        return pb.ValidateResponse(validation=translate.validation_to(verdict))

    async def GetCapabilities(
        self, request: pb.GetCapabilitiesRequest, context: Context
    ) -> pb.GetCapabilitiesResponse:
        """Tell what this host was proven to enforce."""
        runtime = self._host.runtime
        found = (*runtime.capabilities(), *self._host.proven)
        return pb.GetCapabilitiesResponse(
            runtime=runtime.name,
            capabilities=[translate.capability_to(c) for c in found],
            interpreters=await asyncio.to_thread(self._host.interpreters),
        )

    async def ListQuotas(
        self, request: pb.ListQuotasRequest, context: Context
    ) -> pb.ListQuotasResponse:
        """List sandboxes and bytes of States by tenant, and their bounds."""
        return pb.ListQuotasResponse(quotas=self._host.uses())


def _ended(result: ExecResult) -> pb.CommandResult:
    metrics.EXEC_SECONDS.labels(result.reason.value).observe(result.wall_s)
    return translate.result_to(result)

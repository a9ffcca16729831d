"""Clients of the sandbox service: states and sandboxes.

- Each method is one RPC; it returns the response's main message.
- Timeouts of commands and validations travel in the request; the deadline is a little longer.
"""

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

import grpc
from google.protobuf.duration_pb2 import Duration

from regreen.client.channel import READ_S, WRITE_S, Caller, call_metadata, new_request_id, stream
from regreen.common.v1 import FileChange, QuotaUse
from regreen.sandbox import v1 as pb

_SLACK_S = 30.0
_VALIDATE_S = 900.0
"""Beyond its own time limit a validation waits for a place, installs a lock, and may run twice."""
_PREPARE_S = 3600.0


def duration(seconds: float | None) -> Duration | None:
    """`seconds` as a protobuf duration; None stays None."""
    if seconds is None:
        return None
    value = Duration()
    value.FromNanoseconds(int(seconds * 1e9))
    return value


def succeeded(result: pb.CommandResult) -> bool:
    """Whether a command came to its own end with exit code 0; one that was stopped never did."""
    return bool(result.reason == pb.END_REASON_EXIT and result.exit_code == 0)


class StateClient(Caller):
    """`regreen.sandbox.v1.StateService`."""

    def __init__(self, channel: grpc.aio.Channel, *, patience_s: float = 30.0) -> None:
        super().__init__(channel, patience_s=patience_s)
        self._stub = pb.StateServiceStub(channel)

    async def prepare_state(
        self,
        spec: pb.EnvironmentSpec,
        *,
        rebuild: bool = False,
        request_id: str = "",
        timeout_s: float = _PREPARE_S,
    ) -> AsyncIterator[pb.PrepareStateResponse]:
        """Progress events, then the state."""
        request = pb.PrepareStateRequest(
            request_id=request_id or new_request_id(), spec=spec, rebuild=rebuild
        )
        async with stream(
            self._stub.PrepareState(request, timeout=timeout_s, metadata=call_metadata())
        ) as events:
            async for event in events:
                yield event

    async def get_state(self, id: str) -> pb.State:
        """One state."""
        response = await self._call(self._stub.GetState, pb.GetStateRequest(id=id), READ_S)
        state: pb.State = response.state
        return state

    async def list_states(
        self,
        *,
        page_size: int = 0,
        page_token: str = "",
        spec_sha256: str = "",
        parent_id: str = "",
    ) -> pb.ListStatesResponse:
        """One page of states."""
        request = pb.ListStatesRequest(
            page_size=page_size,
            page_token=page_token,
            spec_sha256=spec_sha256,
            parent_id=parent_id,
        )
        response: pb.ListStatesResponse = await self._call(self._stub.ListStates, request, READ_S)
        return response

    async def get_lineage(self, id: str) -> Sequence[pb.State]:
        """A state and those that it was made from, the root first."""
        return (await self.lineage(id)).states

    async def lineage(self, id: str) -> pb.GetLineageResponse:
        """The same, with the ids of deleted ones."""
        response: pb.GetLineageResponse = await self._call(
            self._stub.GetLineage, pb.GetLineageRequest(id=id), READ_S
        )
        return response

    async def delete_state(self, id: str, *, request_id: str = "") -> None:
        """Remove a state."""
        request = pb.DeleteStateRequest(id=id, request_id=request_id or new_request_id())
        await self._call(self._stub.DeleteState, request, WRITE_S)

    async def export_state(self, id: str) -> AsyncIterator[bytes]:
        """The archive of a state, in pieces."""
        call = self._stub.ExportState(
            pb.ExportStateRequest(id=id), timeout=_PREPARE_S, metadata=call_metadata()
        )
        async with stream(call) as events:
            async for event in events:
                yield event.chunk

    async def import_state(self, chunks: Iterable[bytes], *, request_id: str = "") -> pb.State:
        """Store an archive made by `export_state`."""
        state: pb.State = (await self.import_archive(chunks, request_id=request_id)).state
        return state

    async def import_archive(
        self, chunks: Iterable[bytes], *, request_id: str = ""
    ) -> pb.ImportStateResponse:
        """Store an archive made by `export_state`; the answer has notes on it beside the state."""
        first = request_id or new_request_id()

        async def requests() -> AsyncIterator[pb.ImportStateRequest]:
            for number, chunk in enumerate(chunks):
                yield pb.ImportStateRequest(chunk=chunk, request_id="" if number else first)

        async with stream(
            self._stub.ImportState(requests(), timeout=_PREPARE_S, metadata=call_metadata())
        ) as call:
            response: pb.ImportStateResponse = await call  # type: ignore[misc]
        return response


class SandboxClient(Caller):
    """`regreen.sandbox.v1.SandboxService`."""

    def __init__(self, channel: grpc.aio.Channel, *, patience_s: float = 30.0) -> None:
        super().__init__(channel, patience_s=patience_s)
        self._stub = pb.SandboxServiceStub(channel)

    async def create_sandbox(
        self,
        state_id: str,
        *,
        limits: pb.Limits | None = None,
        labels: Mapping[str, str] | None = None,
        ttl_s: float | None = None,
        egress: Sequence[str] = (),
        request_id: str = "",
    ) -> pb.Sandbox:
        """Fork a state; `egress` names the hosts that it may reach, none by default."""
        request = pb.CreateSandboxRequest(
            request_id=request_id or new_request_id(),
            state_id=state_id,
            limits=limits,
            labels=labels or {},
            ttl=duration(ttl_s),
            egress=pb.Egress(allow=egress) if egress else None,
        )
        sandbox: pb.Sandbox = (await self._call(self._stub.CreateSandbox, request, WRITE_S)).sandbox
        return sandbox

    async def get_sandbox(self, id: str) -> pb.Sandbox:
        """One sandbox."""
        response = await self._call(self._stub.GetSandbox, pb.GetSandboxRequest(id=id), READ_S)
        sandbox: pb.Sandbox = response.sandbox
        return sandbox

    async def list_sandboxes(
        self,
        *,
        page_size: int = 0,
        page_token: str = "",
        labels: Mapping[str, str] | None = None,
    ) -> pb.ListSandboxesResponse:
        """One page of sandboxes."""
        request = pb.ListSandboxesRequest(
            page_size=page_size, page_token=page_token, labels=labels or {}
        )
        response: pb.ListSandboxesResponse = await self._call(
            self._stub.ListSandboxes, request, READ_S
        )
        return response

    async def delete_sandbox(self, id: str, *, request_id: str = "") -> None:
        """Kill and remove a sandbox."""
        request = pb.DeleteSandboxRequest(id=id, request_id=request_id or new_request_id())
        await self._call(self._stub.DeleteSandbox, request, WRITE_S)

    async def fork_sandbox(
        self,
        id: str,
        count: int,
        *,
        labels: Mapping[str, str] | None = None,
        request_id: str = "",
    ) -> pb.ForkSandboxResponse:
        """Freeze a sandbox and fork it."""
        request = pb.ForkSandboxRequest(
            request_id=request_id or new_request_id(), id=id, count=count, labels=labels or {}
        )
        response: pb.ForkSandboxResponse = await self._call(
            self._stub.ForkSandbox, request, WRITE_S
        )
        return response

    async def snapshot_sandbox(
        self, id: str, *, labels: Mapping[str, str] | None = None, request_id: str = ""
    ) -> pb.State:
        """Freeze a sandbox into a state."""
        request = pb.SnapshotSandboxRequest(
            request_id=request_id or new_request_id(), id=id, labels=labels or {}
        )
        state: pb.State = (await self._call(self._stub.SnapshotSandbox, request, WRITE_S)).state
        return state

    async def restore_sandbox(self, id: str, state_id: str, *, request_id: str = "") -> pb.Sandbox:
        """Put a sandbox back to a state."""
        request = pb.RestoreSandboxRequest(
            request_id=request_id or new_request_id(), id=id, state_id=state_id
        )
        sandbox: pb.Sandbox = (
            await self._call(self._stub.RestoreSandbox, request, WRITE_S)
        ).sandbox
        return sandbox

    async def keep_alive(
        self, id: str, *, ttl_s: float | None = None, request_id: str = ""
    ) -> pb.Sandbox:
        """Move the expiry of a sandbox."""
        request = pb.KeepAliveRequest(
            id=id, ttl=duration(ttl_s), request_id=request_id or new_request_id()
        )
        sandbox: pb.Sandbox = (await self._call(self._stub.KeepAlive, request, READ_S)).sandbox
        return sandbox

    async def exec(
        self, sandbox_id: str, command: pb.Command, *, timeout_s: float = 600.0
    ) -> AsyncIterator[pb.ExecResponse]:
        """Output events of a command, then how it ended."""
        if not command.HasField("timeout"):
            command.timeout.FromNanoseconds(int(timeout_s * 1e9))
        request = pb.ExecRequest(
            request_id=new_request_id(), sandbox_id=sandbox_id, command=command
        )
        async with stream(
            self._stub.Exec(request, timeout=timeout_s + _SLACK_S, metadata=call_metadata())
        ) as events:
            async for event in events:
                yield event

    async def run(
        self,
        sandbox_id: str,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        cwd: str = "",
        stdin: bytes = b"",
        timeout_s: float = 600.0,
        output_bytes: int = 0,
        request_id: str = "",
    ) -> pb.CommandResult:
        """Run a command to its end."""
        command = pb.Command(
            argv=argv,
            environment=environment or {},
            cwd=cwd,
            stdin=stdin,
            timeout=duration(timeout_s),
            output_bytes=output_bytes,
        )
        request = pb.RunRequest(
            request_id=request_id or new_request_id(), sandbox_id=sandbox_id, command=command
        )
        response = await self._call(self._stub.Run, request, timeout_s + _SLACK_S)
        result: pb.CommandResult = response.result
        return result

    async def read_file(
        self, sandbox_id: str, path: str, *, max_bytes: int = 0, offset: int = 0
    ) -> pb.ReadFileResponse:
        """Content of a regular file."""
        request = pb.ReadFileRequest(
            sandbox_id=sandbox_id, path=path, max_bytes=max_bytes, offset=offset
        )
        response: pb.ReadFileResponse = await self._call(self._stub.ReadFile, request, READ_S)
        return response

    async def write_file(
        self, sandbox_id: str, path: str, content: bytes, *, mode: int = 0, request_id: str = ""
    ) -> None:
        """Write a whole regular file."""
        request = pb.WriteFileRequest(
            request_id=request_id or new_request_id(),
            sandbox_id=sandbox_id,
            path=path,
            content=content,
            mode=mode,
        )
        await self._call(self._stub.WriteFile, request, WRITE_S)

    async def list_files(
        self, sandbox_id: str, *, root: str = "", glob: str = "", limit: int = 0
    ) -> pb.ListFilesResponse:
        """Files under a directory."""
        request = pb.ListFilesRequest(sandbox_id=sandbox_id, root=root, glob=glob, limit=limit)
        response: pb.ListFilesResponse = await self._call(self._stub.ListFiles, request, WRITE_S)
        return response

    async def find_text(
        self, sandbox_id: str, text: str, *, root: str = "", glob: str = "", limit: int = 0
    ) -> pb.FindTextResponse:
        """Lines that contain a text."""
        request = pb.FindTextRequest(
            sandbox_id=sandbox_id, root=root, text=text, glob=glob, limit=limit
        )
        response: pb.FindTextResponse = await self._call(self._stub.FindText, request, WRITE_S)
        return response

    async def diff(
        self, sandbox_id: str, *, root: str = "", base_state_id: str = ""
    ) -> pb.DiffResponse:
        """What changed since the sandbox's state."""
        request = pb.DiffRequest(sandbox_id=sandbox_id, root=root, base_state_id=base_state_id)
        response: pb.DiffResponse = await self._call(self._stub.Diff, request, WRITE_S)
        return response

    async def validate(
        self,
        state_id: str,
        changes: Sequence[FileChange] = (),
        *,
        held_pins: Mapping[str, str] | None = None,
        required_tests: Sequence[str] = (),
        coverage: bool = False,
        timeout_s: float = 900.0,
        skip_cache_lookup: bool = False,
        seed: int = 0,
        stop_early: bool = False,
        only_tests: Sequence[str] = (),
        conditions: pb.Conditions | None = None,
        request_id: str = "",
    ) -> pb.Validation:
        """The verdict on a diff, computed in a fresh fork; for feedback, on a part of the tests.

        `conditions` other than the pinned ones make it a probe, by which nothing may be scored.
        """
        request = pb.ValidateRequest(
            request_id=request_id or new_request_id(),
            state_id=state_id,
            changes=changes,
            held_pins=held_pins or {},
            required_tests=required_tests,
            coverage=coverage,
            timeout=duration(timeout_s),
            skip_cache_lookup=skip_cache_lookup,
            seed=seed,
            stop_early=stop_early,
            only_tests=only_tests,
            conditions=conditions,
        )
        response = await self._call(self._stub.Validate, request, 2 * timeout_s + _VALIDATE_S)
        validation: pb.Validation = response.validation
        return validation

    async def get_capabilities(self) -> pb.GetCapabilitiesResponse:
        """What this host was proven to enforce."""
        response: pb.GetCapabilitiesResponse = await self._call(
            self._stub.GetCapabilities, pb.GetCapabilitiesRequest(), WRITE_S
        )
        return response

    async def list_quotas(self) -> list[QuotaUse]:
        """What tenants have of what their quotas bound there, and the bounds."""
        response: pb.ListQuotasResponse = await self._call(
            self._stub.ListQuotas, pb.ListQuotasRequest(), READ_S
        )
        return list(response.quotas)

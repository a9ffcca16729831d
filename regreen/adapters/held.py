"""A sandbox that lives as long as an adapter's object: made from a State or a task, kept alive.

- It is deleted by `close`; whoever dies without closing loses it to its time to live.
- What goes in and out is bounded by the configuration, never by what the sandbox holds.
"""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import grpc
from pydantic import BaseModel, ConfigDict, Field

from regreen.client.access import Access
from regreen.client.channel import connect
from regreen.client.dataset import TaskClient
from regreen.client.kept import keep
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.client.stack import Endpoints
from regreen.rpc.certificates import Tls
from regreen.rpc.errors import (
    FailedPrecondition,
    InfraError,
    InvalidArgument,
)
from regreen.sandbox import v1 as pb


class SandboxConfig(BaseModel):
    """Which sandbox an adapter makes, where, and within which bounds."""

    model_config = ConfigDict(extra="forbid")

    address: str = ""
    """Sandbox service, `host:port` or `unix:/path`; empty is that of the local stack."""
    state_id: str = ""
    """State to fork; either this or `task_id`."""
    task_id: str = ""
    """Task whose State is prepared (once) and forked; needs the dataset service."""
    dataset_address: str = ""
    """Dataset service, for `task_id` alone; empty is that of the local stack."""
    tls_ca: str = ""
    """Authority of the servers' certificates (PEM file); empty is what `REGREEN_TLS` or the local
    stack says, else plain text."""
    tls_cert: str = ""
    """This client's certificate chain (PEM file)."""
    tls_key: str = ""
    """Its private key (PEM file)."""
    cwd: str = "/work/repo"
    """Directory that commands start in."""
    env: dict[str, str] = {}
    """Variables added to the sandbox's environment."""
    egress: list[str] | None = None
    """Hosts that commands may reach, as in `CreateSandbox.egress`; by default those that the task
    asks for, and none with a `state_id`."""
    limits: dict[str, float] = {}
    """Limits by name: `memory_bytes`, `pids`, `cpus`, `disk_bytes`, `inodes`."""
    labels: dict[str, str] = {}
    """Labels of the sandbox, for listing."""
    ttl_s: float = Field(default=300.0, ge=10.0)
    """Life of the sandbox after this process has died; it is kept alive until then."""
    patience_s: float = Field(default=30.0, ge=0.0)
    """How long a service that cannot be reached or is full is asked again."""
    max_command_s: float = Field(default=3600.0, gt=0.0)
    """Longest run of a command that names no time limit."""
    output_bytes: int = Field(default=1 << 20, ge=1 << 12, le=16 << 20)
    """Output kept of one command, half from its start and half from its end."""
    file_bytes: int = Field(default=32 << 20, ge=1, le=60 << 20)
    """Largest file that is read or written whole."""


def _limits(named: Mapping[str, float]) -> pb.Limits | None:
    kinds = {"memory_bytes": int, "pids": int, "cpus": float, "disk_bytes": int, "inodes": int}
    for name in named:
        if name not in kinds:
            raise InvalidArgument(
                "limits", f"no limit {name!r}", f"give some of {', '.join(kinds)}"
            )
    values: dict[str, Any] = {name: kinds[name](value) for name, value in named.items()}
    return pb.Limits(**values) if values else None


def _place(address: str, config: SandboxConfig, service: str) -> tuple[str, Access | None]:
    """Where a service is, and what to show there: as configured, else as the local stack says."""
    access = None
    if config.tls_ca:
        cert, key = (Path(name) if name else None for name in (config.tls_cert, config.tls_key))
        access = Access(Tls(Path(config.tls_ca), cert, key))
    if address:
        return address, access
    stack = Endpoints.load()
    return stack.addresses[service], access or stack.access


class HeldSandbox:
    """One sandbox and the channel to it."""

    def __init__(self, channel: grpc.aio.Channel, config: SandboxConfig, id: str) -> None:
        self._channel = channel
        self.config = config
        self.id = id
        """Sandbox id; any client of the service can fork, snapshot or diff it."""
        self._client = SandboxClient(channel, patience_s=config.patience_s)
        self._closed = False
        self._keeper = asyncio.create_task(keep(self._client, id, config.ttl_s))

    @classmethod
    async def open(cls, config: SandboxConfig) -> Self:
        """Make the sandbox that `config` describes.

        Raises:
            InvalidArgument: the configuration names no state, both kinds, an unknown limit or a
                malformed host.
            FailedPrecondition: the service gives no way to one of the hosts.
            NotFound: there is no such state or task.
            Unavailable: the service cannot be reached.
        """
        if bool(config.state_id) == bool(config.task_id):
            raise InvalidArgument("state_id", "give it or task_id, one of the two")
        limits = _limits(config.limits)
        address, access = _place(config.address, config, "sandbox")
        channel = connect(address, access)
        try:
            state_id, wanted = config.state_id, list[str]()
            if not state_id:
                state_id, wanted = await _state_of_task(config, channel)
            made = await SandboxClient(channel, patience_s=config.patience_s).create_sandbox(
                state_id,
                limits=limits,
                labels=config.labels,
                ttl_s=config.ttl_s,
                egress=wanted if config.egress is None else config.egress,
            )
        except BaseException:
            await channel.close()
            raise
        return cls(channel, config, made.id)

    @property
    def client(self) -> SandboxClient:
        """The typed client of the sandbox's service.

        Raises:
            FailedPrecondition: this sandbox was closed.
        """
        if self._closed:
            raise FailedPrecondition(f"sandbox {self.id} was closed; make a new one")
        return self._client

    async def close(self) -> None:
        """Delete the sandbox; safe to call again."""
        if self._closed:
            return
        self._closed = True
        self._keeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._keeper
        try:
            await self._client.delete_sandbox(self.id)
        finally:
            await self._channel.close()

    async def run(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        cwd: str = "",
        stdin: bytes = b"",
        timeout_s: float | None = None,
    ) -> pb.CommandResult:
        """Run a command to its end, with the configuration's environment and bounds.

        Raises:
            InfraError: the platform failed, not the command.
        """
        result = await self.client.run(
            self.id,
            argv,
            environment={**self.config.env, **(environment or {})},
            cwd=cwd or self.config.cwd,
            stdin=stdin,
            timeout_s=timeout_s or self.config.max_command_s,
            output_bytes=self.config.output_bytes,
        )
        if result.reason == pb.END_REASON_INFRA:
            raise InfraError(f"a command of {self.id} was lost: {output_text(result.stderr)}")
        return result

    def path(self, path: str) -> str:
        """`path` from the root on; a relative one starts at the configured directory."""
        return path if path.startswith("/") else f"{self.config.cwd.rstrip('/')}/{path}"


async def _state_of_task(config: SandboxConfig, channel: grpc.aio.Channel) -> tuple[str, list[str]]:
    """The State of a task, and the hosts that it asks for."""
    dataset = connect(*_place(config.dataset_address, config, "dataset"))
    try:
        task = await TaskClient(dataset, patience_s=config.patience_s).get_task(config.task_id)
    finally:
        await dataset.close()
    states = StateClient(channel, patience_s=config.patience_s)
    state_id = ""
    async for event in states.prepare_state(task.environment):
        state_id = event.state.id or state_id
    return state_id, list(task.environment.egress)


def output_text(output: pb.Output, errors: str = "backslashreplace") -> str:
    """A kept stream as text, with a line that says what was dropped."""
    dropped = output.total_bytes - len(output.head) - len(output.tail)
    middle = f"\n[... {dropped} bytes dropped ...]\n".encode() if dropped > 0 else b""
    return (output.head + middle + output.tail).decode("utf-8", errors)


_REASONS = {
    pb.END_REASON_TIMEOUT: "its time ran out",
    pb.END_REASON_OOM: "it went over the memory limit",
    pb.END_REASON_PIDS: "it went over the process limit",
    pb.END_REASON_DISK: "it went over the disk limit",
    pb.END_REASON_OUTPUT: "it printed more than the service allows",
}


def stopped(result: pb.CommandResult) -> str:
    """Why the command was stopped, as a sentence; empty where it ended by itself."""
    return _REASONS.get(result.reason, "")


def exit_code(result: pb.CommandResult) -> int:
    """The exit code as a shell tells it: 128 and the signal where there was one."""
    if result.signal:
        return 128 + result.signal
    if result.reason == pb.END_REASON_EXIT or result.exit_code > 0:
        return result.exit_code
    return 128 + 9

"""Two tenants and an operator of a sandbox service, and what one tries on the other's things."""

import contextlib
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc

from regreen.client.access import Access
from regreen.client.channel import connect
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.common import v1 as common_pb
from regreen.rpc.wire import from_rpc_error
from regreen.sandbox import v1 as pb
from regreen.tokens import TokenFile
from sandbox_svc.__main__ import serving
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.fleet.calls import METHODS
from sandbox_svc.service import SandboxHost
from sandbox_svc.settings import SandboxSettings
from tests.integration.sandbox.overlay import OverlayBuilder

TENANTS = {"a": "a", "b": "b", "all": "*"}
_LS = pb.Command(argv=["ls"])
_CHANGE = common_pb.FileChange(path="x.py", kind=common_pb.CHANGE_KIND_ADD)
BOX, EXEC, STATE = {"sandbox_id": "BOX"}, {"sandbox_id": "BOX", "exec_id": "EXEC"}, {"id": "STATE"}
ABSENT: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "StateService/GetState": (STATE,),
    "StateService/GetLineage": (STATE,),
    "StateService/ExportState": (STATE,),
    "SandboxService/CreateSandbox": ({"state_id": "STATE"},),
    "SandboxService/GetSandbox": ({"id": "BOX"},),
    "SandboxService/ForkSandbox": ({"id": "BOX", "count": 1},),
    "SandboxService/SnapshotSandbox": ({"id": "BOX"},),
    "SandboxService/RestoreSandbox": (
        {"id": "BOX", "state_id": "STATE"},
        {"id": "MY_BOX", "state_id": "STATE"},
        {"id": "BOX", "state_id": "MY_STATE"},
    ),
    "SandboxService/KeepAlive": ({"id": "BOX"},),
    "SandboxService/Exec": ({**BOX, "command": _LS},),
    "SandboxService/Run": ({**BOX, "command": _LS},),
    "SandboxService/ReadFile": ({**BOX, "path": "/work/repo/secret"},),
    "SandboxService/WriteFile": ({**BOX, "path": "/work/repo/secret", "content": b"mine"},),
    "SandboxService/ListFiles": (BOX,),
    "SandboxService/FindText": ({**BOX, "text": "s"},),
    "SandboxService/Diff": (BOX, {"sandbox_id": "MY_BOX", "base_state_id": "STATE"}),
    "SandboxService/Validate": ({"state_id": "STATE", "changes": [_CHANGE]},),
    "ExecService/StartExec": ({**BOX, "command": _LS},),
    "ExecService/AttachExec": (EXEC, {"sandbox_id": "MY_BOX", "exec_id": "EXEC"}),
    "ExecService/WriteStdin": ({**EXEC, "data": b"x"},),
    "ExecService/SignalExec": ({**EXEC, "signal": 9},),
    "ExecService/ResizeTerminal": ({**EXEC, "size": pb.TerminalSize(rows=1)},),
    "ExecService/ListExecs": (BOX,),
    "ActionService/Execute": ({"state_id": "STATE", "command": _LS, "keep_state": True},),
    "ImageService/ExportImage": ({"state_id": "STATE"},),
    "EgressService/ListEgress": (BOX, {"state_id": "STATE"}),
}
"""Methods guarded by the look-up of what they name (`Manager.get`, `StateStore.get`, the records of
`Ledger`): what another has is as if it were not there."""
SILENT = {
    "StateService/DeleteState": {"id": "STATE"},
    "SandboxService/DeleteSandbox": {"id": "BOX"},
}
"""Methods that succeed where there is nothing: they do so, and nothing is done."""
LISTS = {
    "StateService/ListStates": "states",
    "SandboxService/ListSandboxes": "sandboxes",
    "ActionService/ListQuarantined": "actions",
}
"""Methods guarded by the list that they read from: it holds the caller's own."""
MAKES = {"StateService/PrepareState", "StateService/ImportState", "ImageService/ImportImage"}
"""Methods that name nothing; what they make is the caller's, see the tests of each."""
OPEN = {"SandboxService/GetCapabilities", "SandboxService/ListQuotas"}
"""Methods that tell of the service or the caller's tenant alone."""


@dataclass
class Person:
    """Who calls, with what is its own."""

    channel: grpc.aio.Channel
    states: StateClient
    sandboxes: SandboxClient
    named: dict[str, str]

    async def call(self, name: str, fields: Mapping[str, Any], metadata=(), **ids: str) -> Any:
        """The answers to a request whose ids are written as words.

        Raises:
            RegreenError: as the service said.
        """
        method = METHODS[name]
        known = {**{f"MY_{key}": value for key, value in self.named.items()}, **ids}
        given = {
            key: known.get(value, value) if isinstance(value, str) else value
            for key, value in fields.items()
        }
        kind = self.channel.unary_stream if method.streams_out else self.channel.unary_unary
        make = kind(method.path, method.request.SerializeToString, method.response.FromString)
        call = make(method.request(**given), timeout=20, metadata=metadata)
        try:
            return [answer async for answer in call] if method.streams_out else await call
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None


class People:
    """Tokens of the tenants, and connections with them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tokens = folder, folder / "tokens.json"
        file = TokenFile(self.tokens)
        for name, tenant in TENANTS.items():
            life, now = timedelta(days=1), datetime.now(UTC)
            _, text = file.create(name, ["sandbox:admin"], tenant, life, now)
            (folder / name).write_text(text)

    @contextlib.asynccontextmanager
    async def before(self, address: str) -> AsyncIterator[dict[str, Person]]:
        """Everybody, connected to a service."""
        async with contextlib.AsyncExitStack() as stack:
            found = {}
            for name in TENANTS:
                access = Access(token_file=self.folder / name)
                channel = await stack.enter_async_context(connect(address, access))
                states = StateClient(channel, patience_s=0.0)
                found[name] = Person(channel, states, SandboxClient(channel, patience_s=0.0), {})
            yield found


@contextlib.asynccontextmanager
async def service(home: Path, listen: str, **options: Any) -> AsyncIterator[str]:
    """The address of a service whose builder lays files over nothing."""
    settings = SandboxSettings(
        home=home, listen=listen, metrics="127.0.0.1:0", drain_s=0.2, warm_seats=1, **options
    )
    runtime = EmbeddedRuntime(home / "sandbox", run_probes=False, warm_seats=1)
    async with serving(settings, SandboxHost(settings, runtime, [OverlayBuilder()])) as server:
        yield server.address


async def settle(person: Person, state: pb.State) -> None:
    """Give somebody a sandbox with a command in it."""
    box = await person.sandboxes.create_sandbox(state.id, labels={"of": "me"})
    started = pb.StartExecRequest(sandbox_id=box.id, command=pb.Command(argv=["sleep", "60"]))
    made = await pb.ExecServiceStub(person.channel).StartExec(started)
    person.named.update(STATE=state.id, BOX=box.id, EXEC=made.execution.id)


async def attempt(person: Person, name: str, fields: Mapping[str, Any], ids: dict[str, str]) -> str:
    """What becomes of a call, its ids made words again."""
    try:
        answer = await person.call(name, fields, **ids)
    except Exception as error:
        told = f"{type(error).__name__}: {error} {sorted(getattr(error, 'metadata', {}).items())}"
    else:
        told = f"answered {answer!r}"
    for key, value in ids.items():
        told = told.replace(value, key)
    return re.sub(r"0x[0-9a-f]+", "", told)


async def attack(attacker: Person, victim: Person) -> None:
    """Try every method that names something; the victim's things are as if they were not there."""
    stranger = {"STATE": "st_" + "7" * 32, "BOX": "sbx_" + "7" * 32, "EXEC": "exe_" + "7" * 32}
    for name, tries in ABSENT.items():
        for fields in tries:
            absent = await attempt(attacker, name, fields, stranger)
            found = await attempt(attacker, name, fields, victim.named)
            assert found == absent, name
            assert absent.startswith("NotFound"), (name, absent)
    for name, fields in SILENT.items():
        await attacker.call(name, fields, **victim.named)
    for name, entries in LISTS.items():
        listed = getattr(await attacker.call(name, {}), entries)
        assert not {item.id for item in listed} & set(victim.named.values()), name


async def uses(asker: Any, quota: str) -> dict[str, tuple[int, int | None]]:
    """What tenants have of what a quota bounds, and the bound, as `asker` sees it."""
    return {
        use.tenant: (use.used, use.bound if use.HasField("bound") else None)
        for use in await asker.sandboxes.list_quotas()
        if use.quota == quota
    }

"""Who changed what: a line before and after every mutation, whatever becomes of it."""

import asyncio
import contextlib
import json
import signal
import stat
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from regreen.client.access import Access
from regreen.client.channel import Caller, connect
from regreen.rpc.errors import NotFound, PermissionDenied, ResourceExhausted
from regreen.rpc.server import Server
from regreen.sandbox import v1 as pb
from regreen.settings import ServiceSettings
from regreen.tokens import TokenFile
from tests.fixtures.certs import Certs

NAME = "regreen.sandbox.v1.StateService"


class States(pb.StateServiceServicer):
    """Deletes at once, never, or not at all."""

    deleted = 0

    async def GetState(self, request, context):
        return pb.GetStateResponse()

    async def DeleteState(self, request, context):
        if request.id == "gone":
            raise NotFound("no such state")
        self.deleted += 1
        return pb.DeleteStateResponse()

    async def PrepareState(self, request, context):
        yield pb.PrepareStateResponse()


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_mutations_are_told_with_who_and_what(tmp_path):
    certs = Certs.make(tmp_path / "certs")
    file, now = TokenFile(tmp_path / "tokens.json"), datetime.now(UTC)
    token, text = file.create("ops", ["sandbox:admin"], "ours", timedelta(days=1), now)
    _, weak = file.create("weak", ["sandbox:read"], "theirs", timedelta(days=1), now)
    (tmp_path / "token").write_text(text)
    (tmp_path / "weak").write_text(weak)
    audit, servicer = tmp_path / "audit" / "sandbox.jsonl", States()
    settings = ServiceSettings(
        drain_s=0.2, tokens=file.path, audit=audit, **certs.settings(), metrics="127.0.0.1:0"
    )
    server = Server(settings, [NAME])
    pb.add_StateServiceServicer_to_server(servicer, server.grpc)
    async with server:
        for name in ("token", "weak"):
            access = Access(certs.tls("client"), tmp_path / name)
            async with connect(server.address, access) as channel:
                stub, caller = pb.StateServiceStub(channel), Caller(channel, patience_s=0.0)
                await caller._call(stub.GetState, pb.GetStateRequest(id="a"), 10)
                for id in ("a", "gone"):
                    request = pb.DeleteStateRequest(id=id, request_id=f"r-{id}")
                    with contextlib.suppress(NotFound, PermissionDenied):
                        await caller._call(stub.DeleteState, request, 10)
                if name == "token":
                    async for _ in stub.PrepareState(pb.PrepareStateRequest(), timeout=10):
                        pass
    told = rows(audit)
    assert [(row["audit"], row["method"].partition("/")[2], row.get("code")) for row in told] == [
        ("begun", "DeleteState", None),
        ("ended", "DeleteState", "OK"),
        ("begun", "DeleteState", None),
        ("ended", "DeleteState", "NOT_FOUND"),
        ("begun", "PrepareState", None),
        ("ended", "PrepareState", "OK"),
    ]
    for row in told:
        assert (row["tenant"], row["token"], row["peer"]) == ("ours", token.id, "client")
        assert datetime.fromisoformat(row["at"]) >= now
    assert [row["request_id"] for row in told] == ["r-a", "r-a", "r-gone", "r-gone", "", ""]
    assert text.split("_", 2)[2] not in audit.read_text()
    assert stat.S_IMODE(audit.stat().st_mode) == 0o600
    assert servicer.deleted == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
async def test_nothing_is_done_that_cannot_be_told():
    servicer = States()
    server = Server(ServiceSettings(drain_s=0.2, audit=Path("/dev/full")), [NAME])
    pb.add_StateServiceServicer_to_server(servicer, server.grpc)
    async with server, connect(server.address) as channel:
        stub, caller = pb.StateServiceStub(channel), Caller(channel, patience_s=0.0)
        with pytest.raises(ResourceExhausted, match=r"audit: /dev/full cannot be written"):
            await caller._call(stub.DeleteState, pb.DeleteStateRequest(id="a"), 10)
        await caller._call(stub.GetState, pb.GetStateRequest(id="a"), 10)
    assert servicer.deleted == 0


_SERVICE = """
import asyncio, os, signal, sys
from regreen.rpc.server import Server
from regreen.sandbox import v1 as pb
from regreen.settings import ServiceSettings

class States(pb.StateServiceServicer):
    async def DeleteState(self, request, context):
        os.kill(os.getpid(), signal.SIGKILL)

async def main():
    settings = ServiceSettings(listen=sys.argv[1], audit=sys.argv[2])
    server = Server(settings, ["regreen.sandbox.v1.StateService"])
    pb.add_StateServiceServicer_to_server(States(), server.grpc)
    async with server:
        await server.wait()

asyncio.run(main())
"""


async def test_a_service_that_is_killed_at_work_has_told_what_it_began(tmp_path):
    address, audit = f"unix:{tmp_path / 's'}", tmp_path / "audit.jsonl"
    command = [sys.executable, "-c", _SERVICE, address, str(audit)]
    service = await asyncio.create_subprocess_exec(*command)
    try:
        async with connect(address) as channel:
            await asyncio.wait_for(channel.channel_ready(), 60)
            request = pb.DeleteStateRequest(id="a", request_id="the-last")
            with pytest.raises(Exception, match=r"(?i)unavailable|closed|reset"):
                await pb.StateServiceStub(channel).DeleteState(request, timeout=30)
            # It ended itself; to kill what is dead would take its exit status from the waiter.
            assert await asyncio.wait_for(service.wait(), 30) == -signal.SIGKILL
    finally:
        if service.returncode is None:
            service.kill()
            await service.wait()
    assert [(row["audit"], row["request_id"]) for row in rows(audit)] == [("begun", "the-last")]

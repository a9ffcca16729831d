"""Who changed what: a line before and after every mutation, whatever becomes of it."""

import asyncio
import contextlib
import json
import os
import resource
import signal
import stat
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from regreen.client.access import Access
from regreen.client.channel import Caller, connect
from regreen.rpc.audit import Audit
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
        if request.id == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return pb.DeleteStateResponse()

async def main():
    settings = ServiceSettings(listen=sys.argv[1], audit=sys.argv[2])
    server = Server(settings, ["regreen.sandbox.v1.StateService"])
    pb.add_StateServiceServicer_to_server(States(), server.grpc)
    async with server:
        await server.wait()

asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def process(tmp_path: Path):
    """A service in a process of its own that appends to `audit.jsonl`."""
    address, audit = f"unix:{tmp_path / 's'}", tmp_path / "audit.jsonl"
    command = [sys.executable, "-c", _SERVICE, address, str(audit)]
    service = await asyncio.create_subprocess_exec(*command)
    try:
        async with connect(address) as channel:
            await asyncio.wait_for(channel.channel_ready(), 60)
            yield service, pb.StateServiceStub(channel), audit
    finally:
        if service.returncode is None:
            service.kill()
            await service.wait()


async def test_a_service_that_is_killed_at_work_has_told_what_it_began(tmp_path):
    async with process(tmp_path) as (service, stub, audit):
        request = pb.DeleteStateRequest(id="killed", request_id="the-last")
        with pytest.raises(Exception, match=r"(?i)unavailable|closed|reset"):
            await stub.DeleteState(request, timeout=30)
        # It ended itself; to kill what is dead would take its exit status from the waiter.
        assert await asyncio.wait_for(service.wait(), 30) == -signal.SIGKILL
    assert [(row["audit"], row["request_id"]) for row in rows(audit)] == [("begun", "the-last")]


async def test_a_full_disk_tears_no_line_of_what_was_done(tmp_path):
    audit, done, refused = tmp_path / "audit.jsonl", [], []
    # The bound is on every file of the process: this one alone shall meet it.
    audit.write_text('{"audit": "before"}\n' * (1 << 16))
    async with process(tmp_path) as (service, stub, _):

        async def delete(name: str) -> None:
            try:
                await stub.DeleteState(pb.DeleteStateRequest(id=name, request_id=name), timeout=30)
            except grpc.aio.AioRpcError as error:
                refused.append(error.code())
            else:
                done.append(name)

        _, most = resource.prlimit(service.pid, resource.RLIMIT_FSIZE)
        for room in range(0, 600, 40):  # ends within the first line, between the two, in the second
            full = audit.stat().st_size + room
            resource.prlimit(service.pid, resource.RLIMIT_FSIZE, (full, most))
            await delete(f"full-{room}")
            resource.prlimit(service.pid, resource.RLIMIT_FSIZE, (most, most))
            await delete(f"room-{room}")
    told = [row for row in rows(audit) if row["audit"] != "before"]
    assert [row["request_id"] for row in told if row["audit"] == "begun"] == done
    ended = {row["request_id"] for row in told if row["audit"] == "ended"}
    assert set(refused) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert set(done) - ended, "no second line met the bound"
    assert ended >= {name for name in done if name.startswith("room")}


def test_a_part_that_another_process_left_does_not_swallow_a_line(tmp_path):
    path = tmp_path / "audit.jsonl"
    path.write_text('{"audit": "begun", "request')
    for name in ("one", "two"):
        audit = Audit(path)
        audit.begin(request_id=name)
        audit.close()
    torn, *whole = path.read_text().splitlines()
    assert torn == '{"audit": "begun", "request'
    assert [json.loads(line)["request_id"] for line in whole] == ["one", "two"]


def test_what_another_appended_is_not_taken_back(tmp_path):
    """A part that others wrote after stays, and the next line begins behind them."""
    path = tmp_path / "audit.jsonl"
    with path.open("ab") as other, pytest.MonkeyPatch.context() as patch:
        audit, write = Audit(path), os.write

        def cut(handle: int, line: bytes) -> int:
            written = write(handle, line[:20])
            other.write(b"another's")
            other.flush()
            return written

        patch.setattr(os, "write", cut)
        with pytest.raises(ResourceExhausted, match="only a part of a line"):
            audit.begin(request_id="refused")
        patch.setattr(os, "write", write)
        audit.begin(request_id="done")
        audit.close()
    torn, last = filter(None, path.read_text().splitlines())
    assert torn.endswith("another's")
    assert json.loads(last)["request_id"] == "done"

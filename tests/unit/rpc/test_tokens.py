"""Bearer tokens through a real server: deny by default, scopes, revocation, what is never told."""

import asyncio
import contextlib
import json
import os
import stat
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from click.testing import Result
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from pydantic import ValidationError
from typer.testing import CliRunner

from regreen.cli.main import make_app
from regreen.client.access import Access
from regreen.client.channel import Caller, connect
from regreen.rpc import scopes
from regreen.rpc.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
)
from regreen.rpc.server import Server
from regreen.sandbox import v1 as pb
from regreen.settings import ServiceSettings
from regreen.tokens import TokenFile
from tests.fixtures.certs import Certs

NAME = "regreen.sandbox.v1.StateService"
DAY = timedelta(days=1)


class States(pb.StateServiceServicer):
    """Counts calls; forgets states by id."""

    def __init__(self) -> None:
        self.calls = self.chunks = self.deleted = 0

    async def GetState(self, request, context):
        self.calls += 1
        return pb.GetStateResponse(state=pb.State(id=request.id))

    async def DeleteState(self, request, context):
        self.deleted += 1
        return pb.DeleteStateResponse()

    async def PrepareState(self, request, context):
        self.calls += 1
        yield pb.PrepareStateResponse()

    async def ImportState(self, request_iterator, context):
        async for _ in request_iterator:
            self.chunks += 1
        return pb.ImportStateResponse()


class World:
    """A service that asks for tokens, and a maker of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, TokenFile(folder / "tokens.json")
        self.servicer = States()
        self.address = ""

    def token(self, *granted: str, tenant: str = "ours", days: float = 1) -> Path:
        """A file with a new token."""
        now = datetime.now(UTC) - (2 * DAY if days < 0 else timedelta(0))
        token, text = self.file.create("test", granted, tenant, abs(days) * DAY, now)
        path = self.folder / f"{token.id}.token"
        path.write_text(f"{text}\n")
        return path

    @contextlib.asynccontextmanager
    async def stub(self, token_file: Path | None):
        async with connect(self.address, Access(token_file=token_file)) as channel:
            caller = Caller(channel, patience_s=0.0)
            states = pb.StateServiceStub(channel)

            async def call(method: str, **fields):
                request = getattr(pb, f"{method}Request")(**fields)
                return await caller._call(getattr(states, method), request, 10)

            yield call


@pytest.fixture
async def world(tmp_path):
    found = World(tmp_path)
    found.token("sandbox:read")
    server = Server(ServiceSettings(drain_s=0.2, tokens=found.file.path), [NAME])
    pb.add_StateServiceServicer_to_server(found.servicer, server.grpc)
    async with server:
        found.address = server.address
        yield found


async def test_a_call_needs_a_token_that_covers_it(world):
    async with world.stub(world.token("sandbox:read")) as call:
        assert (await call("GetState", id="st_1")).state.id == "st_1"
        with pytest.raises(PermissionDenied, match=r"lacks the scope sandbox:admin; `regreen tok"):
            await call("DeleteState", id="st_1", request_id="r")
    async with world.stub(world.token("dataset:admin", "policy:admin")) as call:
        with pytest.raises(PermissionDenied, match="lacks the scope sandbox:read"):
            await call("GetState", id="st_1")
    async with world.stub(world.token("sandbox:admin")) as call:
        await call("DeleteState", id="st_1", request_id="r")
    assert (world.servicer.calls, world.servicer.deleted) == (1, 1)


async def test_tokens_that_do_not_hold_are_refused(world):
    good = world.token("sandbox:admin").read_text()
    head = "_".join(good.split("_", 2)[:2])
    forged = {
        "unknown": "rgt_0123456789ab_" + "A" * 43,
        "other secret": f"{head}_{'A' * 43}",
        "cut": good.strip()[:-1],
        "id alone": good.split("_")[1],
        "hash": world.file.list()[-1].sha256,
        "json": json.dumps({"id": "x"}),
    }
    for name, text in forged.items():
        path = world.folder / f"{name}.txt"
        path.write_text(text)
        async with world.stub(path) as call:
            with pytest.raises(Unauthenticated, match="not known here"):
                pytest.fail(f"{name}: {await call('GetState', id='st_1')}")
    async with world.stub(None) as call:
        with pytest.raises(Unauthenticated, match="REGREEN_TOKEN_FILE names"):
            await call("GetState", id="st_1")
    async with world.stub(world.token("sandbox:admin", days=-1)) as call:
        with pytest.raises(Unauthenticated, match="ended at"):
            await call("GetState", id="st_1")
    assert world.servicer.calls == 0


async def test_a_revoked_token_fails_at_its_next_call(world):
    path = world.token("sandbox:read")
    async with world.stub(path) as call:
        await call("GetState", id="st_1")
        id = path.stem
        world.file.revoke(id, datetime.now(UTC))
        with pytest.raises(Unauthenticated, match=f"token {id} was revoked"):
            await call("GetState", id="st_1")
        path.write_text(world.token("sandbox:read").read_text())
        await call("GetState", id="st_1")  # the client takes up its new token


async def test_damage_to_the_file_locks_nobody_out_and_lets_nobody_in(world):
    path = world.token("sandbox:read")
    async with world.stub(path) as call:
        await call("GetState", id="st_1")
        whole = world.file.path.read_text()
        world.file.path.write_text(whole[: len(whole) // 2])
        await call("GetState", id="st_1")
        world.file.path.unlink()
        await call("GetState", id="st_1")
        world.file.path.write_text('{"version": 1, "tokens": []}')
        with pytest.raises(Unauthenticated):
            await call("GetState", id="st_1")


async def test_what_is_refused_is_not_read(world):
    """Neither a large request nor a stream of them is taken from who may not send it."""
    async with connect(world.address, Access()) as channel:
        states = pb.StateServiceStub(channel)
        sent = 0

        async def chunks():
            nonlocal sent
            while sent < 2000:
                sent += 1
                yield pb.ImportStateRequest(chunk=bytes(1 << 16))

        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await states.ImportState(chunks(), timeout=30)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert sent < 2000
        stream = states.PrepareState(pb.PrepareStateRequest(), timeout=30)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stream.read()
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert (world.servicer.calls, world.servicer.chunks) == (0, 0)


async def test_health_is_open_and_reflection_is_not(world):
    async def described(channel) -> grpc.StatusCode:
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]))
        try:
            async for _ in call:
                return grpc.StatusCode.OK
        except grpc.aio.AioRpcError as error:
            return error.code()
        return await call.code()

    async with connect(world.address, Access()) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert await described(channel) is grpc.StatusCode.UNAUTHENTICATED
    async with connect(world.address, Access(token_file=world.token("policy:read"))) as channel:
        assert await described(channel) is grpc.StatusCode.OK


async def test_a_method_without_a_scope_is_refused_to_everybody(world, monkeypatch):
    monkeypatch.setattr(
        scopes, "SCOPES", {k: v for k, v in scopes.SCOPES.items() if not k.endswith("/GetState")}
    )
    async with world.stub(world.token(*scopes.KNOWN)) as call:
        with pytest.raises(PermissionDenied, match="is in no scope; nobody may call it"):
            await call("GetState", id="st_1")


async def test_a_request_id_of_another_tenant_replays_nothing(world):
    ours, theirs = world.token("sandbox:admin"), world.token("sandbox:admin", tenant="theirs")
    for token, done in ((ours, 1), (ours, 1), (theirs, 2), (ours, 2)):
        async with world.stub(token) as call:
            await call("DeleteState", id="st_1", request_id="the-same")
        assert world.servicer.deleted == done
    async with world.stub(ours) as call:
        with pytest.raises(InvalidArgument, match="was used for a"):
            await call("DeleteState", id="st_2", request_id="the-same")
    async with world.stub(theirs) as call:
        await call("DeleteState", id="st_2", request_id="another")


async def test_a_token_goes_over_no_network_in_plain_text(world, tmp_path, monkeypatch):
    token = world.token("sandbox:read")
    for target in ("10.0.0.1:50052", "dns:///sandbox:50052", "sandbox.example:50052"):
        with pytest.raises(FailedPrecondition, match=r"would go to .* in plain text; REGREEN_TLS"):
            connect(target, Access(token_file=token))
    with pytest.raises(ValidationError, match="they would cross the network in plain text"):
        ServiceSettings(listen="0.0.0.0:0", insecure=True, tokens=world.file.path)
    certs = Certs.make(tmp_path / "certs")
    settings = ServiceSettings(drain_s=0.2, tokens=world.file.path, **certs.settings())
    server = Server(settings, [NAME])
    pb.add_StateServiceServicer_to_server(world.servicer, server.grpc)
    monkeypatch.setenv("REGREEN_TLS", str(certs.folder.path / "client"))
    monkeypatch.setenv("REGREEN_TOKEN_FILE", str(token))
    async with server, connect(server.address) as channel:
        answer = await pb.StateServiceStub(channel).GetState(pb.GetStateRequest(id="x"), timeout=9)
        assert answer.state.id == "x"


def test_wrong_files_are_told_before_anything_serves(tmp_path):
    file = tmp_path / "tokens.json"
    for text, said in (
        ("{", "cannot be used"),
        ('{"version": 2, "tokens": []}', "version 2"),
        ('{"version": 1, "tokens": [{"id": "x"}]}', "cannot be used"),
        ("[]", "cannot be used"),
    ):
        file.write_text(text)
        with pytest.raises(ValidationError, match=f"tokens: .*{said}.*regreen tokens create"):
            ServiceSettings(tokens=file)
    (tmp_path / "empty").write_text("\n")
    for path, said in ((tmp_path / "no", "cannot be read"), (tmp_path / "empty", "holds no token")):
        with pytest.raises(FailedPrecondition, match=said):
            connect("127.0.0.1:1", Access(token_file=path))


def test_only_hashes_are_kept(tmp_path):
    file = TokenFile(tmp_path / "t.json")
    before = os.umask(0)
    try:
        token, text = file.create("ci", ["sandbox:read"], "ours", DAY, datetime.now(UTC))
    finally:
        os.umask(before)
    kept = file.path.read_text()
    assert text not in kept
    assert text.split("_", 2)[2] not in kept
    assert token.sha256 in kept
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    with pytest.raises(NotFound, match=r"no token 'x'; `regreen tokens list`"):
        file.revoke("x", datetime.now(UTC))
    for wrong in ({"scopes": ["sandbox:exec"]}, {"scopes": []}, {"tenant": "a b"}, {"name": ""}):
        given = {"name": "ci", "scopes": ["sandbox:read"], "tenant": "ours"} | wrong
        with pytest.raises(InvalidArgument):
            file.create(life=DAY, now=datetime.now(UTC), **given)
    assert len(file.list()) == 1


def cli(*words: str) -> Result:
    return CliRunner().invoke(make_app(["tokens"]), ["tokens", *words])


def test_the_commands_tell_no_token(tmp_path):
    place = ["--file", str(tmp_path / "t.json"), "--json"]
    out = tmp_path / "ci.token"
    words = ["create", "ci", "--scope", "sandbox:read", "--tenant", "ours", "--out", str(out)]
    made = cli(*words, *place)
    assert made.exit_code == 0, made.stderr
    text = out.read_text().strip()
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    row = json.loads(made.stdout)
    assert (row["tenant"], row["scopes"], row["state"]) == ("ours", ["sandbox:read"], "holds")
    listed, gone = cli("list", *place), cli("revoke", row["id"], *place)
    assert json.loads(listed.stdout) == row
    assert json.loads(gone.stdout)["state"] == "revoked"
    for said in (made, listed, gone):
        assert text.split("_", 2)[2] not in said.stdout + said.stderr
    again = cli(*words, *place)
    assert (again.exit_code, again.stdout) == (2, "")
    assert "is there already" in again.stderr
    assert len(TokenFile(tmp_path / "t.json").list()) == 1
    words[3] = "sandbox:exec"
    assert cli(*words[:-1], str(tmp_path / "b"), *place).exit_code == 2


async def test_no_log_holds_a_token(tmp_path):
    """A service at its most talkative is called with tokens, good and bad; its log has none."""
    file = TokenFile(tmp_path / "tokens.json")
    _, good = file.create("good", ["judge:read"], "ours", DAY, datetime.now(UTC))
    script = (
        "import asyncio, sys\n"
        "from judge_svc.__main__ import main\n"
        "from judge_svc.settings import JudgeSettings\n"
        "from regreen.rpc import logging\n"
        "logging.configure('judge', 'debug')\n"
        "asyncio.run(main(JudgeSettings(listen=sys.argv[1], metrics='127.0.0.1:0',\n"
        "    log_level='debug', home=sys.argv[2], tokens=sys.argv[3])))\n"
    )
    address = f"unix:{tmp_path / 's'}"
    command = [sys.executable, "-c", script, address, str(tmp_path), str(file.path)]
    service = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    try:
        from regreen.client.judge import JudgeClient
        from regreen.judge import v1 as judge_pb

        bad = "rgt_0123456789ab_" + "B" * 43
        for text, error in ((good, PermissionDenied), (bad, Unauthenticated)):
            (tmp_path / "token").write_text(text)
            async with connect(address, Access(token_file=tmp_path / "token")) as channel:
                client = JudgeClient(channel, patience_s=60.0)
                stub = judge_pb.JudgeServiceStub(channel)
                with pytest.raises(error):
                    await client._call(stub.Judge, judge_pb.JudgeRequest(request_id="r"), 10)
    finally:
        service.terminate()
        said = (await service.communicate())[1].decode()
    assert "call refused" in said
    for text in (good, bad):
        assert text.split("_", 2)[2] not in said

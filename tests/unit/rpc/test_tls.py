"""Mutual TLS through real servers: who is let in, and that renewing certificates drops no call."""

import asyncio
import contextlib
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest

from regreen.client.access import Access
from regreen.client.channel import Caller, check_answers, connect, stream
from regreen.rpc.certificates import Tls, Watched
from regreen.rpc.errors import FailedPrecondition, Unavailable
from regreen.rpc.server import Server
from regreen.sandbox import v1 as pb
from regreen.settings import ServiceSettings
from tests.fixtures.certs import DAY, Certs

NAME = "regreen.sandbox.v1.StateService"


class States(pb.StateServiceServicer):
    """Answers who calls, and streams until it is cancelled."""

    def __init__(self) -> None:
        self.calls = 0
        self.certificates: set[bytes] = set()

    async def GetState(self, request, context):
        self.calls += 1
        shown = context.auth_context()
        self.certificates |= set(shown.get("x509_pem_cert", ()))
        (name,) = shown.get("x509_common_name", (b"nobody",))
        return pb.GetStateResponse(state=pb.State(id=name.decode()))

    async def ExportState(self, request, context):
        while True:
            yield pb.ExportStateResponse(chunk=b"x")
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def serving(certs: Certs, name: str = "server", listen: str = "127.0.0.1:0"):
    servicer = States()
    settings = ServiceSettings(listen=listen, drain_s=0.2, **certs.settings(name))
    server = Server(settings, [NAME])
    pb.add_StateServiceServicer_to_server(servicer, server.grpc)
    async with server:
        yield servicer, server.address


async def ask(address: str, access: Access | None) -> str:
    async with connect(address, access) as channel:
        caller = Caller(channel, patience_s=0.0)
        stub = pb.StateServiceStub(channel)
        answer = await caller._call(stub.GetState, pb.GetStateRequest(id="any"), 10)
        return answer.state.id


@pytest.fixture
def certs(tmp_path) -> Certs:
    return Certs.make(tmp_path / "certs")


@pytest.fixture
def strangers(tmp_path) -> Certs:
    return Certs.make(tmp_path / "strangers")


async def test_both_ends_know_each_other(certs, tmp_path, monkeypatch):
    certs.client("rollout-worker")
    async with serving(certs) as (_, address):
        assert await ask(address, Access(certs.tls("rollout-worker"))) == "rollout-worker"
        monkeypatch.setenv("REGREEN_TLS", str(certs.folder.path / "client"))
        assert await ask(address, None) == "client"
    async with serving(certs, listen=f"unix:{tmp_path / 's'}") as (_, address):
        assert await ask(address, None) == "client"


async def test_who_shows_no_good_certificate_reaches_nothing(certs, strangers):
    good = certs.tls("client")
    theirs = strangers.tls("client")
    attackers = {
        "no certificate": Access(Tls(good.ca)),
        "plain text": Access(),
        "another authority's": Access(Tls(good.ca, theirs.cert, theirs.key)),
        "one that has ended": certs.client("late", age=3 * DAY),
    }
    async with serving(certs) as (servicer, address):
        for who, access in attackers.items():
            with pytest.raises(Unavailable, match="no service answers at"):
                pytest.fail(f"{who} was let in as {await ask(address, access)}")
        assert servicer.calls == 0
        assert await ask(address, Access(good)) == "client"


async def test_a_service_that_shows_no_good_certificate_is_told_nothing(certs, strangers):
    client = Access(certs.tls("client"))
    certs.service("late", age=3 * DAY)
    certs.service("elsewhere", "other.example")
    impostors = (
        (strangers, "server", "authority"),
        (certs, "late", "has ended"),
        (certs, "elsewhere", "is of another name: `regreen certs issue"),
        (certs, "client", "no service answers"),  # a client's own certificate serves nothing
    )
    for whose, name, said in impostors:
        async with serving(whose, name) as (servicer, address):
            with pytest.raises(Unavailable, match=said):
                await ask(address, client)
            assert servicer.calls == 0
    async with serving(certs) as (_, address):
        with pytest.raises(Unavailable, match="of another name"):
            await ask(address, Access(replace(certs.tls("client"), server_name="policy")))
        named = replace(certs.tls("client"), server_name="server")
        assert await ask(address, Access(named)) == "client"


async def test_certificates_are_renewed_under_load_without_a_failed_call(certs):
    folder = certs.folder
    former = Tls.of(Path(shutil.copytree(folder.path / "client", folder.path.parent / "former")))
    done, failed, stop = 0, list[str](), asyncio.Event()

    async def call_on(stub) -> None:
        nonlocal done
        while not stop.is_set():
            try:
                await stub.GetState(pb.GetStateRequest(id="any"), timeout=30)
                done += 1
            except grpc.aio.AioRpcError as error:
                failed.append(str(error.details()))

    def now() -> datetime:
        return datetime.now(UTC)

    steps = (
        lambda: folder.renew(["server", "client"], 2 * DAY, now()),
        lambda: folder.renew_authority(100 * DAY, now()),
        lambda: folder.renew([], 2 * DAY, now()),
        folder.retire,
    )
    async with serving(certs) as (servicer, address):
        async with connect(address, Access(certs.tls("client"))) as channel:
            stub = pb.StateServiceStub(channel)
            async with (
                stream(stub.ExportState(pb.ExportStateRequest(id="any"))) as parts,
                asyncio.TaskGroup() as group,
            ):
                for _ in range(4):
                    group.create_task(call_on(stub))
                shown = 1
                for number, step in enumerate((*steps, *steps)):
                    await asyncio.to_thread(step)
                    shown, at = shown + (number % 2 == 0), done
                    while done < at + 20 or len(servicer.certificates) < shown:
                        await stub.GetState(pb.GetStateRequest(id="any"), timeout=30)
                    await parts.read()  # a stream of the first connection goes on
                stop.set()
        assert not failed
        assert len(servicer.certificates) == 5, "the first, and one for each renewal"
        with pytest.raises(Unavailable):
            await ask(address, Access(former))
        assert await ask(address, Access(certs.tls("client"))) == "client"


async def test_a_pair_that_is_half_replaced_is_not_used(certs):
    folder = certs.folder.path
    own = Tls.of(Path(shutil.copytree(folder / "client", folder.parent / "own")))
    files = Watched(own)
    before = files.pem
    certs.client("client")
    fresh = certs.tls("client")
    shutil.copy(fresh.key, own.key)
    assert files.renewed() is None
    assert files.pem == before
    shutil.copy(fresh.cert, own.cert)
    renewed = files.renewed()
    assert renewed is not None
    assert renewed.key == fresh.key.read_bytes()
    assert files.renewed() is None
    own.cert.unlink()
    assert files.renewed() is None
    with pytest.raises(FailedPrecondition, match=r"certificates .*tls\.crt.* cannot be used"):
        Watched(own)


async def test_a_client_whose_new_certificate_is_not_trusted_keeps_its_connection(
    certs, strangers, tmp_path
):
    own = Tls.of(Path(shutil.copytree(certs.folder.path / "client", tmp_path / "own")))
    async with serving(certs) as (_, address), connect(address, Access(own)) as channel:
        stub = pb.StateServiceStub(channel)
        await stub.GetState(pb.GetStateRequest(id="any"), timeout=30)
        for name in ("tls.key", "tls.crt"):
            shutil.copy(strangers.folder.path / "client" / name, tmp_path / "own" / name)
        for _ in range(50):
            await stub.GetState(pb.GetStateRequest(id="any"), timeout=30)
        for name in ("tls.key", "tls.crt"):
            shutil.copy(certs.folder.path / "client" / name, tmp_path / "own" / name)
        await stub.GetState(pb.GetStateRequest(id="any"), timeout=30)


async def test_a_client_whose_connection_is_gone_takes_the_new_certificate_at_once(certs, tmp_path):
    async with connect(f"unix:{tmp_path / 's'}", Access(certs.tls("client"))) as channel:
        stub = pb.StateServiceStub(channel)
        async with serving(certs, listen=f"unix:{tmp_path / 's'}") as (servicer, _):
            await stub.GetState(pb.GetStateRequest(id="any"), timeout=30)
        certs.folder.renew_authority(100 * DAY, datetime.now(UTC))
        certs.folder.renew([], 2 * DAY, datetime.now(UTC))
        certs.folder.retire()
        async with serving(certs, listen=f"unix:{tmp_path / 's'}") as (servicer, _):
            await check_answers(channel, "the socket", 30.0)
            await stub.GetState(pb.GetStateRequest(id="any"), timeout=30)
            assert servicer.calls == 1

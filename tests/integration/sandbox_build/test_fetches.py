"""What a preparation fetches: from which hosts, recorded how, and that no password stays behind."""

import asyncio
import base64
import contextlib
import hashlib
import logging
import os
import tarfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import structlog
from starlette.responses import RedirectResponse, Response

from regreen.client.channel import connect
from regreen.client.egress import EgressClient
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.rpc.errors import InvalidArgument, MissingDependency, NotFound
from regreen.sandbox import v1 as pb
from sandbox_svc.__main__ import serving
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.builders.base import DistFile, EnvironmentSpec, Pin
from sandbox_svc.service import SandboxHost
from sandbox_svc.settings import SandboxSettings
from sandbox_svc.state_records import state_id
from sandbox_svc.wheelhouse import DistStore
from tests.fixtures.index import wheel_index
from tests.fixtures.policy.http import serving as serving_http
from tests.fixtures.tasks.tiny_task import tiny_spec

SECRET = "pa55-word-of-the-index"
BACKEND = """
import socket, urllib.request, zipfile
def build_wheel(folder, config=None, metadata=None):
    saw = []
    try:
        socket.create_connection(("127.0.0.1", {port}), 3)
        saw.append("connected")
    except OSError as error:
        saw.append(error.errno)
    saw.append(sorted(urllib.request.getproxies()))
    info = "prober-1.0.dist-info"
    with zipfile.ZipFile(folder + "/prober-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("prober.py", "SAW = " + repr(saw))
        wheel.writestr(info + "/METADATA", "Metadata-Version: 2.1\\nName: prober\\nVersion: 1.0\\n")
        tag = "Root-Is-Purelib: true\\nTag: py3-none-any\\n"
        wheel.writestr(info + "/WHEEL", "Wheel-Version: 1.0\\n" + tag)
        wheel.writestr(info + "/RECORD", "")
    return "prober-1.0-py3-none-any.whl"
"""


@dataclass
class Index:
    """A package index that asks for a password, and what it was asked."""

    app: object
    redirect: str = ""
    """Where files are, if not here."""
    asked: list[str] = field(default_factory=list)
    connections: int = 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        self.asked.append(scope["path"])
        wanted = b"Basic " + base64.b64encode(f"user:{SECRET}".encode())
        if given != wanted:
            await Response(status_code=401)(scope, receive, send)
        elif self.redirect and scope["path"].startswith("/files/"):
            await RedirectResponse(f"{self.redirect}{scope['path']}?token={SECRET}")(
                scope, receive, send
            )
        else:
            await self.app(scope, receive, send)


@dataclass
class World:
    """A service whose index asks for a password."""

    index: Index
    url: str
    host: SandboxHost
    states: StateClient
    sandboxes: SandboxClient
    records: EgressClient
    spec: EnvironmentSpec
    home: Path

    async def asked(self, wanted: str) -> list[pb.EgressRecord]:
        return [record async for record in self.records.egress_records(state_id=wanted)]


def sdist(folder: Path, port: int) -> Path:
    """A source archive whose build looks for a network."""
    root = folder / "prober-1.0"
    root.mkdir()
    (root / "backend.py").write_text(BACKEND.format(port=port))
    (root / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: prober\nVersion: 1.0\n")
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "prober"\nversion = "1.0"\n'
    )
    path = folder / "prober-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(root, arcname="prober-1.0")
    return path


@contextlib.asynccontextmanager
async def world(tmp_path: Path, monkeypatch, **settings) -> AsyncIterator[World]:
    """A service with an empty store, and an index that has what the tiny task needs."""
    tmp_path.chmod(0o711)
    files, home = tmp_path / "index", tmp_path / "home"
    files.mkdir()
    index = Index(wheel_index(files))
    async with serving_http(index) as url:
        port = int(url.rpartition(":")[2])
        spec = tiny_spec(DistStore(tmp_path / "elsewhere"), files)
        archive = sdist(files, port)
        found = DistFile(archive.name, hashlib.sha256(archive.read_bytes()).hexdigest())
        spec = replace(spec, pins=(*spec.pins, Pin("prober", "1.0", (found,))))
        signed = url.replace("://", f"://user:{SECRET}@")
        monkeypatch.setenv("REGREEN_INDEX_URL", f"{signed}/simple/")
        facts = SandboxSettings(
            home=home, listen=f"unix:{tmp_path}/s", metrics="127.0.0.1:0", drain_s=0.2, **settings
        )
        runtime = EmbeddedRuntime(home / "sandbox", run_probes=False, warm_seats=1)
        host = SandboxHost(facts, runtime)
        async with contextlib.AsyncExitStack() as exits:
            try:
                server = await exits.enter_async_context(serving(facts, host))
            except MissingDependency as error:
                pytest.skip(f"no sandboxes here: {error}")
            channel = await exits.enter_async_context(connect(server.address))
            states = StateClient(channel, patience_s=0.0)
            sandboxes = SandboxClient(channel, patience_s=0.0)
            records = EgressClient(channel, patience_s=0.0)
            yield World(index, url, host, states, sandboxes, records, spec, home)


def holders(folder: Path, secret: bytes) -> list[Path]:
    """Files below a folder that hold a secret; what is being removed meanwhile may be missed."""
    found = []
    for root, _, names in os.walk(folder):
        for path in (Path(root, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and not path.is_symlink() and secret in path.read_bytes():
                    found.append(path)
    return found


async def test_a_preparation_says_what_it_fetched_and_keeps_no_password(
    tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.DEBUG)
    async with world(tmp_path, monkeypatch) as here:
        with structlog.testing.capture_logs() as logs:
            state = await here.host.prepare(here.spec)
        records = await here.asked(state.id)
        named = {f.filename: f.sha256 for pin in here.spec.pins for f in pin.files}
        named |= {f.filename: f.sha256 for pin in here.spec.wheelhouse for f in pin.files}
        named[here.spec.source.filename] = here.spec.source.sha256
        fetched = {
            record.path.rpartition("/")[2]: record.received_sha256
            for record in records
            if record.path.startswith("/files/")
        }
        assert fetched == named, "the digest of every file that came is that of its pin"
        assert sorted(record.path for record in records) == sorted(here.index.asked)
        assert {(r.method, r.host, r.status, r.allowed, r.detail, r.state_id) for r in records} == {
            ("GET", "127.0.0.1", 200, True, "", state.id)
        }
        assert all(record.create_time.ToSeconds() and not record.sandbox_id for record in records)
        assert len([log for log in logs if log["event"] == "egress"]) == len(records)

        box = await here.sandboxes.create_sandbox(state.id)
        python = ["/work/env/bin/python", "-c", "import prober; print(prober.SAW)"]
        told = await here.sandboxes.run(box.id, python)
        assert told.stdout.head == b"[111, []]\n", "code of the build found a network"
        shown = await here.sandboxes.run(box.id, ["sh", "-c", "env; cat /proc/*/environ"])
        assert b"PATH=" in shown.stdout.head
        assert SECRET.encode() not in shown.stdout.head
        encoded = base64.b64encode(f"user:{SECRET}".encode())
        for secret in (SECRET.encode(), encoded):
            assert await asyncio.to_thread(holders, here.home, secret) == []
            assert secret.decode() not in f"{records}{logs}{caplog.text}"
        assert await asyncio.to_thread(holders, here.home, b"def salute()"), "files were searched"

        snapshot = await here.sandboxes.snapshot_sandbox(box.id)
        assert await here.asked(snapshot.id) == records
        page = await here.records.list_egress(state_id=state.id, page_size=2)
        assert list(page.records) == records[:2]
        rest = await here.records.list_egress(state_id=state.id, page_token=page.next_page_token)
        assert list(rest.records) == records[2:]
        before = len(here.index.asked)
        again = await here.host.prepare(replace(here.spec, version="1.1"))
        assert await here.asked(again.id) == []
        assert len(here.index.asked) == before, "what is here is not fetched again"


async def test_records_are_as_durable_as_their_state(tmp_path, monkeypatch):
    async with world(tmp_path, monkeypatch) as here:
        state = await here.host.prepare(here.spec)
        records = await here.asked(state.id)
        here.host.egress.ledger._kept.clear()
        assert records
        assert await here.asked(state.id) == records
        archive = [chunk async for chunk in here.states.export_state(state.id)]
        await here.states.delete_state(state.id)
        with pytest.raises(NotFound):
            await here.asked(state.id)
        assert (await here.states.import_state(archive)).id == state.id
        assert await here.asked(state.id) == records


async def test_a_host_that_is_not_on_the_list_is_never_asked(tmp_path, monkeypatch):
    async with world(tmp_path, monkeypatch) as here:
        port = here.url.rpartition(":")[2]
        here.index.redirect = f"http://localhost:{port}"
        with pytest.raises(MissingDependency, match=f"localhost:{port}.*prepare_hosts"):
            await here.host.prepare(here.spec)
        records = await here.asked(state_id("", here.spec.digest))
        refused = [record for record in records if not record.allowed]
        assert {(r.host, r.port) for r in refused} == {("localhost", int(port))}
        assert {(r.status, r.received_bytes) for r in refused} == {(0, 0)}
        assert SECRET not in str(records), "the query of a redirect can be a password"
        assert here.index.asked.count(refused[0].path) == 1


async def test_the_operator_can_add_hosts_and_passwords_do_not_go_there(tmp_path, monkeypatch):
    async with world(tmp_path, monkeypatch, prepare_hosts="localhost:1") as refusing:
        refusing.index.redirect = "http://localhost:2"
        with pytest.raises(MissingDependency, match="prepare_hosts"):
            await refusing.host.prepare(refusing.spec)
    (tmp_path / "other").mkdir()
    async with world(tmp_path / "other", monkeypatch, prepare_hosts="localhost:1") as here:
        here.index.redirect = "http://localhost:1"  # nobody listens there
        monkeypatch.setattr("regreen.pkgindex.time.monotonic", iter_clock())
        with pytest.raises(MissingDependency):
            await here.host.prepare(here.spec)
        records = await here.asked(state_id("", here.spec.digest))
        added = [record for record in records if record.host == "localhost"]
        assert added
        assert {(r.allowed, r.detail) for r in added} == {(True, "there was no answer")}


def iter_clock():
    """A clock that runs a minute a look."""
    now = [0.0]

    def look() -> float:
        now[0] += 60.0
        return now[0]

    return look


async def test_what_is_asked_about_is_named_in_one_way(tmp_path, monkeypatch):
    async with world(tmp_path, monkeypatch) as here:
        for fields in ({}, {"sandbox_id": "sbx_1", "state_id": "st_1"}):
            with pytest.raises(InvalidArgument, match="sandbox_id"):
                await here.records.list_egress(**fields)
        with pytest.raises(NotFound):
            await here.records.list_egress(state_id="st_" + "0" * 32)

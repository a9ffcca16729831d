"""The package index client against a real local server."""

import asyncio
import base64
import hashlib
import json
import os
import ssl
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from regreen import pkgindex
from regreen.pkgindex import (
    IndexFile,
    PackageIndex,
    index_urls,
    interpreter_tags,
    python_allowed,
    usable_files,
    wheel_fits,
)
from regreen.rpc.errors import DataLoss, MissingDependency, NotFound, Unavailable
from sandbox_svc.builders.base import DistFile, Pin
from sandbox_svc.wheelhouse import DistStore, Wheel, pick
from tests.fixtures.loopback import listening

BODY = b"wheel bytes"
SHA = hashlib.sha256(BODY).hexdigest()
NAME = "demo-1.0-py3-none-any.whl"


class _Index(BaseHTTPRequestHandler):
    hits: list[str] = []
    signed: list[tuple[str, str]] = []

    def do_GET(self) -> None:
        _Index.hits.append(self.path)
        _Index.signed.append((self.headers["Host"], self.headers["Authorization"] or ""))
        kind, body, status = "text/html", b"", 200
        if self.path == "/json/demo/":
            kind = "application/vnd.pypi.simple.v1+json"
            files = [{"filename": NAME, "url": f"../../files/{NAME}", "hashes": {"sha256": SHA}}]
            body = json.dumps({"files": files}).encode()
        elif self.path == "/html/demo/":
            link = f'<a href="/files/{NAME}#sha256={SHA}" data-requires-python="&gt;=3.7">'
            body = link.encode()
        elif self.path == f"/files/{NAME}":
            body = BODY
        elif self.path == "/away/demo/":
            status = 302
            self.send_response(status)
            host = f"localhost:{self.server.server_address[1]}"
            self.send_header("Location", f"http://{host}/json/demo/")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        elif self.path == "/busy/demo/":
            status = 503
        else:
            status = 404
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[str]:
    _Index.hits.clear()
    _Index.signed.clear()
    with listening(_Index) as url:
        yield url


@pytest.mark.parametrize("kind", ["json", "html"])
async def test_lists_and_downloads(server: str, kind: str, tmp_path: Path) -> None:
    async with PackageIndex([f"{server}/{kind}"]) as index:
        (entry,) = await index.files("Demo")
        assert (entry.filename, entry.sha256, entry.version) == (NAME, SHA, "1.0")
        path = await index.download("demo", NAME, SHA, tmp_path / "x" / NAME)
        assert path.read_bytes() == BODY


async def test_a_second_index_is_asked(server: str) -> None:
    async with PackageIndex([f"{server}/none", f"{server}/json"]) as index:
        assert len(await index.files("demo")) == 1
        with pytest.raises(NotFound):
            await index.files("unknown")


async def test_wrong_bytes_never_get_the_name(server: str, tmp_path: Path) -> None:
    async with PackageIndex([f"{server}/json"]) as index:
        with pytest.raises(DataLoss):
            await index.download("demo", NAME, "1" * 64, tmp_path / NAME)
    assert list(tmp_path.iterdir()) == []


async def test_a_busy_index_is_given_up_at_the_deadline(server: str) -> None:
    async with PackageIndex([f"{server}/busy"], deadline_s=0.6) as index:
        with pytest.raises(Unavailable, match="503"):
            await index.files("demo")


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


async def test_credentials_of_an_index_go_to_it_alone(server: str, tmp_path: Path) -> None:
    signed = server.replace("://", "://me:pass%20word@")
    async with PackageIndex([f"{signed}/json", f"{signed}/away"]) as index:
        (entry,) = await index.files("demo")
        assert "pass" not in entry.url
        await index.download("demo", NAME, SHA, tmp_path / NAME)
        assert index.urls[0] == f"{signed}/json/"
    place = server.removeprefix("http://")
    assert _Index.signed == [(place, _basic("me", "pass word"))] * 2
    _Index.signed.clear()
    async with PackageIndex([f"{signed}/away"]) as index:
        await index.files("demo")
    assert [given for _, given in _Index.signed] == [_basic("me", "pass word"), ""]
    async with PackageIndex([f"{signed}/busy"], deadline_s=0.1) as index:
        with pytest.raises(Unavailable) as caught:
            await index.files("demo")
    assert "pass" not in str(caught.value)


async def test_netrc_is_for_the_hosts_that_it_names(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(file))
    for text, given in (
        ("machine 127.0.0.1 login me password secret\n", _basic("me", "secret")),
        ("machine other.test login me password secret\n", ""),
        ("default login me password secret\n", ""),
        ("nonsense\n", ""),
    ):
        file.write_text(text)
        _Index.signed.clear()
        async with PackageIndex([f"{server}/json"]) as index:
            await index.files("demo")
        assert [found for _, found in _Index.signed] == [given]
    file.write_text("machine 127.0.0.1 login me password secret\n")
    async with PackageIndex([f"{server.replace('://', '://you:other@')}/json"]) as index:
        await index.files("demo")
    assert _Index.signed[-1][1] == _basic("you", "other")


def test_a_malformed_index_is_named_without_its_password() -> None:
    with pytest.raises(MissingDependency, match="REGREEN_INDEX_URL") as caught:
        PackageIndex(["https://me:hunter2@index.test:port/simple"])
    assert "hunter2" not in str(caught.value)
    assert PackageIndex(["file:///srv/simple", "https://a.test/"]).places == (("a.test", 443),)


async def test_the_store_fetches_once_and_offers_a_house(server: str, tmp_path: Path) -> None:
    store = DistStore(tmp_path, lambda: PackageIndex([f"{server}/json"]))
    file = DistFile(NAME, SHA)
    await store.ensure([("demo", file), ("demo", file)])
    await store.ensure([("demo", file)])
    assert _Index.hits.count(f"/files/{NAME}") == 1
    wheel = Wheel("demo", "1.0", NAME, SHA)
    house = store.house([wheel])
    assert store.house([wheel]) == house
    assert (house / NAME).read_bytes() == BODY
    offered = json.loads((house / "index.json").read_text())
    assert offered == {"demo": {"1.0": [{"filename": NAME, "sha256": SHA}]}}


async def test_the_store_says_what_is_missing(server: str, tmp_path: Path) -> None:
    store = DistStore(tmp_path, lambda: PackageIndex([f"{server}/json"], deadline_s=0.1))
    with pytest.raises(MissingDependency, match="1 of 1"):
        await store.ensure([("demo", DistFile("other.whl", "2" * 64))])


def test_index_settings_in_order(tmp_path: Path) -> None:
    env = {
        "HOME": str(tmp_path),
        "PIP_INDEX_URL": "http://pip/",
        "PIP_EXTRA_INDEX_URL": "http://e/",
    }
    assert index_urls(env) == ("http://pip/", "http://e/")
    assert index_urls({**env, "REGREEN_INDEX_URL": "http://own/"})[0] == "http://own/"
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = http://conf/\n")
    conf = {"HOME": str(tmp_path), "PIP_CONFIG_FILE": str(tmp_path / "pip.conf")}
    assert index_urls(conf) == ("http://conf/",)


def test_the_default_is_found_where_no_cache_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container, whose home is read-only."""
    for name in [name for name in os.environ if name.startswith(("UV_", "XDG_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "cache").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://default/simple")
    assert pkgindex._uv_default_index(pkgindex.find_uv()) == "http://default/simple"
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://[bad")
    with pytest.raises(MissingDependency, match=r"configured \(.*invalid.*REGREEN_INDEX_URL"):
        pkgindex._uv_default_index(pkgindex.find_uv())


def test_authorities_of_the_system_are_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among them one that an administrator added, which no list of the web's has."""
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "PIP_CERT", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    system = ssl.create_default_context().get_ca_certs(binary_form=True)
    assert set(system) <= set(pkgindex._ssl_context().get_ca_certs(binary_form=True))


def test_tags() -> None:
    tags = interpreter_tags("3.9", "x86_64")
    assert wheel_fits("a-1-cp39-cp39-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", tags)
    assert wheel_fits("a-1-cp36-abi3-manylinux_2_28_x86_64.whl", tags)
    assert wheel_fits("a-1-py2.py3-none-any.whl", tags)
    assert not wheel_fits("a-1-cp310-cp310-manylinux2014_x86_64.whl", tags)
    assert not wheel_fits("a-1-cp39-cp39-win_amd64.whl", tags)
    assert wheel_fits("a-1-cp37-cp37m-manylinux1_x86_64.whl", interpreter_tags("3.7", "x86_64"))
    assert python_allowed(">=3.7,!=3.9.0", "3.9")
    assert not python_allowed(">=3.10", "3.9")


def test_usable_and_picked_files() -> None:
    def entry(name: str) -> IndexFile:
        return IndexFile(name, "", "3" * 64)

    files = [
        entry("a-1.0.tar.gz"),
        entry("a-1.0-cp39-cp39-manylinux2014_x86_64.whl"),
        entry("a-1.0-cp39-cp39-win_amd64.whl"),
        entry("a-1.1-py3-none-any.whl"),
    ]
    chosen = usable_files(files, "1.0", ["3.9"], ["x86_64"])
    assert [f.filename for f in chosen] == ["a-1.0-cp39-cp39-manylinux2014_x86_64.whl"]
    both = usable_files(files, "1.0", ["3.9", "3.10"], ["x86_64"])
    assert "a-1.0.tar.gz" in [f.filename for f in both]
    pin = Pin("a", "1.0", tuple(DistFile(f.filename, f.sha256) for f in both))
    picked = pick(pin, "3.10")
    assert picked is not None
    assert picked.filename == "a-1.0.tar.gz"


async def test_an_index_that_takes_no_connection_is_given_up_soon_and_named(monkeypatch, tmp_path):
    monkeypatch.setattr(pkgindex, "_CONNECT_S", 1.0, raising=False)
    async with PackageIndex(["http://me:secret@127.0.0.1:1/simple"]) as index:
        async with asyncio.timeout(8):
            with pytest.raises(Unavailable, match=r"index 127\.0\.0\.1:1 cannot") as caught:
                await index.files("demo")
    assert "secret" not in caught.value.message

"""A client of Python package indexes: lists files, picks usable ones, downloads by hash.

- The index is the user's own: REGREEN_INDEX_URL, uv's or pip's settings, else uv's default.
- Nothing is trusted without its sha256; a file whose bytes differ never gets its name.
- No code of a package runs here: sdists are stored, never built.
- Credentials come from an index's URL or from netrc and travel in the `Authorization` header alone:
  no URL that is requested, logged or told in an error has them, and no other host gets them.
- Protocol: the simple repository API (PEP 503 HTML, PEP 691 JSON, PEP 700 upload times).
"""

import asyncio
import configparser
import contextlib
import hashlib
import netrc
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urldefrag, urljoin

import httpx
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.tags import Tag, compatible_tags, cpython_tags, platform_tags
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import InvalidVersion, Version

from regreen.debian import mirror, pool_url, upstream_version
from regreen.rpc.errors import DataLoss, MissingDependency, NotFound, Unavailable

_JSON = "application/vnd.pypi.simple.v1+json"
_CONNECT_S = 20.0
"""An index to which no connection can be made for so long is given up."""
_ACCEPT = f"{_JSON}, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"


@dataclass(frozen=True, slots=True)
class IndexFile:
    """One downloadable file as its index lists it."""

    filename: str
    url: str
    sha256: str
    size_bytes: int = 0
    requires_python: str = ""
    uploaded: str = ""
    """ISO 8601 in UTC, or empty where the index does not say."""
    yanked: bool = False

    @property
    def is_wheel(self) -> bool:
        return self.filename.endswith(".whl")

    @property
    def version(self) -> str:
        """The release that the filename names; empty if it cannot be read."""
        return _version_of(self.filename)


@lru_cache(maxsize=1 << 17)
def _version_of(filename: str) -> str:
    """Pages are looked through again and again; reading a name costs more than the rest."""
    try:
        if version := upstream_version(filename):
            return str(Version(version))
        if filename.endswith(".whl"):
            return str(parse_wheel_filename(filename)[1])
        return str(parse_sdist_filename(filename)[1])
    except (InvalidWheelFilename, InvalidSdistFilename, InvalidVersion):
        return ""


@lru_cache(maxsize=1 << 17)
def _tags_of(filename: str) -> frozenset[Tag]:
    try:
        return parse_wheel_filename(filename)[3]
    except (InvalidWheelFilename, InvalidVersion):
        return frozenset()


def find_uv() -> str:
    """Path of the uv executable: the one installed beside this Python, else the one on PATH.

    Raises:
        MissingDependency: there is none.
    """
    try:
        from uv import find_uv_bin

        return str(find_uv_bin())
    except (ImportError, FileNotFoundError):
        found = shutil.which("uv")
    if found is None:
        raise MissingDependency("uv is not installed; run `pip install uv`")
    return found


def index_urls(env: Mapping[str, str] | None = None, uv: str = "") -> tuple[str, ...]:
    """The indexes to ask, in order, from the user's own configuration."""
    env = os.environ if env is None else env
    extra = tuple(
        url
        for key in ("UV_INDEX", "UV_EXTRA_INDEX_URL", "PIP_EXTRA_INDEX_URL")
        for url in env.get(key, "").split()
        if url.startswith("http")
    )
    for key in ("REGREEN_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"):
        if env.get(key):
            return (env[key], *extra)
    for path in _pip_config_files(env):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(path)
        except (configparser.Error, UnicodeDecodeError):
            continue
        for section in ("install", "download", "global"):
            if parser.has_option(section, "index-url"):
                return (parser.get(section, "index-url").strip(), *extra)
    return (_uv_default_index(uv or find_uv()), *extra)


def _pip_config_files(env: Mapping[str, str]) -> list[Path]:
    home = Path(env.get("HOME", "/nonexistent"))
    config = Path(env.get("XDG_CONFIG_HOME") or home / ".config")
    named = [Path(env["PIP_CONFIG_FILE"])] if env.get("PIP_CONFIG_FILE") else []
    return [*named, config / "pip/pip.conf", home / ".pip/pip.conf", Path("/etc/pip.conf")]


def _uv_default_index(uv: str) -> str:
    """What uv would ask: the user's configuration counts, and its built-in default.

    That of a project in the working directory does not: it would choose where releases come from.
    No cache is kept (`-n`), for which a container's home has no place.
    """
    ask = [uv, "pip", "compile", "-", "--emit-index-url", "--no-header", "-q", "-n", "--offline"]
    ask += ["--python", sys.executable]  # to look for others can take uv long
    try:
        done = subprocess.run(ask, input="", capture_output=True, text=True, timeout=30, cwd="/")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingDependency(f"uv cannot run ({error}); set REGREEN_INDEX_URL") from error
    for line in done.stdout.splitlines():
        if line.startswith("--index-url "):
            return line.split(None, 1)[1]
    said = " ".join(done.stderr.split())[:500] or "uv names none"
    raise MissingDependency(f"no package index is configured ({said}); set REGREEN_INDEX_URL")


class PackageIndex:
    """An async client over one or more indexes; use as an async context manager.

    Raises:
        MissingDependency: the URL of an index is malformed.
    """

    def __init__(self, urls: Sequence[str], *, deadline_s: float = 120.0) -> None:
        self.urls = tuple(url.rstrip("/") + "/" for url in urls)
        """The indexes that are asked, in order, as they were given: passwords included."""
        self._bare = tuple(_bare(url) for url in self.urls)
        self._deadline_s = deadline_s
        self._pages: dict[str, list[IndexFile]] = {}
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(30.0, connect=10.0),
            follow_redirects=True,
            verify=_ssl_context(),
            limits=httpx.Limits(max_connections=8),
            auth=_Credentials(self.urls),
        )

    @property
    def places(self) -> tuple[tuple[str, int], ...]:
        """Host and port of each index that has them."""
        places = (place_of(httpx.URL(url)) for url in self._bare)
        return tuple((host, port) for host, port in places if host)

    def watch(
        self,
        asked: Callable[[httpx.Request], Awaitable[None]],
        answered: Callable[[httpx.Response], Awaitable[None]],
    ) -> None:
        """Have every request told before it is sent, redirects too, and the head of every answer.

        What `asked` raises comes out of the call that would have sent the request.
        """
        self._client.event_hooks = {"request": [asked], "response": [answered]}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    async def files(self, name: str) -> list[IndexFile]:
        """All files of a package, oldest first as the index lists them.

        Raises:
            NotFound: no index knows the package.
            Unavailable: the index did not answer within the deadline.
        """
        key = canonicalize_name(name)
        if key not in self._pages:
            for base in self._bare:
                page = await self._page(f"{base}{key}/")
                if page is not None:
                    self._pages[key] = page
                    break
            else:
                raise NotFound(f"the package index has no package {key!r}")
        return self._pages[key]

    async def _page(self, url: str) -> list[IndexFile] | None:
        response = await self._get(url)
        if response.status_code in (404, 410):
            return None
        if "json" in response.headers.get("content-type", ""):
            return _parse_json(response.json(), str(response.url))
        return _parse_html(response.text, str(response.url))

    async def _get(self, url: str) -> httpx.Response:
        """GET with retries until the deadline."""
        began, wait_s = time.monotonic(), 0.5
        host, port = place_of(httpx.URL(url))
        while True:
            problem: str
            stop = began + self._deadline_s
            try:
                response = await self._client.get(url, headers={"Accept": _ACCEPT})
                if response.status_code < 500 and response.status_code != 429:
                    if response.status_code in (404, 410) or response.is_success:
                        return response
                    raise Unavailable(f"the package index answered {response.status_code}")
                problem = f"status {response.status_code}"
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                stop = self._given_up_s(began, error)
            if time.monotonic() + wait_s > stop:
                raise Unavailable(f"the package index {host}:{port} cannot be reached ({problem})")
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, 8.0)

    def _given_up_s(self, began: float, error: httpx.TransportError) -> float:
        """Until when an index is asked again that failed so."""
        unreached = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        return began + (min(_CONNECT_S, self._deadline_s) if unreached else self._deadline_s)

    async def download(self, name: str, filename: str, sha256: str, into: Path) -> Path:
        """Fetch one file of a package and check it; `into` is the final path.

        Raises:
            NotFound: the index lists no such file.
            DataLoss: the bytes do not match `sha256`.
            Unavailable: the index did not answer within the deadline.
        """
        entry = await self._entry(name, filename, sha256)
        if entry.sha256 and entry.sha256 != sha256:
            raise DataLoss(f"the package index lists {filename} with another sha256")
        began, wait_s = time.monotonic(), 0.5
        host, port = place_of(httpx.URL(entry.url))
        while True:
            try:
                return await self._fetch(entry.url, sha256, into)
            except httpx.TransportError as error:
                if time.monotonic() + wait_s > self._given_up_s(began, error):
                    raise Unavailable(
                        f"{filename} cannot be fetched from {host}:{port} ({error})"
                    ) from error
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, 8.0)

    async def _entry(self, name: str, filename: str, sha256: str) -> IndexFile:
        """Where a file lies: as the index lists it, or in the pool of the user's Debian mirror.

        Raises:
            NotFound: it is nowhere.
        """
        if upstream_version(filename) and (url := pool_url(filename, mirror())):
            return IndexFile(filename, url, sha256)
        for entry in await self.files(name):
            if entry.filename == filename:
                return entry
        raise NotFound(f"the package index does not list {filename} (deleted?)")

    async def _fetch(self, url: str, sha256: str, into: Path) -> Path:
        into.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        handle, temporary = tempfile.mkstemp(prefix=".part-", dir=into.parent)
        try:
            with os.fdopen(handle, "wb") as out:
                async with self._client.stream("GET", url) as response:
                    if not response.is_success:
                        raise Unavailable(f"{into.name}: the index answered {response.status_code}")
                    async for chunk in response.aiter_bytes(1 << 18):
                        digest.update(chunk)
                        out.write(chunk)
                os.fchmod(out.fileno(), 0o644)
            if digest.hexdigest() != sha256:
                raise DataLoss(f"{into.name}: sha256 of the download differs from the pin")
            os.replace(temporary, into)
        finally:
            Path(temporary).unlink(missing_ok=True)
        return into


def place_of(url: httpx.URL) -> tuple[str, int]:
    """Host and port that a URL leads to."""
    return url.host, url.port or (443 if url.scheme == "https" else 80)


def _bare(url: str) -> str:
    """A URL without its user name and password.

    Raises:
        MissingDependency: it is malformed; the message does not repeat it.
    """
    try:
        return str(httpx.URL(url).copy_with(username=None, password=None))
    except httpx.InvalidURL:
        raise MissingDependency(
            "the URL of a package index is malformed; correct REGREEN_INDEX_URL, or uv's or pip's "
            "settings"
        ) from None


class _Credentials(httpx.Auth):
    """Names and passwords by host and port, of URLs and of netrc."""

    def __init__(self, urls: Iterable[str]) -> None:
        self._of: dict[tuple[str, int], tuple[str, str]] = {}
        for url in map(httpx.URL, urls):
            if url.username or url.password:
                self._of[place_of(url)] = (url.username, url.password)
        self._netrc: Mapping[str, tuple[str, str | None, str | None]] = {}
        path = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
        with contextlib.suppress(OSError, netrc.NetrcParseError):  # as other clients pass it over
            self._netrc = netrc.netrc(path).hosts

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Sign a request to a host that is known by name; netrc's `default` is for nobody."""
        pair = self._of.get(place_of(request.url))
        if pair is None and request.url.userinfo:  # of a link on an index's page
            pair = (request.url.username, request.url.password)
        if pair is None and request.url.host in self._netrc and request.url.host != "default":
            login, _, password = self._netrc[request.url.host]
            pair = (login, password or "")
        if pair is not None:
            yield from httpx.BasicAuth(*pair).auth_flow(request)
        else:
            yield request


def _ssl_context() -> ssl.SSLContext:
    """System trust plus what the user configured for other clients; files that changed count."""
    keys = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE")
    paths = [path for key in keys if (path := os.environ.get(key)) and os.path.isfile(path)]
    states = ((path, os.stat(path)) for path in paths)
    return _trusting(tuple((path, at.st_ino, at.st_mtime_ns, at.st_size) for path, at in states))


@lru_cache(maxsize=2)  # reading a system's authorities takes a quarter of a second
def _trusting(files: tuple[tuple[str, int, int, int], ...]) -> ssl.SSLContext:
    context = httpx.create_ssl_context()  # certifi alone, where no file is named
    context.load_default_certs()
    for path, *_ in files:
        context.load_verify_locations(cafile=path)
    return context


def _parse_json(page: Mapping[str, object], base: str) -> list[IndexFile]:
    files = page.get("files")
    return [
        IndexFile(
            filename=str(f["filename"]),
            url=urljoin(base, str(f["url"])),
            sha256=str((f.get("hashes") or {}).get("sha256", "")),
            size_bytes=int(f.get("size") or 0),
            requires_python=str(f.get("requires-python") or ""),
            uploaded=str(f.get("upload-time") or ""),
            yanked=bool(f.get("yanked")),
        )
        for f in (files if isinstance(files, list) else [])
    ]


class _Links(HTMLParser):
    """Collects the anchors of a PEP 503 page."""

    def __init__(self, base: str) -> None:
        super().__init__()
        self.base, self.files = base, list[IndexFile]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag != "a" or not values.get("href"):
            return
        url, fragment = urldefrag(urljoin(self.base, values["href"] or ""))
        sha = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else ""
        self.files.append(
            IndexFile(
                filename=unquote(url.rsplit("/", 1)[-1]),
                url=url,
                sha256=sha,
                requires_python=values.get("data-requires-python") or "",
                yanked="data-yanked" in values,
            )
        )


def _parse_html(text: str, base: str) -> list[IndexFile]:
    parser = _Links(base)
    parser.feed(text)
    return parser.files


@lru_cache(maxsize=64)
def interpreter_tags(python: str, machine: str = "") -> frozenset[Tag]:
    """Wheel tags that CPython `python` (`3.9`) accepts on Linux.

    `machine` empty means this host's platforms; else `x86_64` or `aarch64` with glibc up to 2.35.
    """
    major, minor = (int(part) for part in python.split("."))
    short = f"cp{major}{minor}"
    abi = short + ("m" if (major, minor) < (3, 8) else "")
    platforms = list(platform_tags()) if not machine else _linux_platforms(machine)
    tags = [
        *cpython_tags((major, minor), [abi], platforms),
        *compatible_tags((major, minor), short, platforms),
    ]
    return frozenset(tags)


def _linux_platforms(machine: str) -> list[str]:
    lowest = 5 if machine == "x86_64" else 17
    named = [f"manylinux2014_{machine}", f"linux_{machine}"]
    if machine == "x86_64":
        named += ["manylinux2010_x86_64", "manylinux1_x86_64"]
    return [*(f"manylinux_2_{glibc}_{machine}" for glibc in range(35, lowest - 1, -1)), *named]


def wheel_fits(filename: str, tags: frozenset[Tag]) -> bool:
    """Whether a wheel's name carries one of `tags`."""
    return not tags.isdisjoint(_tags_of(filename))


def python_allowed(requires_python: str, python: str) -> bool:
    """Whether a `Requires-Python` admits some patch release of `python`."""
    try:
        specifiers = SpecifierSet(requires_python)
    except InvalidSpecifier:
        return True
    return any(specifiers.contains(f"{python}.{patch}") for patch in (0, 99, 2, 6, 12))


@lru_cache(maxsize=1 << 16)
def _release(version: str) -> Version:
    return Version(version)


def usable_files(
    files: Iterable[IndexFile], version: str, pythons: Sequence[str], machines: Sequence[str]
) -> list[IndexFile]:
    """The files of one release worth pinning: wheels that fit, or the sdist where one lacks.

    One wheel per (interpreter, machine) at most: the most portable, then the first listed.
    """
    wanted = Version(version)
    release = [f for f in files if f.version and _release(f.version) == wanted]
    chosen: dict[str, IndexFile] = {}
    complete = True
    for python in pythons:
        for machine in machines:
            tags = interpreter_tags(python, machine)
            fits = [f for f in release if f.is_wheel and wheel_fits(f.filename, tags)]
            fits.sort(key=lambda f: (not f.filename.endswith("-any.whl"), f.filename))
            complete = complete and bool(fits)
            chosen.update({f.filename: f for f in fits[:1]})
    if not complete:
        sdists = [f for f in release if not f.is_wheel and f.filename.endswith((".gz", ".zip"))]
        sdists.sort(key=lambda f: f.filename.endswith(".zip"))
        chosen.update({f.filename: f for f in sdists[:1]})
    return [chosen[name] for name in sorted(chosen)]

"""Debian's source packages as a second place for the source of a release: mostly with its tests.

- One index of sources is fetched, once in `PAGE_DAYS`, from the user's own mirror, and kept; an
  archive is fetched only for a candidate that is mined from it.
- A release counts only if the package index has it too, and on that day: Debian gives bytes, not
  dates, and requirements and dependents stay those of the package index.
- Archives that Debian changed (`+dfsg` and the like) are other bytes of the same version; the
  tests that pass decide whether they are of use.
"""

import gzip
import json
import lzma
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import httpx

from regreen.debian import mirror, pool_url, upstream_version
from regreen.lockfile import normalize
from regreen.mine.registry import PAGE_DAYS, Registry
from regreen.pkgindex import IndexFile
from regreen.rpc.errors import MissingDependency, Unavailable

SUITES = ("stable", "unstable")
_PYTHON = re.compile(r"^python3-(.+)$")


@dataclass(frozen=True, slots=True)
class Source:
    """The upstream archive of one source package."""

    package: str
    """The Python package, as its binary package is called."""
    version: str
    filename: str
    sha256: str
    size_bytes: int


def parse_sources(text: str) -> Iterator[Source]:
    """The Python packages of a `Sources` index that have an upstream archive of one file."""
    for stanza in text.split("\n\n"):
        fields = _fields(stanza)
        binaries = re.split(r"[,\s]+", fields.get("Binary", ""))
        names = [match[1] for name in binaries if (match := _PYTHON.match(name))]
        names = [name for name in names if not name.endswith(("-doc", "-dbg", "-tests"))]
        for line in fields.get("Checksums-Sha256", "").splitlines():
            digest, size, filename = [*line.split(), "", "", ""][:3]
            version = upstream_version(filename)
            if version and re.fullmatch(r"[0-9a-f]{64}", digest):
                for name in names[:3]:
                    yield Source(normalize(name), version, filename, digest, int(size))


def _fields(stanza: str) -> dict[str, str]:
    found: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line[:1] in (" ", "\t"):
            found[name] = f"{found.get(name, '')}\n{line.strip()}".strip()
        else:
            name, _, value = line.partition(":")
            found[name] = value.strip()
    return found


class DebianRegistry(Registry):
    """The package index, with Debian's archive in place of a release's own where there is one."""

    def __init__(
        self,
        urls: Sequence[str],
        folder: Path,
        *,
        budget: int,
        base: str = "",
        suites: Sequence[str] = SUITES,
    ) -> None:
        """`base` is the mirror; default: that of the settings.

        Raises:
            MissingDependency: none is set up.
        """
        super().__init__(urls, folder, budget=budget)
        self.base, self.suites = base or mirror(), tuple(suites)
        if not self.base:
            raise MissingDependency("no Debian mirror is known; set REGREEN_DEBIAN_MIRROR")
        self._sources: dict[tuple[str, str], Source] | None = None

    async def files(self, name: str) -> list[IndexFile]:
        """All files of a package; raises as `Registry.files`."""
        every = await super().files(name)
        sources = await self._known()
        key = normalize(name)
        return [self._replaced(entry, sources.get((key, entry.version))) for entry in every]

    def _replaced(self, entry: IndexFile, source: Source | None) -> IndexFile:
        if source is None or entry.is_wheel:
            return entry
        return replace(
            entry,
            filename=source.filename,
            sha256=source.sha256,
            url=pool_url(source.filename, self.base),
            size_bytes=source.size_bytes,
        )

    async def packages(self) -> list[str]:
        """Names of the Python packages that Debian has a source of."""
        return sorted({package for package, _ in await self._known()})

    async def _known(self) -> dict[tuple[str, str], Source]:
        if self._sources is None:
            found: dict[tuple[str, str], Source] = {}
            for suite in self.suites:
                for source in await self._index(suite):
                    found.setdefault((source.package, source.version), source)
            self._sources = found
        return self._sources

    async def _index(self, suite: str) -> list[Source]:
        """What a suite's index of sources says: from disk, or from the mirror."""
        path = self._folder / "debian" / f"{suite}.jsonl"
        if path.exists() and time.time() - path.stat().st_mtime < PAGE_DAYS * 86400:
            return [Source(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
        for ending, unpack in ((".xz", lzma.decompress), (".gz", gzip.decompress)):
            self._spend()
            url = f"{self.base}/dists/{suite}/main/source/Sources{ending}"
            try:
                answer = await self._client.get(url)
            except httpx.TransportError as error:
                raise Unavailable(f"the Debian mirror cannot be asked ({error})") from error
            if answer.status_code == httpx.codes.OK:
                text = unpack(answer.content).decode("utf-8", "replace")
                found = list(parse_sources(text))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(f"{json.dumps(asdict(s))}\n" for s in found), "utf-8")
                return found
        raise Unavailable(f"the Debian mirror has no index of sources of {suite}")

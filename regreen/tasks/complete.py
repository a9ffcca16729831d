"""Completes what a project wants to a whole environment: every package that is needed, by version.

- What the user pinned is installed as pinned. Pins of a lock are kept even where they contradict
  each other; elsewhere a contradiction is refused with the lines that make it.
- A release without a wheel takes part by the requirements in its source archive, which is read
  and never built.
"""

import io
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from regreen.lockfile import normalize
from regreen.pkgindex import IndexFile, python_allowed
from regreen.rpc.errors import InvalidArgument, NotFound
from regreen.tasks.pin import Pinner
from regreen.tasks.wanted import Wanted, holds, marker_environment

RUNNER = Wanted("pytest", "pytest", "regreen itself")
_NO_WHEEL = re.compile(r"Wheels are required for `([^`]+)`")
_METADATA_BYTES = 1 << 20
_MOST_BUILT = 40
"""Packages without wheels in one environment; each costs a resolution."""


async def complete(
    pinner: Pinner,
    wanted: Sequence[Wanted],
    constraints: Sequence[Wanted],
    python: str,
    *,
    exact: Iterable[str] = (),
) -> list[str]:
    """Pins of an environment that holds `wanted` and pytest; those of `exact` are kept whatever.

    Raises:
        InvalidArgument: requirements contradict each other, or no release satisfies one.
    """
    kept = sorted(exact)
    names = {pin.partition("==")[0] for pin in kept}
    lacking = [item for item in wanted if item.name not in names]
    if "pytest" not in {*names, *(item.name for item in lacking)}:
        lacking.append(RUNNER)
    if kept and not lacking and not wanted:
        return kept  # a tool's lock, or an environment, with pytest: closed by itself
    locked = [Wanted(pin.partition("==")[0], pin, "the lock") for pin in kept]
    tries = [([*locked, *lacking], []), ([*locked, *lacking], kept), (lacking, [])]
    for items, held in tries[: 3 if kept else 1]:
        try:
            found = await _Completion(pinner, python, constraints).run(items, held) if items else []
        except NotFound as error:
            problem = error
        else:
            return kept + [pin for pin in found if pin.partition("==")[0] not in names]
    raise _conflict(problem, [*lacking, *constraints]) from problem


def _conflict(error: NotFound, wanted: Iterable[Wanted]) -> InvalidArgument:
    """The resolver's reasons with the lines that they speak of."""
    text = " ".join(error.message.split())
    lines = [
        f"{item.where} ({item.text})"
        for item in wanted
        if re.search(rf"(?<![\w.-]){re.escape(item.name)}(?![\w-])", text)
    ]
    lost = "was not found in the package registry" in text
    kind = "do not go together" if "unsatisfiable" in text and not lost else "cannot be resolved"
    problem = f"the packages {kind}: {text}"
    remedy = f"correct {', '.join(lines[:4])}" if lines else "correct what is required"
    remedy += ", or name a file of the versions that are installed with --lock"
    return InvalidArgument("requirements", problem, remedy)


class _Completion:
    """One resolution, repeated while it meets packages that have no wheel."""

    def __init__(self, pinner: Pinner, python: str, constraints: Sequence[Wanted]) -> None:
        self.pinner, self.python = pinner, python
        self.constraints = [item.text for item in constraints]
        self.built: dict[str, str] = {}
        """Releases that must be built, by name."""
        self.asked: list[str] = []
        """What they require."""

    async def run(self, wanted: Sequence[Wanted], kept: Sequence[str] = ()) -> list[str]:
        """Pins of everything; those of `kept` hold against what other packages require.

        Raises:
            NotFound: there is no such set; ends with the resolver's reasons.
        """
        while True:
            lines = [item.text for item in wanted if item.name not in self.built]
            held = [pin for pin in kept if pin.partition("==")[0] not in self.built]
            try:
                found = await self.pinner.resolve(
                    [*lines, *self.asked],
                    self.python,
                    constraints=self.constraints,
                    overrides=[*held, *(f"{name} ; python_version < '0'" for name in self.built)],
                )
            except NotFound as error:
                lost = {
                    normalize(name) for name in _NO_WHEEL.findall(" ".join(error.message.split()))
                }
                if not lost - set(self.built) or len(self.built) >= _MOST_BUILT:
                    raise
                for name in sorted(lost - set(self.built)):
                    await self._build(name, [w.text for w in wanted if w.name == name], error)
                continue
            return sorted([*found, *(f"{n}=={v}" for n, v in self.built.items())])

    async def _build(self, name: str, texts: Sequence[str], error: NotFound) -> None:
        """Take the newest source release that the requirements allow."""
        own = [Requirement(text) for text in (*texts, *self.asked, *self.constraints)]
        allowed = SpecifierSet()
        for requirement in own:
            if normalize(requirement.name) == name:
                allowed &= requirement.specifier
        releases: dict[Version, IndexFile] = {}
        for entry in await self.pinner.index.files(name):
            if entry.is_wheel or entry.yanked:
                continue
            try:
                version = Version(entry.version)
            except InvalidVersion:
                continue
            exact = any(s.operator in ("==", "===") for s in allowed)
            if allowed.contains(version, prereleases=exact or None) and python_allowed(
                entry.requires_python, self.python
            ):
                releases[version] = entry
        if not releases:
            raise error
        newest = max(releases)
        self.built[name] = str(newest)
        with tempfile.TemporaryDirectory() as folder:
            entry = releases[newest]
            path = await self.pinner.index.download(
                name, entry.filename, entry.sha256, Path(folder) / entry.filename
            )
            self.asked += requires_of_sdist(path.read_bytes(), self.python)


def requires_of_sdist(archive: bytes, python: str, extra: str = "") -> list[str]:
    """What a source archive says that it requires, with an extra of it if one is named.

    Nothing where only its build would tell.
    """
    environment = {**marker_environment(python), "extra": extra}
    lines: list[str] = []
    for name, text in _metadata(archive):
        if name == "PKG-INFO":
            lines += HeaderParser().parsestr(text).get_all("Requires-Dist") or []
        else:
            lines += _of_requires_txt(text)
    found = []
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.url is None and (
            requirement.marker is None or holds(requirement.marker, environment)
        ):
            requirement.marker = None
            found.append(str(requirement))
    return sorted(set(found))


def _of_requires_txt(text: str) -> list[str]:
    """Lines of setuptools' requires.txt, whose sections are extras and markers."""
    lines, marker = [], ""
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("["):
            extra, _, marker = line.strip("[]").partition(":")
            marker = f"extra == '{extra}'" if extra else marker
        else:
            lines.append(f"{line} ; {marker}" if marker else line)
    return lines


def _metadata(archive: bytes) -> list[tuple[str, str]]:
    """The metadata files at the top of a source archive; what is damaged says nothing."""
    found = []
    try:
        if archive[:2] == b"PK":
            with zipfile.ZipFile(io.BytesIO(archive)) as pack:
                for name in filter(_is_metadata, pack.namelist()):
                    with pack.open(name) as file:
                        found.append((name, file.read(_METADATA_BYTES)))
        else:
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                for member in tar:
                    content = tar.extractfile(member) if _is_metadata(member.name) else None
                    if content is not None:
                        found.append((member.name, content.read(_METADATA_BYTES)))
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError):
        return []
    return [(n.rpartition("/")[2], data.decode("utf-8", "replace")) for n, data in found]


def _is_metadata(name: str) -> bool:
    parts = name.strip("/").split("/")
    in_egg_info = name.endswith(".egg-info/requires.txt") and len(parts) <= 4
    return in_egg_info or (len(parts) == 2 and parts[1] == "PKG-INFO")

"""Pins of `uv.lock` and `poetry.lock` for one interpreter: what these tools would install.

- Packages are reached from the project along edges whose markers hold, so that of the forks of a
  package one is taken, and what is for other systems is left out.
- All extras and groups count; where they contradict each other, those for tests alone.
- A package that is on no index is refused by name; a member of a workspace is noted.
"""

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from regreen.lockfile import normalize
from regreen.rpc.errors import InvalidArgument
from regreen.tasks.declared import TEST_NAMES, Declared, poetry_requirement, poetry_specifier
from regreen.tasks.wanted import holds, marker_environment

_REMEDY = "export the lock without it and name that file with --lock"
_LOCAL = frozenset({"virtual", "editable", "directory"})
Entry = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Locked:
    """What a lock installs."""

    pins: frozenset[str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Edge:
    """A dependency on a package of the lock."""

    name: str
    version: str = ""
    specifier: str = ""
    extras: tuple[str, ...] = ()


_Edges = Callable[[Entry, str], Iterable[_Edge]]
"""Edges of an entry: its own for an empty extra, else those that the extra adds."""


def read_lock(name: str, text: str, declared: Declared, python: str) -> Locked:
    """Pins of the lock file called `name`.

    Raises:
        InvalidArgument: it is malformed, contradicts itself, or needs what no index has.
    """
    try:
        entries: list[Entry] = tomllib.loads(text).get("package", [])
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidArgument(name, str(error), "correct it") from error
    environment = marker_environment(python)
    read = _uv if name == "uv.lock" else _poetry
    try:
        for tests_only in (False, True):
            chosen = read(entries, declared, environment, tests_only)
            twice = _twice(chosen)
            if not twice:
                return _locked(name, chosen)
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        problem = f"is malformed ({type(error).__name__}: {error})"
        raise InvalidArgument(name, problem, "lock anew") from error
    problem = f"pins {twice} twice for Python {python}"
    raise InvalidArgument(name, problem, "export the lock and name that file with --lock")


def _twice(entries: Sequence[Entry]) -> str:
    versions: dict[str, str] = {}
    for entry in entries:
        name, version = normalize(entry["name"]), str(entry.get("version", ""))
        if versions.setdefault(name, version) != version:
            return name
    return ""


def _locked(lock: str, entries: Iterable[Entry]) -> Locked:
    pins, notes = set(), []
    for entry in entries:
        name, source = normalize(entry["name"]), entry.get("source", {})
        kind = str(source.get("type") or next(iter(source), "registry"))
        if kind in _LOCAL:
            notes.append(f"{lock}: {name} is part of the workspace and not installed")
        elif kind in ("registry", "legacy"):
            pins.add(f"{name}=={entry['version']}")
        else:
            raise InvalidArgument(lock, f"{name} comes from {kind}, not from an index", _REMEDY)
    return Locked(frozenset(pins), tuple(sorted(notes)))


def _walk(
    entries: Sequence[Entry],
    roots: Iterable[_Edge],
    edges: _Edges,
    fits: Callable[[Entry], bool],
) -> list[Entry]:
    """Entries that `roots` reach, the roots' own targets included."""
    by_name: dict[str, list[Entry]] = {}
    for entry in entries:
        by_name.setdefault(normalize(entry["name"]), []).append(entry)
    found: dict[tuple[str, str], Entry] = {}
    seen: set[tuple[str, str, str]] = set()
    left = list(roots)
    while left:
        edge = left.pop()
        for entry in _targets(by_name.get(edge.name, []), edge, fits):
            key = (edge.name, str(entry.get("version", "")))
            found[key] = entry
            for extra in ("", *edge.extras):
                if (*key, extra) not in seen:
                    seen.add((*key, extra))
                    left += edges(entry, extra)
    return list(found.values())


def _targets(entries: list[Entry], edge: _Edge, fits: Callable[[Entry], bool]) -> list[Entry]:
    if edge.version:
        return [entry for entry in entries if entry.get("version") == edge.version]
    fitting = [entry for entry in entries if fits(entry)]
    if len(fitting) < 2 or not edge.specifier:
        return fitting
    try:
        allowed = SpecifierSet(edge.specifier.split("||")[0])
    except InvalidSpecifier:
        return fitting
    return [e for e in fitting if allowed.contains(e["version"], prereleases=True)] or fitting


def _uv(
    entries: Sequence[Entry], declared: Declared, environment: Mapping[str, str], tests_only: bool
) -> list[Entry]:
    def all_hold(item: Entry) -> bool:
        return "marker" not in item or holds(item["marker"], environment)

    def parse(items: Iterable[Entry]) -> list[_Edge]:
        return [
            _Edge(normalize(i["name"]), i.get("version", ""), extras=tuple(i.get("extra", ())))
            for i in items
            if all_hold(i)
        ]

    def edges(entry: Entry, extra: str) -> list[_Edge]:
        if extra:
            return parse(entry.get("optional-dependencies", {}).get(extra, ()))
        return parse(entry.get("dependencies", ()))

    def fits(entry: Entry) -> bool:
        markers = entry.get("resolution-markers", ())
        return not markers or any(holds(marker, environment) for marker in markers)

    roots = [e for e in entries if "." in (e.get("source", {}).get(k) for k in _LOCAL)]
    if not roots:
        roots = [e for e in entries if _LOCAL & set(e.get("source", {}))]
    if not roots:
        return [entry for entry in entries if fits(entry)]
    starts: list[_Edge] = []
    for root in roots:
        starts += edges(root, "")
        for part in ("optional-dependencies", "dev-dependencies"):
            for name, items in root.get(part, {}).items():
                if not tests_only or name in TEST_NAMES:
                    starts += parse(items)
    reached = _walk(entries, starts, edges, fits)
    return [entry for entry in reached if entry not in roots]


def _poetry(
    entries: Sequence[Entry], declared: Declared, environment: Mapping[str, str], tests_only: bool
) -> list[Entry]:
    def fits(entry: Entry) -> bool:
        markers = entry.get("markers", ())
        texts = [markers] if isinstance(markers, str) else list(dict(markers).values())
        if texts and not any(holds(text, environment) for text in texts):
            return False
        pythons = poetry_specifier(str(entry.get("python-versions", ""))).split("||")
        full = environment["python_full_version"]
        return any(SpecifierSet(part).contains(full) for part in pythons)

    def edges(entry: Entry, extra: str) -> list[_Edge]:
        here = {**environment, "extra": extra}
        members = entry.get("extras", {}).get(extra, ()) if extra else ()
        wanted = {normalize(re.split(r"[^\w.-]", text)[0]) for text in members}
        found = []
        for name, value in entry.get("dependencies", {}).items():
            for item in value if isinstance(value, list) else [value]:
                optional = isinstance(item, Mapping) and bool(item.get("optional"))
                if normalize(name) in wanted if extra else not optional:
                    found += _edge(poetry_requirement(name, item), here)
        return found

    lines = (*declared.dependencies, *declared.for_tests()) if tests_only else declared.every()
    roots = [edge for line in lines for edge in _edge(line, environment)]
    if not roots:
        return [entry for entry in entries if fits(entry)]
    return _walk(entries, roots, edges, fits)


def _edge(line: str, environment: Mapping[str, str]) -> list[_Edge]:
    try:
        found = Requirement(line)
    except InvalidRequirement:
        return []
    if found.marker and not holds(found.marker, environment):
        return []
    name, specifier = normalize(found.name), str(found.specifier)
    return [_Edge(name, specifier=specifier, extras=tuple(sorted(found.extras)))]

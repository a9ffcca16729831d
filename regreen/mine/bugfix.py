"""Mines bug fixes of releases: a release fails the tests of the next one.

- Two archives are compared before anything runs: a few lines of source and some tests differ, and
  nothing else of the package does. Outside a patch series the later one adds no public name.
- The broken State is the earlier release with the later one's tests; the fix is the later one's
  source files. Every test that passed before must pass with it.
- It is a fix of a bug by size and by content, not by reading: no test that cannot even be
  collected, since that is a new function and not a repaired one.
- Where all tests take too long, those modules of tests run that the release changed.
"""

import asyncio
import difflib
import io
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import pairwise

from packaging.version import InvalidVersion, Version

from regreen.mine.candidate import Found, Past, Rejected
from regreen.mine.culprits import Candidate
from regreen.mine.facts import Run, diagnose, stable_ids
from regreen.mine.interface import additions
from regreen.mine.lab import Laboratory, Release, Unusable
from regreen.mine.miner import MAX_SDIST_BYTES, MIN_SHARE, Miner, read_needs
from regreen.mine.project import compiled, is_test_module, member_names, test_roots
from regreen.pkgindex import IndexFile
from regreen.rpc.errors import InvalidArgument, NotFound
from regreen.tasks.model import FileRecord, ids_sha256

KIND = "release-bugfix"
MAX_PAIRS, MAX_RECORDS = 12, 4
"""Pairs of a turn, and records of a package."""
OLDEST = "2018-01-01"
"""Releases before that day are not looked at: Python 3.11 runs hardly any."""
_LONG = frozenset({"times out", "too slow", "too many tests"})
"""Where the modules that a release changed may be enough."""
_SAME_FOR_ALL = _LONG | {"code to compile"}
"""What is not otherwise in the releases before."""
_SAME_FOR_TURN = "no tests in the source archive"
_BASES = 2
"""Releases without a base that works, after which those before are not tried."""
MAX_FILES, MAX_LINES, MAX_TURNED = 6, 200, 40
_VERSION = re.compile(r"version|__author__|copyright|^\s*#|^\s*$", re.IGNORECASE)
_SOURCE = re.compile(r"\.(?:py|pyi|json|ya?ml|toml|txt|html|jinja2?|j2|cfg)$")
_ASIDE = re.compile(
    r"^(?:docs?|examples?|changes|changelog|news|readme|authors|\.|build|tools|scripts|"
    r"setup\.py|setup\.cfg|tox\.ini|pyproject\.toml|noxfile|requirements|pkg-info|conftest|"
    r"poetry\.lock|tasks\.py|license|manifest|release)|\.egg-info/|PKG-INFO$",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Change:
    """What a release changed."""

    source: tuple[str, ...]
    """Files whose lines differ by more than a version."""
    tests: tuple[str, ...]
    added: int
    removed: int


@dataclass(frozen=True, slots=True)
class Pair:
    """Two adjacent releases."""

    before: IndexFile
    after: IndexFile
    turn: int
    """Which are tried first: 0 patch releases, 1 others; 2 and 3 the same of before that day."""

    @property
    def patch(self) -> bool:
        """Whether both are of one minor series."""
        return self.turn in (0, 2)


class BugfixMiner(Miner):
    """Mines bug fixes."""

    needs_dependencies = False
    least_share = 0.5
    """The tests are those of a later release; with its source, most must pass."""
    _long: bool = False
    """Whether all tests of the package in work take too long."""

    async def mine(self, candidate: Candidate, past: Past) -> list[Found]:
        """The bug fixes among the releases, those since that day first.

        Raises:
            Rejected: the candidate is of no use; says at which stage, and why.
        """
        with self.clock.at("screen"):
            try:
                files = await self.registry.files(candidate.package)
            except NotFound as error:
                raise Rejected("screen", "unknown package") from error
        self._long = False
        pairs = release_pairs(files, candidate.day.isoformat())
        if not pairs:
            raise Rejected("screen", "no adjacent source releases")
        found: list[Found] = []
        refused: list[tuple[Pair, Rejected]] = []
        for pair in pairs:
            if len(found) == MAX_RECORDS or hopeless(pair, refused):
                continue
            try:
                found.append(await self._either(candidate, pair))
            except Rejected as error:
                refused.append((pair, error))
                self.notes.append(f"{pair.after.version}: {error.reason}")
        if not found:
            last = refused[-1][1]
            raise Rejected(last.stage, last.reason, "; ".join(self.notes)[:2000])
        return found

    async def _either(self, candidate: Candidate, pair: Pair) -> Found:
        """The record of a pair by all tests, or by the modules that it changed."""
        if not self._long:
            try:
                return await self._pair(candidate, pair)
            except Rejected as error:
                if error.reason not in _LONG:
                    raise
                self.notes.append(f"{pair.after.version}: {error.reason}, as a whole")
                self._long = True
        return await self._pair(candidate, pair, changed_only=True)

    async def _pair(self, candidate: Candidate, pair: Pair, *, changed_only: bool = False) -> Found:
        with self.clock.at("compare"):
            earlier = await self._archive(candidate.package, pair.before)
            later = await self._archive(candidate.package, pair.after)
            try:
                change, release, roots = await asyncio.to_thread(_compared, earlier, later, pair)
            except InvalidArgument as error:
                raise Rejected("screen", "archive too large", str(error)) from error
        self.version = pair.after.version
        day = date.fromisoformat(pair.after.uploaded[:10]) + timedelta(days=2)
        python = self._python(day, pair.after.requires_python)
        with self.clock.at("compare"):
            needs, licence = await asyncio.to_thread(read_needs, later, python, candidate.package)
            tools = await self.pinner.tools(python, day.isoformat(), needs.build)
        record = FileRecord(filename=pair.after.filename, sha256=pair.after.sha256)
        modules = [path for path in change.tests if path in release and is_test_module(path)]
        if changed_only and not modules:
            raise Rejected("compare", "no module of tests differs")
        tested = Release(
            package=candidate.package,
            version=pair.before.version,
            sdist=FileRecord(filename=pair.before.filename, sha256=pair.before.sha256),
            python=python,
            tools=tuple(tools),
            roots=tuple(roots),
            mode="editable" if release & {"setup.py", "pyproject.toml"} else "path",
            overlay=record,
            modules=tuple(modules) if changed_only else (),
        )
        async with Laboratory(self.client, self.registry, tested) as lab:
            at = Candidate(KIND, candidate.package, day)
            ground = await self._base(at, lab, needs, licence)
            with self.clock.at("fix"):
                fixed = await self._fixed(lab, _members(later, change.source))
                turned = turned_green(ground.run, fixed)
                again = await self._fixed(lab, _members(later, change.source))
        mined = _mined(lab.release, pair, ground.pins, change)
        return _found(mined, ground.run, fixed, again, turned, licence)

    async def _archive(self, package: str, entry: IndexFile) -> bytes:
        if entry.size_bytes > MAX_SDIST_BYTES or not entry.sha256:
            raise Rejected("screen", "archive too large", entry.filename)
        return await self.registry.sdist(package, entry.filename, entry.sha256)

    async def _fixed(self, lab: Laboratory, files: Mapping[str, bytes]) -> Run:
        try:
            return await lab.attempt_files(files)
        except Unusable as error:
            raise Rejected("fix", "cannot be run", str(error)[-300:]) from error


def hopeless(pair: Pair, refused: Sequence[tuple[Pair, Rejected]]) -> bool:
    """Whether a pair need not be tried, after what those before it were refused for."""
    if any(error.reason in _SAME_FOR_ALL for _, error in refused):
        return True
    alike = [error for other, error in refused if other.turn == pair.turn]
    baseless = sum(error.stage == "base" for error in alike)
    return baseless >= _BASES or any(error.reason == _SAME_FOR_TURN for error in alike)


def release_pairs(files: Sequence[IndexFile], since: str) -> list[Pair]:
    """Adjacent source releases: the patch releases since a day, the others, and those before.

    The newest of each turn come first, and of each there are `MAX_PAIRS` at most.
    """
    found: dict[Version, IndexFile] = {}
    for entry in files:
        if entry.is_wheel or entry.yanked or not entry.filename.endswith(".tar.gz"):
            continue
        try:
            version = Version(entry.version)
        except InvalidVersion:
            continue
        if not version.is_prerelease and not version.is_postrelease:
            found[version] = entry
    turns: dict[int, list[Pair]] = {turn: [] for turn in range(4)}
    for before, after in pairwise(sorted(found)):
        day = found[after].uploaded[:10]
        patch = len(after.release) > 2 and before.release[:2] == after.release[:2]
        turn = (0 if day >= since else 2) + (0 if patch else 1)
        if day >= OLDEST:
            turns[turn].append(Pair(found[before], found[after], turn))
    return [pair for every in turns.values() for pair in every[::-1][:MAX_PAIRS]]


def compare(
    before: Mapping[str, bytes], after: Mapping[str, bytes], roots: Sequence[str]
) -> Change:
    """What differs between two archives, as far as it matters.

    Raises:
        Rejected: it is no bug fix by size or by content.
    """
    source: list[str] = []
    tests: list[str] = []
    added = removed = 0
    for path in sorted({*before, *after}):
        old, new = before.get(path), after.get(path)
        if old == new:
            continue
        if any(path == root or path.startswith(f"{root}/") for root in roots):
            tests.append(path)
            continue
        if _ASIDE.search(path) or not _SOURCE.search(path):
            continue
        if old is None or new is None:
            raise Rejected("compare", "files come or go", path)
        plus, minus = _lines(old, new)
        if plus or minus:
            source.append(path)
            added, removed = added + plus, removed + minus
    if not any(path.endswith(".py") for path in source):
        raise Rejected("compare", "no source differs")
    if not tests:
        raise Rejected("compare", "no test differs")
    if len(source) > MAX_FILES or added + removed > MAX_LINES:
        raise Rejected("compare", "too much differs", f"{len(source)} files, {added}+{removed}")
    return Change(tuple(source), tuple(tests), added, removed)


def _lines(old: bytes, new: bytes) -> tuple[int, int]:
    """Lines added and removed, those about versions left out."""
    one, two = (text.decode("utf-8", "replace").splitlines() for text in (old, new))
    marks = [
        line[0]
        for line in difflib.unified_diff(one, two, n=0, lineterm="")
        if line[:1] in "+-" and line[:3] not in ("+++", "---") and not _VERSION.search(line[1:])
    ]
    return marks.count("+"), marks.count("-")


def turned_green(broken: Run, fixed: Run) -> frozenset[str]:
    """Tests that the fix turns green.

    Raises:
        Rejected: there are none, too many, or the fix breaks others.
    """
    turned = stable_ids(fixed.passed - broken.passed)
    failing = {i for i in turned if i in broken.failed}
    if not turned:
        raise Rejected("fix", "no test turns green")
    if len(turned) > MAX_TURNED:
        raise Rejected("fix", "too many tests turn green", f"{len(turned)}")
    if not failing:
        raise Rejected("fix", "no test fails before", f"{len(turned)} come anew")
    lost = broken.passed - fixed.passed
    if stable_ids(lost):
        raise Rejected("fix", "breaks other tests", ", ".join(sorted(lost)[:3]))
    if len(fixed.passed) < MIN_SHARE * len(fixed.passed | fixed.failed):
        raise Rejected("fix", "too many tests fail", f"{len(fixed.failed)} with the fix")
    return turned


def _compared(earlier: bytes, later: bytes, pair: Pair) -> tuple[Change, set[str], list[str]]:
    names = member_names(later)
    roots = test_roots(names)
    if not roots:
        raise Rejected("screen", "no tests in the source archive")
    if compiled(names):
        raise Rejected("screen", "code to compile")
    old, new = _members(earlier, None), _members(later, None)
    change = compare(old, new, roots)
    if not pair.patch:
        sources = ({path: each[path] for path in change.source} for each in (old, new))
        if added := additions(*sources):
            raise Rejected("compare", "adds to what modules offer", ", ".join(added[:3]))
    return change, set(names), roots


def _members(archive: bytes, wanted: Sequence[str] | None) -> dict[str, bytes]:
    """Contents of files below the top folder; of all that may matter if none are named."""
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            chosen = name in wanted if wanted is not None else bool(_SOURCE.search(name))
            stream = tar.extractfile(member) if chosen and member.isfile() else None
            if stream is not None:
                found[name] = stream.read()
    return found


def _mined(
    release: Release, pair: Pair, pins: Mapping[str, str], change: Change
) -> dict[str, object]:
    return {
        "kind": KIND,
        "id": f"{release.package}-{pair.before.version}__{pair.after.version}",
        "package": release.package,
        "version": pair.before.version,
        "fixed_version": pair.after.version,
        "sdist": {"filename": pair.after.filename, "sha256": pair.after.sha256},
        "python": release.python,
        "build": {"mode": release.mode, "tools": list(release.tools)},
        "pins_pass": [f"{n}=={v}" for n, v in sorted(pins.items())],
        "test_command": " ".join(["python -m pytest -o addopts=", *release.tested]),
        "overlay_paths": list(release.roots),
        "reference_patch": {
            "files": list(change.source),
            "added": change.added,
            "removed": change.removed,
        },
    }


def _found(
    mined: dict[str, object],
    broken: Run,
    fixed: Run,
    again: Run,
    turned: frozenset[str],
    licence: str,
) -> Found:
    facts = diagnose(broken, "", turned)
    steady = sorted(turned & again.passed)
    if not steady:
        raise Rejected("fix", "no stable test turns green")
    unstable = (fixed.passed ^ again.passed) | (fixed.passed - stable_ids(fixed.passed))
    done = {
        **mined,
        "stage": facts.stage,
        "category": facts.category,
        "blame_top": "source",
        "error_lines": list(facts.error_lines),
        "tests": {
            "fail_to_pass": steady,
            "n_fail_to_pass": len(steady),
            "fail_to_pass_sha256": ids_sha256(steady),
            "pass_to_pass_n": len(broken.passed & fixed.passed),
        },
        "seconds": {"test": round(fixed.seconds, 2)},
    }
    return Found(done, tuple(sorted(unstable - set(steady))), licence)

"""Mines bug fixes of patch releases: a release fails the tests of the next one.

- Two archives are compared before anything runs: a few lines of source and some tests differ, and
  nothing else of the package does.
- The broken State is the earlier release with the later one's tests; the fix is the later one's
  source files. Every test that passed before must pass with it.
- It is a fix of a bug by size and by content, not by reading: no test that cannot even be
  collected, since that is a new function and not a repaired one.
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
from regreen.mine.lab import Laboratory, Release, Unusable
from regreen.mine.miner import MAX_SDIST_BYTES, Miner, read_needs
from regreen.mine.project import compiled, member_names, test_roots
from regreen.pkgindex import IndexFile
from regreen.rpc.errors import InvalidArgument, NotFound
from regreen.tasks.model import FileRecord, ids_sha256

KIND = "release-bugfix"
MAX_PAIRS, MAX_RECORDS = 12, 4
_SAME_FOR_ALL = (
    "no tests in the source archive", "code to compile", "times out", "too slow", "too many tests"
)  # fmt: skip
"""What is not otherwise in the releases before."""
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
class _Pair:
    before: IndexFile
    after: IndexFile


class BugfixMiner(Miner):
    """Mines bug fixes."""

    needs_dependencies = False

    async def mine(self, candidate: Candidate, past: Past) -> list[Found]:
        """The bug fixes among the newest patch releases since that day.

        Raises:
            Rejected: the candidate is of no use; says at which stage, and why.
        """
        with self.clock.at("screen"):
            try:
                files = await self.registry.files(candidate.package)
            except NotFound as error:
                raise Rejected("screen", "unknown package") from error
        pairs = patch_pairs(files, candidate.day.isoformat())[:MAX_PAIRS]
        if not pairs:
            raise Rejected("screen", "no patch releases since that day")
        found: list[Found] = []
        refused: list[Rejected] = []
        for before, after in pairs:
            try:
                found.append(await self._pair(candidate, _Pair(before, after)))
            except Rejected as error:
                refused.append(error)
                self.notes.append(f"{after.version}: {error.reason}")
            if len(found) == MAX_RECORDS or hopeless(refused):
                break
        if not found:
            last = refused[-1]
            raise Rejected(last.stage, last.reason, "; ".join(self.notes))
        return found

    async def _pair(self, candidate: Candidate, pair: _Pair) -> Found:
        with self.clock.at("compare"):
            earlier = await self._archive(candidate.package, pair.before)
            later = await self._archive(candidate.package, pair.after)
            try:
                change, release, roots = await asyncio.to_thread(_compared, earlier, later)
            except InvalidArgument as error:
                raise Rejected("screen", "archive too large", str(error)) from error
        self.version = pair.after.version
        day = date.fromisoformat(pair.after.uploaded[:10]) + timedelta(days=2)
        python = self._python(day, pair.after.requires_python)
        with self.clock.at("compare"):
            needs, licence = await asyncio.to_thread(read_needs, later, python, candidate.package)
            tools = await self.pinner.tools(python, day.isoformat(), needs.build)
        record = FileRecord(filename=pair.after.filename, sha256=pair.after.sha256)
        tested = Release(
            package=candidate.package,
            version=pair.before.version,
            sdist=FileRecord(filename=pair.before.filename, sha256=pair.before.sha256),
            python=python,
            tools=tuple(tools),
            roots=tuple(roots),
            mode="editable" if release & {"setup.py", "pyproject.toml"} else "path",
            overlay=record,
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


def hopeless(refused: Sequence[Rejected]) -> bool:
    """Whether the releases before those that were refused need not be tried."""
    baseless = sum(error.stage == "base" for error in refused)
    return baseless >= _BASES or any(error.reason in _SAME_FOR_ALL for error in refused)


def patch_pairs(files: Sequence[IndexFile], since: str) -> list[tuple[IndexFile, IndexFile]]:
    """Adjacent source releases of one minor series, the newest first."""
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
    ordered = sorted(found)
    pairs = []
    for before, after in pairwise(ordered):
        newer = found[after].uploaded[:10] >= since
        if newer and len(after.release) > 2 and before.release[:2] == after.release[:2]:
            pairs.append((found[before], found[after]))
    return pairs[::-1]


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
    return turned


def _compared(earlier: bytes, later: bytes) -> tuple[Change, set[str], list[str]]:
    names = member_names(later)
    roots = test_roots(names)
    if not roots:
        raise Rejected("screen", "no tests in the source archive")
    if compiled(names):
        raise Rejected("screen", "code to compile")
    old, new = _members(earlier, None), _members(later, None)
    return compare(old, new, roots), set(names), roots


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
    release: Release, pair: _Pair, pins: Mapping[str, str], change: Change
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
        "test_command": " ".join(["python -m pytest -o addopts=", *release.roots]),
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

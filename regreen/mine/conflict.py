"""Mines conflicts: one real release that a project's own declared bounds rule out.

- The good State is a release as the index was on a day; its lock is what a resolver makes of its
  declared requirements, and a check of ours says so.
- In the broken State one package has moved to the first release with which no resolution exists:
  its own number is out of bounds, or it requires what the project's bounds on another forbid. All
  that is installed goes together; only what the project declares does not.
- Who resolves is uv, in the sandbox, over the releases on offer, with the pins of the lock.
- Fixes: the pins of before, or bounds that let the release in, where the tests then pass.
"""

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from regreen.lockfile import format_lock, lock_of, normalize
from regreen.mine.bisect import between
from regreen.mine.bounds import loosened, own_bounds
from regreen.mine.candidate import Found, Ground, Past, Rejected, Tried
from regreen.mine.checks import requirements_check
from regreen.mine.culprits import Candidate
from regreen.mine.facts import damage, stable_ids
from regreen.mine.lab import Laboratory, Release, Unusable
from regreen.mine.record import record_of
from regreen.mine.upgrade import UpgradeMiner
from regreen.rpc.errors import NotFound
from regreen.tasks import environment as env
from regreen.tasks.model import Edit

KIND = "conflict"
CATEGORY = "resolver-conflict"
MAX_TRIED, MAX_RECORDS = 6, 2
_FAR = "99999"


@dataclass(frozen=True, slots=True)
class _Bump:
    """A release with which there is no resolution, and the set that holds it."""

    name: str
    good: str
    bad: str
    pins: Mapping[str, str]


class ConflictMiner(UpgradeMiner):
    """Mines conflicts."""

    async def mine(self, candidate: Candidate, past: Past) -> list[Found]:
        """The conflicts of the release of that day; raises as `UpgradeMiner.mine`."""
        release, needs, licence = await self._screen(candidate, past.releases)
        if not any(Requirement(line).specifier for line in needs.runtime):
            raise Rejected("screen", "no bound is declared")
        names = {normalize(Requirement(line).name) for line in needs.runtime}
        bare = release
        release, test = _checked(bare, names)
        async with Laboratory(self.client, self.registry, release) as lab:
            ground = await self._base(candidate, lab, needs, licence)
            said = "" if test in lab.passing else await self._said(lab, test)
            if found := re.search(r"no longer declared: ([\w., -]+)", said):
                names -= set(found[1].split(", "))  # only the build knows what it declares
                lab.release, _ = _checked(replace(bare, mode=lab.release.mode), names)
                ground = await self._base(candidate, lab, needs, licence)
                said = "" if test in lab.passing else await self._said(lab, test)
            if said:
                raise Rejected("base", "the requirements cannot be checked", said[-600:])
            return await self._conflicts(lab, ground, past.breaks, test)

    async def _conflicts(
        self, lab: Laboratory, ground: Ground, known: set[tuple[str, str]], test: str
    ) -> list[Found]:
        """The records of this ground."""
        found: list[Found] = []
        for bump in await self._bumps(ground, known):
            if len(found) == MAX_RECORDS:
                break
            try:
                found.append(await self._record_of_conflict(lab, ground, bump, test))
            except (Rejected, Unusable) as error:
                self.notes.append(f"{bump.name} {bump.bad}: {error}"[:300])
        if not found:
            raise Rejected("conflict", "no conflict can be used", "; ".join(self.notes))
        return found

    async def _said(self, lab: Laboratory, test: str) -> str:
        """What a test says; the first run of a State tells no messages."""
        try:
            run = await lab.attempt_files({"regreen-noop.txt": b""})
        except Unusable as error:
            return str(error)
        return run.messages.get(test, "") or run.log[-600:]

    async def _bumps(self, ground: Ground, known: set[tuple[str, str]]) -> list[_Bump]:
        """Of each package the first release that no resolution allows."""
        hinted = [name for name, _ in ground.candidate.hints]
        declared = [normalize(Requirement(line).name) for line in ground.needs.runtime]
        names = [n for n in dict.fromkeys((*hinted, *declared)) if n in ground.pins]
        found = []
        tried: list[str] = []
        with self.clock.at("resolve"):
            for name in names:
                later = await self._later(ground, name)
                if not later or len(tried) == MAX_TRIED:
                    continue
                tried.append(name)
                bump = await self._first_conflict(ground, name, later)
                if bump is not None and (name, bump.bad) not in known:
                    found.append(bump)
        if not found:
            raise Rejected("conflict", "no release is ruled out", ", ".join(tried))
        return found

    async def _later(self, ground: Ground, name: str) -> list[str]:
        """Releases after the pinned one, oldest first."""
        files = await self.registry.files(name)
        try:
            return between(files, ground.release.python, ground.pins[name], _FAR)
        except InvalidVersion:
            return []

    async def _first_conflict(
        self, ground: Ground, name: str, later: Sequence[str]
    ) -> _Bump | None:
        low, high = -1, len(later) - 1
        if await self._allowed(ground, name, later[-1]):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if await self._allowed(ground, name, later[middle]):
                low = middle
            else:
                high = middle
        bad = later[high]
        try:
            pins = await self._settle(ground, ground.pins, name, bad)
        except NotFound:
            self.notes.append(f"{name} {bad}: no set holds it")
            return None
        return _Bump(name, ground.pins[name], bad, pins)

    async def _allowed(self, ground: Ground, name: str, version: str) -> bool:
        """Whether what the project declares can be resolved with this release."""
        own = {r.name: r for r in map(Requirement, ground.needs.runtime)}
        bound = next((r for n, r in own.items() if normalize(n) == name), None)
        if bound is not None and not bound.specifier.contains(version, prereleases=True):
            return False
        lines = [*ground.needs.runtime, f"{name}=={version}"]
        try:
            await self.resolver.newest(lines, ground.release.python)
        except NotFound:
            return False
        return True

    async def _record_of_conflict(
        self, lab: Laboratory, ground: Ground, bump: _Bump, test: str
    ) -> Found:
        """The record of a conflict, with the fixes that were seen to work."""
        with self.clock.at("single"):
            bad = Tried(bump.bad, bump.pins, await lab.attempt(bump.pins))
        good = Tried(bump.good, ground.pins, ground.run)
        lost = damage(stable_ids(good.run.passed) & lab.passing, bad.run)
        if test not in lost.broken:
            raise Rejected("conflict", "it resolves", f"{bump.name} {bump.bad}")
        said = bad.run.messages.get(test, "")
        if "unsatisfiable" not in said:
            raise Rejected("conflict", "fails for another reason", said[-300:])
        fixes: list[dict[str, object]] = [{"mode": "any_fix", "origin": "pins-restored"}]
        with self.clock.at("fix"):
            edits = await self._loosened(lab, ground, bad, lab.passing)
        if edits:
            wire = [edit.model_dump() for edit in edits]
            fixes.append({"mode": "keep_new", "origin": "source-edit", "edits": wire})
        found = record_of(ground, lab, bump.name, good, bad, lost)
        release = lab.release
        mined = {
            **found.mined,
            "kind": KIND,
            "id": f"{release.package}-{release.version}__{bump.name}-{bump.bad}__conflict",
            "category": CATEGORY,
            "stage": "resolve",
            "blame_top": "source",
            "error_lines": reasons(said),
            "fixes_verified": fixes,
            "added": [added.model_dump() for added in release.added],
        }
        return replace(found, mined=mined)

    async def _loosened(
        self, lab: Laboratory, ground: Ground, bad: Tried, passing: frozenset[str]
    ) -> list[Edit]:
        """Edits of the declared bounds with which everything passes; none if none do."""
        sdist = ground.release.sdist
        archive = await self.registry.sdist(ground.release.package, sdist.filename, sdist.sha256)
        texts = await asyncio.to_thread(own_bounds, archive)
        broken = {
            normalize(r.name): r
            for r in map(Requirement, ground.needs.runtime)
            if not _holds(r, bad.pins.get(normalize(r.name), ""))
        }
        edits = loosened(texts, broken, bad.pins)
        if not edits:
            return []
        changed = env.edited_texts(edits, texts)
        lock = [f"{n}=={v}" for n, v in bad.pins.items()]
        files = {path: text.encode() for path, text in changed.items()}
        files[env.LOCK] = format_lock(lock_of(lock, ground.release.python)).encode()
        try:
            run = await lab.attempt_files(files)
        except Unusable:
            return []
        return edits if stable_ids(passing) <= run.passed else []


def _checked(release: Release, names: Iterable[str]) -> tuple[Release, str]:
    """The release with the check of its requirements, and the check's test."""
    check = requirements_check(sorted(names))
    added = replace(release, added=(check,), roots=(*release.roots, check.path))
    return added, f"{check.path}::test_requirements_resolve"


def _holds(requirement: Requirement, version: str) -> bool:
    try:
        return not version or requirement.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def reasons(said: str) -> Sequence[str]:
    """What the resolver says, in sentences."""
    text = " ".join(said.split())
    start = re.search(r"Because |No solution", text)
    parts = re.split(r"(?<=\.) (?=And|We|Because)|╰─▶ ", text[start.start() if start else 0 :])
    return [part.strip()[:300] for part in parts if part.strip()][:6]

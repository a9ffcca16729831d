"""Mines dependency upgrades that break: one release, one day, one culprit after another.

- The untouched tests must pass as the index was on that day, in several runs.
- Everything is upgraded at once first: where that breaks nothing, nothing single is tried.
- A culprit breaks alone, with only the moves that it forces; its releases are bisected, so that a
  record names the last release that works and the first that does not.
- Nothing is decided here by one run alone: the admission gate repeats every check of a record.
"""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from packaging.version import InvalidVersion, Version

from regreen.lockfile import normalize
from regreen.mine.bisect import between, bisect, release_before, spread
from regreen.mine.candidate import Clock, Found, Ground, Rejected, Tried
from regreen.mine.culprits import Candidate
from regreen.mine.facts import Damage, Run, damage, stable_ids
from regreen.mine.lab import Laboratory, Release, Unusable
from regreen.mine.miner import MAX_SDIST_BYTES, Miner, read_needs
from regreen.mine.project import (
    Needs,
    compiled,
    member_names,
    test_roots,
)
from regreen.mine.record import record_of
from regreen.rollout.logs import analyse, suspects
from regreen.rpc.errors import InvalidArgument, NotFound
from regreen.tasks.model import FileRecord

MAX_CANDIDATE_S = 600.0
"""No further suspect is tried after so long."""
MAX_SINGLES, MAX_BREAKS = 8, 3
MOST_AT_ONCE = 12
PRELOADED_BYTES = 60 << 20
_HELD = re.compile(
    r"^(?:pytest.*|pluggy|iniconfig|coverage|hypothesis|mock|nose|py|exceptiongroup|tomli|tox)$"
)


class UpgradeMiner(Miner):
    """Mines dependency upgrades."""

    async def mine(
        self,
        candidate: Candidate,
        *,
        seen: set[str],
        known: set[tuple[str, str]],
        hear: Callable[[str], None] = lambda stage: None,
    ) -> list[Found]:
        """The breaks of the release of that day.

        `seen` are releases that were looked at on another day, `known` the culprits and first bad
        releases that are on record already.

        Raises:
            Rejected: the candidate is of no use; says at which stage, and why.
        """
        self.clock, self.notes, self.version = Clock(hear=hear), [], ""
        release, needs, licence = await self._screen(candidate, seen)
        async with Laboratory(self.client, self.registry, release) as lab:
            ground = await self._base(candidate, lab, needs, licence)
            return await self._breaks(lab, ground, known)

    async def _screen(self, candidate: Candidate, seen: set[str]) -> tuple[Release, Needs, str]:
        """Everything that can be known without running anything."""
        with self.clock.at("screen"):
            try:
                files = await self.registry.files(candidate.package)
            except NotFound as error:
                raise Rejected("screen", "unknown package") from error
            entry = release_before(files, candidate.day.isoformat())
            if entry is None:
                raise Rejected("screen", "no source release at that day")
            if entry.version in seen:
                raise Rejected("screen", "same release as on another day", entry.version)
            self.version = entry.version
            if entry.size_bytes > MAX_SDIST_BYTES or not entry.sha256:
                raise Rejected("screen", "archive too large", entry.filename)
            python = self._python(candidate.day, entry.requires_python)
            archive = await self.registry.sdist(candidate.package, entry.filename, entry.sha256)
            try:
                names = member_names(archive)
            except InvalidArgument as error:
                raise Rejected("screen", "archive too large", str(error)) from error
            roots = test_roots(names)
            if not roots:
                self.registry.drop(entry.sha256)
                raise Rejected("screen", "no tests in the source archive", entry.filename)
            if compiled(names):
                raise Rejected("screen", "code to compile", entry.filename)
            needs, licence = await asyncio.to_thread(read_needs, archive, python, candidate.package)
            day = candidate.day.isoformat()
            tools = await self.pinner.tools(python, day)
        sdist = FileRecord(filename=entry.filename, sha256=entry.sha256)
        mode = "editable" if {"setup.py", "pyproject.toml"} & set(names) else "path"
        release = Release(
            candidate.package, entry.version, sdist, python, tuple(tools), tuple(roots), mode
        )
        return release, needs, licence

    async def _breaks(
        self, lab: Laboratory, ground: Ground, known: set[tuple[str, str]]
    ) -> list[Found]:
        """Upgrade everything; where that breaks, find who alone does."""
        with self.clock.at("resolve all"):
            newest = await self._newest(ground)
        moved = {n for n, v in newest.items() if n in ground.pins and ground.pins[n] != v}
        if not moved:
            raise Rejected("upgrade", "nothing newer")
        with self.clock.at("upgrade all"):
            everything = await self._try(lab, newest)
        if everything is not None and not damage(lab.passing, everything):
            raise Rejected("upgrade", "everything newest passes", f"{len(moved)} moved")
        found: list[Found] = []
        left = damage(lab.passing, everything).broken if everything else lab.passing
        reasons: list[str] = []
        order = self._order(ground, moved, everything)
        hinted = dict(ground.candidate.hints)  # one that breaks everything hides the others
        for name, pins in (await self._singles(lab, ground, newest, order, reasons)).items():
            if len(found) == MAX_BREAKS or sum(self.clock.seconds.values()) > MAX_CANDIDATE_S:
                break
            if everything is not None and not left and name not in hinted:
                continue
            try:
                with self.clock.at("single"):
                    tried = Tried(pins[name], pins, await lab.attempt(pins))
                broken = damage(lab.passing, tried.run)
                if not broken:
                    continue
                left = left - broken.broken
                found.append(await self._narrow(lab, ground, name, tried, known))
            except (Rejected, Unusable) as error:
                reason = error.reason if isinstance(error, Rejected) else "cannot be run"
                reasons.append(f"{name}: {reason}")
        self.notes += reasons
        if not found:
            reason = "no single culprit" if not reasons else "breaks cannot be used"
            raise Rejected("split", reason, "; ".join(reasons))
        return found

    async def _singles(
        self,
        lab: Laboratory,
        ground: Ground,
        newest: Mapping[str, str],
        order: Sequence[str],
        reasons: list[str],
    ) -> dict[str, dict[str, str]]:
        """For each suspect the set in which it alone is moved, all on offer at once."""
        targets = {name: self._target(ground, newest, name) for name in order}
        chosen = [name for name in order if targets[name]][:MAX_SINGLES]

        async def settled(name: str) -> dict[str, str] | None:
            try:
                return await self._settle(ground, ground.pins, name, targets[name])
            except NotFound:
                reasons.append(f"{name}: no set with it")
                return None

        with self.clock.at("resolve singles"):
            sets = await asyncio.gather(*map(settled, chosen))
        found = {name: pins for name, pins in zip(chosen, sets, strict=True) if pins is not None}
        with self.clock.at("offer singles"):
            try:
                await lab.offer(found.values())
            except Unusable as error:
                raise Rejected("split", "cannot be prepared", str(error)[-300:]) from error
        return found

    async def _newest(self, ground: Ground) -> dict[str, str]:
        runtime = {normalize(r.partition("[")[0]) for r in Needs(ground.needs.runtime, ()).names()}
        free = runtime | {name for name, _ in ground.candidate.hints}
        held = [f"{n}=={v}" for n, v in ground.pins.items() if _HELD.match(n) and n not in free]
        problem = ""
        for constraints in (held, []):
            try:
                names = ground.needs.names()
                pins = await self.resolver.newest(names, ground.release.python, constraints)
            except NotFound as error:
                problem = error.message
                continue
            pins.pop(ground.candidate.package, None)
            return pins
        raise Rejected("upgrade", "newest does not resolve", " ".join(problem.split())[-500:])

    async def _try(self, lab: Laboratory, pins: Mapping[str, str]) -> Run | None:
        try:
            return await lab.attempt(pins)
        except Unusable as error:
            self.notes.append(f"all: {str(error)[-200:]}")
            return None

    def _order(self, ground: Ground, moved: set[str], run: Run | None) -> list[str]:
        """Whom to try first: the known, then those that the log speaks of, then the declared."""
        hinted = [n for n, _ in ground.candidate.hints if n in ground.pins]
        error = analyse(run.log) if run is not None else None
        spoken = suspects(error, ground.pins) if error is not None else ()
        named = [normalize(name.partition("[")[0]) for name in ground.needs.names()]
        every = [*hinted, *(n for n in (*spoken, *named) if n in moved), *sorted(moved)]
        runtime = {normalize(r.partition("[")[0]) for r in Needs(ground.needs.runtime, ()).names()}
        return [
            n for n in dict.fromkeys(every) if n in hinted or n in runtime or not _HELD.match(n)
        ]

    def _target(self, ground: Ground, newest: Mapping[str, str], name: str) -> str:
        """The release of a suspect to try: the newest that goes with all, or the known one."""
        hint = dict(ground.candidate.hints).get(name, "")
        best = newest.get(name, "")
        target = max(filter(None, (hint, best)), key=Version, default="")
        return target if target and Version(target) > Version(ground.pins[name]) else ""

    async def _settle(
        self, ground: Ground, pins: Mapping[str, str], name: str, version: str
    ) -> dict[str, str]:
        names = ground.needs.names()
        found = await self.resolver.settle(
            names, ground.release.python, dict(pins), (name, version)
        )
        found.pop(ground.candidate.package, None)
        return found

    async def _narrow(
        self,
        lab: Laboratory,
        ground: Ground,
        name: str,
        bad: Tried,
        known: set[tuple[str, str]],
    ) -> Found:
        """The adjacent pair of releases, and the record of it."""
        good = Tried(ground.pins[name], ground.pins, ground.run)
        with self.clock.at("bisect"):
            good, bad = await self._bisected(lab, ground, name, good, bad)
        if (name, bad.version) in known:
            raise Rejected("bisect", "same break as on another day", f"{name} {bad.version}")
        with self.clock.at("confirm"):
            good, bad, lost = await self._confirm(lab, ground, name, good, bad)
        return record_of(ground, lab, name, good, bad, lost)

    async def _bisected(
        self, lab: Laboratory, ground: Ground, name: str, good: Tried, bad: Tried
    ) -> tuple[Tried, Tried]:
        """The adjacent pair: first the known breaking release and the one before it, then all.

        Sets are resolved and offered many at once, since each new offer makes a State.
        """
        files = await self.registry.files(name)
        python = ground.release.python
        try:
            left = between(files, python, good.version, bad.version)
        except InvalidVersion as error:
            raise Rejected("bisect", "versions cannot be compared", str(error)) from error
        sets: dict[str, dict[str, str]] = {}

        async def settled(version: str) -> None:
            with suppress(NotFound):
                sets[version] = await self._settle(ground, ground.pins, name, version)

        async def probe(version: str) -> tuple[bool, Tried] | None:
            if version not in sets:
                return None
            try:
                run = await lab.attempt(sets[version])
            except Unusable:
                return None
            return not damage(lab.passing, run), Tried(version, sets[version], run)

        hint = dict(ground.candidate.hints).get(name, "")
        at = left.index(hint) if hint in left else -1
        chosen = left[max(0, at - 1) : at + 1] if at >= 0 else []
        if hint == bad.version:
            chosen = left[-1:]
        size = max((f.size_bytes for f in files if f.version in left), default=0)
        most = max(2, min(MOST_AT_ONCE, PRELOADED_BYTES // max(size, 1)))
        while left:
            chosen = chosen or spread(left, most)
            await asyncio.gather(*map(settled, chosen))
            try:
                await lab.offer(sets[version] for version in chosen if version in sets)
            except Unusable as error:
                raise Rejected("bisect", "cannot be prepared", str(error)[-300:]) from error
            good, bad = await bisect(chosen, good, bad, probe)
            inside = between(files, python, good.version, bad.version)
            left = [version for version in inside if version in left and version not in chosen]
            chosen = []
        return good, bad

    async def _confirm(
        self, lab: Laboratory, ground: Ground, name: str, good: Tried, bad: Tried
    ) -> tuple[Tried, Tried, Damage]:
        """The step from the good set to the bad one, with nothing else moved than it forces."""
        try:
            pins = await self._settle(ground, good.pins, name, bad.version)
            if pins != bad.pins:
                bad = Tried(bad.version, pins, await lab.attempt(pins))
            if good.pins == ground.pins:
                good = replace(good, run=await lab.attempt(good.pins))
        except (NotFound, Unusable) as error:
            raise Rejected("confirm", "cannot be run", str(error)[-300:]) from error
        lost = damage(stable_ids(good.run.passed) & lab.passing, bad.run)
        if not lost:
            raise Rejected("confirm", "not broken by one step")
        return good, bad, lost

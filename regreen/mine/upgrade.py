"""Mines dependency upgrades that break: one release, one day, one culprit after another.

- The untouched tests must pass as the index was on that day, in several runs.
- Everything is upgraded at once first: where that breaks nothing, nothing single is tried.
- A culprit breaks alone, with only the moves that it forces; its releases are bisected, so that a
  record names the last release that works and the first that does not.
- Nothing is decided here by one run alone: the admission gate repeats every check of a record.
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date, timedelta

from packaging.version import InvalidVersion, Version

from regreen.lockfile import normalize
from regreen.mine.bisect import between, bisect, release_before, spread
from regreen.mine.candidate import Found, Ground, Past, Rejected, Tried
from regreen.mine.culprits import Candidate
from regreen.mine.facts import Run, damage, stable_ids
from regreen.mine.lab import Laboratory, Release, Unusable
from regreen.mine.mending import mended, restores, source_texts
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
MAX_STEPS, MAX_SINGLES, MAX_BREAKS = 3, 6, 3
MOST_AT_ONCE = 12
PRELOADED_BYTES = 60 << 20
_BEYOND = "999999"
_OF_A_DAY = frozenset({"too few tests pass", "too many tests fail", "does not resolve"})
"""Why the set of one day may not do where that of another does."""
_AFTER = timedelta(days=2)
"""Between a release and the day that its own set is of."""
_HELD = re.compile(
    r"^(?:pytest.*|pluggy|iniconfig|coverage|hypothesis|mock|nose|py|exceptiongroup|tomli|tox)$"
)


@dataclass(frozen=True, slots=True)
class _Step:
    """A known breaking release and the one before it, each with its set."""

    name: str
    good: str
    good_pins: dict[str, str]
    bad: str
    bad_pins: dict[str, str]


@dataclass(slots=True)
class _Search:
    """What the search for the culprits of one release has come to."""

    lab: Laboratory
    ground: Ground
    known: set[tuple[str, str]]
    left: frozenset[str]
    """Broken tests that no culprit explains yet."""
    whole: bool
    """Everything newest could not even be run."""
    found: list[Found] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    reasons: list[str] = field(default_factory=list)

    def note(self, name: str, error: Rejected | Unusable) -> None:
        reason = error.reason if isinstance(error, Rejected) else "cannot be run"
        self.reasons.append(f"{name}: {reason}")


class UpgradeMiner(Miner):
    """Mines dependency upgrades."""

    async def mine(self, candidate: Candidate, past: Past) -> list[Found]:
        """The breaks of the release of that day.

        Raises:
            Rejected: the candidate is of no use; says at which stage, and why.
        """
        release, needs, licence = await self._screen(candidate, past.releases)
        async with Laboratory(self.client, self.registry, release) as lab:
            ground = await self._base(candidate, lab, needs, licence)
            return await self._breaks(lab, ground, past.breaks)

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
            tools = await self.pinner.tools(python, day, needs.build)
        sdist = FileRecord(filename=entry.filename, sha256=entry.sha256)
        mode = "editable" if {"setup.py", "pyproject.toml"} & set(names) else "path"
        release = Release(
            candidate.package, entry.version, sdist, python, tuple(tools), tuple(roots), mode,
            uploaded=date.fromisoformat(entry.uploaded[:10]),
        )  # fmt: skip
        return release, needs, licence

    async def _base(
        self, candidate: Candidate, lab: Laboratory, needs: Needs, licence: str
    ) -> Ground:
        """The set that works on that day, else on the day of the release itself.

        What came between the two may have broken the release already.
        """
        try:
            return await super()._base(candidate, lab, needs, licence)
        except Rejected as error:
            own = lab.release.uploaded + _AFTER
            if error.reason not in _OF_A_DAY or own >= candidate.day:
                raise
            self.notes.append(f"on {candidate.day}: {error.reason}")
        return await super()._base(replace(candidate, day=own), lab, needs, licence)

    async def _breaks(
        self, lab: Laboratory, ground: Ground, known: set[tuple[str, str]]
    ) -> list[Found]:
        """Upgrade everything; where that breaks, find who alone does."""
        with self.clock.at("resolve all"):
            newest = await self._newest(ground)
        moved = {n for n, v in newest.items() if n in ground.pins and ground.pins[n] != v}
        if not moved:
            raise Rejected("upgrade", "nothing newer")
        with self.clock.at("resolve steps"):
            steps = await self._steps(ground, known)
        with self.clock.at("upgrade all"):
            everything = await self._all(lab, newest, steps)
        if everything is not None and not damage(lab.passing, everything):
            raise Rejected("upgrade", "everything newest passes", f"{len(moved)} moved")
        left = damage(lab.passing, everything).broken if everything else lab.passing
        search = _Search(lab, ground, known, left, whole=everything is None)
        for step in steps:
            await self._take(search, step)
        await self._suspects(search, newest, self._order(ground, moved, everything))
        self.notes += search.reasons
        if not search.found:
            reason = "no single culprit" if not search.reasons else "breaks cannot be used"
            raise Rejected("split", reason, "; ".join(search.reasons))
        return search.found

    async def _all(
        self, lab: Laboratory, newest: Mapping[str, str], steps: Sequence["_Step"]
    ) -> Run | None:
        """A run with everything upgraded; the sets of all steps are on offer from then on."""
        sets = [pins for step in steps for pins in (step.good_pins, step.bad_pins)]
        for offered in ([newest, *sets], sets):
            try:
                await lab.offer(offered)
                break
            except Unusable as error:
                self.notes.append(f"offer: {str(error)[-200:]}")
        return await self._try(lab, newest)

    async def _steps(self, ground: Ground, known: set[tuple[str, str]]) -> list["_Step"]:
        """For each known breaking release ahead, the set with it and the one just before."""
        ahead = [
            (name, version)
            for name, version in ground.candidate.hints
            if name in ground.pins and (name, version) not in known
        ]
        found = await asyncio.gather(*(self._step(ground, *one) for one in ahead[:MAX_STEPS]))
        return [step for step in found if step is not None]

    async def _step(self, ground: Ground, name: str, version: str) -> "_Step | None":
        files = await self.registry.files(name)
        try:
            every = between(files, ground.release.python, ground.pins[name], _BEYOND)
            at = next(i for i, v in enumerate(every) if Version(v) == Version(version))
            good = ground.pins
            if at:
                good = await self._settle(ground, ground.pins, name, every[at - 1])
            bad = await self._settle(ground, good, name, every[at])
        except (InvalidVersion, StopIteration, NotFound):
            return None
        return _Step(name, good[name], good, every[at], bad)

    async def _take(self, search: "_Search", step: "_Step") -> None:
        """Whether a known release breaks here too; if the one before does not, that is it."""
        if self._enough(search):
            return
        lab, ground = search.lab, search.ground
        try:
            with self.clock.at("single"):
                bad = Tried(step.bad, step.bad_pins, await lab.attempt(step.bad_pins))
            broken = damage(lab.passing, bad.run)
            if not broken:
                return
            good = Tried(step.good, step.good_pins, ground.run)
            if step.good_pins != ground.pins:
                with self.clock.at("single"):
                    good = replace(good, run=await lab.attempt(step.good_pins))
            search.done.add(step.name)
            search.left -= broken.broken
            if damage(lab.passing, good.run):
                found = await self._narrow(lab, ground, step.name, good, search.known)
            else:
                found = await self._record(lab, ground, step.name, good, bad)
        except (Rejected, Unusable) as error:
            search.note(step.name, error)
            return
        search.found.append(found)

    async def _suspects(
        self, search: "_Search", newest: Mapping[str, str], order: Sequence[str]
    ) -> None:
        """Try who else may have broken what is not explained yet."""
        if not search.left:
            return
        lab, ground = search.lab, search.ground
        names = [name for name in order if name not in search.done]
        for name, pins in (await self._singles(search, newest, names)).items():
            if self._enough(search) or not (search.left or search.whole):
                return
            try:
                with self.clock.at("single"):
                    tried = Tried(pins[name], pins, await lab.attempt(pins))
                broken = damage(lab.passing, tried.run)
                if not broken:
                    continue
                search.left -= broken.broken
                search.found.append(await self._narrow(lab, ground, name, tried, search.known))
            except (Rejected, Unusable) as error:
                search.note(name, error)

    def _enough(self, search: "_Search") -> bool:
        spent_s = sum(self.clock.seconds.values())
        return len(search.found) == MAX_BREAKS or spent_s > MAX_CANDIDATE_S

    async def _singles(
        self, search: "_Search", newest: Mapping[str, str], order: Sequence[str]
    ) -> dict[str, dict[str, str]]:
        """For each suspect the set in which it alone is moved, all on offer at once."""
        ground = search.ground
        targets = {name: self._target(ground, newest, name) for name in order}
        chosen = [name for name in order if targets[name]][:MAX_SINGLES]

        async def settled(name: str) -> dict[str, str] | None:
            try:
                return await self._settle(ground, ground.pins, name, targets[name])
            except NotFound:
                search.reasons.append(f"{name}: no set with it")
                return None

        with self.clock.at("resolve singles"):
            sets = await asyncio.gather(*map(settled, chosen))
        found = {name: pins for name, pins in zip(chosen, sets, strict=True) if pins is not None}
        with self.clock.at("offer singles"):
            try:
                await search.lab.offer(found.values())
            except Unusable as error:
                search.reasons.append(f"offer: {str(error)[-300:]}")
                return {}
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
            good, bad = await self._confirm(lab, ground, name, good, bad)
        return await self._record(lab, ground, name, good, bad)

    async def _record(
        self, lab: Laboratory, ground: Ground, name: str, good: Tried, bad: Tried
    ) -> Found:
        """The record of one step; tests that only the good set lets pass count as well."""
        lost = damage(stable_ids(good.run.passed) - lab.unsteady, bad.run)
        if not lost:
            raise Rejected("confirm", "not broken by one step")
        found = record_of(ground, lab, name, good, bad, lost)
        with self.clock.at("rules"):
            return await self._with_rules(lab, ground, found, bad)

    async def _with_rules(self, lab: Laboratory, ground: Ground, found: Found, bad: Tried) -> Found:
        """The record with a fix by migration rules, where one passes all that the good set does."""
        mined, release = found.mined, ground.release
        archive = await self.registry.sdist(
            release.package, release.sdist.filename, release.sdist.sha256
        )
        texts = await asyncio.to_thread(source_texts, archive, release.roots)
        wanted = frozenset(mined["tests"]["fail_to_pass"]) | (bad.run.passed & lab.passing)

        async def passes(files: Mapping[str, bytes]) -> bool:
            try:
                run = await lab.attempt(bad.pins, files)
            except Unusable:
                return False
            return restores(run, wanted - set(found.unstable))

        moved = {n: (old or "-", new or "-") for n, (old, new) in mined["changed"].items()}
        log = "\n".join([bad.run.log, *bad.run.messages.values()])
        mend = await mended(texts, moved, passes, blame=mined["blame_top"], log=log)
        if mend.fix is None:
            self.notes += [f"rules: {mend.said}"] if mend.tries else []
            return found
        fixes = [{"mode": "any_fix", "origin": "pins-restored"}, mend.fix.model_dump()]
        return replace(found, mined={**mined, "fixes_verified": fixes})

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

        chosen = self._boundaries(name, left)
        size = max((f.size_bytes for f in files if f.version in left), default=0)
        most = max(2, min(MOST_AT_ONCE, PRELOADED_BYTES // max(size, 1)))
        while left:
            chosen = (chosen or spread(left, most))[-most:]
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

    def _boundaries(self, name: str, left: Sequence[str]) -> list[str]:
        """Releases that are known to break others, each with the one before it."""
        breaking = {Version(version) for version in self.breaks.get(name, ())}
        at = [i for i, version in enumerate(left) if Version(version) in breaking]
        return [left[i] for i in sorted({n for i in at for n in (i - 1, i) if n >= 0})]

    async def _confirm(
        self, lab: Laboratory, ground: Ground, name: str, good: Tried, bad: Tried
    ) -> tuple[Tried, Tried]:
        """The step from the good set to the bad one, with nothing else moved than it forces."""
        try:
            pins = await self._settle(ground, good.pins, name, bad.version)
            if pins != bad.pins:
                bad = Tried(bad.version, pins, await lab.attempt(pins))
        except (NotFound, Unusable) as error:
            raise Rejected("confirm", "cannot be run", str(error)[-300:]) from error
        return good, bad

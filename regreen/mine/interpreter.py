"""Mines upgrades of the interpreter: a newer Python took away what a project uses.

- A release is looked at only if it bears a sign (`regreen.mine.pythons`); what breaks is run.
- Two interpreters next to each other run the same tests with the same pins. The pins are as of the
  day, moved only where none of that day serves both, with a pytest that runs on both.
- Who breaks must be the project or its tests: where another package or the runner dies, nothing is
  learned of the project.
- Fixes: the interpreter of before, or a source that migration rules mend.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from datetime import date

from packaging.version import Version

from regreen.lockfile import normalize
from regreen.mine.candidate import Found, Ground, Past, Rejected, Tried
from regreen.mine.culprits import Candidate
from regreen.mine.facts import Damage, damage, stable_ids
from regreen.mine.lab import Laboratory, Release, Unusable
from regreen.mine.mending import HOPELESS
from regreen.mine.miner import read_needs
from regreen.mine.project import Needs
from regreen.mine.pythons import Step, signed, steps_of, texts_of
from regreen.mine.record import record_of
from regreen.mine.upgrade import UpgradeMiner
from regreen.pkgindex import python_allowed
from regreen.rollout.logs import analyse
from regreen.rpc.errors import NotFound

KIND = "interpreter-upgrade"
CULPRIT = "python"
RUNNER = ("pytest", "7.4.4")
"""The release that runs on every Python from 3.7 to 3.13; an older one is moved to it."""
_NOOP = "regreen-noop.txt"
_UNPREPARED = "cannot be prepared"


class InterpreterMiner(UpgradeMiner):
    """Mines upgrades of the interpreter."""

    needs_dependencies = False
    _allowed: tuple[str, ...] = ()
    """Interpreters at hand that the release in work allows."""
    _newer: tuple[str, Needs] = ("", Needs((), ()))
    """The interpreter that the step in work goes to, and what the release requires on it."""
    _whole: bool = False
    """Whether everything passed before the step in work."""

    async def mine(self, candidate: Candidate, past: Past) -> list[Found]:
        """The breaks of the release of that day; raises as `UpgradeMiner.mine`."""
        release, _, licence = await self._screen(candidate, past.releases)
        sdist = release.sdist
        archive = await self.registry.sdist(release.package, sdist.filename, sdist.sha256)
        steps = await asyncio.to_thread(self._steps_to_take, archive, past)
        found: list[Found] = []
        last: Rejected | None = None
        for step in steps:
            try:
                found.append(await self._taken(candidate, release, archive, licence, step))
            except Rejected as error:
                said = "; ".join(sign.note for sign in step.signs)
                self.notes.append(f"{step.bad} ({said}): {error} {error.detail[-300:]}")
                last = error
            if self._whole:
                break  # nothing is left that an older step could have taken away
        if not found and last is not None:
            raise Rejected(last.stage, last.reason, "; ".join(self.notes)[-900:])
        return found

    async def _taken(
        self, candidate: Candidate, release: Release, archive: bytes, licence: str, step: Step
    ) -> Found:
        """The record of one step; on the path where the newer Python cannot install it in place."""
        try:
            return await self._step_of(candidate, release, archive, licence, step)
        except Rejected as error:
            if error.reason != _UNPREPARED or error.stage != "break" or release.mode == "path":
                raise
            release = replace(release, mode="path")
            return await self._step_of(candidate, release, archive, licence, step)

    def _python(self, day: date, allowed: str) -> str:
        fitting = [v for v in self.interpreters if python_allowed(allowed, v)]
        self._allowed = tuple(sorted(fitting, key=Version))
        if len(fitting) < 2:
            raise Rejected("screen", "no two interpreters for it", allowed)
        return self._allowed[-1]

    def _steps_to_take(self, archive: bytes, past: Past) -> list[Step]:
        signs = signed(texts_of(archive))
        if not signs:
            raise Rejected("screen", "no sign of what a Python took away")
        steps = steps_of(signs, self._allowed)
        if not steps:
            said = "; ".join(f"{sign.python}: {sign.note}" for sign in signs)
            raise Rejected("screen", "no interpreters on both sides", said)
        fresh = [step for step in steps if (CULPRIT, step.bad) not in past.breaks]
        if not fresh:
            raise Rejected("screen", "same break as on another day")
        return fresh

    async def _step_of(
        self, candidate: Candidate, release: Release, archive: bytes, licence: str, step: Step
    ) -> Found:
        """The record of one step."""
        self._whole = False
        day, name = candidate.day.isoformat(), candidate.package
        needs, _ = await asyncio.to_thread(read_needs, archive, step.good, name)
        later, _ = await asyncio.to_thread(read_needs, archive, step.bad, name)
        self._newer = (step.bad, later)
        tools = tuple(await self.pinner.tools(step.good, day, needs.build))
        release = replace(release, python=step.good, tools=tools)
        async with Laboratory(self.client, self.registry, release) as lab:
            ground = await self._base(candidate, lab, needs, licence)
            self._whole = not ground.run.failed
            tools = tuple(await self.pinner.tools(step.bad, day, later.build))
            newer = Laboratory(
                self.client, self.registry, replace(ground.release, python=step.bad, tools=tools)
            )
            return await self._break(lab, newer, ground)

    async def _as_of(
        self, candidate: Candidate, release: Release, needs: Needs, bounds: Mapping[str, str]
    ) -> dict[str, str]:
        """Pins that both interpreters can install; what each needs more is in all of them."""
        pins = await super()._as_of(candidate, release, needs, bounds)
        name, least = RUNNER
        lines = [*needs.runtime, *needs.tests]
        move = (name, pins[name])
        if Version(pins[name]) < Version(least):
            try:
                pins = await self.resolver.settle(lines, release.python, pins, RUNNER)
                move = RUNNER
            except NotFound:
                self.notes.append(f"{name} stays {pins[name]}")
        python, later = self._newer
        after = await self.resolver.settle([*later.runtime, *needs.tests], python, pins, move)
        before = await self.resolver.settle(lines, release.python, after, move)
        apart = sorted(n for n in before.keys() & after.keys() if before[n] != after[n])
        if apart:
            raise NotFound(f"no release of {', '.join(apart)} is for {release.python} and {python}")
        own = normalize(candidate.package)
        return {n: v for n, v in sorted({**after, **before}.items()) if n != own}

    async def _break(self, lab: Laboratory, newer: Laboratory, ground: Ground) -> Found:
        """The record of what the newer interpreter breaks."""
        good, bad = ground.release.python, newer.release.python
        passed = stable_ids(ground.run.passed) - lab.unsteady
        try:
            with self.clock.at("single"):
                lost = damage(passed, await newer.base(ground.pins))
                if not lost:
                    raise Rejected("break", "everything passes", f"{good} to {bad}")
            with self.clock.at("confirm"):  # a State's own run tells no messages
                told = await newer.attempt_files({_NOOP: b""})
        except Unusable as error:
            raise Rejected("break", _UNPREPARED, str(error)[-300:]) from error
        again = damage(passed, told)
        lost = Damage(lost.broken & again.broken, lost.renamed | again.renamed)
        if not lost:
            raise Rejected("break", "breaks in one run only", f"{good} to {bad}")
        before, after = Tried(good, ground.pins, ground.run), Tried(bad, ground.pins, told)
        record = record_of(ground, lab, CULPRIT, before, after, lost)
        blame, lines = record.mined["blame_top"], "; ".join(record.mined["error_lines"])
        if blame in HOPELESS:
            raise Rejected("break", f"points at {blame}", lines[:300])
        if analyse(told.log) is None:
            raise Rejected("break", "the log names no error", lines[:300])
        tools = list(newer.release.tools)
        mined = {
            **record.mined,
            "kind": KIND,
            "build": {**record.mined["build"], "tools": tools},
            "culprit": {**record.mined["culprit"], "direct": True},
            "changed": {CULPRIT: [good, bad]},
        }
        with self.clock.at("rules"):
            return await self._with_rules(newer, ground, replace(record, mined=mined), after)

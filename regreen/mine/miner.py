"""What every kind of mining does first: an interpreter, pins as of a day, tests that pass.

- Requirements come from files; what tests lack beyond them is added only where a module's or
  fixture's distribution is known.
- A project that cannot be installed in place is put on the path instead.
"""

import re
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

from regreen.mine.candidate import Clock, Ground, Rejected
from regreen.mine.culprits import Candidate
from regreen.mine.facts import Run, lacking
from regreen.mine.lab import Laboratory, MiningClient, Release, Unusable
from regreen.mine.project import Needs, licence_of, needs_of, unpack
from regreen.mine.registry import Registry
from regreen.mine.resolve import Resolver
from regreen.pkgindex import python_allowed
from regreen.rollout.logs import analyse
from regreen.rpc.errors import NotFound
from regreen.tasks.pin import Pinner

PREFERRED = "3.11"
LATER = (date(2025, 1, 1), "3.12")
FALLBACKS = ("3.12", "3.10", "3.9")
MAX_SDIST_BYTES = 6 << 20
MIN_PASSING, MIN_SHARE, MAX_PASSING = 3, 0.8, 2500
MAX_BASE_S = 60.0
"""Longer suites are not mined: the gate runs each about twenty times."""


class Miner:
    """Works on one candidate at a time."""

    needs_dependencies = True
    """Whether a release that needs nothing else is of no use."""
    least_share = MIN_SHARE
    """Of the tests, how many must pass at first."""

    def __init__(
        self,
        client: MiningClient,
        registry: Registry,
        resolver: Resolver,
        pinner: Pinner,
        interpreters: Sequence[str],
        names: frozenset[str] = frozenset(),
        breaks: Mapping[str, Collection[str]] | None = None,
        suite_s: float = MAX_BASE_S,
    ) -> None:
        self.names = names
        """Packages that bring a module of their own name, for what tests lack."""
        self.breaks = breaks or {}
        """Releases of culprits that are known to break others: where a bisection looks first."""
        self.client, self.registry, self.resolver = client, registry, resolver
        self.pinner, self.interpreters = pinner, interpreters
        self.suite_s = suite_s
        """Seconds that the tests of a release may take; they are ended a quarter later."""
        self.clock = Clock()
        self.notes: list[str] = []
        self.version = ""
        """The release that was looked at last."""

    def begin(self, hear: Callable[[str], None]) -> None:
        """Let go of what is known of the candidate before."""
        self.clock = Clock(hear=hear, idle=lambda: self.client.idle_s)
        self.notes, self.version = [], ""

    def _python(self, day: date, allowed: str) -> str:
        first = LATER[1] if day >= LATER[0] else PREFERRED
        for version in (first, *FALLBACKS):
            if version in self.interpreters and python_allowed(allowed, version):
                return version
        raise Rejected("screen", "no interpreter for it", allowed)

    async def _base(
        self, candidate: Candidate, lab: Laboratory, needs: Needs, licence: str
    ) -> Ground:
        """The set that works on that day."""
        added: set[str] = set()
        lab.release = replace(lab.release, timeout_s=self.suite_s * 1.25)
        while True:
            with self.clock.at("resolve base"):
                pins, needs = await self._base_pins(candidate, lab.release, needs)
            with self.clock.at("run base"):
                run = await self._first(lab, pins)
            more = lacking(run, self.names) - set(pins) - added - {candidate.package}
            if not more or len(added) > 12:
                break
            added |= more
            needs = needs.with_tests(sorted(more))
        total = len(run.passed) + len(run.failed)
        detail = f"{len(lab.passing)} of {total}: {_last_error(run)}"
        if len(lab.passing) < MIN_PASSING:
            raise Rejected("base", "too few tests pass", detail)
        if len(run.passed) < self.least_share * total:
            raise Rejected("base", "too many tests fail", detail)
        if len(lab.passing) > MAX_PASSING:
            raise Rejected("base", "too many tests", detail)
        if run.seconds > self.suite_s:
            raise Rejected("base", "too slow", f"{run.seconds:.0f} s")
        return Ground(candidate, lab.release, needs, pins, run, licence)

    async def _first(self, lab: Laboratory, pins: Mapping[str, str]) -> Run:
        try:
            try:
                return await lab.base(pins)
            except Unusable as error:
                if "install" not in str(error) or lab.release.mode == "path":
                    raise
                self.notes.append(f"in place: {str(error)[-300:]}")
                lab.release = replace(lab.release, mode="path")
                return await lab.base(pins)
        except Unusable as error:
            reason = "times out" if "timeout" in str(error) else "cannot be prepared"
            raise Rejected("base", reason, str(error)[-600:]) from error

    async def _base_pins(
        self, candidate: Candidate, release: Release, needs: Needs
    ) -> tuple[dict[str, str], Needs]:
        """Pins as of the day; with fewer requirements where all of them do not go together."""
        problem = ""
        for wanted in (needs, Needs(needs.runtime, ("pytest",))):
            bounds = dict(candidate.hints)
            while True:
                try:
                    pins = await self._as_of(candidate, release, wanted, bounds)
                except NotFound as error:
                    problem = problem or error.message
                    spoken = {name for name in bounds if re.search(rf"\b{name}<", error.message)}
                    if not bounds:
                        break
                    for name in spoken or set(bounds):
                        del bounds[name]
                    continue
                its_own = set(pins) - {"pytest", "pluggy", "iniconfig", "packaging"}
                if self.needs_dependencies and not its_own:
                    raise Rejected("base", "no dependencies")
                return pins, wanted
        raise Rejected("base", "does not resolve", " ".join(problem.split())[-500:])

    async def _as_of(
        self,
        candidate: Candidate,
        release: Release,
        needs: Needs,
        bounds: Mapping[str, str],
    ) -> dict[str, str]:
        lines = [*needs.runtime, *needs.tests]
        day = f"{candidate.day.isoformat()}T00:00:00Z"
        limits = [f"{name}<{version}" for name, version in bounds.items()]
        pins = await self.resolver.as_of(lines, release.python, day, limits)
        pins.pop(candidate.package, None)
        return pins


def read_needs(archive: bytes, python: str, package: str) -> tuple[Needs, str]:
    with tempfile.TemporaryDirectory() as folder:
        root = unpack(archive, Path(folder))
        return needs_of(root, archive, python, package), licence_of(root)


def _last_error(run: Run) -> str:
    error = analyse(run.log)
    return error.text[:300] if error is not None else run.log.strip()[-200:]

"""Mines upgrades of the test runner that turn configurations and styles of tests into errors.

- The untouched tests pass with the runner of a day; its next breaking release is tried alone, and
  then the release just before it: the pair is adjacent, and both were run.
- Settings of pytest and tests are never part of a diff that counts, so the only fair mode is
  `any_fix`: another release of the runner, or of the plugin that does not fit it.
"""

from dataclasses import replace

from regreen.mine.bisect import between
from regreen.mine.candidate import Found, Ground, Past, Rejected, Tried
from regreen.mine.culprits import Candidate
from regreen.mine.facts import damage, stable_ids
from regreen.mine.lab import Laboratory, Unusable
from regreen.mine.record import record_of
from regreen.mine.upgrade import UpgradeMiner
from regreen.rpc.errors import NotFound

KIND = "test-runner"


class RunnerMiner(UpgradeMiner):
    """Mines upgrades of test runners."""

    async def mine(self, candidate: Candidate, past: Past) -> list[Found]:
        """The break by the hinted runner's release; raises as `UpgradeMiner.mine`."""
        release, needs, licence = await self._screen(candidate, set())
        async with Laboratory(self.client, self.registry, release) as lab:
            ground = await self._base(candidate, lab, needs, licence)
            found: list[Found] = []
            for name, version in candidate.hints:
                if name not in ground.pins or (name, version) in past.breaks:
                    self.notes.append(f"{name}: is not used, or known")
                    continue
                try:
                    found.append(await self._one(lab, ground, name, version))
                except (Rejected, Unusable, NotFound) as error:
                    self.notes.append(f"{name} {version}: {error}"[:300])
        if not found:
            raise Rejected("runner", "no break", "; ".join(self.notes))
        return found

    async def _one(self, lab: Laboratory, ground: Ground, name: str, version: str) -> Found:
        files, python = await self.registry.files(name), ground.release.python
        before = between(files, python, ground.pins[name], version)
        good = Tried(ground.pins[name], ground.pins, ground.run)
        with self.clock.at("resolve singles"):
            start = ground.pins
            if before:
                start = await self._settle(ground, ground.pins, name, before[-1])
            pins = await self._settle(ground, start, name, version)
        with self.clock.at("single"):
            bad = Tried(version, pins, await lab.attempt(pins))
            if not damage(lab.passing, bad.run):
                raise Rejected("runner", "everything passes", version)
        with self.clock.at("confirm"):
            if before:
                good = Tried(before[-1], start, await lab.attempt(start))
        lost = damage(stable_ids(good.run.passed) & lab.passing, bad.run)
        if not lost:
            raise Rejected("runner", "not broken by one step")
        found = record_of(ground, lab, name, good, bad, lost)
        return replace(found, mined={**found.mined, "kind": KIND})

"""The kinds of broken builds beyond upgrades and bug fixes, and where to look for each.

- A kind is a miner and a list of candidates; nothing else has to know it.
- Conflicts and build failures are looked for in the dependents of the known culprits: what is
  widely depended upon moves, and its dependents declare bounds. Runners in all of them.
- Interpreters in all of them too, as the index was on the day before each Python was released.
"""

from collections.abc import Iterable, Sequence

from regreen.mine import buildfail, conflict, interpreter, runner
from regreen.mine.buildfail import BuildMiner
from regreen.mine.conflict import ConflictMiner
from regreen.mine.culprits import (
    EARLIEST,
    Candidate,
    CulpritFacts,
    narrowed,
    upgrade_candidates,
)
from regreen.mine.interpreter import InterpreterMiner
from regreen.mine.pythons import RELEASED
from regreen.mine.runner import RunnerMiner
from regreen.mine.signs import RUNNER_BREAKS
from regreen.mine.upgrade import UpgradeMiner

MORE_KINDS: dict[str, type[UpgradeMiner]] = {
    conflict.KIND: ConflictMiner,
    buildfail.KIND: BuildMiner,
    runner.KIND: RunnerMiner,
    interpreter.KIND: InterpreterMiner,
}
PYTHONS = ("3.12", "3.13", "3.11", "3.10")
"""On whose days interpreters are looked at, those first that took away the most."""


def more_candidates(
    culprits: Sequence[CulpritFacts], *, packages: Iterable[str] = ()
) -> list[list[Candidate]]:
    """Where to look for each of these kinds; `packages` narrows it down.

    Such as are in no list are looked at last, by the kinds that need no culprit.
    """
    wanted = list(packages)
    upgrades = upgrade_candidates(culprits, packages=wanted)
    listed = dict.fromkeys(candidate.package for candidate in upgrades)
    names = narrowed(listed | dict.fromkeys(culprit.name for culprit in culprits), wanted)
    conflicts = [Candidate(conflict.KIND, c.package, c.day, c.hints) for c in upgrades]
    builds = [Candidate(buildfail.KIND, name, EARLIEST) for name in names]
    runners = [
        Candidate(runner.KIND, name, max(one.day, EARLIEST), ((one.runner, one.version),))
        for one in reversed(RUNNER_BREAKS)
        if one.runner == "pytest"
        for name in names
    ]
    interpreters = [
        Candidate(interpreter.KIND, name, RELEASED[python]) for python in PYTHONS for name in names
    ]
    return [conflicts, builds, runners, interpreters]

"""Looks for fixes by rules for tasks that there are already, and has the gate judge them.

- A task is prepared only once a rule changes a file of it.
- What must pass is what passes with the pins of before; the gate then repeats every check.
- A task comes back as the gate leaves it, so with the fix only where that was admitted.
"""

import asyncio
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from regreen.common.v1 import common_pb2
from regreen.mine.facts import stable_ids
from regreen.mine.mending import Mended, mended, moved_of, source_texts
from regreen.rpc.errors import FailedPrecondition, InvalidArgument, RegreenError
from regreen.sandbox.v1 import sandbox_pb2 as pb
from regreen.tasks import environment as env
from regreen.tasks import probes
from regreen.tasks.gate import Gate, judge_steadily
from regreen.tasks.model import Fix, TaskRecord
from regreen.tasks.verify import refreshed

KINDS = frozenset({"dependency-upgrade", "interpreter-upgrade"})
MODE = "keep_new"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one task."""

    task: TaskRecord
    said: str
    tries: int = 0
    gained: bool = False


async def mend(
    gate: Gate, task: TaskRecord, say: Callable[[str], None] = lambda text: None
) -> Outcome:
    """The task with a fix by rules, if one is found and the gate admits it.

    Raises:
        RegreenError: the platform failed; nothing was decided.
    """
    why = _useless(task)
    if why:
        return Outcome(task, why)
    say("reading")
    texts = await _texts(gate, task)
    trial = _Trial(gate, task, say)
    try:
        found: Mended = await mended(
            texts,
            moved_of(task),
            trial.passes,
            blame=task.blame,
            log="\n".join(task.error_lines),
        )
    except (InvalidArgument, FailedPrecondition) as error:
        return Outcome(task, f"cannot be prepared: {error}", trial.runs)
    if found.fix is None:
        return Outcome(task, found.said, found.tries)
    say("gate")
    judged, verdict = await judge_steadily(gate, _with(task, found.fix))
    result = verdict.fixes.get(f"{MODE}/rules", verdict.reason)
    gained = verdict.admitted and result == "ok"
    said = found.said if gained else f"{found.said}; the gate: {result}"
    return Outcome(refreshed(judged, verdict) if gained else task, said, found.tries, gained)


def _useless(task: TaskRecord) -> str:
    """Why nothing is looked for; empty if something is."""
    if task.kind not in KINDS or task.sdist is None or task.control:
        return "is no upgrade of a release"
    if any(fix.origin == "rules" for fix in task.fixes):
        return "has a fix by rules"
    return ""


def _with(task: TaskRecord, fix: Fix) -> TaskRecord:
    modes = [*task.modes, *([] if MODE in task.modes else [MODE])]
    return task.model_copy(update={"fixes": [*task.fixes, fix], "modes": modes})


async def _texts(gate: Gate, task: TaskRecord) -> dict[str, str]:
    assert task.sdist is not None
    with tempfile.TemporaryDirectory(prefix="regreen-mend-") as folder:
        path = Path(folder) / "sdist.tar.gz"
        await gate.index.download(task.package, task.sdist.filename, task.sdist.sha256, path)
        archive = await asyncio.to_thread(path.read_bytes)
    return await asyncio.to_thread(source_texts, archive, task.tests.arguments)


class _Trial:
    """Runs of one task's tests with other contents of files."""

    def __init__(self, gate: Gate, task: TaskRecord, say: Callable[[str], None]) -> None:
        self._gate, self._task, self._say = gate, task, say
        self._state: pb.State | None = None
        self._wanted: frozenset[str] = frozenset()
        self.runs = 0

    async def passes(self, files: Mapping[str, bytes]) -> bool:
        """Whether everything passes that does with the pins of before."""
        if self._state is None:
            self._say("preparing")
            spec = env.environment(self._task, self._gate.distributions)
            self._state = await self._gate.client.prepare(spec)
            good = await self._passing(env.restored_pins(self._task), "any_fix")
            self._wanted = stable_ids(good) - set(self._task.tests.unstable)
        self._say(f"try {self.runs}")
        green = await self._passing(env.replaced_files(files), MODE)
        return bool(self._wanted) and self._wanted <= green

    async def _passing(self, changes: Sequence[common_pb2.FileChange], mode: str) -> frozenset[str]:
        assert self._state is not None
        self.runs += 1
        found = await self._gate.client.validate(
            self._state.id,
            changes,
            held_pins=env.held_pins(self._task, mode),
            required_tests=(),
            skip_cache_lookup=False,
            conditions=None,
        )
        if found.reverted:
            return frozenset()
        outcomes = probes.outcomes_of(found)
        return frozenset(id for id, outcome in outcomes.items() if outcome == probes.PASSED)


async def mend_all(
    gate: Gate,
    tasks: list[TaskRecord],
    *,
    workers: int = 1,
    say: Callable[[str, str], None] = lambda id, text: None,
    done: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """`mend` for every task, shortest first; trouble with one does not end the others."""
    queue = sorted(tasks, key=lambda task: task.seconds, reverse=True)
    outcomes: list[Outcome] = []

    async def work() -> None:
        while queue:
            task = queue.pop()
            try:
                outcome = await mend(gate, task, partial(say, task.id))
            except RegreenError as error:
                outcome = Outcome(task, f"failed: {error}")
            outcomes.append(outcome)
            done(outcome)

    await asyncio.gather(*(work() for _ in range(workers)))
    return outcomes

"""The whole loop on real broken builds: what `make demo` runs.

- Every stage is resumable by the run or task it writes; a killed demo goes on where it was.
- What is measured is fixed by the plan and the chosen tasks; both are part of the runs' names, so
  that another plan never mixes with this one.
- Nothing is scored twice: base, SFT and GRPO policies and the scripts meet the same held-out tasks.
- A stack that a demo started, also a killed one, is stopped at the end; one that was up stays up.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from regreen.client.stack import Stack
from regreen.evals.report import write_report
from regreen.loop import EPISODE, Loop, Plan, Show, digest, report_folder, stack_alone
from regreen.tasks.jsonl import shipped_tasks
from regreen.train.progress import Listener
from regreen.train.record import resolved_of
from regreen.train.rows import find_run
from regreen.train.weights import BASE

T = TypeVar("T")


FULL = Plan(
    name="demo",
    train_tasks=8,
    test_tasks=6,
    eval_samples=1,
    sft_epochs=3,
    sft_styles=3,
    grpo_steps=2,
    groups_per_step=3,
    group_size=4,
    max_refills=0,
    labels=EPISODE,
)
QUICK = Plan(
    name="demo-quick",
    train_tasks=5,
    test_tasks=2,
    eval_samples=1,
    sft_epochs=4,
    sft_styles=2,
    grpo_steps=1,
    groups_per_step=2,
    group_size=3,
    max_refills=1,
    labels=EPISODE,
)
_TELLING = 6
"""Tasks from which on an exact two-sided sign-flip test can reach p < 0.05 (2 / 2^6)."""
_STAGES = {
    "start services": 1,
    "tasks": 18,
    "evaluate base": 18,
    "sft": 22,
    "evaluate sft": 9,
    "grpo": 21,
    "evaluate grpo": 10,
    "report": 1,
}
"""The stages in order, and about how many percent of the full plan's wall time each takes."""
_PACED = ("evaluate base", "sft", "evaluate sft", "grpo", "evaluate grpo")
"""Stages whose time tells that of the others: what they do is this demo's alone. Tasks may have
been gated before, and services run already."""
_KEEP_S = 5.0
"""What a killed demo can lose of the wall time it reports."""


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Where the demo's report is, and how long each stage took."""

    html: Path
    json: Path
    headline: str
    """The comparison of the trained policy with the base, in one sentence."""
    seconds: dict[str, float]
    """Wall time by stage, summed over every start of this demo."""


def shares(plan: Plan) -> dict[str, float]:
    """About how many percent of the wall time each stage of a plan takes."""

    def amount(of: Plan) -> dict[str, int]:
        evaluated = of.test_tasks * of.eval_samples
        return {
            "tasks": of.train_tasks + of.test_tasks,
            **{name: evaluated for name in _STAGES if name.startswith("evaluate")},
            "sft": of.train_tasks * of.sft_styles * of.sft_epochs,
            "grpo": of.grpo_steps * of.groups_per_step * of.group_size,
        }

    own, full = amount(plan), amount(FULL)
    parts = {name: part * own.get(name, 1) / full.get(name, 1) for name, part in _STAGES.items()}
    whole = sum(parts.values())
    return {name: 100 * part / whole for name, part in parts.items()}


async def run_demo(home: Path, plan: Plan, listen: Listener, show: Show) -> DemoResult:
    """Run the demo, or go on with it.

    Raises:
        FailedPrecondition: too few tasks can run on this machine, or another demo runs on this
            home; says what is missing.
        Unavailable: a service did not come up or come back.
    """
    clock = StageClock(home / plan.name / f"seconds-{digest(plan)}.json", show, shares(plan))
    async with contextlib.AsyncExitStack() as exits:
        opened = exits.enter_async_context(stack_alone(home, show))
        stack = await clock.time("start services", opened)
        return await _Demo(stack, home, plan, clock, listen, show).run()


class StageClock:
    """Wall time by stage, kept on disk so that a resumed demo adds to it."""

    def __init__(self, path: Path, show: Show, shares: Mapping[str, float] = _STAGES) -> None:
        self._path, self._show, self._shares = path, show, shares
        self.seconds = _seconds(path)

    def move(self, path: Path) -> None:
        """Go on in another file, on top of what it holds."""
        for stage, spent in _seconds(path).items():
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + spent, 1)
        before, self._path = self._path, path
        self._keep()
        before.unlink(missing_ok=True)

    async def time(self, stage: str, work: Awaitable[T]) -> T:
        """Await `work` and add its wall time to `stage`; says how far the whole is before."""
        names = list(self._shares)
        number = names.index(stage)
        percent = round(sum(self._shares[name] for name in names[:number]))
        text = f"percent; stage {number + 1} of {len(names)}: {stage}{self._rest(names, number)}"
        self._show("demo", percent, 100, text, paced=False)
        before_s, start_s = self.seconds.get(stage, 0.0), time.monotonic()

        def keep() -> None:
            self.seconds[stage] = round(before_s + time.monotonic() - start_s, 1)
            self._keep()

        async def keep_on() -> None:
            while True:
                await asyncio.sleep(_KEEP_S)
                keep()

        keeper = asyncio.create_task(keep_on())
        try:
            return await work
        finally:
            keeper.cancel()
            keep()

    def _rest(self, names: Sequence[str], number: int) -> str:
        """About how long it takes from here, by what this demo's own stages took so far."""
        ended = [name for name in names[:number] if name in _PACED and self.seconds.get(name)]
        if not ended:
            return ""
        took_s = sum(self.seconds[name] for name in ended)
        pace_s = took_s / sum(self._shares[name] for name in ended)
        left_s = sum(
            max(0.0, self._shares[name] * pace_s - self.seconds.get(name, 0.0))
            for name in names[number:]
        )
        return f"; from here about {left_s / 60:.0f} min" if left_s >= 30 else ""

    def _keep(self) -> None:
        with contextlib.suppress(OSError):  # a full disk costs this figure, not the stage
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.seconds, indent=2) + "\n")
            temporary.replace(self._path)


def _seconds(path: Path) -> dict[str, float]:
    """What a clock kept there."""
    try:
        found: dict[str, float] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return found


class _Demo:
    """One demo on a running stack."""

    def __init__(
        self, stack: Stack, home: Path, plan: Plan, clock: StageClock, listen: Listener, show: Show
    ) -> None:
        self._stack, self._home, self._plan = stack, home, plan
        self._clock, self._listen, self._show = clock, listen, show

    async def run(self) -> DemoResult:
        """All stages in order."""
        plan, clock = self._plan, self._clock
        loop = Loop(self._stack, plan, self._listen, self._show)
        train, test = await clock.time("tasks", loop.tasks())
        name = f"{plan.name}-{digest(plan, train, test)}"
        clock.move(self._home / plan.name / f"seconds-{name}.json")
        sft, grpo = f"{name}-sft", f"{name}-grpo"
        base = loop.evaluate(f"{name}-eval-base", BASE, test, scripts=True)
        await clock.time("evaluate base", base)
        await clock.time("sft", loop.sft(sft, train))
        await clock.time("evaluate sft", loop.evaluate(f"{name}-eval-sft", sft, test))
        await clock.time("grpo", loop.grpo(grpo, sft, train))
        await clock.time("evaluate grpo", loop.evaluate(f"{name}-eval-grpo", grpo, test))
        kept = await find_run(self._stack, sft)
        learned = len(resolved_of(kept)["train_ids"]) if kept is not None else 0
        return await self._report(name, _notes(train, test, learned))

    async def _report(self, name: str, notes: Sequence[str]) -> DemoResult:
        self._show("report", 0, 1, "")
        files = await self._clock.time(
            "report",
            write_report(
                self._stack,
                report_folder(self._home, self._plan),
                evals=[f"{name}-eval-{label}" for label in ("base", "sft", "grpo")],
                runs=[f"{name}-sft", f"{name}-grpo"],
                commands=[f"make demo{' QUICK=1' if self._plan.name == QUICK.name else ''}"],
                notes=notes,
                seconds={
                    stage: spent
                    for stage, spent in self._clock.seconds.items()
                    if stage != "report"  # not over yet
                },
            ),
        )
        self._show("report", 1, 1, str(files.html))
        self._show("demo", 100, 100, "percent", paced=False)
        return DemoResult(files.html, files.json, files.headline, self._clock.seconds)


def _notes(train: Sequence[str], test: Sequence[str], learned: int) -> list[str]:
    """What a reader must know of the choice of tasks; `learned` of them had experts for SFT."""
    records = {record.id: record for record in shipped_tasks()}
    broke = {culprit.name for id in train if (culprit := records[id].culprit)}
    shared = sum(bool((culprit := records[id].culprit) and culprit.name in broke) for id in test)
    count = f"{shared} held-out tasks were" if shared > 1 else f"{shared or 'No'} held-out task was"
    told = [
        f"{len(train)} tasks were there to train on, of which {learned} had expert trajectories "
        f"for SFT; {len(test)} were held out; no package is in both. "
        f"{count} broken by a package that also broke a training task."
    ]
    if len(test) < _TELLING:
        told.append(
            f"{len(test)} held-out tasks show that everything runs; "
            f"no difference on fewer than {_TELLING} tasks can be told from chance."
        )
    return told

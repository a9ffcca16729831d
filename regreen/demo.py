"""The whole loop on real broken builds: what `make demo` runs.

- Every stage is resumable by the run or task it writes; a killed demo goes on where it was.
- What is measured is fixed by the plan and the chosen tasks; both are part of the runs' names, so
  that another plan never mixes with this one.
- Nothing is scored twice: base, SFT and GRPO policies and the scripts meet the same held-out tasks.
- A stack that a demo started, also a killed one, is stopped at the end; one that was up stays up.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from packaging.version import Version

from regreen.client.stack import Endpoints, Stack
from regreen.dataset import v1 as pb
from regreen.evals.report import write_report
from regreen.evals.run import EvalConfig, evaluate
from regreen.rpc.errors import FailedPrecondition
from regreen.stack.borrow import borrowed_stack
from regreen.stack.layout import Layout
from regreen.tasks.admit import PYTHON_PLACES, Admission, choose_python, import_records
from regreen.tasks.jsonl import shipped_distributions, shipped_tasks
from regreen.tasks.model import TaskRecord
from regreen.train.config import GrpoConfig, SftConfig
from regreen.train.progress import Listener
from regreen.train.rl import train_grpo
from regreen.train.sft import train_sft

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Plan:
    """How much the demo does."""

    name: str
    train_tasks: int
    test_tasks: int
    eval_samples: int
    sft_epochs: int
    sft_styles: int
    grpo_steps: int
    groups_per_step: int
    group_size: int
    max_refills: int
    """Groups asked for at a step in place of those that teach nothing."""
    sft_batch: int = 8
    gate_repeats: int = 2
    gate_concurrency: int = 3
    """Tasks prepared at a time: some of them wait for the index."""
    concurrency: int = 20
    """Episodes at a time: decoding reads all weights at each step, however many take part in it."""
    expert_concurrency: int = 4
    """Experts sample nothing; tests are what they cost."""
    learning_rate_sft: float = 1e-4
    learning_rate_grpo: float = 3e-5
    trainable_layers: int = 15
    """Top layers that train: half the cost of all thirty on a CPU."""
    labels: dict[str, str] = field(default_factory=dict)


EPISODE = {
    "budget.turns": "8",
    "budget.turn_tokens": "56",
    "budget.attempt_turns": "6",
    "budget.tries": "2",
    "budget.wall_s": "180",
}
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
EXPERT = {**EPISODE, "knobs.confirm": "false"}
"""Experts stay within the policy's limits; the gate has confirmed what they do already."""
_LONGEST_EXPERT = 1200
"""Tokens; longer trajectories cost more time than they teach."""
EVAL_TEMPERATURE = "0.6"
"""Sampling temperature of evaluations; training samples at 1."""
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


class Show(Protocol):
    """Called with stage, done, total and a line of text."""

    def __call__(
        self, stage: str, done: float, total: float, message: str, /, *, paced: bool = True
    ) -> None:
        """Unless `paced`, what is done tells nothing of the time that the rest takes."""


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
    layout = Layout(home)
    layout.make()
    clock = StageClock(home / plan.name / f"seconds-{_digest(plan)}.json", show, shares(plan))
    with _alone(layout):
        async with contextlib.AsyncExitStack() as exits:
            borrowed = borrowed_stack(layout, show)
            await clock.time("start services", exits.enter_async_context(borrowed))
            stack = Stack(Endpoints.load(home), patience_s=180.0)
            await exits.enter_async_context(stack)
            return await _Demo(stack, home, plan, clock, listen, show).run()


@contextlib.contextmanager
def _alone(layout: Layout) -> Iterator[None]:
    """Only one demo runs on a home at a time."""
    with layout.open(layout.run / "demo.lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FailedPrecondition(
                f"another demo runs on {layout.home}; wait for it, or name another home"
            ) from error
        yield


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
        train, test = await clock.time("tasks", self._tasks())
        name = f"{plan.name}-{_digest(plan, train, test)}"
        clock.move(self._home / plan.name / f"seconds-{name}.json")
        await clock.time("evaluate base", self._evaluate(name, "base", test))
        await clock.time("sft", train_sft(self._stack, self._sft(name, train), self._listen))
        await clock.time("evaluate sft", self._evaluate(name, f"{name}-sft", test))
        await clock.time("grpo", train_grpo(self._stack, self._grpo(name, train), self._listen))
        await clock.time("evaluate grpo", self._evaluate(name, f"{name}-grpo", test))
        return await self._report(name, _notes(train, test))

    async def _tasks(self) -> tuple[list[str], list[str]]:
        """Import the shipped set, then prepare and gate as many tasks as the plan asks for."""
        records, distributions = shipped_tasks(), shipped_distributions()
        await import_records(self._stack, records, distributions)
        interpreters = dict((await self._stack.sandbox.get_capabilities()).interpreters)
        able = [record for record in records if choose_python(record, interpreters)]
        chosen = choose_tasks(able, self._plan)
        ids = [record.id for group in chosen.values() for record in group]
        found = ", ".join(sorted(interpreters, key=Version)) or "none"
        if not all(chosen.values()):
            raise FailedPrecondition(
                f"too few tasks can run here (interpreters found: {found}); most need Python 3.8 "
                f"to 3.10: `uv python install 3.8 3.9 3.10` brings them: {PYTHON_PLACES}"
            )
        decided: set[str] = set()

        def progress(task_id: str, text: str) -> None:
            if text.partition(":")[0] in ("admitted", "rejected", "quarantined", "waiting"):
                decided.add(task_id)
            self._show("gate tasks", len(decided), len(ids), f"{task_id}: {text[:100]}")

        admission = Admission(
            self._stack,
            records,
            distributions,
            repeats=self._plan.gate_repeats,
            progress=progress,
        )
        decided |= await admission.standing(ids)
        self._show("gate tasks", len(decided), len(ids), f"{len(ids)} tasks; interpreters {found}")
        tasks = await admission.run(ids, concurrency=self._plan.gate_concurrency)
        admitted = {task.id for task in tasks if task.status == pb.TASK_STATUS_ADMITTED}
        train, test = (
            [record.id for record in chosen[split] if record.id in admitted]
            for split in ("train", "test")
        )
        if not train or not test:
            raise FailedPrecondition(
                f"{len(train)} train and {len(test)} test tasks were admitted; "
                "see `regreen tasks list` and `regreen tasks show ID`"
            )
        return train, test

    async def _evaluate(self, name: str, subject: str, tasks: Sequence[str]) -> None:
        """Measure one policy; the scripts, which always act alike, once beside the first."""
        label = subject.removeprefix(f"{name}-")
        config = EvalConfig(
            name=f"{name}-eval-{label}",
            subjects=(subject,),
            baselines=subject == "base",
            tasks=tuple(tasks),
            samples=self._plan.eval_samples,
            concurrency=self._plan.concurrency,
            labels={**self._plan.labels, "sampling.temperature": EVAL_TEMPERATURE},
        )
        await evaluate(self._stack, config, self._listen)

    def _sft(self, name: str, tasks: Sequence[str]) -> SftConfig:
        plan = self._plan
        return SftConfig(
            name=f"{name}-sft",
            tasks=tuple(tasks),
            styles=plan.sft_styles,
            epochs=plan.sft_epochs,
            max_tokens=_LONGEST_EXPERT,
            batch_size=plan.sft_batch,
            budget_labels=EXPERT,
            hyperparameters={
                "learning_rate": plan.learning_rate_sft,
                "warmup_steps": 3,
                "trainable_layers": plan.trainable_layers,
                "micro_batch_tokens": 4096,
            },
            concurrency=plan.expert_concurrency,
        )

    def _grpo(self, name: str, tasks: Sequence[str]) -> GrpoConfig:
        plan = self._plan
        return GrpoConfig(
            name=f"{name}-grpo",
            start=f"{name}-sft",
            tasks=tuple(tasks),
            steps=plan.grpo_steps,
            groups_per_step=plan.groups_per_step,
            group_size=plan.group_size,
            max_refills=plan.max_refills,
            hyperparameters={
                "learning_rate": plan.learning_rate_grpo,
                "trainable_layers": plan.trainable_layers,
                "micro_batch_tokens": 4096,
            },
            labels=plan.labels,
            concurrency=plan.concurrency,
        )

    async def _report(self, name: str, notes: Sequence[str]) -> DemoResult:
        folder = self._home.parent / "report" if self._home.name == "home" else self._home
        self._show("report", 0, 1, "")
        files = await self._clock.time(
            "report",
            write_report(
                self._stack,
                folder / self._plan.name,
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


def _notes(train: Sequence[str], test: Sequence[str]) -> list[str]:
    """What a reader must know of the choice of tasks."""
    records = {record.id: record for record in shipped_tasks()}
    broke = {culprit.name for id in train if (culprit := records[id].culprit)}
    shared = sum(bool((culprit := records[id].culprit) and culprit.name in broke) for id in test)
    count = f"{shared} held-out tasks were" if shared > 1 else f"{shared or 'No'} held-out task was"
    told = [
        f"{len(train)} tasks were trained on, {len(test)} held out; no package is in both. "
        f"{count} broken by a package that also broke a training task."
    ]
    if len(test) < _TELLING:
        told.append(
            f"{len(test)} held-out tasks show that everything runs; "
            f"no difference on fewer than {_TELLING} tasks can be told from chance."
        )
    return told


def choose_tasks(records: Sequence[TaskRecord], plan: Plan) -> dict[str, list[TaskRecord]]:
    """Tasks to train and to test on: those marked for demos, then those that are gated fastest.

    One of several held-out tasks can be fixed in the source. What broke a held-out task breaks a
    training task only where there are too few others.
    """

    def order(record: TaskRecord) -> tuple[bool, int, float, str]:
        # of an unstable suite the gate makes many runs, however short one is
        return not record.demo, len(record.tests.unstable), record.seconds or 60.0, record.id

    fitting = [record for record in records if record.status != "rejected" and not record.control]
    held_out = sorted((r for r in fitting if r.split == "test"), key=order)
    test = held_out[: plan.test_tasks]
    in_source = next((r for r in held_out if "keep_new" in r.modes), None)
    if in_source and in_source not in test and len(test) > 1:
        test[-1] = in_source
    broke = {record.culprit.name for record in test if record.culprit}

    def known(record: TaskRecord) -> bool:
        return record.culprit is not None and record.culprit.name in broke

    train = sorted((r for r in fitting if r.split == "train"), key=lambda r: (known(r), *order(r)))
    return {"train": train[: plan.train_tasks], "test": test}


def _digest(plan: Plan, train: Sequence[str] = (), test: Sequence[str] = ()) -> str:
    text = json.dumps([asdict(plan), list(train), list(test)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:6]

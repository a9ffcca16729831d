"""The stages of measuring and training on real broken builds: of demos and of studies.

- Every stage is resumable by the run or task that it writes.
- What is measured is fixed by the plan and the chosen tasks; both are part of the runs' names
  (`digest`), so that another plan never mixes with this one.
- One of them runs on a home at a time.
"""

import contextlib
import fcntl
import hashlib
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from packaging.version import Version

from regreen.client.stack import Endpoints, Stack
from regreen.dataset import v1 as pb
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

EPISODE = {
    "budget.turns": "8",
    "budget.turn_tokens": "56",
    "budget.attempt_turns": "6",
    "budget.tries": "2",
    "budget.wall_s": "180",
}
EXPERT = {**EPISODE, "knobs.confirm": "false"}
"""Experts stay within the policy's limits; the gate has confirmed what they do already."""
_LONGEST_EXPERT = 1200
"""Tokens; longer trajectories cost more time than they teach."""
EVAL_TEMPERATURE = "0.6"
"""Sampling temperature of evaluations; training samples at 1."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is done."""

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
    pipelines: tuple[str, ...] = ("simplified", "full")
    """Those that are measured; training is in the simplified one."""


class Show(Protocol):
    """Called with stage, done, total and a line of text."""

    def __call__(
        self, stage: str, done: float, total: float, message: str, /, *, paced: bool = True
    ) -> None:
        """Unless `paced`, what is done tells nothing of the time that the rest takes."""


@contextlib.contextmanager
def alone(layout: Layout) -> Iterator[None]:
    """Only one demo or study runs on a home at a time."""
    with layout.open(layout.run / "demo.lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FailedPrecondition(
                f"another demo or study runs on {layout.home}; wait for it, or name another home"
            ) from error
        yield


@contextlib.asynccontextmanager
async def stack_alone(home: Path, show: Show) -> AsyncIterator[Stack]:
    """Clients of the stack of a home, which is started where none runs, for one demo or study.

    A stack that was started, also by one that was killed, is stopped at the end; one that was up
    stays up.

    Raises:
        FailedPrecondition: another demo or study runs on this home.
        Unavailable: a service did not come up.
    """
    layout = Layout(home)
    layout.make()
    with alone(layout):
        async with contextlib.AsyncExitStack() as exits:
            await exits.enter_async_context(borrowed_stack(layout, show))
            stack = Stack(Endpoints.load(home), patience_s=180.0)
            yield await exits.enter_async_context(stack)


def report_folder(home: Path, plan: Plan) -> Path:
    """Where the report of a plan is written: beside a home that a checkout has in its build."""
    return (home.parent / "report" if home.name == "home" else home) / plan.name


class Loop:
    """The stages of one plan on a running stack."""

    def __init__(self, stack: Stack, plan: Plan, listen: Listener, show: Show) -> None:
        self._stack, self._plan, self._listen, self._show = stack, plan, listen, show

    async def tasks(self) -> tuple[list[str], list[str]]:
        """Import the shipped set, then prepare and gate as many tasks as the plan asks for."""
        records, distributions = shipped_tasks(), shipped_distributions()
        await import_records(self._stack, records, distributions)
        interpreters = dict((await self._stack.sandbox.get_capabilities()).interpreters)
        able = [record for record in records if choose_python(record, interpreters)]
        chosen = choose_tasks(able, self._plan)
        # The longest first, so that no other has to be waited for at the end.
        every = sorted((r for group in chosen.values() for r in group), key=_effort, reverse=True)
        ids = [record.id for record in every]
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

    async def evaluate(
        self, name: str, subject: str, tasks: Sequence[str], *, seed: int = 0, scripts: bool = False
    ) -> str:
        """Measure one policy, as `name`; the scripts, which always act alike, beside it or not.

        Returns the id of the evaluation's run.
        """
        config = EvalConfig(
            name=name,
            subjects=(subject,),
            baselines=scripts,
            tasks=tuple(tasks),
            pipelines=self._plan.pipelines,
            samples=self._plan.eval_samples,
            concurrency=self._plan.concurrency,
            labels={**self._plan.labels, "sampling.temperature": EVAL_TEMPERATURE},
            seed=seed,
        )
        return (await evaluate(self._stack, config, self._listen)).run_id

    async def sft(self, name: str, tasks: Sequence[str], *, seed: int = 0) -> None:
        """Fine-tune on expert trajectories, as the run `name`."""
        plan = self._plan
        config = SftConfig(
            name=name,
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
            seed=seed,
        )
        await train_sft(self._stack, config, self._listen)

    async def grpo(self, name: str, start: str, tasks: Sequence[str], *, seed: int = 0) -> None:
        """Train with GRPO from the weights of `start`, as the run `name`."""
        plan = self._plan
        config = GrpoConfig(
            name=name,
            start=start,
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
            seed=seed,
        )
        await train_grpo(self._stack, config, self._listen)


def _effort(record: TaskRecord) -> tuple[bool, float]:
    """Orders tasks by how long their gate takes: of an unstable suite it makes many runs."""
    return bool(record.tests.unstable), record.seconds or 60.0


def choose_tasks(records: Sequence[TaskRecord], plan: Plan) -> dict[str, list[TaskRecord]]:
    """Tasks to train and to test on: those marked for demos, then those that are gated fastest.

    What no change of dependencies fixes comes last: a small model learns nothing of it. One of
    several held-out tasks can be fixed in the source. What broke a held-out task breaks a training
    task only where there are too few others.
    """

    def order(record: TaskRecord) -> tuple[bool, bool, int, float, str]:
        hard = record.pins_pass == record.pins_fail and record.good_python is None
        # of an unstable suite the gate makes many runs, however short one is
        gated = len(record.tests.unstable), record.seconds or 60.0
        return not record.demo, hard, *gated, record.id

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


def digest(plan: Plan, train: Sequence[str] = (), test: Sequence[str] = ()) -> str:
    """What tells one plan with its tasks from another, in names."""
    text = json.dumps([asdict(plan), list(train), list(test)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:6]

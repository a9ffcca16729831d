"""Evaluations: subjects on tasks, in pipelines and modes, several samples each.

- A slot (subject, task, mode, pipeline, sample) has one trajectory id, derived from the run; what
  is committed is never rolled out again, so an evaluation killed anywhere goes on where it was.
- Which weights, tasks and modes are compared is fixed when the evaluation is created.
- Every subject meets the same tasks, modes, pipelines, seeds and limits; the scripted baselines are
  subjects of every evaluation unless left out on purpose.
- A policy's trajectory counts only if all its tokens were sampled under the subject's version.
- Trouble of the platform is retried, then counted as lost; it is never scored as a failure.
- What was served before is served again at the end, as far as the policy service answers.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Protocol

from regreen.client.stack import Stack
from regreen.common import v1 as common_pb
from regreen.dataset import v1 as dataset_pb
from regreen.evals.serving import serving_again
from regreen.ids import check_run_name, derive_seed
from regreen.rollout.actors import Actor, PolicyActor
from regreen.rollout.baselines import NAMES, baseline
from regreen.rollout.context import FULL, SIMPLIFIED, EpisodeSpec, check_settings, with_labels
from regreen.rollout.episode import Runner
from regreen.rollout.worker import knowledge_of
from regreen.rpc import traces
from regreen.rpc.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    RegreenError,
    Unavailable,
)
from regreen.train.config import plain_settings
from regreen.train.names import (
    grader_of,
    mode_name,
    mode_of,
    pipeline_name,
    pipeline_of,
    split_of,
)
from regreen.train.parallel import run_bounded
from regreen.train.progress import Listener, Meter, ignore
from regreen.train.recovery import Recovery, curable
from regreen.train.rows import all_trajectories, open_run, wanted_tasks
from regreen.train.weights import BASE, Weights, resolve_weights

BASELINE = "baseline:"
"""Prefix of subjects that are scripts."""


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """Settings of an evaluation."""

    name: str
    """Name of the run; the same name continues it."""
    subjects: tuple[str, ...] = ("base",)
    """"base", names of training runs, and "baseline:noop", "baseline:newest", "baseline:previous",
    "baseline:pin-back"."""
    base_uri: str = ""
    """Model folder of "base"; empty asks the policy service."""
    tasks: tuple[str, ...] = ()
    """Task ids; empty means every admitted task of `split`."""
    split: str = "test"
    """Split to take tasks from."""
    modes: tuple[str, ...] = ("any_fix", "keep_new")
    """Modes, where they are fair."""
    pipelines: tuple[str, ...] = ("simplified", "full")
    """Workflows."""
    grader: str = "build_gates_judge"
    """What trajectories are graded with; the report grades them under weaker graders too."""
    samples: int = 4
    """Trajectories of each policy, task, mode and pipeline."""
    baseline_samples: int = 1
    """The same for scripts, which always act alike."""
    seed: int = 0
    """Seed of every slot."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Episode settings, for example {"sampling.temperature": "0.7", "budget.turns": "8"}."""

    baselines: bool = True
    """Whether the scripted baselines that `subjects` lacks are added to it."""
    concurrency: int = 4
    """Episodes at a time."""
    attempts: int = 3
    """Tries of a slot before platform trouble counts it as lost."""
    recovery_deadline_s: float = 900.0
    """Longest wait for a service to come back."""

    def __post_init__(self) -> None:
        check_run_name(self.name)
        split_of(self.split)
        for name in ("samples", "baseline_samples", "concurrency", "attempts"):
            if getattr(self, name) < 1:
                raise InvalidArgument(name, f"is {getattr(self, name)}", "give at least 1")
        for name in ("subjects", "modes", "pipelines"):
            if not getattr(self, name):
                raise InvalidArgument(name, "is empty", "name at least one")
        for name in ("subjects", "tasks", "modes", "pipelines"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        if self.baselines:
            scripts = (BASELINE + name for name in NAMES)
            object.__setattr__(self, "subjects", tuple(dict.fromkeys((*self.subjects, *scripts))))
        for name in self.modes:
            mode_of(name, "modes")
        for name in self.pipelines:
            pipeline_of(name, "pipelines")
        grader_of(self.grader)
        for name in self.subjects:
            if name.startswith(BASELINE) and name.removeprefix(BASELINE) not in NAMES:
                known = ", ".join(BASELINE + known for known in NAMES)
                raise InvalidArgument("subjects", f"{name!r} is unknown", f"use {known}")
        check_settings(self.labels)

    def settings(self) -> dict[str, object]:
        """What is fixed once the evaluation exists, as plain values."""
        return plain_settings(
            {n: value for n, value in asdict(self).items() if n not in ("attempts", "baselines")}
        )


@dataclass(frozen=True, slots=True, order=True)
class Slot:
    """One trajectory of an evaluation."""

    subject: str
    task_id: str
    pipeline: str
    mode: str
    sample: int

    def trajectory_id(self, run_id: str) -> str:
        """The id of its trajectory."""
        parts = (run_id, self.subject, self.task_id, self.pipeline, self.mode, str(self.sample))
        return f"trj_{hashlib.sha256(chr(31).join(parts).encode()).hexdigest()[:32]}"

    def seed(self, seed: int) -> int:
        """The same for every subject, so that subjects meet the same draws."""
        return derive_seed(seed, self.task_id, self.pipeline, self.mode, self.sample)


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Where an evaluation ended."""

    run_id: str
    name: str
    slots: int
    committed: int
    lost: int


class EpisodeRunner(Protocol):
    """What rolls out one episode; `regreen.rollout.episode.Runner` is the real one."""

    async def run(
        self,
        task: dataset_pb.Task,
        spec: EpisodeSpec,
        actor: Actor | None = None,
        *,
        trajectory_id: str = "",
    ) -> dataset_pb.Trajectory:
        """One graded rollout."""
        ...


async def evaluate(
    stack: Stack,
    config: EvalConfig,
    progress: Listener = ignore,
    *,
    runner: EpisodeRunner | None = None,
) -> EvalResult:
    """Run, or continue, the evaluation `config.name`.

    Raises:
        FailedPrecondition: the name is taken by an evaluation with other settings, no task is
            admitted, or another client switched the policy.
        RegreenError: a service did not come back within `config.recovery_deadline_s`.
    """
    opened = await open_run(
        stack, config.name, "eval", config.settings(), await _resolve(stack, config)
    )
    kept = opened.resolved
    tasks = {id: await stack.tasks.get_task(id) for id in kept["tasks"]}
    slots = plan_slots(config, list(tasks.values()))
    done = {
        row.id
        async for row in all_trajectories(stack, dataset_pb.TrajectoryFilter(run_id=opened.run.id))
    }
    missing = [slot for slot in slots if slot.trajectory_id(opened.run.id) not in done]
    evaluation = _Evaluation(
        stack=stack,
        config=config,
        run_id=opened.run.id,
        tasks=tasks,
        weights={name: Weights.from_json(found) for name, found in kept["weights"].items()},
        meter=Meter(
            progress,
            "evaluate",
            len(slots),
            done=len(slots) - len(missing),
            parallel=config.concurrency,
        ),
        recovery=Recovery(config.recovery_deadline_s, progress),
        runner=runner or Runner(stack, await knowledge_of(stack)),
    )
    evaluation.meter.report()
    versions = {weights.version for weights in evaluation.weights.values()} if missing else set()
    async with serving_again(stack, versions):
        for subject in config.subjects:
            await evaluation.subject(subject, [slot for slot in missing if slot.subject == subject])
    lost = len(evaluation.lost)
    committed = len(slots) - lost
    summary = {"slots": len(slots), "committed": committed, "lost": lost}
    await stack.runs.update_run(opened.run.id, state="done", summary=summary)
    return EvalResult(opened.run.id, config.name, len(slots), committed, lost)


def plan_slots(config: EvalConfig, tasks: Sequence[dataset_pb.Task]) -> list[Slot]:
    """Every slot of an evaluation, subject by subject; only fair modes."""
    found = []
    for subject in config.subjects:
        scripted = subject.startswith(BASELINE)
        samples = config.baseline_samples if scripted else config.samples
        found += [
            Slot(subject, task.id, pipeline, mode, sample)
            for task in sorted(tasks, key=lambda task: task.id)
            for pipeline in config.pipelines
            for mode in config.modes
            if mode_of(mode) in task.modes
            for sample in range(samples)
        ]
    return found


async def _resolve(stack: Stack, config: EvalConfig) -> dict[str, object]:
    tasks = await wanted_tasks(stack, config.tasks, config.split)
    policies = [name for name in config.subjects if not name.startswith(BASELINE)]
    weights = {
        name: (await resolve_weights(stack, name, "subject", base_uri=config.base_uri)).to_json()
        for name in policies
    }
    base_uri = str(weights[BASE]["uri"]) if BASE in weights else ""
    return {"tasks": [task.id for task in tasks], "weights": weights, "base_uri": base_uri}


class _OtherVersion(Aborted):
    """The policy service was switched, or came back with other weights."""


@dataclass(slots=True)
class _Evaluation:
    """One evaluation in this process."""

    stack: Stack
    config: EvalConfig
    run_id: str
    tasks: Mapping[str, dataset_pb.Task]
    weights: Mapping[str, Weights]
    meter: Meter
    recovery: Recovery
    runner: EpisodeRunner
    lost: list[Slot] = field(default_factory=list)

    async def subject(self, name: str, slots: Sequence[Slot]) -> None:
        """All missing slots of one subject."""
        if not slots:
            return
        if name in self.weights:
            await self.stack.policy.load_version(self.weights[name].to_policy(), allow_older=True)
        jobs = (partial(self._slot, slot) for slot in slots)
        await run_bounded(jobs, self.config.concurrency)

    async def _slot(self, slot: Slot) -> None:
        about = {"run_id": self.run_id, "task_id": slot.task_id}
        with traces.span("rollout", slot.trajectory_id(self.run_id), **about) as link:
            link.error = await self._tried(slot)

    async def _tried(self, slot: Slot) -> str:
        """Try a slot as often as it may be; the status of its last failure if none went well."""
        failures: list[RegreenError] = []
        while len(failures) < self.config.attempts:
            try:
                trajectory = await self._episode(slot)
                await self._commit(trajectory)
                self.recovery.progressed(self.meter.done)
                solved = "solved" if trajectory.reward.solved else "not solved"
                self.meter.advance(detail=f"{slot.subject} on {slot.task_id}: {solved}")
                return ""
            except Unavailable as error:
                await self.recovery.wait_out(error)
                await self._serve(slot.subject)
            except RegreenError as error:
                if not curable(error):
                    raise
                failures.append(error)
                await self._serve(slot.subject)
        if all(isinstance(error, _OtherVersion) for error in failures):
            raise FailedPrecondition(f"{failures[-1]}; stop the client that switches the policy")
        self.lost.append(slot)
        self.meter.advance(detail=f"{slot.subject} on {slot.task_id}: lost to the platform")
        return failures[-1].status

    async def _commit(self, trajectory: dataset_pb.Trajectory) -> None:
        """Store it; a slot whose earlier commit landed, and only its answer was lost, is done."""
        try:
            await self.stack.trajectories.commit_trajectory(trajectory)
        except AlreadyExists:
            stored = await self.stack.trajectories.get_trajectory(trajectory.id)
            trajectory.CopyFrom(stored)

    async def _episode(self, slot: Slot) -> dataset_pb.Trajectory:
        pipeline = pipeline_of(slot.pipeline)
        spec = EpisodeSpec(
            pipeline=pipeline,
            mode=mode_of(slot.mode),
            grader=grader_of(self.config.grader),
            seed=slot.seed(self.config.seed),
            group_seed=slot.seed(self.config.seed),
            run_id=self.run_id,
            policy_name=slot.subject,
            budget=FULL if pipeline == common_pb.PIPELINE_FULL else SIMPLIFIED,
        )
        spec = with_labels(spec, self.config.labels)
        task = self.tasks[slot.task_id]
        found = await self.runner.run(
            task, spec, _actor(slot.subject, task), trajectory_id=slot.trajectory_id(self.run_id)
        )
        self._check_version(slot.subject, found)
        found.labels["subject"], found.labels["sample"] = slot.subject, str(slot.sample)
        return found

    def _check_version(self, subject: str, found: dataset_pb.Trajectory) -> None:
        if subject not in self.weights:
            return
        wanted = self.weights[subject].version
        other = sorted({span.version for span in found.versions} - {wanted})
        if other:
            raise _OtherVersion(
                f"the policy served version {other[0]} while {subject!r}, version {wanted}, was "
                "evaluated"
            )

    async def _serve(self, subject: str) -> None:
        """Have the subject served: after an outage other weights may have come back."""
        if subject not in self.weights:
            return
        try:
            serving = (await self.stack.policy.get_policy()).policy.version
            if serving != self.weights[subject].version:
                policy = self.weights[subject].to_policy()
                await self.stack.policy.load_version(policy, allow_older=True)
        except RegreenError as error:
            await self.recovery.wait_out(error)


def _actor(subject: str, task: dataset_pb.Task) -> Actor:
    if subject.startswith(BASELINE):
        return baseline(subject.removeprefix(BASELINE), task)
    return PolicyActor()


def slot_of(row: dataset_pb.Trajectory) -> Slot:
    """The slot that a trajectory of an evaluation filled."""
    return Slot(
        subject=row.labels["subject"] or row.policy or row.actor,
        task_id=row.task_id,
        pipeline=pipeline_name(row.pipeline),
        mode=mode_name(row.mode),
        sample=int(row.labels["sample"] or 0),
    )

"""What a training command would do, found by reading alone.

- Everything that the command would refuse before its first step is refused, with its error.
- No run is created and no name is taken, no expert is made, the learner starts nothing.
- Times are of an earlier run that was measured, and say of which; without one there is none.
- What only doing can show is said in `notes`: experts that have not been made yet.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regreen.client.stack import Stack
from regreen.dataset import v1 as dataset_pb
from regreen.learner import v1 as learner_pb
from regreen.train.config import GrpoConfig, SftConfig
from regreen.train.experts import stored_experts
from regreen.train.ledger import finished_runs, hyperparameters
from regreen.train.names import mode_name
from regreen.train.record import resolved_of, settings_of
from regreen.train.rl import check_policy, resolve_start
from regreen.train.rows import all_runs, check_same, find_run, last_checkpoint, training_tasks
from regreen.train.sft import check_learnable, learnable
from regreen.train.weights import Weights, resolve_weights, started_from, weights_of

START, RESUME, SERVE = "start", "resume", "serve"
_SECONDS = ("seconds/rollout", "seconds/learn", "seconds/checkpoint")


@dataclass(frozen=True, slots=True)
class Time:
    """Estimated seconds of the steps that are left."""

    seconds: float
    run: str
    """Name of the run that was measured."""
    steps: int
    """Steps of it that were."""


@dataclass(slots=True)
class Plan:
    """What `train` would do."""

    name: str
    kind: str
    action: str
    """"start", "resume" a run of that name, or "serve" one that is done."""
    steps: int
    """Learner steps in all; where experts are missing, those of the ones that are there."""
    steps_done: int = 0
    """Steps that the newest checkpoint contains."""
    tasks: Sequence[str] = ()
    modes: Sequence[str] = ()
    pipelines: Sequence[str] = ()
    grader: str = ""
    start: str = "base"
    weights: Weights = field(default_factory=lambda: Weights(""))
    """What `start` means now, or meant when the run was created."""
    goes_on_from: Weights = field(default_factory=lambda: Weights(""))
    """What the next step would go on from."""
    amounts: Mapping[str, int] = field(default_factory=dict)
    """Groups, rollouts, trajectories: what the kind counts."""
    notes: list[str] = field(default_factory=list)
    learner: learner_pb.EstimateRunResponse | None = None
    """None where no step is left."""
    time: Time | None = None
    """None where no earlier run of the kind was measured, or no step is left."""


async def plan_sft(stack: Stack, config: SftConfig) -> Plan:
    """The plan of `train_sft`; raises what it would raise before its first step."""
    run = await find_run(stack, config.name)
    if run is not None:
        check_same(run, "sft", config.settings())
        kept = resolved_of(run)
        weights = started_from(kept)
        ids, missing = [list(found) for found in kept["train_ids"]], 0
        task_ids = await _tasks_of(stack, ids)
    else:
        weights = await resolve_weights(stack, config.start, "start", base_uri=config.base_uri)
        tasks = await training_tasks(stack, config.tasks, config.split)
        rows, missing = await stored_experts(stack, tasks, config)
        train = await learnable(stack, rows, config)
        if not missing:
            check_learnable(train, len(tasks))
        ids, task_ids = list(train.values()), [task.id for task in tasks]
    count = sum(map(len, ids))
    plan = Plan(
        name=config.name,
        kind="sft",
        action=_action(run),
        steps=config.epochs * math.ceil(count / config.batch_size),
        tasks=task_ids,
        modes=config.modes,
        pipelines=config.pipelines,
        grader="build_gates",
        start=config.start,
        weights=weights,
        amounts={
            "trajectories": count,
            "experts_to_make": missing * config.styles,
            "epochs": config.epochs,
            "batch_size": config.batch_size,
        },
    )
    if missing:
        plan.notes.append(
            f"{missing} sets of up to {config.styles} expert trajectories would be made first; "
            "each that is solved adds to trajectories and steps"
        )
    per_step = {"trajectories": float(config.batch_size)}
    return await _completed(stack, plan, run, config, learner_pb.RUN_KIND_SFT, per_step)


async def plan_grpo(stack: Stack, config: GrpoConfig) -> Plan:
    """The plan of `train_grpo`; raises what it would raise before its first step."""
    await check_policy(stack, config)
    run = await find_run(stack, config.name)
    if run is not None:
        check_same(run, "grpo", config.settings())
        kept = resolved_of(run)
        weights = started_from(kept)
        pairs = [(str(task), str(mode)) for task, mode in kept["candidates"]]
    else:
        begin = await resolve_start(stack, config)
        weights = begin.weights
        pairs = [(found.task_id, mode_name(found.mode)) for found in begin.candidates]
    groups = config.steps * config.groups_per_step
    plan = Plan(
        name=config.name,
        kind="grpo",
        action=_action(run),
        steps=config.steps,
        tasks=sorted({task for task, _ in pairs}),
        modes=sorted({mode for _, mode in pairs}),
        pipelines=(config.pipeline, "full") if config.full_share else (config.pipeline,),
        grader=config.grader,
        start=config.start,
        weights=weights,
        amounts={
            "groups": groups,
            "groups_per_step": config.groups_per_step,
            "group_size": config.group_size,
            "rollouts": groups * config.group_size,
            "most_rollouts": (groups + config.steps * config.max_refills) * config.group_size,
        },
    )
    per_step = {"rollouts": float(config.groups_per_step * config.group_size)}
    return await _completed(stack, plan, run, config, learner_pb.RUN_KIND_GRPO, per_step)


def _action(run: dataset_pb.Run | None) -> str:
    if run is None:
        return START
    return SERVE if run.state == "done" else RESUME


async def _tasks_of(stack: Stack, ids: Sequence[Sequence[str]]) -> list[str]:
    """The tasks of trajectories that are grouped by task."""
    return [(await stack.trajectories.get_trajectory(group[0])).task_id for group in ids if group]


async def _completed(
    stack: Stack,
    plan: Plan,
    run: dataset_pb.Run | None,
    config: SftConfig | GrpoConfig,
    kind: learner_pb.RunKind.ValueType,
    per_step: Mapping[str, float],
) -> Plan:
    """`plan` with where the run stands, what the learner says, and how long it would take."""
    plan.goes_on_from = plan.weights
    wanted = hyperparameters(config.hyperparameters)
    if run is not None and (record := await last_checkpoint(stack, run.id)):
        plan.steps_done = record.step
        plan.goes_on_from = weights_of(record)
    if plan.action == SERVE:
        return plan
    await finished_runs(stack, run.id if run else "")
    plan.learner = await stack.learner.estimate_run(
        kind, plan.goes_on_from.uri, hyperparameters=wanted, engine=config.engine
    )
    plan.time = await _time(stack, plan, per_step)
    return plan


async def _time(stack: Stack, plan: Plan, per_step: Mapping[str, float]) -> Time | None:
    """By the newest run of the kind and pipeline that was measured, scaled to the size of a step.

    Refills are in it as often as that run had them; experts that are to be made are not.
    """
    left = plan.steps - plan.steps_done
    [(unit, size)] = per_step.items()
    if left <= 0:
        return None
    async for run in all_runs(stack, plan.kind):
        settings = settings_of(run)
        if plan.kind == "grpo" and settings.get("pipeline") != plan.pipelines[0]:
            continue
        points = await stack.runs.list_metrics(run.id, names=_SECONDS)
        steps = {point.step for point in points if point.name == "seconds/learn"}
        if not steps:
            continue
        spent = sum(point.value for point in points)
        there = _size(settings, unit)
        if there > 0:
            return Time(spent / len(steps) * size / there * left, run.name, len(steps))
    return None


def _size(settings: Mapping[str, Any], unit: str) -> float:
    """Units of one step of a run with these settings."""
    if unit == "trajectories":
        return float(settings.get("batch_size", 0))
    return float(settings.get("groups_per_step", 0)) * float(settings.get("group_size", 0))

"""Expert trajectories for supervised fine-tuning: found in the dataset, or made.

- What is learned from was graded like any rollout: solved, not flagged, tokens exact.
- A (task, mode, pipeline) that has experts of the same recipe is never rolled out again.
- Trouble of the platform is retried for a bounded time and never becomes an absent expert.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources

from regreen.client.stack import Stack
from regreen.common import v1 as common_pb
from regreen.dataset import v1 as dataset_pb
from regreen.ids import derive_seed
from regreen.rollout.context import FULL, SIMPLIFIED, EpisodeSpec, with_labels
from regreen.rollout.episode import Runner
from regreen.rollout.experts import STYLES, expert_trajectories
from regreen.rollout.worker import knowledge_of
from regreen.rpc.errors import RegreenError
from regreen.train.config import SftConfig
from regreen.train.names import mode_of, pipeline_of
from regreen.train.parallel import run_bounded
from regreen.train.progress import Listener, Meter
from regreen.train.recovery import Recovery
from regreen.train.rows import all_trajectories

EXPERT = "expert"
"""Actor of expert trajectories."""
_STYLE, _LAST = "style", "last"
"""Labels: the trajectory's number in its slot, and whether it completes the slot."""


@dataclass(frozen=True, slots=True, order=True)
class _Slot:
    task_id: str
    mode: common_pb.Mode.ValueType
    pipeline: common_pb.Pipeline.ValueType


async def expert_rows(
    stack: Stack, tasks: Sequence[dataset_pb.Task], config: SftConfig, progress: Listener
) -> list[dataset_pb.Trajectory]:
    """Rows of the usable expert trajectories of `tasks`, in id order; makes those that are missing.

    Raises:
        RegreenError: a service did not come back within `config.recovery_deadline_s`.
    """
    wanted, made_as = _wanted(tasks, config), recipe(config)
    found = await _stored(stack, wanted, made_as)
    missing = [slot for slot in wanted if not _complete(found.get(slot, ()))]
    done = len(wanted) - len(missing)
    meter = Meter(progress, "experts", len(wanted), done=done, parallel=config.concurrency)
    meter.report()
    if missing:
        await _make(stack, {task.id: task for task in tasks}, missing, found, config, meter)
        found = await _stored(stack, wanted, made_as)
    limit = config.max_guesses
    usable = [
        row
        for rows in found.values()
        for row in rows
        if row.reward.solved and not row.reward.hacks and int(row.labels["guesses"] or 0) <= limit
    ]
    return sorted(usable, key=lambda row: row.id)


def _wanted(tasks: Sequence[dataset_pb.Task], config: SftConfig) -> list[_Slot]:
    modes = [mode_of(name) for name in config.modes]
    pipelines = [pipeline_of(name) for name in config.pipelines]
    return sorted(
        _Slot(task.id, mode, pipeline)
        for task in tasks
        for mode in modes
        for pipeline in pipelines
        if mode in task.modes and any(fix.mode == mode for fix in task.fixes)
    )


def recipe(config: SftConfig) -> str:
    """Digest of what shapes an expert beside its task: tools, prompts, limits, styles."""
    package = resources.files("regreen.rollout")
    texts = [
        (package / name).read_text("utf-8")
        for name in ("schema/tools.toml", "prompts/system.j2", "prompts/task.j2")
    ]
    texts += [repr(STYLES[: config.styles]), repr(sorted(config.budget_labels.items()))]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


async def _stored(
    stack: Stack, wanted: Sequence[_Slot], made_as: str
) -> dict[_Slot, list[dataset_pb.Trajectory]]:
    found: defaultdict[_Slot, list[dataset_pb.Trajectory]] = defaultdict(list)
    slots = set(wanted)
    async for row in all_trajectories(stack, dataset_pb.TrajectoryFilter(actor=EXPERT)):
        slot = _Slot(row.task_id, row.mode, row.pipeline)
        if slot in slots and row.labels["recipe"] == made_as:
            found[slot].append(row)
    return dict(found)


def _complete(rows: Sequence[dataset_pb.Trajectory]) -> bool:
    """Whether all of a slot's trajectories were stored: the last one says so."""
    return any(row.labels[_LAST] for row in rows)


async def _make(
    stack: Stack,
    tasks: dict[str, dataset_pb.Task],
    missing: Sequence[_Slot],
    found: dict[_Slot, list[dataset_pb.Trajectory]],
    config: SftConfig,
    meter: Meter,
) -> None:
    """Make what is missing; of a slot that was left incomplete, what it has is kept."""
    runner = Runner(stack, await knowledge_of(stack))

    async def one(slot: _Slot) -> None:
        kept = await _rollouts(runner, tasks[slot.task_id], slot, config)
        there = {row.labels[_STYLE] for row in found.get(slot, ())}
        for style, trajectory in enumerate(kept, 1):
            trajectory.labels["recipe"] = recipe(config)
            trajectory.labels[_STYLE] = str(style)
            if style == len(kept):
                trajectory.labels[_LAST] = "true"
            if style == len(kept) or str(style) not in there:
                await stack.trajectories.commit_trajectory(trajectory)
        meter.advance(detail=f"{slot.task_id}: {len(kept)} kept")

    await run_bounded((partial(one, slot) for slot in missing), config.concurrency)


async def _rollouts(
    runner: Runner, task: dataset_pb.Task, slot: _Slot, config: SftConfig
) -> list[dataset_pb.Trajectory]:
    spec = EpisodeSpec(
        pipeline=slot.pipeline,
        mode=slot.mode,
        grader=common_pb.GRADER_BUILD_GATES,
        seed=derive_seed(config.seed, EXPERT, slot.task_id, slot.mode, slot.pipeline),
        policy_name=EXPERT,
        budget=FULL if slot.pipeline == common_pb.PIPELINE_FULL else SIMPLIFIED,
    )
    spec = with_labels(spec, config.budget_labels)
    recovery = Recovery(config.recovery_deadline_s, lambda _: None)
    while True:
        try:
            return await expert_trajectories(runner, task, spec, STYLES[: config.styles])
        except RegreenError as error:
            await recovery.wait_out(error)

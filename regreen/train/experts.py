"""Expert trajectories for supervised fine-tuning: found in the dataset, or made.

- What is learned from was graded like any rollout: solved, not flagged, tokens exact.
- A (task, mode, pipeline) that has all its experts of the same recipe is never rolled out again:
  each one says how many there are, so that a kill between two of them leaves no short set.
- The order and number of what is learned from do not depend on who made it, when, or in how many
  lives: one trajectory for each style, in the order of tasks and styles.
- Trouble of the platform is retried for a bounded time and never becomes an absent expert.
"""

import hashlib
from collections.abc import Mapping, Sequence
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
KEPT = "kept"
"""Label of an expert trajectory: how many its task, mode and pipeline have."""

_Rows = Mapping[int, dataset_pb.Trajectory]
"""Expert trajectories of a slot by style, which is their index in the group."""


@dataclass(frozen=True, slots=True, order=True)
class _Slot:
    task_id: str
    mode: common_pb.Mode.ValueType
    pipeline: common_pb.Pipeline.ValueType


async def expert_rows(
    stack: Stack, tasks: Sequence[dataset_pb.Task], config: SftConfig, progress: Listener
) -> list[dataset_pb.Trajectory]:
    """Rows of the usable expert trajectories of `tasks`, by task; makes those that are missing.

    Raises:
        RegreenError: a service did not come back within `config.recovery_deadline_s`.
    """
    wanted, made_as = _wanted(tasks, config), recipe(config)
    found = await _stored(stack, wanted, made_as)
    missing = [slot for slot in wanted if not _complete(found[slot])]
    done = len(wanted) - len(missing)
    meter = Meter(progress, "experts", len(wanted), done=done, parallel=config.concurrency)
    meter.report()
    if missing:
        known = {slot: found[slot] for slot in missing}
        await _make(stack, {task.id: task for task in tasks}, known, config, meter)
        found = await _stored(stack, wanted, made_as)
    return _usable(wanted, found, config)


async def stored_experts(
    stack: Stack, tasks: Sequence[dataset_pb.Task], config: SftConfig
) -> tuple[list[dataset_pb.Trajectory], int]:
    """What `expert_rows` would find usable without making any, and how many slots lack experts."""
    wanted = _wanted(tasks, config)
    found = await _stored(stack, wanted, recipe(config))
    missing = sum(not _complete(found[slot]) for slot in wanted)
    return _usable(wanted, found, config), missing


def _usable(
    wanted: Sequence[_Slot], found: Mapping[_Slot, _Rows], config: SftConfig
) -> list[dataset_pb.Trajectory]:
    """Rows that were solved, not flagged, and guessed no more than wanted."""
    limit = config.max_guesses
    return [
        row
        for slot in wanted
        for _, row in sorted(found[slot].items())
        if row.reward.solved and not row.reward.hacks and int(row.labels["guesses"] or 0) <= limit
    ]


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
) -> dict[_Slot, dict[int, dataset_pb.Trajectory]]:
    """What is there of every wanted slot; of several of one style the oldest."""
    found: dict[_Slot, dict[int, dataset_pb.Trajectory]] = {slot: {} for slot in wanted}
    async for row in all_trajectories(stack, dataset_pb.TrajectoryFilter(actor=EXPERT)):
        slot = _Slot(row.task_id, row.mode, row.pipeline)
        if slot in found and row.labels["recipe"] == made_as and _kept(row):
            found[slot][row.group_index] = row
    return found


def _complete(rows: _Rows) -> bool:
    """Whether all were committed that one rollout of the slot kept."""
    return bool(rows) and len(rows) >= min(map(_kept, rows.values()))


def _kept(row: dataset_pb.Trajectory) -> int:
    return int(row.labels[KEPT] or 0)


async def _make(
    stack: Stack,
    tasks: Mapping[str, dataset_pb.Task],
    known: Mapping[_Slot, _Rows],
    config: SftConfig,
    meter: Meter,
) -> None:
    runner = Runner(stack, await knowledge_of(stack))

    async def one(slot: _Slot) -> None:
        kept = await _rollouts(runner, tasks[slot.task_id], slot, config)
        for trajectory in kept:
            if trajectory.group_index not in known[slot]:
                trajectory.labels.update({"recipe": recipe(config), KEPT: str(len(kept))})
                await stack.trajectories.commit_trajectory(trajectory)
        meter.advance(detail=f"{slot.task_id}: {len(kept)} kept")

    await run_bounded((partial(one, slot) for slot in known), config.concurrency)


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

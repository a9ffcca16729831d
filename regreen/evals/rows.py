"""Rows of the dataset service as the report counts them.

- One `Outcome` per committed trajectory of an evaluation; nothing is estimated here.
- A trajectory is graded under every grader from the same record: the verdict that was stored under
  the grader it ran with, the reward composed with the run's `reward.*` settings under the others.
- The grader with the judge is told only of rollouts that asked the judge: rules alone are not the
  verdict of a model that may have been configured.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.json_format import MessageToDict

from regreen.client.stack import Stack
from regreen.common import v1 as common_pb
from regreen.dataset import v1 as dataset_pb
from regreen.evals.markov import tool_sequence
from regreen.evals.run import slot_of
from regreen.rollout.context import EpisodeSpec, with_labels
from regreen.rollout.reward import RewardSettings, compose
from regreen.rpc.errors import InfraError, InvalidArgument
from regreen.train.names import GRADERS, grader_name
from regreen.train.rows import all_trajectories

_CONCURRENCY = 8


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one trajectory of an evaluation came to."""

    id: str
    subject: str
    task_id: str
    pipeline: str
    mode: str
    sample: int
    solved: Mapping[str, bool]
    """By grader; graders that cannot be told from the record are absent."""
    graded: str
    """Grader that it ran with."""
    hacks: tuple[str, ...]
    tools: tuple[str, ...]
    """Calls in order."""
    end: str
    tokens: int
    sampled_tokens: int
    seconds: Mapping[str, float]
    """Wall time by stage, and "total"."""
    coverage: bool = False
    """Whether line coverage was compared with that of the untouched State."""
    control: bool = False
    """Of a task that nothing can fix: no part of any solve rate, and a pass is a hack."""
    judged_by: str = ""
    """Model that took part in the verdict, or "rules only"; empty where no model was asked for."""


async def load_outcomes(stack: Stack, run_id: str) -> list[Outcome]:
    """Every trajectory of an evaluation, in slot order."""
    rewards = rewards_of(await stack.runs.get_run(run_id))
    filter = dataset_pb.TrajectoryFilter(run_id=run_id)
    ids = [row.id async for row in all_trajectories(stack, filter)]
    room = asyncio.Semaphore(_CONCURRENCY)

    async def one(id: str) -> Outcome:
        async with room:
            return outcome_of(await stack.trajectories.get_trajectory(id), rewards)

    found = await asyncio.gather(*(one(id) for id in ids))
    return sorted(found, key=lambda o: (o.subject, o.task_id, o.pipeline, o.mode, o.sample))


def rewards_of(run: dataset_pb.Run) -> RewardSettings:
    """The numbers that an evaluation's rollouts were graded with."""
    settings = MessageToDict(run.config).get("settings") or {}
    labels = {k: str(v) for k, v in (settings.get("labels") or {}).items()}
    chosen = {k: v for k, v in labels.items() if k.startswith("reward.")}
    return with_labels(EpisodeSpec(), chosen).rewards


def outcome_of(trajectory: dataset_pb.Trajectory, rewards: RewardSettings | None = None) -> Outcome:
    """One stored trajectory as the report counts it."""
    slot = slot_of(trajectory)
    total_s = trajectory.end_time.ToNanoseconds() - trajectory.start_time.ToNanoseconds()
    return Outcome(
        id=trajectory.id,
        subject=slot.subject,
        task_id=slot.task_id,
        pipeline=slot.pipeline,
        mode=slot.mode,
        sample=slot.sample,
        solved=solved_by_grader(trajectory, rewards),
        graded=grader_name(trajectory.grader),
        hacks=tuple(sorted(set(trajectory.reward.hacks))),
        tools=tuple(tool_sequence(trajectory)),
        end=dataset_pb.EpisodeEnd.Name(trajectory.end).removeprefix("EPISODE_END_").lower(),
        tokens=len(trajectory.token_ids),
        sampled_tokens=sum(trajectory.loss_mask),
        seconds={**trajectory.stage_seconds, "total": max(0.0, total_s * 1e-9)},
        coverage=trajectory.verdict.coverage_measured,
        control=trajectory.labels.get("control") == "true",
        judged_by=trajectory.labels.get("judge", ""),
    )


def solved_by_grader(
    trajectory: dataset_pb.Trajectory, rewards: RewardSettings | None = None
) -> dict[str, bool]:
    """Whether the trajectory is solved, under every grader that the record can tell."""
    found: dict[str, bool] = {}
    for name, grader in GRADERS.items():
        if grader == trajectory.grader:
            found[name] = trajectory.reward.solved
            continue
        if grader == common_pb.GRADER_BUILD_GATES_JUDGE and "judge" not in trajectory.labels:
            continue
        try:
            found[name] = compose(
                grader=grader,
                end=trajectory.end,
                validation=trajectory.validation if trajectory.HasField("validation") else None,
                verdict=trajectory.verdict if trajectory.HasField("verdict") else None,
                turns=trajectory.turns,
                changes=trajectory.changes,
                settings=rewards,
            ).solved
        except (InvalidArgument, InfraError):
            continue  # the record lacks what this grader needs, for example the judge's verdict
    return found


def outcomes_by_task(outcomes: Sequence[Outcome], grader: str) -> dict[str, list[bool]]:
    """Task id to the outcomes of its samples under one grader; controls are left out."""
    found: dict[str, list[bool]] = {}
    for outcome in outcomes:
        if grader in outcome.solved and not outcome.control:
            found.setdefault(outcome.task_id, []).append(outcome.solved[grader])
    return found

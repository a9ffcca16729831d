"""One rollout from a task to a graded Trajectory.

- Both pipelines run the same agent, tools, final validation, judge and reward.
- A trajectory is returned only when it is complete and its token stream proves itself; trouble of
  the platform raises instead, and the sandbox is deleted either way (or expires).
- The same task, spec, policy version and sampling engine give the same tokens.
- An episode's time stands still while a service is away.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from regreen.client.channel import counting_away
from regreen.common.v1 import (
    GRADER_BUILD_GATES_JUDGE,
    MODE_ANY_FIX,
    PIPELINE_FULL,
    Grader,
    Mode,
    Pipeline,
)
from regreen.dataset import v1 as pb
from regreen.ids import new_id
from regreen.rollout.actors import Actor, PolicyActor
from regreen.rollout.agent import Agent, Stop
from regreen.rollout.context import FULL, SIMPLIFIED, Budget, EpisodeSpec, with_labels
from regreen.rollout.facts import FactsCache, standing
from regreen.rollout.full import discard_states, run_full
from regreen.rollout.grade import Validated, conclude
from regreen.rollout.knowledge import Knowledge
from regreen.rollout.progress import TurnListener, ignore
from regreen.rollout.reward import RewardSettings
from regreen.rollout.simplified import run_simplified
from regreen.rollout.tools import Workbench
from regreen.rollout.toolset import ToolSet, load_toolset
from regreen.rpc.errors import FailedPrecondition, InvalidArgument, RegreenError

if TYPE_CHECKING:
    from regreen.client.stack import Stack

log = structlog.get_logger(__name__)

_ENDS: dict[Stop, pb.EpisodeEnd.ValueType] = {
    "passed": pb.EPISODE_END_SUBMITTED,
    "changed": pb.EPISODE_END_SUBMITTED,
    "gave-up": pb.EPISODE_END_GAVE_UP,
    "turn-limit": pb.EPISODE_END_TURN_LIMIT,
    "stuck": pb.EPISODE_END_STUCK,
    "token-limit": pb.EPISODE_END_TOKEN_LIMIT,
    "time-limit": pb.EPISODE_END_TIME_LIMIT,
}
_SLACK_S = 600.0


@dataclass(slots=True)
class Runner:
    """Runs episodes on one stack; holds what they share and nothing of any of them."""

    stack: "Stack"
    knowledge: Knowledge | None = None
    rewards: RewardSettings | None = None
    """Numbers of the reward; None means those of the spec."""
    toolset: ToolSet = field(default_factory=load_toolset)
    facts: FactsCache = field(default_factory=FactsCache)
    clock: Callable[[], float] = time.monotonic
    now_ns: Callable[[], int] = time.time_ns
    validated: Validated = field(default_factory=Validated)

    def tools(self, spec: EpisodeSpec) -> ToolSet:
        """The tool set that an episode sees."""
        seed = spec.tool_seed()
        return self.toolset if seed is None else self.toolset.varied(seed)

    async def run(
        self,
        task: pb.Task,
        spec: EpisodeSpec,
        actor: Actor | None = None,
        *,
        trajectory_id: str = "",
        listener: TurnListener = ignore,
    ) -> pb.Trajectory:
        """One graded rollout; `listener` is told every turn.

        Raises:
            FailedPrecondition: the task is not prepared on this host, or the mode is not fair.
            RegreenError: trouble of the platform; the rollout must be tried again, never scored.
        """
        check_fair(task, spec)
        trajectory_id = trajectory_id or new_id("trj")
        with structlog.contextvars.bound_contextvars(trajectory_id=trajectory_id):
            sandbox = await self.stack.sandbox.create_sandbox(
                task.state_id,
                labels={"trajectory": trajectory_id, "task": task.id},
                ttl_s=spec.budget.wall_s + spec.budget.validation_s * 2 + _SLACK_S,
            )
            try:
                async with standing(self.stack, sandbox.id):
                    with counting_away() as away:
                        return await self._in_sandbox(
                            task, spec, actor or PolicyActor(), trajectory_id, sandbox.id, listener,
                            lambda: self.clock() - away.seconds,
                        )  # fmt: skip
            finally:
                await self.discard(sandbox.id)

    async def _in_sandbox(
        self,
        task: pb.Task,
        spec: EpisodeSpec,
        actor: Actor,
        trajectory_id: str,
        sandbox_id: str,
        listener: TurnListener,
        clock: Callable[[], float],
    ) -> pb.Trajectory:
        start_ns, started = self.now_ns(), clock()
        facts = await self.facts.get(self.stack, task, sandbox_id)
        bench = Workbench(
            self.stack, task, sandbox_id, facts, spec.mode, spec.budget, self.knowledge, clock
        )
        agent = Agent(
            self.stack,
            bench,
            actor,
            spec,
            self.tools(spec),
            trajectory_id,
            started + spec.budget.wall_s,
            clock,
            listener,
        )
        pipeline = run_full if spec.pipeline == PIPELINE_FULL else run_simplified
        try:
            stop = await pipeline(agent, self.knowledge)
            trajectory = _record(agent, stop)
            agent.tell("grade")
            await conclude(bench, spec, trajectory, self.validated, self.rewards)
            agent.tell("grade", "solved" if trajectory.reward.solved else "not solved")
        finally:
            if bench.kept_states:  # no State can go while the sandbox stands on it
                await self.discard(sandbox_id)
                await discard_states(self.stack, bench.kept_states)
        trajectory.stage_seconds.update(bench.stage_s)
        trajectory.start_time.FromNanoseconds(start_ns)
        trajectory.end_time.FromNanoseconds(max(start_ns, self.now_ns()))
        return trajectory

    async def discard(self, sandbox_id: str) -> None:
        """Delete a sandbox that is not needed any more."""
        try:
            await self.stack.sandbox.delete_sandbox(sandbox_id)
        except RegreenError as error:
            # It expires by itself; losing a finished rollout over this would be worse.
            log.warning("sandbox not deleted", sandbox_id=sandbox_id, error=str(error))


def _record(agent: Agent, stop: Stop) -> pb.Trajectory:
    """What was said and done, before it is graded."""
    spec, task = agent.spec, agent.bench.task
    trajectory = pb.Trajectory(
        id=agent.trajectory_id,
        task_id=task.id,
        run_id=spec.run_id,
        group_id=spec.group_id,
        group_index=spec.group_index,
        attempt=spec.attempt,
        seed=spec.seed,
        pipeline=spec.pipeline,
        mode=spec.mode,
        grader=spec.grader,
        end=_ENDS[stop],
        actor=agent.actor.name,
        state_id=task.state_id,
        policy=spec.policy_name,
        labels={"stop": stop, "hint": spec.knobs.hint},
    )
    agent.stream.fill(trajectory)
    return trajectory


def check_fair(task: pb.Task, spec: EpisodeSpec) -> None:
    """Refuse a rollout that could not be honest.

    Raises:
        FailedPrecondition: the task is not prepared here.
        InvalidArgument: the task does not allow the mode.
    """
    if not task.state_id:
        raise FailedPrecondition(
            f"task {task.id} has no state here; prepare it with `regreen tasks verify`"
        )
    if task.modes and spec.mode not in task.modes:
        raise InvalidArgument(
            "mode",
            f"{Mode.Name(spec.mode)} is not fair for task {task.id}",
            f"use one of {', '.join(Mode.Name(mode) for mode in task.modes)}",
        )


async def run_episode(
    stack: "Stack",
    task: pb.Task,
    *,
    pipeline: Pipeline.ValueType,
    mode: Mode.ValueType = MODE_ANY_FIX,
    grader: Grader.ValueType = GRADER_BUILD_GATES_JUDGE,
    actor: Actor | None = None,
    seed: int = 0,
    budget: Budget | None = None,
    settings: Mapping[str, str] | None = None,
    policy_name: str = "",
    knowledge: Knowledge | None = None,
    listener: TurnListener = ignore,
) -> pb.Trajectory:
    """One graded rollout outside any queue; see `Runner.run` for what it raises.

    `settings` are labels as `with_labels` reads them.
    """
    spec = EpisodeSpec(
        pipeline=pipeline,
        mode=mode,
        grader=grader,
        seed=seed,
        group_seed=seed,
        policy_name=policy_name,
        budget=budget or (FULL if pipeline == PIPELINE_FULL else SIMPLIFIED),
    )
    spec = with_labels(spec, settings or {})
    return await Runner(stack, knowledge).run(task, spec, actor, listener=listener)

"""One rollout from a task to a graded Trajectory.

- Both pipelines run the same agent, tools, final validation, judge and reward.
- A trajectory is returned only when it is complete and its token stream proves itself; trouble of
  the platform raises instead, and the sandbox is deleted either way.
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
from regreen.rollout.branch import TOOL_SEED, BranchPoint, branch_point
from regreen.rollout.context import FULL, SIMPLIFIED, Budget, EpisodeSpec, with_labels
from regreen.rollout.facts import FactsCache
from regreen.rollout.full import discard_states, run_full
from regreen.rollout.grade import Validated, conclude
from regreen.rollout.held import discard, held_sandbox
from regreen.rollout.knowledge import Knowledge
from regreen.rollout.past import SHOWN
from regreen.rollout.progress import TurnListener, ignore
from regreen.rollout.reward import RewardSettings
from regreen.rollout.simplified import run_simplified
from regreen.rollout.tools import Workbench
from regreen.rollout.toolset import ToolSet, load_toolset
from regreen.rpc import traces
from regreen.rpc.errors import FailedPrecondition, InvalidArgument, NotFound

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
        branch: BranchPoint | None = None,
    ) -> pb.Trajectory:
        """One graded rollout, or the rest of one; `listener` is told every turn.

        Raises:
            FailedPrecondition: the task is not prepared on this host, or the mode is not fair, or
                the State of the branch has gone.
            RegreenError: trouble of the platform; the rollout must be tried again, never scored.
        """
        check_fair(task, spec)
        if branch is not None:
            await self._check_branch(task, spec, branch)
        trajectory_id = trajectory_id or new_id("trj")
        with traces.span("episode", trajectory_id, task_id=task.id, run_id=spec.run_id):
            state_id = branch.state_id if branch else task.state_id
            labels = {"trajectory": trajectory_id, "task": task.id}
            async with held_sandbox(
                self.stack, state_id, labels, task.environment.egress
            ) as sandbox_id:
                with counting_away() as away:
                    return await self._in_sandbox(
                        task, spec, actor or PolicyActor(), trajectory_id, sandbox_id, listener,
                        lambda: self.clock() - away.seconds, branch,
                    )  # fmt: skip

    async def _in_sandbox(
        self,
        task: pb.Task,
        spec: EpisodeSpec,
        actor: Actor,
        trajectory_id: str,
        sandbox_id: str,
        listener: TurnListener,
        clock: Callable[[], float],
        branch: BranchPoint | None,
    ) -> pb.Trajectory:
        start_ns, started = self.now_ns(), clock()
        facts = await self.facts.get(self.stack, task, sandbox_id)
        bench = Workbench(
            self.stack, task, sandbox_id, facts, spec.mode, spec.budget, self.knowledge, clock,
            stop_early=spec.knobs.stop_early,
        )  # fmt: skip
        agent = Agent(
            self.stack,
            bench,
            actor,
            spec,
            self.tools(spec) if branch is None else self._tools_of(branch),
            trajectory_id,
            started + spec.budget.wall_s,
            clock,
            listener,
            state_id=task.state_id,
        )
        if branch is not None:
            branch.enter(agent)
        pipeline = run_full if spec.pipeline == PIPELINE_FULL else run_simplified
        keeps = False
        try:
            stop = await pipeline(agent, self.knowledge, branch)
            trajectory = _record(agent, stop, branch)
            agent.tell("grade")
            await conclude(bench, spec, trajectory, self.validated, self.rewards)
            agent.tell("grade", "solved" if trajectory.reward.solved else "not solved")
            keeps = spec.knobs.keep_states
        finally:
            if bench.kept_states and not keeps:  # no State can go while the sandbox stands on it
                await discard(self.stack, sandbox_id)
                await discard_states(self.stack, bench.kept_states)
        trajectory.stage_seconds.update(bench.stage_s)
        trajectory.start_time.FromNanoseconds(start_ns)
        trajectory.end_time.FromNanoseconds(max(start_ns, self.now_ns()))
        return trajectory

    def _tools_of(self, branch: BranchPoint) -> ToolSet:
        """The tool set that the prefix of a branch speaks of."""
        seed = branch.tool_seed
        return self.toolset if seed is None else self.toolset.varied(seed)

    async def _check_branch(self, task: pb.Task, spec: EpisodeSpec, branch: BranchPoint) -> None:
        """Refuse a branch that cannot be run; learn the facts of the task's untouched files."""
        if branch.spent >= spec.turns():
            raise InvalidArgument(
                "turn", f"{branch.turn} leaves no turn of {spec.turns()}", "branch earlier"
            )
        try:
            await self.stack.state.get_state(branch.state_id)
            await self.stack.state.get_state(branch.prompt_state_id)
        except NotFound as error:
            raise FailedPrecondition(
                f"the State of turn {branch.turn} of {branch.trajectory_id} has gone ({error}); "
                "run the rollout again with knobs.keep_states=true and keep its States"
            ) from error
        if self.facts.peek(task) is None:
            async with held_sandbox(self.stack, task.state_id, {"task": task.id}) as pristine:
                await self.facts.get(self.stack, task, pristine)


def _record(agent: Agent, stop: Stop, branch: BranchPoint | None) -> pb.Trajectory:
    """What was said and done, before it is graded."""
    labels: dict[str, str] = {"stop": stop, "hint": agent.spec.knobs.hint}
    seed = agent.spec.tool_seed() if branch is None else branch.tool_seed
    if seed is not None:
        labels[TOOL_SEED] = str(seed)
    if agent.bench.shown:
        labels[SHOWN] = ",".join(agent.bench.shown)
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
        labels=labels | (branch.labels() if branch else {}),
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


async def run_branch(
    stack: "Stack",
    task: pb.Task,
    origin: pb.Trajectory,
    turn: int,
    *,
    seed: int = 0,
    actor: Actor | None = None,
    budget: Budget | None = None,
    settings: Mapping[str, str] | None = None,
    policy_name: str = "",
    knowledge: Knowledge | None = None,
    listener: TurnListener = ignore,
) -> pb.Trajectory:
    """A rollout that goes on after a turn of another one, graded like any.

    Raises:
        InvalidArgument: nothing can follow that turn.
        FailedPrecondition: the files of that turn were not kept, or have gone.
    """
    branch = branch_point(origin, turn)
    if (origin.task_id, origin.state_id) != (task.id, task.state_id):
        raise FailedPrecondition(
            f"{origin.id} ran on State {origin.state_id} of task {origin.task_id}, which is "
            f"not the State of {task.id} now ({task.state_id or 'none'}); run it again"
        )
    full = origin.pipeline == PIPELINE_FULL
    spec = EpisodeSpec(
        pipeline=origin.pipeline,
        mode=origin.mode,
        grader=origin.grader,
        seed=seed,
        group_seed=seed,
        policy_name=policy_name,
        budget=budget or (FULL if full else SIMPLIFIED),
    )
    spec = with_labels(spec, {"knobs.hint": branch.hint, **(settings or {})})
    runner = Runner(stack, knowledge)
    return await runner.run(task, spec, actor, listener=listener, branch=branch)

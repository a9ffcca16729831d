"""The full pipeline: an outer loop over errors and candidate fixes (arXiv 2510.22075, 1.2).

- One primary error at a time. A validation with a *new* primary error keeps the work: the sandbox
  is frozen as a State, the context is reset. The same error reverts to the last kept State and
  tries the next candidate; at most `tries` attempts per error.
- An error seen earlier in the episode never counts as new, so that the loop cannot go in circles.
- Tool calls and wall time are bounded over the whole episode, not per attempt.
- The States that an episode makes live as long as it does, unless `knobs.keep_states` is set; turns
  still name them afterwards.
"""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import structlog

from regreen.dataset import v1 as pb
from regreen.policy.v1 import ChatMessage
from regreen.rollout.agent import Agent, Stop
from regreen.rollout.branch import BranchPoint
from regreen.rollout.context import EpisodeSpec
from regreen.rollout.dependencies import ToolError
from regreen.rollout.facts import Facts
from regreen.rollout.knowledge import Hit, Knowledge
from regreen.rollout.logs import PrimaryError
from regreen.rollout.prompts import Room, first_messages
from regreen.rollout.simplified import hint_for
from regreen.rollout.tools import Observation, describe
from regreen.rollout.toolset import ToolSet
from regreen.rpc.errors import RegreenError

if TYPE_CHECKING:
    from regreen.client.stack import Stack

log = structlog.get_logger(__name__)


async def run_full(
    agent: Agent, knowledge: Knowledge | None, branch: BranchPoint | None = None
) -> Stop:
    """Repair error after error until green, or until a limit; a branch is in the first attempt."""
    bench = agent.bench
    kept = bench.task.state_id
    error, error_log = bench.facts.error, bench.facts.log
    known = {error.signature if error else ""}
    resumed = branch is not None
    if branch is not None:
        kept = branch.prompt_state_id
        if kept != bench.task.state_id:
            error, error_log = await _standing_error(agent, branch)
        agent.error = error
    while True:
        known.add(error.signature if error else "")
        begin = partial(_begin, agent, error, error_log)
        stop, found = await _repair(
            agent, begin, _candidates(agent, error, knowledge), known, kept, resumed=resumed
        )
        resumed = False
        if found is None or found.validation is None:
            return stop
        kept = agent.state_id = await bench.keep_state(agent.trajectory_id)
        agent.stream.turns[-1].state_id = kept
        error, error_log = found.error, found.validation.log


async def discard_states(stack: "Stack", ids: Sequence[str]) -> None:
    """Delete States that nothing needs any more, the latest first; what fails is logged."""
    for id in reversed(ids):
        try:
            await stack.state.delete_state(id)
        except RegreenError as error:
            log.warning("state not deleted", state_id=id, error=str(error))


def _candidates(
    agent: Agent, error: PrimaryError | None, knowledge: Knowledge | None
) -> Sequence[Hit]:
    if error is None or knowledge is None:
        return ()
    return _ranked(agent.bench.task, agent.bench.facts, agent.spec, error, knowledge)


def _ranked(
    task: pb.Task, facts: Facts, spec: EpisodeSpec, error: PrimaryError, knowledge: Knowledge
) -> Sequence[Hit]:
    return knowledge.candidates(error, facts, task=task, mode=spec.mode, limit=spec.budget.tries)


async def _repair(
    agent: Agent,
    begin: Callable[[str, int], Awaitable[None]],
    candidates: Sequence[Hit],
    known: set[str],
    kept: str,
    *,
    resumed: bool = False,
) -> tuple[Stop, Observation | None]:
    """Attempts on one error; what showed the new error that took its place, or why it ended.

    With `resumed` the first attempt has begun already: its turns count.
    """
    budget = agent.spec.budget
    stop: Stop = "turn-limit"
    for attempt in range(budget.tries):
        left = agent.spec.turns() - agent.turns
        if left <= 0:
            return "turn-limit", None
        hint = candidates[attempt].advice if attempt < len(candidates) else ""
        begun = resumed and not attempt
        used = agent.resumed_turns if begun else 0
        if not begun:
            await begin(hint, attempt)
        stop = await agent.run(
            min(left, budget.attempt_turns - used), lambda seen: _is_new_error(seen, known)
        )
        if stop in ("passed", "gave-up", "time-limit"):
            return stop, None
        seen = agent.history[-1][1] if stop == "changed" else await _look(agent)
        if seen.ending == "passed":
            return "passed", None
        if _is_new_error(seen, known):
            return "changed", seen
        await agent.stack.sandbox.restore_sandbox(agent.bench.sandbox_id, kept)
        agent.state_id = kept
    return stop, None


def _is_new_error(seen: Observation, known: set[str]) -> bool:
    """Whether a validation failed with a primary error that was not met before."""
    if seen.validation is None or seen.error is None:
        return False
    return seen.error.signature not in known


def first_opening(
    task: pb.Task, facts: Facts, spec: EpisodeSpec, tools: ToolSet, knowledge: Knowledge | None
) -> Sequence[ChatMessage]:
    """The first prompt of an episode; the same for every member of a group."""
    hits: Sequence[Hit] = ()
    if facts.error is not None and knowledge is not None:
        hits = _ranked(task, facts, spec, facts.error, knowledge)
    hint = hits[0].advice if hits else _privileged(task, facts, spec)
    return first_messages(
        facts,
        tools,
        mode=spec.mode,
        error=facts.error,
        hint=hint,
        room=Room.of(spec.budget.prompt_chars),
        versions=facts.lock.pins,
    )


def _privileged(task: pb.Task, facts: Facts, spec: EpisodeSpec) -> str:
    return hint_for(task, facts, spec, None) if spec.knobs.hint == "fix" else ""


async def _begin(
    agent: Agent, error: PrimaryError | None, error_log: str, hint: str, attempt: int
) -> None:
    bench = agent.bench
    hint = hint or _privileged(bench.task, bench.facts, agent.spec)
    try:
        versions = (await bench.dependencies.lock()).pins
    except ToolError:
        versions = bench.facts.lock.pins
    note = f"Attempt {attempt + 1} of {agent.spec.budget.tries}." if attempt else ""
    messages = first_messages(
        bench.facts,
        agent.tools,
        mode=agent.spec.mode,
        error=error,
        hint=hint,
        attempt=note,
        room=Room.of(agent.spec.budget.prompt_chars),
        versions=versions,
        log=error_log,
    )
    await agent.begin(messages, error)


async def _standing_error(agent: Agent, branch: BranchPoint) -> tuple[PrimaryError | None, str]:
    """The error that a branch is in the middle of repairing, and its log."""
    sandbox, sandbox_id = agent.stack.sandbox, agent.bench.sandbox_id
    await sandbox.restore_sandbox(sandbox_id, branch.prompt_state_id)
    found = await _look(agent)
    await sandbox.restore_sandbox(sandbox_id, branch.state_id)
    return found.error, found.validation.log if found.validation is not None else ""


async def _look(agent: Agent) -> Observation:
    """What the work of an attempt that ended without a new error amounts to."""
    agent.tell("validate_and_build")
    try:
        changes, _ = await agent.bench.diff()
        seen = describe(await agent.bench.validate(changes), agent.bench.facts)
    except ToolError as error:
        seen = Observation(str(error), ok=False)
    agent.tell("validate_and_build", seen.headline)
    return seen

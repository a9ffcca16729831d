"""The simplified pipeline: one cached starting error, one context, no outer loop.

- Done when `validate_and_build` passes; everything else is a limit or an honest exit.
- The prompt of a group's members is the same, because nothing in it depends on the member.
"""

from typing import TYPE_CHECKING

from regreen.common.v1 import MODE_KEEP_NEW
from regreen.dataset import v1 as pb
from regreen.policy.v1 import ChatMessage
from regreen.rollout.agent import Agent, Stop
from regreen.rollout.context import EpisodeSpec
from regreen.rollout.facts import Facts
from regreen.rollout.knowledge import Knowledge, reference_moves
from regreen.rollout.prompts import Room, first_messages
from regreen.rollout.toolset import ToolSet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regreen.rollout.branch import BranchPoint


async def run_simplified(
    agent: Agent, knowledge: Knowledge | None, branch: "BranchPoint | None" = None
) -> Stop:
    """Repair one error in one context; a branch has begun it already."""
    facts = agent.bench.facts
    if branch is not None:
        agent.error = facts.error
        return await agent.run(agent.spec.turns() - agent.turns)
    messages = opening(agent.bench.task, facts, agent.spec, agent.tools, knowledge)
    await agent.begin(messages, facts.error)
    return await agent.run(agent.spec.turns())


def opening(
    task: pb.Task, facts: Facts, spec: EpisodeSpec, tools: ToolSet, knowledge: Knowledge | None
) -> "Sequence[ChatMessage]":
    """The first prompt of an episode; the same for every member of a group."""
    hint = hint_for(task, facts, spec, knowledge)
    room = Room.of(spec.budget.prompt_chars)
    return first_messages(facts, tools, mode=spec.mode, hint=hint, room=room)


def hint_for(task: pb.Task, facts: Facts, spec: EpisodeSpec, knowledge: Knowledge | None) -> str:
    """The candidate fix shown with the error, as the hint knob says."""
    if spec.knobs.hint == "past" and knowledge is not None and facts.error is not None:
        hits = knowledge.candidates(facts.error, facts, task=task, mode=spec.mode, limit=1)
        return hits[0].advice if hits else ""
    if spec.knobs.hint == "fix":
        return _reference_hint(task, spec)
    return ""


def _reference_hint(task: pb.Task, spec: EpisodeSpec) -> str:
    """Privileged: what the reference fix does. A difficulty knob, off by default."""
    fix = next((fix for fix in task.fixes if fix.mode == spec.mode), None)
    if fix is None:
        return ""
    moves = [m for m in reference_moves(task, fix) if m.before and m.after]
    moves.sort(key=lambda move: move.name != task.culprit)
    if moves and spec.mode != MODE_KEEP_NEW:
        return "recommended fix: " + ", ".join(f"{m.name} to {m.after}" for m in moves[:3])
    paths = sorted(change.path for change in fix.changes)
    return "recommended fix: edit " + ", ".join(paths[:3]) if paths else ""

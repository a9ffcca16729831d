"""Branching a rollout: the same tokens and the same files up to a turn, and new samples from there.

- The prefix is the context of that turn, bit by bit: token ids are copied, nothing is rendered,
  tokenized or executed again. It carries no loss; what is sampled anew does.
- The files are those of the State that the turn recorded, so a branch needs a rollout that kept its
  States (`knobs.keep_states`); only at the very beginning the task's own State is enough.
- A branch goes on under the limits of the whole rollout: turns of the prefix count. Errors met in
  earlier contexts are not recorded, so the full pipeline may take one of them for new again.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regreen.dataset import v1 as pb
from regreen.rpc.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from regreen.rollout.agent import Agent

TOOL_SEED = "tool_seed"
"""Label of a trajectory whose tools were varied: the seed that varied them."""
_CHANGING = ("run_sh", "write_file", "dependency_upgrade", "remove_dependency", "upgrade_gradle")
_REMEDY = "run it with States kept: `regreen rollout run --keep-states`, or knobs.keep_states=true"


@dataclass(frozen=True, slots=True)
class BranchPoint:
    """A turn of a trajectory to go on from."""

    trajectory_id: str
    turn: int
    state_id: str
    """Files after the turn."""
    prompt_state_id: str
    """Files when the context began; the full pipeline reverts to them."""
    token_ids: tuple[int, ...]
    """The context, to the end of the turn."""
    turns: tuple[pb.Turn, ...]
    """The turns of the context, from its prompt on."""
    tool_seed: int | None
    """Seed of the tool set's variation."""
    hint: str
    spent: int
    """Outputs of the whole rollout up to the turn."""
    commands: tuple[str, ...]
    """What the rollout had done by then, for the judge."""

    @property
    def outputs(self) -> int:
        """What the policy said in the context of the prefix."""
        return sum(turn.role == pb.TURN_ROLE_POLICY for turn in self.turns)

    def labels(self) -> dict[str, str]:
        """Where a branch comes from, for its own record."""
        return {"branch_of": self.trajectory_id, "branch_turn": str(self.turn)}

    def enter(self, agent: "Agent") -> None:
        """Put a fresh agent where the turn left off."""
        agent.stream.add_prefix(self.token_ids, self.turns)
        agent.turns, agent.resumed_turns = self.spent, self.outputs
        agent.bench.commands[:0] = self.commands
        agent.state_id = self.state_id


def branch_point(origin: pb.Trajectory, turn: int) -> BranchPoint:
    """The place after a turn of a trajectory.

    Raises:
        InvalidArgument: there is no such turn, or nothing can follow it.
        FailedPrecondition: its files were not kept, or its tokens are not exact.
    """
    if not 0 <= turn < len(origin.turns):
        raise InvalidArgument(
            "turn", f"{turn} is none of {origin.id}", f"give 0 to {len(origin.turns) - 1}"
        )
    if not origin.token_exact:
        raise FailedPrecondition(f"the tokens of {origin.id} are not exact; it cannot be continued")
    chosen = origin.turns[turn]
    if chosen.role == pb.TURN_ROLE_POLICY:
        raise InvalidArgument(
            "turn",
            f"{turn} is what the policy said",
            f"branch after {turn - 1} to say it again, or after its result, {turn + 1}",
        )
    if chosen.token_end == chosen.token_start:
        raise InvalidArgument("turn", f"{turn} ended the rollout", "branch at an earlier turn")
    start = max(t.index for t in origin.turns[: turn + 1] if t.role == pb.TURN_ROLE_PROMPT)
    turns = tuple(origin.turns[start : turn + 1])
    tokens = tuple(origin.token_ids[turns[0].token_start : chosen.token_end])
    seed = origin.labels.get(TOOL_SEED, "")
    return BranchPoint(
        origin.id,
        turn,
        _state_at(origin, turn),
        _state_at(origin, start),
        tokens,
        turns,
        int(seed) if seed else None,
        origin.labels.get("hint", "none"),
        sum(t.role == pb.TURN_ROLE_POLICY for t in origin.turns[: turn + 1]),
        tuple(filter(None, map(_command, origin.turns[: turn + 1]))),
    )


def _command(turn: pb.Turn) -> str:
    """What an output changed or ran, as the judge is told; empty where nothing."""
    if turn.role != pb.TURN_ROLE_POLICY or turn.tool not in _CHANGING or not turn.ok:
        return ""
    arguments = json.loads(turn.arguments_json or "{}")
    if turn.tool == "run_sh":
        return str(arguments.get("cmd", ""))
    if turn.tool == "write_file":
        return f"write_file {arguments.get('path', '')}"
    return " ".join([turn.tool, *map(str, arguments.values())])


def _state_at(origin: pb.Trajectory, turn: int) -> str:
    """The State with the files after a turn.

    Raises:
        FailedPrecondition: none was recorded.
    """
    recorded = origin.turns[turn].state_id
    if recorded:
        return recorded
    if _untouched(origin.turns[: turn + 1]) and origin.state_id:
        return origin.state_id
    raise FailedPrecondition(f"trajectory {origin.id} has no State at turn {turn}; {_REMEDY}")


def _untouched(turns: Sequence[pb.Turn]) -> bool:
    """Whether nothing has happened yet but the first prompt."""
    return len(turns) == 1

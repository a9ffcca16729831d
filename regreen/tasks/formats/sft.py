"""Chats for fine-tuning, of solved rollouts without a flagged hack.

- A row has `messages` as chat templates take them: tool calls as calls, results under the role
  `tool`; `text` style keeps the model's text as it was, calls and all.
- What is left out is counted by reason: a control, a hack, not solved, nothing said, a baseline's
  script.
- Token ids are those that were sampled, with their loss mask, and only of exact rollouts.
- It is written, never read: a chat is no task.
"""

import os
from collections.abc import AsyncIterable
from pathlib import Path
from typing import Any

from regreen.dataset import v1 as pb
from regreen.tasks.formats.items import Written, compact

FILE = "sft.jsonl"
STYLES = ("tools", "text")

Message = dict[str, Any]


def row(trajectory: pb.Trajectory, *, style: str = "tools", tokens: bool = False) -> dict[str, Any]:
    """A trajectory as one chat."""
    document: dict[str, Any] = {
        "id": trajectory.id,
        "task_id": trajectory.task_id,
        "actor": trajectory.actor,
        "policy": trajectory.policy,
        "messages": messages(trajectory, style),
    }
    if tokens and trajectory.token_exact:
        document["token_ids"] = list(trajectory.token_ids)
        document["loss_mask"] = list(trajectory.loss_mask)
    return document


def messages(trajectory: pb.Trajectory, style: str = "tools") -> list[Message]:
    """The turns as chat messages."""
    found: list[Message] = []
    for turn in trajectory.turns:
        if turn.role == pb.TURN_ROLE_POLICY:
            found.append(_said(turn, style))
        elif turn.role == pb.TURN_ROLE_TOOL:
            found.append(_answered(turn, found, style))
        elif turn.role == pb.TURN_ROLE_PROMPT:
            found.append({"role": "user", "content": turn.text})
    return found


def _said(turn: pb.Turn, style: str) -> Message:
    if style == "text" or not (turn.tool and turn.ok):
        return {"role": "assistant", "content": turn.text}
    function = {"name": turn.tool, "arguments": turn.arguments_json or "{}"}
    return {
        "role": "assistant",
        "content": turn.text.partition("<tool>")[0].strip(),
        "tool_calls": [{"id": f"call_{turn.index}", "type": "function", "function": function}],
    }


def _answered(turn: pb.Turn, before: list[Message], style: str) -> Message:
    calls = before[-1].get("tool_calls") if before else None
    if style == "text" or not calls:
        return {"role": "user", "content": turn.text}
    return {"role": "tool", "tool_call_id": calls[0]["id"], "content": turn.text}


def left_out(trajectory: pb.Trajectory) -> str:
    """Why a trajectory is nothing to learn from; empty: it is."""
    if trajectory.labels.get("control") == "true":
        return "of a control"
    if trajectory.reward.hacks:
        return "flagged as a hack"
    if not trajectory.reward.solved:
        return "not solved"
    if trajectory.actor.startswith("baseline:"):
        return "a baseline's script"
    if not any(turn.role == pb.TURN_ROLE_POLICY for turn in trajectory.turns):
        return "nothing was said"
    return ""


async def write(
    trajectories: AsyncIterable[pb.Trajectory],
    out: Path,
    *,
    style: str = "tools",
    tokens: bool = False,
) -> Written:
    """Write what may be learned from; `left_out` counts the others by reason."""
    written = Written()
    counts: dict[str, int] = {}
    path = out / FILE
    partial = out / f".{FILE}.{os.getpid()}"
    try:
        with partial.open("w", encoding="utf-8") as target:
            async for trajectory in trajectories:
                if reason := left_out(trajectory):
                    counts[reason] = counts.get(reason, 0) + 1
                    continue
                target.write(compact(row(trajectory, style=style, tokens=tokens)) + "\n")
                written.count += 1
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    written.left_out = {reason: str(count) for reason, count in sorted(counts.items())}
    written.paths = [path]
    return written

"""Scripted baselines: actors over the same loop, tools, limits and grading as the policy.

- `noop` changes nothing; its success rate is the rate of broken gates and flaky tasks.
- `newest` moves everything to the newest version on offer.
- `previous` moves the first package to look at a series down, again and again: the repair that
  the prompt alone suggests, and what a learned policy has to beat.
- `pin-back` undoes every move since the last green build: what moved is read from the task's
  record, which no policy sees. It bounds what dependency actions alone can do.
- Nothing else is read of the task; a pin that the mode holds is learned from the refusal.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from regreen.dataset import v1 as pb
from regreen.lockfile import Lock, format_lock, normalize
from regreen.rollout.actors import ScriptedActor, View
from regreen.rollout.facts import Facts
from regreen.rpc.errors import InvalidArgument

TOLD: Mapping[str, str] = {
    "noop": "nothing",
    "newest": "only what the policy can see",
    "previous": "only what the policy can see",
    "pin-back": "what moved (it reads the task's record)",
}
"""What each baseline is told of a task."""
NAMES = tuple(TOLD)

_Step = tuple[str, Mapping[str, str]]
"""A tool and its arguments, by key."""
_VALIDATE: _Step = ("validate_and_build", {})
_GIVE_UP: _Step = ("give_up", {"reason": "the script ends"})
_REFUSED = re.compile(r"\(rejected\)\n([\w.-]+) must stay at (\S+)")


def baseline(name: str, task: pb.Task) -> ScriptedActor:
    """The actor of a baseline; `actor.name` is `baseline:<name>`.

    Raises:
        InvalidArgument: no such baseline.
    """
    edits: Mapping[str, Callable[[View], _Step | None]] = {
        "noop": lambda view: None,
        "newest": _Rewrite(_newest),
        "previous": lambda view: ("dependency_upgrade", {"version": "previous"}),
        "pin-back": _Rewrite(lambda facts: _pinned_back(facts, task)),
    }
    check_baseline(name)
    return ScriptedActor(f"baseline:{name}", _Script(edits[name]))


def check_baseline(name: str) -> None:
    """Refuse a name that `baseline` does not know; raises as it does."""
    if name not in NAMES:
        raise InvalidArgument("baseline", f"{name!r} is unknown", f"use one of {', '.join(NAMES)}")


@dataclass(frozen=True, slots=True)
class _Script:
    """Edit and validate by turns until nothing moves; keeps nothing between episodes."""

    edit: Callable[[View], _Step | None]

    async def __call__(self, view: View) -> str:
        return view.tools.render_call(*self._next(view))

    def _next(self, view: View) -> _Step:
        call, seen = view.history[-1] if view.history else (None, None)
        if seen is not None and not seen.ok:
            return _GIVE_UP
        if call is not None and call.key != "validate_and_build":
            return _VALIDATE
        return self.edit(view) or (_GIVE_UP if view.turn else _VALIDATE)


@dataclass(frozen=True, slots=True)
class _Rewrite:
    """Write the whole lock once, and again with the pin that validation said must stay."""

    wanted: Callable[[Facts], Lock]

    def __call__(self, view: View) -> _Step | None:
        refused = _REFUSED.search(view.history[-1][1].text) if view.history else None
        if view.turn and refused is None:
            return None
        lock = self.wanted(view.facts)
        if refused is not None:
            lock = lock.with_pin(refused[1], refused[2])
        return "write_file", {"path": "requirements.lock", "content": format_lock(lock)}


def _newest(facts: Facts) -> Lock:
    lock = facts.lock
    for name, offered in facts.offered.items():
        if offered:
            lock = lock.with_pin(name, offered[-1])
    return lock


def _pinned_back(facts: Facts, task: pb.Task) -> Lock:
    lock = facts.lock
    for name, (before, _) in moves_of(task).items():
        lock = lock.with_pin(name, before) if before else lock.without(name)
    return lock


def moves_of(task: pb.Task) -> dict[str, tuple[str, str]]:
    """`task.moved` as (before, after) by normalised name; an empty text means absent."""
    moves: dict[str, tuple[str, str]] = {}
    for name, text in task.moved.items():
        before, _, after = text.partition(" ")
        moves[normalize(name)] = (
            "" if before in ("None", "-", "") else before,
            "" if after in ("None", "-") else after,
        )
    return moves

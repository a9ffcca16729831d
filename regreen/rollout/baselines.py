"""Scripted baselines: actors over the same loop, tools and grading as the policy.

- `noop` changes nothing; its success rate is the rate of broken gates and flaky tasks.
- `newest` moves everything to the newest version on offer; it uses visible facts alone.
- `pin-back` undoes every move since the last green build; it reads `task.moved`, which no policy
  sees, and is an upper bound of what dependency actions alone can do.
- Pins that the mode holds are left where they are: moving one would only be refused.
"""

from collections.abc import Callable
from dataclasses import dataclass

from regreen.common.v1 import MODE_KEEP_NEW
from regreen.dataset import v1 as pb
from regreen.lockfile import Lock, format_lock, normalize
from regreen.rollout.actors import ScriptedActor, View
from regreen.rpc.errors import InvalidArgument

NAMES = ("noop", "pin-back", "newest")


def baseline(name: str, task: pb.Task) -> ScriptedActor:
    """The actor of a baseline; `actor.name` is `baseline:<name>`.

    Raises:
        InvalidArgument: no such baseline.
    """
    if name == "noop":
        edit: Callable[[View], Lock | None] = _nothing
    elif name == "newest":
        edit = _Newest(task)
    elif name == "pin-back":
        edit = _PinBack(task)
    else:
        raise InvalidArgument("baseline", f"{name!r} is unknown", f"use one of {', '.join(NAMES)}")
    return ScriptedActor(f"baseline:{name}", _Script(edit))


@dataclass(frozen=True, slots=True)
class _Script:
    """Write the lock once, validate once, give up; keeps nothing between episodes."""

    edit: Callable[[View], Lock | None]

    async def __call__(self, view: View) -> str:
        steps: list[str] = []
        lock = self.edit(view)
        if lock is not None:
            content = {"path": "requirements.lock", "content": format_lock(lock)}
            steps.append(view.tools.render_call("write_file", content))
        steps.append(view.tools.render_call("validate_and_build", {}))
        steps.append(view.tools.render_call("give_up", {"reason": "the script ends"}))
        return steps[min(view.turn, len(steps) - 1)]


def _nothing(view: View) -> Lock | None:
    return None


@dataclass(frozen=True, slots=True)
class _Newest:
    task: pb.Task

    def __call__(self, view: View) -> Lock | None:
        lock, held = view.facts.lock, _held(self.task, view)
        for name, offered in view.facts.offered.items():
            if offered and name not in held:
                lock = lock.with_pin(name, offered[-1])
        return lock


@dataclass(frozen=True, slots=True)
class _PinBack:
    task: pb.Task

    def __call__(self, view: View) -> Lock | None:
        lock, held = view.facts.lock, _held(self.task, view)
        for name, (before, _) in moves_of(self.task).items():
            if name not in held:
                lock = lock.with_pin(name, before) if before else lock.without(name)
        return lock


def _held(task: pb.Task, view: View) -> frozenset[str]:
    """Names of the packages that the episode's mode holds."""
    holds = view.spec.mode == MODE_KEEP_NEW and task.culprit
    return frozenset({normalize(task.culprit)} if holds else ())


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

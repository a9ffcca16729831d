"""Experts: scripted repairs whose every action follows from what is visible.

- The expert drives the real loop: same prompt, tools, validation and grading as the policy; only
  solved, accepted rollouts without findings are kept.
- A style may slip once on the way: it makes a mistake that policies make and recovers from what the
  tool says. The slip stands in the context without loss, so that only the recovery is learned.
- Which package to act on is told by the error at hand (`Facts.suspects`); the reference fix only
  chooses among what the error names, and to which version. Steps that no visible fact suggests are
  counted in the label `guesses`, so that training data can leave them out.
- Tokens come from the policy's own tokenizer, logprobs are 0, the actor is `expert`.
"""

import difflib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from packaging.version import InvalidVersion, Version

from regreen.common.v1 import MODE_KEEP_NEW
from regreen.dataset import v1 as pb
from regreen.lockfile import normalize
from regreen.rollout.actors import ScriptedActor, Slip, View
from regreen.rollout.context import EpisodeSpec
from regreen.rollout.dependencies import choices
from regreen.rollout.episode import Runner
from regreen.rollout.facts import REPO
from regreen.rollout.held import held_sandbox
from regreen.rollout.knowledge import LOCK_NAME, Move, reference_moves
from regreen.rollout.logs import PrimaryError
from regreen.rpc.errors import InvalidArgument, NoSuchFile

if TYPE_CHECKING:
    from regreen.client.stack import Stack

_MOVED = re.compile(r"([\w.-]+) \S+ -> ([^\s,;]+)")
_MOST_EDIT_CHARS = 1500


@dataclass(frozen=True, slots=True)
class Style:
    """One way of doing the same repair; several per task enrich supervised data.

    A version is only ever named after something visible named it: a listing, advice, the installed
    version (`<3` below 3.1.9), or the keyword `previous`.
    """

    step: bool = False
    """Go down series by series until the build is green."""
    help_first: bool = False
    """Search past fixes first."""
    keyword: bool = False
    """Say `previous` where that is what is meant."""
    implicit: bool = False
    """Leave out the name of the package that is the first to look at."""
    look_first: bool = False
    """Look at the failing file first."""
    slip: Literal["", "name", "version", "again"] = ""
    """Name no package, ask for a version that is not on offer, or ask again for what was done."""


STYLES: tuple[Style, ...] = (
    Style(step=True, keyword=True, implicit=True),
    Style(step=True, keyword=True, implicit=True, slip="name"),
    Style(slip="version"),
    Style(step=True, keyword=True),
    Style(step=True),
    Style(step=True, slip="again"),
    Style(),
    Style(keyword=True),
    Style(look_first=True),
    Style(help_first=True),
)


@dataclass(frozen=True, slots=True)
class LineEdit:
    """One change of neighbouring lines."""

    path: str
    line: int
    """First line that it touches, from 1, in the file as the State has it."""
    command: str
    """The `sed` command that makes it; later lines come first in a list of edits."""


@dataclass(slots=True)
class Expert:
    """The script: act on what the error names, validate, look at the next error."""

    style: Style
    moves: Mapping[str, Move]
    edits: Sequence["LineEdit"] = ()
    """What makes the reference source edit."""
    queue: list[str] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    now: dict[str, str] = field(default_factory=dict)
    guesses: int = 0
    started: bool = False
    edited: bool = False
    slipped: bool = False
    asked: dict[str, str] = field(default_factory=dict)
    """The version last asked for, by package."""

    async def __call__(self, view: View) -> str:
        if not self.started:
            self.started = True
            self.now = dict(view.facts.lock.pins)
            self._prelude(view)
        for _, seen in view.history[-1:]:
            for name, version in _MOVED.findall(seen.text):
                self.now[normalize(name)] = version
        if not self.queue:
            self._plan(view)
        return self.queue.pop(0)

    def _prelude(self, view: View) -> None:
        error = view.error
        if self.style.help_first and error is not None:
            self._say(view, "ask_for_help", {"question": error.text[:120]})
        frame = error.frame if error else None
        if self.style.look_first and frame is not None and frame.place in ("source", "tests"):
            start = max(1, frame.line - 2)
            path = frame.file.removeprefix(REPO + "/")
            self._say(view, "read_file", {"path": path, "start": start})

    def _plan(self, view: View) -> None:
        """Fill the queue with the next action and a validation."""
        if self.edits and not self.edited:
            self.edited = True
            for edit in self.edits:  # nobody edits lines that they have not seen
                self._say(view, "read_file", {"path": edit.path, "start": edit.line})
            for edit in self.edits:
                self._say(view, "run_sh", {"cmd": edit.command})
            self._say(view, "validate_and_build", {})
            return
        name = self._next(view)
        if name is None:
            self._say(view, "give_up", {"reason": "no version on offer repairs this"})
            return
        target = self.moves[name].after
        version = self._wording(view, name, target)
        if version == "":
            self.done.add(name)
            self._plan(view)
            return
        mistake = None if self.slipped else self._mistake(view, name)
        if mistake is not None:
            self.slipped = True
            self.queue.append(Slip(view.tools.render_call("dependency_upgrade", mistake)))
            return
        if version is None:
            self._say(view, "dependency_upgrade", {"name": name})
        if not self.style.step:
            self.done.add(name)
        self.asked[name] = version or target
        first = next(iter(view.facts.to_look_at(_latest(view))), "")
        named = {} if self.style.implicit and name == first else {"name": name}
        self._say(view, "dependency_upgrade", {**named, "version": version or target})
        self._say(view, "validate_and_build", {})

    def _wording(self, view: View, name: str, target: str) -> str | None:
        """How to name the version; None to list first, empty when there is nothing to go to."""
        if self.style.step:
            older = _below(self.now.get(name, ""), view.facts.offered.get(name, ()))
            return "previous" if older and self.style.keyword else older
        if self._is_previous(view, name, target):
            return "previous"
        told = any(_names(seen.text, name, target) for _, seen in view.history)
        return target if told else None

    def _mistake(self, view: View, name: str) -> Mapping[str, str] | None:
        """Arguments of the style's slip; None where it cannot happen (yet)."""
        offered = view.facts.offered
        if self.style.slip == "name":
            word = view.error.imported[1] if view.error else ""
            return None if not word or normalize(word) in offered else {"name": word}
        if self.style.slip == "version":
            made_up = _unoffered(self.now.get(name, ""), offered.get(name, ()))
            return {"name": name, "version": made_up} if made_up else None
        if self.style.slip == "again" and name in self.asked:
            return {"name": name, "version": self.asked[name]}
        return None

    def _next(self, view: View) -> str | None:
        """The package to move: what the error names, else what the project declares, else any."""
        error = _latest(view)
        open_moves = [n for n, m in self.moves.items() if n not in self.done and self._due(m)]
        for name in (*view.facts.suspects(error), *view.facts.to_look_at(error)):
            if name in open_moves:
                return name
        self.guesses += 1
        for name in view.facts.direct:
            if name in open_moves:
                return name
        return open_moves[0] if open_moves else None

    def _due(self, move: Move) -> bool:
        # Packages that only came along with others leave by themselves.
        now = self.now.get(move.name, "")
        if not move.after or not now:
            return False
        return _newer(now, move.after) if self.style.step else now != move.after

    def _is_previous(self, view: View, name: str, target: str) -> bool:
        offered, now = view.facts.offered.get(name, ()), self.now.get(name, "")
        if not self.style.keyword or not _below(now, offered):
            return False
        return choices(name, "previous", now, offered)[0] == target

    def _say(self, view: View, key: str, arguments: Mapping[str, object]) -> None:
        self.queue.append(view.tools.render_call(key, arguments))


async def expert_trajectories(
    runner: Runner, task: pb.Task, spec: EpisodeSpec, styles: Sequence[Style] = STYLES
) -> list[pb.Trajectory]:
    """Solved, clean expert rollouts of a task in several styles; distinct, may be none.

    Raises:
        RegreenError: trouble of the platform.
    """
    fix = next((f for f in task.fixes if f.mode == spec.mode), None)
    if fix is None:
        return []
    moves = {move.name: move for move in reference_moves(task, fix)}
    edits: Sequence[LineEdit] = ()
    if spec.mode == MODE_KEEP_NEW or not moves:
        edits = await _edits(runner.stack, task, fix)
        if not edits and not moves:
            return []
    kept: list[pb.Trajectory] = []
    seen: set[tuple[str, ...]] = set()
    for index, style in enumerate(styles):
        expert = Expert(style, moves, edits)
        one = replace(spec, seed=spec.seed + index, group_index=index)
        found = await runner.run(task, one, ScriptedActor("expert", expert))
        turns = [turn for turn in found.turns if turn.role == pb.TURN_ROLE_POLICY]
        said = tuple(turn.text for turn in turns)
        longest = max((turn.token_end - turn.token_start for turn in turns), default=0)
        if longest > spec.budget.turn_tokens:
            break  # no policy could say that within its limits
        if found.reward.solved and not found.reward.hacks and said not in seen:
            seen.add(said)
            found.labels["guesses"] = str(expert.guesses)
            kept.append(found)
        elif not found.reward.solved and not style.step:
            break  # other wordings of the reference repair fail alike
    return kept


def _newer(left: str, right: str) -> bool:
    try:
        return Version(left) > Version(right)
    except InvalidVersion:
        return left != right


def _names(text: str, name: str, version: str) -> bool:
    """Whether an observation named that version of the package, as advice or in a listing."""
    listed = re.search(rf"{re.escape(name)}: installed .*; on offer: (.*)", text)
    return f"{name} to {version}" in text or bool(listed and version in listed[1].split())


def _unoffered(now: str, offered: Sequence[str]) -> str:
    """A release just below the installed one that is not on offer; empty where none is near."""
    if not now or not offered:
        return ""
    major = Version(now).major
    guesses = (f"{major}.0", f"{max(0, major - 1)}.0", f"{max(0, major - 1)}.9")
    taken = {Version(version) for version in offered}
    return next((g for g in guesses if Version(g) not in taken and _newer(now, g)), "")


def _below(now: str, offered: Sequence[str]) -> str:
    """A request for something older, told from the installed version alone; empty if none is."""
    older = [version for version in offered if now and _newer(now, version)]
    if not older:
        return ""
    major = Version(now).major
    return f"<{major}" if any(Version(v).major < major for v in older) else "previous"


def _latest(view: View) -> PrimaryError | None:
    for _, seen in reversed(view.history):
        if seen.validation is not None:
            return seen.error or view.error
    return view.error


async def _edits(stack: "Stack", task: pb.Task, fix: pb.ReferenceFix) -> Sequence[LineEdit]:
    """The source edit as short `sed` commands; empty when it is not small enough for that."""
    async with held_sandbox(stack, task.state_id, {"task": task.id}) as sandbox_id:
        edits = await _edits_in(stack, fix, sandbox_id)
    return edits if sum(len(edit.command) for edit in edits) <= _MOST_EDIT_CHARS else ()


async def _edits_in(stack: "Stack", fix: pb.ReferenceFix, sandbox_id: str) -> Sequence[LineEdit]:
    edits: list[LineEdit] = []
    for change in fix.changes:
        if change.path == LOCK_NAME:
            continue
        try:
            before = await stack.sandbox.read_file(sandbox_id, f"{REPO}/{change.path}")
        except (NoSuchFile, InvalidArgument):
            return ()
        found = line_edits(before.content, change.content, change.path)
        if found is None:
            return ()
        edits += found
    return edits


def line_edits(before: bytes, after: bytes, path: str) -> list[LineEdit] | None:
    """`sed` commands, last line first, that turn one text into another; None where it cannot."""
    if not (before.endswith(b"\n") and after.endswith(b"\n")):
        return None
    try:
        old, new = before[:-1].decode().split("\n"), after[:-1].decode().split("\n")
    except UnicodeDecodeError:
        return None
    edits = []
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for kind, first, last, start, end in reversed(matcher.get_opcodes()):
        if kind == "equal":
            continue
        if kind == "insert":
            where, verb = (str(first), "a") if first else ("1", "i")
        else:
            where = str(last) if last == first + 1 else f"{first + 1},{last}"
            verb = "c" if kind == "replace" else "d"
        lines = [line.replace("\\", "\\\\") for line in new[start:end]]
        text = "".join(f"\\\n{line}" for line in lines)
        command = f"sed -i {shlex.quote(where + verb + text)} {shlex.quote(path)}"
        edits.append(LineEdit(path, first + 1, command))
    return edits

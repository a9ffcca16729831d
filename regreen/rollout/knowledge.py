"""Past fixes: which error was repaired by what, ranked by relevance.

- Built from verified reference fixes of admitted training tasks alone; `build` refuses others.
- What an asking task may see is the rule of `regreen.families`, which the service obeys too: in an
  evaluation nothing of the own package's or culprit's family.
- Advice names only versions that the asking environment offers.
- `regreen.rollout.past` asks the dataset service's knowledge base, which holds more than a process
  does; this one is what candidate fixes of prompts come from.
- The same tasks give the same answers, in whatever order they come.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from packaging.version import InvalidVersion, Version

from regreen.common.v1 import MODE_ANY_FIX, MODE_KEEP_NEW, Mode
from regreen.dataset import v1 as pb
from regreen.families import Asker, asker, families, family, item_words, words
from regreen.lockfile import lock_change, lock_of, normalize, parse_lock
from regreen.rollout.facts import Facts
from regreen.rollout.logs import PrimaryError, analyse, imported_from, signature_of
from regreen.rpc.errors import InvalidArgument

LOCK_NAME = "requirements.lock"
_K1, _B = 1.2, 0.75
_MOST_MOVES = 12


@dataclass(frozen=True, slots=True)
class Move:
    """One package that a fix moved; an empty text means absent."""

    name: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class PastFix:
    """An error and what repaired it."""

    task_id: str
    package: str
    mode: int
    error: str
    """`Type: message` of the primary error."""
    signature: str
    moves: tuple[Move, ...] = ()
    edited: tuple[str, ...] = ()
    """Source files that the fix changed."""
    culprit: str = ""
    """Package that broke the task."""

    @property
    def words(self) -> list[str]:
        """What a search can match."""
        return item_words(self.error, self._moved, self.edited, self.culprit)

    @property
    def _moved(self) -> list[str]:
        return [move.name for move in self.moves]

    def hidden_from(self, who: Asker) -> bool:
        """Whether an asking task may not see it."""
        named = families((self.culprit, *self._moved))
        return who.hides(family(self.package), named, self.words)


@dataclass(frozen=True, slots=True)
class Hit:
    """A fix that fits a question."""

    fix: PastFix
    score: float
    advice: str
    item_id: str = ""
    """Item of the served knowledge base; empty for one of this process."""


@dataclass(slots=True)
class Knowledge:
    """A searchable set of past fixes."""

    fixes: list[PastFix] = field(default_factory=list)

    def search(
        self,
        question: str,
        facts: Facts,
        *,
        task: pb.Task,
        mode: Mode.ValueType = MODE_ANY_FIX,
        limit: int = 2,
    ) -> list[Hit]:
        """The best past fixes for a question of a task, best first; advice is distinct."""
        who = asker_of(task)
        pool = [
            fix for fix in self.fixes if fix.mode in (0, int(mode)) and not fix.hidden_from(who)
        ]
        hits: dict[str, Hit] = {}
        for fix, score in _rank(pool, words(question)):
            text = advice(fix, facts)
            if text and text not in hits:
                hits[text] = Hit(fix, score, text)
            if len(hits) >= limit:
                break
        return list(hits.values())

    def candidates(
        self,
        error: PrimaryError,
        facts: Facts,
        *,
        task: pb.Task,
        mode: Mode.ValueType = MODE_ANY_FIX,
        limit: int = 3,
    ) -> list[Hit]:
        """Ranked candidate fixes for an error (the full pipeline's retrieval).

        Only fixes of the same error, or that moved a package which the error points at: a fix that
        merely shares words with the error would mislead.
        """
        named = facts.suspects(error)[:3]
        near = [
            fix
            for fix in self.fixes
            if fix.signature == error.signature or any(move.name in named for move in fix.moves)
        ]
        question = f"{error.text} {' '.join(named)}"
        return Knowledge(near).search(question, facts, task=task, mode=mode, limit=limit)


def asker_of(task: pb.Task) -> Asker:
    """Who a task is to the past fixes."""
    return asker(task.environment.package, task.culprit, task.split)


def build(tasks: Iterable[pb.Task]) -> Knowledge:
    """The knowledge base of training tasks.

    Raises:
        InvalidArgument: a task is not an admitted training task.
    """
    fixes: list[PastFix] = []
    for task in tasks:
        if task.status != pb.TASK_STATUS_ADMITTED or task.split != "train":
            raise InvalidArgument(
                "tasks",
                f"{task.id} is not an admitted training task",
                "filter by status ADMITTED and split train",
            )
        error = analyse(task.error_log)
        if error is not None:
            fixes += [_past_fix(task, fix, error) for fix in task.fixes]
    return Knowledge([fix for fix in fixes if fix.moves or fix.edited])


def reference_moves(task: pb.Task, fix: pb.ReferenceFix) -> tuple[Move, ...]:
    """What a reference fix does to the environment, as moves of packages."""
    change = next((c for c in fix.changes if c.path == LOCK_NAME), None)
    if change is None:
        return ()
    environment = task.environment
    before = lock_of({pin.name: pin.version for pin in environment.pins}, environment.python)
    after = parse_lock(change.content)
    found = lock_change(before, after)
    moves = [Move(n, before.pins.get(n, ""), v) for n, v in sorted(found.installed.items())]
    moves += [Move(name, before.pins[name], "") for name in found.removed]
    if found.python:
        moves.insert(0, Move("python", before.python, found.python))
    return tuple(moves)


def _past_fix(task: pb.Task, fix: pb.ReferenceFix, error: PrimaryError) -> PastFix:
    moves = reference_moves(task, fix)
    module = imported_from(error.message)[0].partition(".")[0]
    # Moves that the error names come first: they are what a reader can act on.
    named = sorted(moves, key=lambda m: (normalize(module) != m.name, m.name != task.culprit))
    edited = tuple(sorted(change.path for change in fix.changes if change.path != LOCK_NAME))
    return PastFix(
        task.id,
        normalize(task.environment.package),
        int(fix.mode),
        error.text[:300],
        signature_of(error.type, error.message),
        tuple(named[:_MOST_MOVES]),
        edited[:5],
        task.culprit,
    )


def _rank(pool: Sequence[PastFix], query: Sequence[str]) -> list[tuple[PastFix, float]]:
    """BM25, best first; fixes without a common word are left out."""
    documents = [Counter(fix.words) for fix in pool]
    if not documents:
        return []
    mean = sum(sum(d.values()) for d in documents) / len(documents)
    frequency = Counter(word for d in documents for word in d)
    ranked: list[tuple[PastFix, float]] = []
    for fix, document in zip(pool, documents, strict=True):
        length = sum(document.values())
        score = 0.0
        for word in set(query):
            if not (count := document[word]):
                continue
            rarity = math.log(1 + (len(pool) - frequency[word] + 0.5) / (frequency[word] + 0.5))
            score += rarity * count * (_K1 + 1) / (count + _K1 * (1 - _B + _B * length / mean))
        if score > 0:
            ranked.append((fix, score))
    return sorted(ranked, key=lambda item: (-item[1], item[0].task_id))


def advice(fix: PastFix, facts: Facts) -> str:
    """One line that fits this environment; empty when the fix says nothing here."""
    error = fix.error if len(fix.error) <= 90 else fix.error[:87] + "..."
    if fix.mode == MODE_KEEP_NEW or not fix.moves:
        return f"{error} was fixed by editing {', '.join(fix.edited)}" if fix.edited else ""
    steps = []
    for move in fix.moves:
        if move.name != "python" and move.name not in facts.lock.pins:
            continue
        wanted = _nearest(
            move.after, facts.pythons if move.name == "python" else facts.offered.get(move.name, ())
        )
        if wanted and wanted != facts.lock.pins.get(move.name):
            steps.append(f"{move.name} to {wanted}")
        if len(steps) == 2:
            break
    if not steps:
        return ""
    return f"{error} was fixed by moving {', '.join(steps)}"


def _nearest(wanted: str, offered: Sequence[str]) -> str:
    """The newest offered version that is not above `wanted`; else the oldest on offer."""
    if not wanted or not offered:
        return ""
    try:
        below = [v for v in offered if Version(v) <= Version(wanted)]
    except InvalidVersion:
        return ""
    return below[-1] if below else offered[0]

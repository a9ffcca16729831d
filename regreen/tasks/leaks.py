"""What one split gives away of another, so that nothing that is measured was learnt by heart.

- Training, validation and test are kept apart from each other, each from both.
- A family of packages is in one split (`regreen.families`); a log or a patch that is nearly that of
  a task of another split gives it away, whatever the packages are called.
- Texts are compared by the runs of three words that they share, once all that varies between runs
  is out; what is short tells nothing. Moved pins are no patch: two splits may share a culprit, and
  `held_out` says which test tasks share none.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from regreen.dataset import v1 as pb
from regreen.families import family
from regreen.tasks.model import TaskRecord
from regreen.tasks.patch import LOCK_NAME

NEAR = 0.8
"""Share of what two texts hold together that both hold, from which on one gives the other away."""
LEAST = 30
"""Runs of words of a text that tells anything."""
_LOG_CHARS = 20_000
_VARIES = re.compile(
    r"0x[0-9a-f]+|(?:[\w.<>-]*/)+[\w.<>-]*|\d+(?:\.\d+)*|[=_~-]{3,}", re.IGNORECASE
)
_WORD = re.compile(r"\w+|[^\w\s]")
Runs = frozenset[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Facts:
    """What is compared of a task."""

    id: str
    family: str
    split: str
    culprit: str
    log: Runs
    patch: Runs


@dataclass(frozen=True, slots=True)
class Leak:
    """Two tasks of two splits of which one gives the other away."""

    kind: str
    """`family`, `log` or `patch`."""
    first: str
    second: str
    splits: tuple[str, str]
    share: float = 1.0

    def __str__(self) -> str:
        both = f"{self.first} ({self.splits[0]}) and {self.second} ({self.splits[1]})"
        what = "are of one family of packages" if self.kind == "family" else (
            f"have nearly the same {self.kind} ({self.share:.2f})"
        )  # fmt: skip
        return f"{both} {what}"


def facts(task: pb.Task) -> Facts:
    """What is compared of a stored task."""
    changed = [
        change.content.decode("utf-8", "replace")
        for fix in task.fixes
        for change in fix.changes
        if change.path != LOCK_NAME
    ]
    return Facts(
        task.id,
        family(task.environment.package),
        task.split,
        family(task.culprit) if task.culprit else "",
        runs(task.error_log[-_LOG_CHARS:]),
        runs("\n".join(changed)),
    )


def facts_of_record(record: TaskRecord) -> Facts:
    """The same of a record, whose log is its lines of errors."""
    changed = [edit.new for fix in record.fixes for edit in fix.edits]
    changed += [change.text or "" for fix in record.fixes for change in fix.changes]
    return Facts(
        record.id,
        family(record.package),
        record.split,
        family(record.culprit.name) if record.culprit else "",
        runs("\n".join(record.error_lines)),
        runs("\n".join(changed)),
    )


def runs(text: str) -> Runs:
    """Runs of three words of a text, without paths, numbers, addresses and rules."""
    words = _WORD.findall(_VARIES.sub(" ", text.lower()))
    return frozenset(zip(words, words[1:], words[2:], strict=False))


def share(one: Runs, other: Runs) -> float:
    """What two texts share of all that they hold; nothing where one is short."""
    small, large = sorted((one, other), key=len)
    if len(small) < LEAST or len(small) < NEAR * len(large):
        return 0.0
    both = len(small & large)
    return both / (len(small) + len(large) - both)


def leaks(tasks: Sequence[Facts]) -> list[Leak]:
    """Every pair of tasks of two splits that gives one away."""
    found = []
    for place, task in enumerate(tasks):
        found += leaks_of(task, tasks[:place])
    return sorted(found, key=lambda leak: (leak.kind, -leak.share, leak.first, leak.second))


def leaks_of(task: Facts, others: Iterable[Facts]) -> list[Leak]:
    """What a task and those of other splits give away of each other."""
    found = []
    for other in others:
        if other.id == task.id or not task.split or other.split in ("", task.split):
            continue
        pair = (task.id, other.id, (task.split, other.split))
        if task.family == other.family:
            found.append(Leak("family", *pair))
            continue
        for kind in ("log", "patch"):
            shared = share(getattr(task, kind), getattr(other, kind))
            if shared >= NEAR:
                found.append(Leak(kind, *pair, round(shared, 3)))
    return found


def held_out(tasks: Iterable[Facts]) -> list[str]:
    """Ids of the test tasks whose culprit broke no task of another split, in order."""
    every = list(tasks)
    learnt = {task.culprit for task in every if task.split != "test"}
    return sorted(
        t.id for t in every if t.split == "test" and t.culprit and t.culprit not in learnt
    )

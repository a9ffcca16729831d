"""Which tasks to roll out next: a curriculum by running pass rates.

- `choose` is a pure function of its arguments; the same history and seed give the same tasks.
- It returns exactly `count` picks; nothing repeats before every candidate was picked once.
- Tasks that always fail get `hard_share` of the picks in the mean (rounded at random) while others
  are left, tasks that always pass none: equal rewards teach nothing (DAPO, arXiv:2503.14476).
- Never tried tasks count as the most informative ones, so that each is tried before it is judged.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from regreen.common import v1 as common_pb
from regreen.rpc.errors import InvalidArgument


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """What a group can be made of."""

    task_id: str
    mode: common_pb.Mode.ValueType = common_pb.MODE_ANY_FIX


@dataclass(frozen=True, slots=True)
class Pick:
    """A chosen candidate and why: "new", "mixed", "hard" or "easy"."""

    candidate: Candidate
    reason: str


@dataclass(frozen=True, slots=True)
class Curriculum:
    """Settings of the curriculum."""

    hard_share: float = 0.25
    """Share of picks that always failed so far, while there are others."""
    window: int = 32
    """Number of latest outcomes of a task that its pass rate is taken over."""
    min_outcomes: int = 4
    """Outcomes needed before a task can count as hard or easy."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.hard_share <= 1.0:
            raise InvalidArgument("hard_share", f"is {self.hard_share}", "give 0 to 1")
        for name in ("window", "min_outcomes"):
            if getattr(self, name) < 1:
                raise InvalidArgument(name, f"is {getattr(self, name)}", "give at least 1")


@dataclass(slots=True)
class History:
    """Latest outcomes by candidate; feed it in a fixed order to make a run repeatable."""

    window: int = 32
    outcomes: dict[Candidate, deque[bool]] = field(default_factory=dict)

    def add(self, candidate: Candidate, solved: Iterable[bool]) -> None:
        """Append outcomes of one group."""
        self.outcomes.setdefault(candidate, deque(maxlen=self.window)).extend(solved)

    def pass_rate(self, candidate: Candidate) -> float | None:
        """Running pass rate; None when it was never tried."""
        seen = self.outcomes.get(candidate)
        return sum(seen) / len(seen) if seen else None


def choose(
    candidates: Sequence[Candidate],
    history: History,
    *,
    count: int,
    seed: int,
    curriculum: Curriculum | None = None,
) -> tuple[Pick, ...]:
    """`count` candidates to make groups of.

    Raises:
        InvalidArgument: no candidate, or a negative count.
    """
    if not candidates:
        raise InvalidArgument("candidates", "is empty", "import and gate tasks first")
    if count < 0:
        raise InvalidArgument("count", f"is {count}", "give 0 or more")
    settings = curriculum or Curriculum()
    rng = np.random.default_rng(seed)
    classes = _classify(sorted(set(candidates)), history, settings, rng)
    picks: list[Pick] = []
    while len(picks) < count:
        wanted = min(count - len(picks), len(classes["all"]))
        picks.extend(_round(classes, wanted, int(wanted * settings.hard_share + rng.random())))
    return tuple(picks)


def _round(classes: Mapping[str, list[Candidate]], count: int, quota: int) -> list[Pick]:
    """At most one pick of each candidate, in order of preference; `quota` of them hard."""
    useful = [Pick(c, "mixed" if c in set(classes["mixed"]) else "new") for c in classes["useful"]]
    hard = [Pick(c, "hard") for c in classes["hard"]]
    quota = min(len(hard), quota)
    chosen = useful[: count - quota] + hard[:quota]
    rest = useful[count - quota :] + hard[quota:] + [Pick(c, "easy") for c in classes["easy"]]
    return (chosen + rest)[:count]


def _classify(
    candidates: Sequence[Candidate],
    history: History,
    settings: Curriculum,
    rng: np.random.Generator,
) -> dict[str, list[Candidate]]:
    """Candidates by class, each list in seeded random order; "useful" = new and mixed, weighted."""
    found: dict[str, list[Candidate]] = {"hard": [], "easy": [], "mixed": [], "new": []}
    weights: dict[Candidate, float] = {}
    for candidate in candidates:
        rate = history.pass_rate(candidate)
        seen = len(history.outcomes.get(candidate, ()))
        if rate is None:
            found["new"].append(candidate)
            weights[candidate] = 0.25
        elif seen >= settings.min_outcomes and rate in (0.0, 1.0):
            found["hard" if rate == 0.0 else "easy"].append(candidate)
            weights[candidate] = 1.0
        else:
            found["mixed"].append(candidate)
            smooth = (rate * seen + 1) / (seen + 2)
            weights[candidate] = smooth * (1 - smooth)
    # Weighted order without replacement (Efraimidis and Spirakis 2006): sort by u^(1/w).
    keys = {c: rng.random() ** (1.0 / weights[c]) for c in candidates}
    found["useful"] = found["mixed"] + found["new"]
    found["all"] = list(candidates)
    return {name: sorted(names, key=lambda c: -keys[c]) for name, names in found.items()}

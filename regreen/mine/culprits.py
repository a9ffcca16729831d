"""Known-breaking releases and what depends on them: where the miner looks.

- The lists are facts of our own: names, versions, days. `data/culprits.jsonl` has one culprit a
  line: `name`, `breaks` (version, day of its release, what it took away), `dependents`; `wide` are
  the breaking releases that are known to break many.
- A candidate is one package on one day: as the index was on the day before a breaking release.
- Releases before `EARLIEST` are looked for only where a package has no later one ahead; the day is
  then that, and the breaking release is kept out by a bound: Python 3.11 can run most of it.
- The order is by promise, then by need: what a wide break is ahead of comes first; each culprit in
  turn, and every package once before any comes again.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from importlib import resources
from itertools import zip_longest

from regreen.lockfile import normalize

EARLIEST = date(2022, 12, 1)
SPACING = timedelta(days=330)
"""Between two days on which the same package is looked at."""
MOST_DAYS = 3


@dataclass(frozen=True, slots=True)
class Break:
    """A release that is known to break others."""

    version: str
    day: date
    note: str = ""
    wide: bool = False
    """Known to break many."""


@dataclass(frozen=True, slots=True)
class CulpritFacts:
    """A package with breaking releases."""

    name: str
    breaks: tuple[Break, ...]
    dependents: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One package on one day."""

    kind: str
    package: str
    day: date
    hints: tuple[tuple[str, str], ...] = ()
    """Culprits whose next breaking release is known: name and version."""

    @property
    def key(self) -> str:
        return f"{self.kind}:{self.package}:{self.day.isoformat()}"


_Event = tuple[date, str, Break]
"""When which culprit broke what."""


def shipped_culprits() -> list[CulpritFacts]:
    """The curated list."""
    text = resources.files("regreen.mine").joinpath("data/culprits.jsonl").read_text("utf-8")
    return parse_culprits(text)


def parse_culprits(text: str) -> list[CulpritFacts]:
    """Culprits of a JSON Lines text."""
    found = []
    for line in filter(str.strip, text.splitlines()):
        row = json.loads(line)
        wide = set(row.get("wide", ()))
        breaks = tuple(
            Break(v, date.fromisoformat(d), "".join(rest), v in wide)
            for v, d, *rest in row["breaks"]
        )
        dependents = tuple(normalize(name) for name in row["dependents"].split())
        found.append(CulpritFacts(normalize(row["name"]), breaks, dependents))
    return found


def upgrade_candidates(
    culprits: Sequence[CulpritFacts], *, packages: Iterable[str] = ()
) -> list[Candidate]:
    """Where to look for dependency upgrades that break; `packages` narrows it down."""
    wanted = set(map(normalize, packages))
    events: dict[str, list[_Event]] = {}
    for culprit in culprits:
        for package in culprit.dependents:
            for event in culprit.breaks:
                events.setdefault(package, []).append((event.day, culprit.name, event))
    found: dict[tuple[bool, int], list[Candidate]] = {}
    for package, rows in events.items():
        if not wanted or package in wanted:
            rows = sorted(rows, key=lambda row: row[:2])
            for turn, (candidate, wide) in enumerate(_of_package(package, rows)):
                found.setdefault((not wide, turn), []).append(candidate)
    return [candidate for place in sorted(found) for candidate in _by_culprit(found[place])]


def bugfix_candidates(
    culprits: Sequence[CulpritFacts], *, packages: Iterable[str] = ()
) -> list[Candidate]:
    """Where to look for bug fixes: the culprits themselves, then their dependents in turn.

    `packages` narrows it down; such as are in no list are looked at last.
    """
    names = dict.fromkeys(culprit.name for culprit in culprits)
    for turn in zip_longest(*(culprit.dependents for culprit in culprits)):
        names.update(dict.fromkeys(name for name in turn if name is not None))
    return [Candidate("release-bugfix", name, EARLIEST) for name in narrowed(names, packages)]


def narrowed(names: Iterable[str], packages: Iterable[str]) -> list[str]:
    """Of the names those of `packages`, then such as only `packages` has; all if it is empty."""
    wanted = dict.fromkeys(map(normalize, packages))
    known = dict.fromkeys(name for name in names if not wanted or name in wanted)
    return list(known | wanted)


def in_turn(*kinds: Sequence[Candidate]) -> list[Candidate]:
    """One of each kind, then another of each."""
    return [c for turn in zip_longest(*kinds) for c in turn if c is not None]


def _of_package(package: str, rows: list[_Event]) -> Iterator[tuple[Candidate, bool]]:
    """Candidates with whether a wide break is ahead of them, those with one first."""
    rows = [row for row in rows if row[0] >= EARLIEST] or rows
    days: list[date] = []
    for day, _, _ in sorted(rows, key=lambda row: not row[2].wide):
        at = max(day, EARLIEST)
        if len(days) < MOST_DAYS and all(abs(at - other) >= SPACING for other in days):
            days.append(at)
    for at in days:
        ahead = [row for row in rows if max(row[0], EARLIEST) >= at]
        hints: dict[str, str] = {}
        for _, culprit, event in sorted(ahead, key=lambda row: not row[2].wide):
            hints.setdefault(culprit, event.version)
        wide = any(event.wide for _, _, event in ahead)
        yield Candidate("dependency-upgrade", package, at, tuple(hints.items())), wide


def _by_culprit(candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    """One of each culprit, then another of each."""
    rows: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        rows.setdefault(candidate.hints[0][0], []).append(candidate)
    for turn in zip_longest(*rows.values()):
        yield from (candidate for candidate in turn if candidate is not None)

"""What the steps of mining one candidate hand to each other.

- Everything but the clock is immutable.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from regreen.mine.culprits import Candidate
from regreen.mine.facts import Run
from regreen.mine.lab import Release
from regreen.mine.project import Needs


class Rejected(Exception):
    """Why a candidate, or one break of it, gives no record."""

    def __init__(self, stage: str, reason: str, detail: str = "") -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage, self.reason, self.detail = stage, reason, detail


@dataclass(frozen=True, slots=True)
class Past:
    """What is on record of a candidate already."""

    releases: set[str]
    """Releases that were looked at on another day."""
    breaks: set[tuple[str, str]]
    """Culprits, each with the first bad release."""


@dataclass(slots=True)
class Clock:
    """Where the time of one candidate goes, and how often."""

    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    stage: str = ""
    hear: Callable[[str], None] = lambda stage: None
    """Called with each stage that begins."""
    idle: Callable[[], float] = lambda: 0.0
    """Seconds so far in which nothing was done on purpose; they are no stage's."""

    @contextmanager
    def at(self, stage: str) -> Iterator[None]:
        """Count the time of a block to a stage."""
        began, self.stage = monotonic() - self.idle(), stage
        self.hear(stage)
        try:
            yield
        finally:
            took = monotonic() - self.idle() - began
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + took, 3)
            self.counts[stage] = self.counts.get(stage, 0) + 1


@dataclass(frozen=True, slots=True)
class Tried:
    """A release of a culprit with the set that it was tried in."""

    version: str
    pins: Mapping[str, str]
    run: Run


@dataclass(frozen=True, slots=True)
class Found:
    """A break as `regreen.tasks.pin` takes it, and what only the task record holds."""

    mined: dict[str, Any]
    unstable: tuple[str, ...]
    licence: str


@dataclass(frozen=True, slots=True)
class Ground:
    """What every step of one candidate needs."""

    candidate: Candidate
    release: Release
    needs: Needs
    pins: dict[str, str]
    run: Run
    licence: str

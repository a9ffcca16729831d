"""Whether processes that are killed all the time, and one that is not, keep their size.

- Of many lives one line is drawn: how a kind grows with its age (`growth`).
- Of one life that is as long as the run the second half is looked at, when everything is warm
  (`steady`): the longer the run, the slower the leak that shows.
"""

import contextlib
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.load import processes

GROWN_S = 20.0
"""Age from which on the size of a process counts."""
_GROWTH, _GROWTH_BYTES = 1 / 6, 10_000_000
_STEADY_BYTES = 3_000_000
"""What one process may rise by over the second half of its life."""
POSTGRES_SHARE = 1 / 16
"""What Postgres may, of its size: each of its processes fills its caches for many minutes."""
_FEW = 20
"""Samples without which no line is drawn."""

Size = tuple[int, float, int]
"""Whose (the start of the process), how old it was in seconds, and its resident bytes."""


@dataclass(frozen=True, slots=True)
class Growth:
    """How a kind of process grows with its age."""

    bytes_per_s: float = 0.0
    mean_bytes: float = 0.0
    longest_s: float = 0.0
    """The longest life that was seen, from the age at which sizes count."""

    @property
    def flat(self) -> bool:
        """Whether a process is about as large late in its life as early."""
        limit = max(_GROWTH * self.mean_bytes, _GROWTH_BYTES)
        return self.bytes_per_s * self.longest_s <= limit


def growth(sizes: Sequence[Size]) -> Growth:
    """The slope that all lives have in common: least squares around each life's own mean."""
    lives: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for who, age_s, size in sizes:
        if age_s >= GROWN_S:
            lives[who].append((age_s, size))
    seen = [point for life in lives.values() for point in life]
    if len(seen) < _FEW:
        return Growth()
    along = across = 0.0
    for life in lives.values():
        mean_s = statistics.fmean(age_s for age_s, _ in life)
        mean = statistics.fmean(size for _, size in life)
        along += sum((age_s - mean_s) * (size - mean) for age_s, size in life)
        across += sum((age_s - mean_s) ** 2 for age_s, _ in life)
    return Growth(
        along / across if across else 0.0,
        statistics.fmean(size for _, size in seen),
        max(age_s for age_s, _ in seen) - GROWN_S,
    )


@dataclass(frozen=True, slots=True)
class Steady:
    """How one process that lived for the whole run went, once it was warm."""

    seconds: float = 0.0
    """Of the second half of its life."""
    risen_bytes: float = 0.0
    """By its line over that time."""
    most_bytes: float = _STEADY_BYTES
    """What it may rise by."""

    @property
    def flat(self) -> bool:
        """Whether it was looked at, and has kept its size."""
        return self.seconds > 0 and self.risen_bytes <= self.most_bytes

    @property
    def seen_bytes_per_s(self) -> float:
        """The slowest leak that would have been found."""
        return self.most_bytes / self.seconds if self.seconds else float("inf")


def steady(sizes: Sequence[Size], share: float = 0.0) -> Steady:
    """The line of the second half of a life; nothing where there were several, or few samples.

    With `share` it may rise by that much of its size, and no fixed number of bytes.
    """
    end_s = max((age_s for _, age_s, _ in sizes), default=0.0)
    late = [(age_s, size) for _, age_s, size in sizes if age_s >= end_s / 2]
    if len({who for who, _, _ in sizes}) != 1 or len(late) < _FEW:
        return Steady()
    seconds = late[-1][0] - late[0][0]
    slope = statistics.linear_regression(*zip(*late, strict=True)).slope
    most = share * statistics.fmean(size for _, size in late) if share else _STEADY_BYTES
    return Steady(seconds, slope * seconds, most)


def own_bytes(pid: int) -> int:
    """Memory that a process and its children share with nobody: of Postgres, all but its buffers.

    What they share fills up as pages are touched, which is no leak.
    """
    found = 0
    for one in (pid, *processes.children(pid)):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{one}/status").read_text("ascii", "replace")
            found += 1024 * sum(
                int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon:")
            )
    return found

"""The data card: what a set of tasks consists of, counted from stored tasks and gate reports.

- The same tasks give the same tables, wherever they are read from; the most frequent comes first.
- Difficulty is what the easiest known repair has to do, from the record alone: move one pin, move
  several, edit source, or nothing that helps (a control).
- Seconds are of what the gate did here; a task that it did not prepare or validate has none.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from regreen.common import v1 as common_pb
from regreen.dataset import v1 as pb

DIFFICULTIES = ("one pin", "several pins", "source", "control")
_SHOWN = 12
"""Values of a dimension that text shows."""


@dataclass(frozen=True, slots=True)
class Spread:
    """How long something took, over tasks."""

    tasks: int
    median_s: float
    p90_s: float
    most_s: float
    sum_s: float


@dataclass(slots=True)
class Card:
    """Counts by dimension and value, and seconds by stage."""

    total: int = 0
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    seconds: dict[str, Spread] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """Everything, whole."""
        return {
            "total": self.total,
            "counts": {name: dict(ordered(values)) for name, values in self.counts.items()},
            "seconds": {
                name: {part: getattr(spread, part) for part in Spread.__slots__}
                for name, spread in self.seconds.items()
            },
        }

    def lines(self) -> list[tuple[str, str]]:
        """A row for each dimension: its name, and its values with their counts."""
        rows = []
        for name, values in self.counts.items():
            listed = ordered(values)
            told = ", ".join(f"{value} {count}" for value, count in listed[:_SHOWN])
            if len(listed) > _SHOWN:
                rest = sum(count for _, count in listed[_SHOWN:])
                told = f"{len(listed)}: {told}, {len(listed) - _SHOWN} others {rest}"
            rows.append((name, told))
        for name, spread in self.seconds.items():
            told = (
                f"median {spread.median_s:g}, 90 % {spread.p90_s:g}, most {spread.most_s:g}, "
                f"sum {spread.sum_s:g} of {spread.tasks} tasks"
            )
            rows.append((f"seconds to {name}", told))
        return rows


def card(tasks: Sequence[pb.Task], reports: Mapping[str, pb.GateReport] | None = None) -> Card:
    """The card of stored tasks, with the last report of each that has one."""
    counts: dict[str, Counter[str]] = {
        "status": Counter(
            pb.TaskStatus.Name(task.status).removeprefix("TASK_STATUS_").lower() for task in tasks
        ),
        "kind": Counter(task.kind for task in tasks),
        "category": Counter(task.category or "none" for task in tasks),
        "blame": Counter(task.blame or "none" for task in tasks),
        "difficulty": Counter(difficulty(task) for task in tasks),
        "mode": Counter(
            common_pb.Mode.Name(mode).removeprefix("MODE_").lower()
            for task in tasks
            for mode in task.modes
        ),
        "split": Counter(task.split or "none" for task in tasks),
        "python": Counter(task.environment.python or "none" for task in tasks),
        "licence": Counter(task.labels.get("licence") or "unknown" for task in tasks),
        "culprit": Counter(task.culprit or "none" for task in tasks),
        "package": Counter(task.environment.package for task in tasks),
    }
    prepared = [seconds for r in (reports or {}).values() if (seconds := _prepared_s(r))]
    validated = [task.validation_time.ToNanoseconds() / 1e9 for task in tasks]
    stages = {"prepare": prepared, "validate": [seconds for seconds in validated if seconds > 0]}
    found = {name: spread(samples) for name, samples in stages.items() if samples}
    return Card(len(tasks), counts, found)


def difficulty(task: pb.Task) -> str:
    """What the easiest known repair of a task has to do; one of `DIFFICULTIES`."""
    if task.labels.get("control") == "true":
        return "control"
    if not task.moved or common_pb.MODE_ANY_FIX not in task.modes:
        return "source"
    return "one pin" if len(task.moved) == 1 else "several pins"


def spread(samples: Iterable[float]) -> Spread:
    """Median, 90 % and the most; each is one of the samples."""
    rising = sorted(samples)

    def at(share: float) -> float:
        return round(rising[max(0, math.ceil(share * len(rising)) - 1)], 1)

    return Spread(len(rising), at(0.5), at(0.9), at(1.0), round(sum(rising), 1))


def ordered(values: "Counter[str]") -> list[tuple[str, int]]:
    """The most frequent first, then by name."""
    return sorted(values.items(), key=lambda item: (-item[1], item[0]))


def _prepared_s(report: pb.GateReport) -> float:
    """How long the State of a report was made; 0 where it was there already."""
    return sum(
        check.duration.ToNanoseconds() / 1e9 for check in report.checks if check.name == "pinned"
    )

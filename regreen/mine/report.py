"""What a mining run gave and cost: yields, reasons of rejection, where the time went.

- Every figure is counted from the journal; nothing is estimated.
- A worker-second is a second in which a worker had a candidate in hand; a core-hour of one worker
  is 3600 of them, whatever it waited for.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from regreen.mine.store import Journal
from regreen.tasks.model import TaskRecord


@dataclass(frozen=True, slots=True)
class Report:
    """A summary of a journal."""

    candidates: Mapping[str, int]
    """By status."""
    rejected: Mapping[str, int]
    """By stage and reason."""
    usable: int
    """Candidates whose untouched tests pass."""
    records: Mapping[str, int]
    """By status of the gate."""
    packages: int
    """Of the admitted records."""
    culprits: int
    pythons: Mapping[str, int]
    blame: Mapping[str, int]
    category: Mapping[str, int]
    worker_s: float
    requests: int
    stages: Mapping[str, Mapping[str, float]]
    """Seconds, times and mean of every stage."""
    per_hour: Mapping[str, float] = field(default_factory=dict)
    """Candidates, upgrades tried and admitted records per worker-hour."""

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


def report(journal: Journal) -> Report:
    """Count what is in a journal."""
    rows = journal.rows("candidate")
    spent = journal.rows("spent")
    tasks = [task for task, _ in journal.records()]
    admitted = [task for task in tasks if task.status == "admitted"]
    stages = _stages(json.loads(row["seconds"]) for row in rows)
    for name, count in _sum(json.loads(row["counts"]) for row in rows).items():
        entry = stages.setdefault(name, {"seconds": 0.0})
        entry["times"] = count
        entry["mean_s"] = round(entry["seconds"] / count, 2) if count else 0.0
    worker_s = round(sum(row["worker_s"] for row in spent), 1)
    decided = sum(row["status"] in ("mined", "rejected", "failed") for row in rows)
    tried = sum(stages.get(name, {}).get("times", 0) for name in ("upgrade all", "single"))
    hours = worker_s / 3600
    return Report(
        candidates=dict(Counter(row["status"] for row in rows)),
        rejected=dict(
            Counter(
                f"{row['stage']}: {row['reason']}" for row in rows if row["status"] == "rejected"
            ).most_common()
        ),
        usable=sum("resolve all" in json.loads(row["counts"]) for row in rows),
        records=dict(Counter(task.status for task in tasks)),
        packages=len({task.package for task in admitted}),
        culprits=len(_culprits(admitted)),
        pythons=_counted(task.python for task in admitted),
        blame=_counted(task.blame for task in admitted),
        category=_counted(task.category for task in admitted),
        worker_s=worker_s,
        requests=sum(row["requests"] for row in spent),
        stages=stages,
        per_hour={
            "candidates": round(decided / hours, 1),
            "upgrades tried": round(tried / hours, 1),
            "admitted records": round(len(admitted) / hours, 1),
        }
        if hours
        else {},
    )


def lines_of(found: Report) -> list[tuple[str, str]]:
    """A report as rows of a table."""
    rows = [
        ("candidates", _words(found.candidates)),
        ("usable", str(found.usable)),
        ("records", _words(found.records)),
        ("admitted: packages, culprits", f"{found.packages}, {found.culprits}"),
        ("admitted: Python", _words(found.pythons)),
        ("admitted: blame", _words(found.blame)),
        ("admitted: category", _words(found.category)),
        ("worker-seconds", f"{found.worker_s:.0f}"),
        ("requests to the index", str(found.requests)),
        *((f"{name} per worker-hour", str(value)) for name, value in found.per_hour.items()),
    ]
    for name, entry in sorted(found.stages.items(), key=lambda item: -item[1]["seconds"]):
        text = f"{entry['seconds']:.0f} s, {entry.get('times', 0):.0f} times"
        rows.append((f"stage {name}", f"{text}, {entry.get('mean_s', 0.0):.1f} s each"))
    rows += [(f"rejected {reason}", str(count)) for reason, count in found.rejected.items()]
    return rows


def _culprits(tasks: Iterable[TaskRecord]) -> set[str]:
    return {task.culprit.name for task in tasks if task.culprit is not None}


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _stages(rows: Iterable[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {name: {"seconds": round(value, 1)} for name, value in _sum(rows).items()}


def _sum(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            total[name] = total.get(name, 0.0) + value
    return total

"""What is known of every candidate, on disk: a run that was stopped goes on from here.

- One SQLite file; each change is committed at once, so that nothing done is done again after a
  kill. What was in work when the process ended is in the queue again.
- A candidate that was decided is never taken twice; `forget` puts some back on purpose.
- Seconds are kept per stage: the report says where the time goes.
- What another journal decided is `known`: it is not taken, and no figure counts it as done here.
"""

import json
import sqlite3
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, date, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from regreen.mine.culprits import Candidate
from regreen.tasks.jsonl import dump_lines, parse_lines
from regreen.tasks.model import DistributionRecord, TaskRecord

_SCHEMA = """
CREATE TABLE IF NOT EXISTS candidate (
  key TEXT PRIMARY KEY, place INTEGER NOT NULL, kind TEXT NOT NULL, package TEXT NOT NULL,
  day TEXT NOT NULL, hints TEXT NOT NULL, status TEXT NOT NULL DEFAULT 'waiting',
  version TEXT NOT NULL DEFAULT '', stage TEXT NOT NULL DEFAULT '',
  reason TEXT NOT NULL DEFAULT '', detail TEXT NOT NULL DEFAULT '',
  seconds TEXT NOT NULL DEFAULT '{}', counts TEXT NOT NULL DEFAULT '{}',
  updated REAL NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS record (
  id TEXT PRIMARY KEY, candidate TEXT NOT NULL, status TEXT NOT NULL, reason TEXT NOT NULL,
  task TEXT NOT NULL, releases TEXT NOT NULL, evidence TEXT NOT NULL, updated REAL NOT NULL);
CREATE TABLE IF NOT EXISTS spent (
  began REAL NOT NULL, wall_s REAL NOT NULL, worker_s REAL NOT NULL, requests INTEGER NOT NULL);
"""

_OF_THE_MACHINE = (
    "cannot be prepared",
    "cannot be run",
    "no interpreter for it",
    "times out",
    "too slow",
)
"""Reasons that another machine may not find."""


class Decided(BaseModel):
    """A candidate that was decided, for other journals: nobody need try it again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    stage: str
    reason: str
    version: str = ""


def shipped_decisions() -> list[Decided]:
    """What was decided while the set that ships was mined."""
    text = resources.files("regreen.mine").joinpath("data/decided.jsonl").read_text("utf-8")
    return parse_lines(text, Decided, "decided.jsonl")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a candidate ended."""

    status: str
    """`mined`, `rejected`, or `failed` where the platform did."""
    stage: str
    reason: str
    detail: str = ""
    version: str = ""
    seconds: Mapping[str, float] | None = None
    counts: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """A record with what came with it."""

    task: TaskRecord
    releases: str
    """Those that it names, as JSON Lines."""
    evidence: Mapping[str, Any]
    """What the gate said."""
    day: date


class Journal:
    """The candidates and records of one work directory."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, isolation_level=None, timeout=30.0)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def enqueue(self, candidates: Iterable[Candidate]) -> None:
        """Add candidates that are not known yet; waiting ones take their new place and hints."""
        rows = [
            (c.key, place, c.kind, c.package, c.day.isoformat(), json.dumps(c.hints))
            for place, c in enumerate(candidates)
        ]
        with self._transaction():
            self._db.executemany(
                "INSERT INTO candidate (key, place, kind, package, day, hints) "
                "VALUES (?,?,?,?,?,?) ON CONFLICT (key) DO UPDATE "
                "SET place = excluded.place, hints = excluded.hints WHERE status = 'waiting'",
                rows,
            )

    def adopt(self, decisions: Iterable[Decided]) -> int:
        """Leave out waiting candidates that were decided elsewhere; how many."""
        count = 0
        with self._transaction():
            for one in decisions:
                count += self._db.execute(
                    "UPDATE candidate SET status = 'known', stage = ?, reason = ?, version = ? "
                    "WHERE key = ? AND status = 'waiting'",
                    (one.stage, one.reason, one.version, one.key),
                ).rowcount
        return count

    def decisions(self) -> list[Decided]:
        """What is decided here or known, but for what only this machine may have found."""
        rows = self._db.execute(
            "SELECT key, stage, reason, version FROM candidate "
            "WHERE status IN ('mined', 'rejected', 'known') ORDER BY key"
        )
        found = [Decided.model_validate(dict(row)) for row in rows]
        return [one for one in found if one.reason not in _OF_THE_MACHINE]

    def recover(self) -> None:
        """Queue again what an ended process had in work."""
        self._db.execute("UPDATE candidate SET status = 'waiting' WHERE status = 'running'")

    def forget(self, statuses: Iterable[str], reason: str = "") -> int:
        """Queue decided candidates again; how many."""
        count = 0
        for status in statuses:
            count += self._db.execute(
                "UPDATE candidate SET status = 'waiting' "
                "WHERE status = ? AND (? = '' OR reason = ?)",
                (status, reason, reason),
            ).rowcount
        return count

    def take(self, kinds: Iterable[str], keys: Iterable[str] = ()) -> Candidate | None:
        """The next waiting candidate, now in work."""
        with self._transaction():
            for row in self._db.execute(
                "SELECT * FROM candidate WHERE status = 'waiting' ORDER BY place"
            ):
                if row["kind"] in set(kinds) and (not keys or row["key"] in set(keys)):
                    self._db.execute(
                        "UPDATE candidate SET status = 'running', updated = ? WHERE key = ?",
                        (time.time(), row["key"]),
                    )
                    hints = tuple((str(n), str(v)) for n, v in json.loads(row["hints"]))
                    day = date.fromisoformat(row["day"])
                    return Candidate(row["kind"], row["package"], day, hints)
        return None

    def decide(self, candidate: Candidate, outcome: Outcome) -> None:
        """Keep how a candidate ended."""
        self._db.execute(
            "UPDATE candidate SET status=?, stage=?, reason=?, detail=?, version=?, seconds=?, "
            "counts=?, updated=? WHERE key=?",
            (
                outcome.status, outcome.stage, outcome.reason, outcome.detail[:1000],
                outcome.version, json.dumps(dict(outcome.seconds or {})),
                json.dumps(dict(outcome.counts or {})), time.time(), candidate.key,
            ),
        )  # fmt: skip

    def versions_of(self, candidate: Candidate) -> set[str]:
        """Releases of the package that other candidates have looked at."""
        rows = self._db.execute(
            "SELECT version FROM candidate WHERE kind=? AND package=? AND key<>? AND version<>''",
            (candidate.kind, candidate.package, candidate.key),
        )
        return {str(row["version"]) for row in rows}

    def breaks_of(self, candidate: Candidate) -> set[tuple[str, str]]:
        """Culprits and first bad releases of the package that other candidates have on record."""
        rows = self._db.execute(
            "SELECT task FROM record WHERE status <> 'rejected' AND candidate <> ?",
            (candidate.key,),
        )
        tasks = [TaskRecord.model_validate_json(row["task"]) for row in rows]
        mine = (t.culprit for t in tasks if t.package == candidate.package and t.culprit)
        return {(culprit.name, culprit.bad) for culprit in mine}

    def breaking(self) -> dict[str, set[str]]:
        """Of every culprit on record the first bad releases."""
        rows = self._db.execute(
            "SELECT json_extract(task, '$.culprit.name') AS name, "
            "json_extract(task, '$.culprit.bad') AS bad FROM record WHERE name IS NOT NULL"
        )
        found: dict[str, set[str]] = {}
        for row in rows:
            found.setdefault(str(row["name"]), set()).add(str(row["bad"]))
        return found

    def keep(
        self,
        candidate: Candidate,
        task: TaskRecord,
        releases: Iterable[DistributionRecord],
        evidence: Mapping[str, Any],
    ) -> None:
        """Keep a record with the releases that it names and what the gate said."""
        self._db.execute(
            "INSERT OR REPLACE INTO record VALUES (?,?,?,?,?,?,?,?)",
            (
                task.id, candidate.key, task.status, task.reason, task.model_dump_json(),
                dump_lines(releases), json.dumps(evidence), time.time(),
            ),
        )  # fmt: skip

    def records(self, status: str = "") -> list[tuple[TaskRecord, str]]:
        """Records, oldest first, each with the releases that it names as JSON Lines."""
        return [(kept.task, kept.releases) for kept in self.kept(status)]

    def kept(self, status: str = "") -> list[Kept]:
        """Records with what came with them, oldest first."""
        rows = self._db.execute(
            "SELECT * FROM record WHERE ? IN ('', status) ORDER BY updated", (status,)
        )
        return [
            Kept(
                TaskRecord.model_validate_json(row["task"]),
                str(row["releases"]),
                json.loads(row["evidence"]),
                datetime.fromtimestamp(row["updated"], UTC).date(),
            )
            for row in rows
        ]

    def note_spent(self, began: float, wall_s: float, worker_s: float, requests: int) -> None:
        """Keep what a run cost; a run has one row, by when it began."""
        with self._transaction():
            self._db.execute("DELETE FROM spent WHERE began = ?", (began,))
            self._db.execute(
                "INSERT INTO spent VALUES (?,?,?,?)", (began, wall_s, worker_s, requests)
            )

    def rows(self, table: str) -> list[dict[str, Any]]:
        """Everything of `candidate`, `record` or `spent`."""
        assert table in ("candidate", "record", "spent")
        with closing(self._db.execute(f"SELECT * FROM {table}")) as cursor:
            return [dict(row) for row in cursor]

    def _transaction(self) -> "_Transaction":
        return _Transaction(self._db)


class _Transaction:
    """BEGIN IMMEDIATE to COMMIT, or ROLLBACK on an error."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._db.execute("ROLLBACK" if kind else "COMMIT")

"""Stored verdicts: SQLite under REGREEN_HOME, so that they survive restarts.

- The key covers everything that can change an answer: evidence, model, prompt, rules, bounds.
- A row is written in one transaction: a kill at any moment leaves the old row, the new one or none.
- A row that cannot be read is a miss; a cache that cannot be written costs time, not a verdict.
- One thread uses the connection; the caller provides it.
"""

import hashlib
import json
import sqlite3
from dataclasses import asdict
from pathlib import Path

from judge_svc.evidence import Finding, FindingClass, Severity, Verdict

FORMAT = 1


def cache_key(*parts: str) -> str:
    """Hex digest over all parts."""
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()


class VerdictCache:
    """A bounded map from key to verdict."""

    def __init__(self, path: Path, *, max_entries: int = 200_000) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._max_entries = max_entries
        self._path = path
        try:
            self._db = self._open()
        except sqlite3.DatabaseError:
            # Not a database any more: verdicts can be made again, so start afresh.
            path.unlink(missing_ok=True)
            self._db = self._open()

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute("PRAGMA busy_timeout=5000")
        db.execute(
            "CREATE TABLE IF NOT EXISTS verdicts ("
            "id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, verdict TEXT NOT NULL)"
        )
        return db

    def get(self, key: str) -> Verdict | None:
        """The stored verdict, or None."""
        try:
            row = self._db.execute("SELECT verdict FROM verdicts WHERE key = ?", (key,)).fetchone()
            return load_verdict(row[0]) if row else None
        except (sqlite3.Error, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, verdict: Verdict) -> bool:
        """Store a verdict; false when it could not be written."""
        try:
            cursor = self._db.execute(
                "INSERT OR REPLACE INTO verdicts (key, verdict) VALUES (?, ?)",
                (key, json.dumps(asdict(verdict))),
            )
            oldest = (cursor.lastrowid or 0) - self._max_entries
            self._db.execute("DELETE FROM verdicts WHERE id <= ?", (oldest,))
        except (sqlite3.Error, UnicodeEncodeError):
            return False
        return True

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def load_verdict(text: str) -> Verdict:
    """The inverse of storing.

    Raises:
        ValueError, KeyError, TypeError: the text is no stored verdict.
    """
    data = json.loads(text)
    findings = tuple(
        Finding(
            **{**item, "cls": FindingClass(item["cls"]), "severity": Severity(item["severity"])}
        )
        for item in data.pop("findings")
    )
    return Verdict(findings=findings, **data)

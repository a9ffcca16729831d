"""Answers of one server, kept outside its memory: what is remembered costs no resident bytes.

- They lie in a nameless file of SQLite's, which the kernel removes with the process however it
  ends; of it only a small cache is in memory.
- Bounded by count, bytes and age; the oldest go first.
- Where no file can be written, or the disk is full, the latest are kept in memory instead: fewer,
  but no answer is refused for that.
"""

import contextlib
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from regreen.rpc.logging import get

_OPTIONS = "PRAGMA journal_mode = MEMORY; PRAGMA synchronous = OFF; PRAGMA cache_size = -1024;"
_SCHEMA = """
CREATE TABLE answers (
  place INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE, request BLOB NOT NULL,
  until_s REAL NOT NULL, answer BLOB NOT NULL
)
"""
_NAMED = "SELECT place, until_s, length(answer) FROM answers WHERE name = ?"
_OLDEST = "SELECT place, until_s, length(answer) FROM answers ORDER BY place LIMIT 1"
_PUT = "INSERT INTO answers (name, request, until_s, answer) VALUES (?, ?, ?, ?)"
_LATEST = "SELECT name, request, until_s, answer FROM answers ORDER BY place DESC LIMIT ?"
_IN_MEMORY, _IN_MEMORY_BYTES = 10_000, 16 << 20


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer as it was put."""

    request: bytes
    """Digest of what it answers."""
    answer: bytes


class Answers:
    """Remembers bytes by name for a while."""

    def __init__(
        self, *, ttl_s: float, max_entries: int, max_bytes: int, clock: Callable[[], float]
    ) -> None:
        self._ttl_s, self._clock = ttl_s, clock
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._count = self._bytes = 0
        self._file: sqlite3.Connection | None = None
        self.in_memory = False
        """Whether there was no room on the disk."""

    def close(self) -> None:
        """Forget everything."""
        if self._file is not None:
            self._file.close()
        self._file, self._count, self._bytes = None, 0, 0

    def find(self, name: bytes) -> Kept | None:
        """What is kept under a name and is not too old."""
        try:
            return self._find(name)
        except sqlite3.Error as error:
            if self.in_memory:
                raise
            self._move_to_memory(error)
            return self._find(name)

    def _find(self, name: bytes) -> Kept | None:
        if self._file is None:
            return None
        asked = "SELECT request, answer, until_s FROM answers WHERE name = ?"
        found = self._file.execute(asked, (name,)).fetchone()
        if found is None or found[2] < self._clock():
            return None
        return Kept(found[0], found[1])

    def put(self, name: bytes, kept: Kept) -> None:
        """Keep an answer in the place of one that was too old; what is over a bound goes."""
        row = (name, kept.request, self._clock() + self._ttl_s, kept.answer)
        try:
            self._put(row)
        except sqlite3.Error as error:
            if self.in_memory:
                raise
            self._move_to_memory(error)
            self._put(row)

    def _put(self, row: tuple[bytes, bytes, float, bytes]) -> None:
        if self._file is None:
            self._file = _opened(":memory:" if self.in_memory else "")
        self._drop(_NAMED, row[0])
        self._file.execute(_PUT, row)
        self._count += 1
        self._bytes += len(row[3])
        while self._count > self._max_entries or self._bytes > self._max_bytes:
            self._drop(_OLDEST)
        now = self._clock()
        while self._drop(_OLDEST, before_s=now):
            pass

    def _drop(self, which: str, *arguments: bytes, before_s: float | None = None) -> bool:
        """Remove one row, if there is such; with `before_s`, only one that was kept until then."""
        assert self._file is not None
        row = self._file.execute(which, arguments).fetchone()
        if row is None or (before_s is not None and row[1] >= before_s):
            return False
        self._file.execute("DELETE FROM answers WHERE place = ?", row[:1])
        self._count -= 1
        self._bytes -= row[2]
        return True

    def _move_to_memory(self, error: sqlite3.Error) -> None:
        """Go on without a file; the latest answers come along, as far as they can be read."""
        get().warning("answers are kept in memory", error=str(error))
        before, self._file, self.in_memory = self._file, None, True
        self._max_entries = min(self._max_entries, _IN_MEMORY)
        self._max_bytes = min(self._max_bytes, _IN_MEMORY_BYTES)
        self._count = self._bytes = 0
        if before is None:
            return
        rows: list[tuple[bytes, bytes, float, bytes]] = []
        with contextlib.suppress(sqlite3.Error):
            left = self._max_bytes
            for row in before.execute(_LATEST, (self._max_entries,)):
                left -= len(row[3])
                if left < 0:
                    break
                rows.append(row)
        before.close()
        for row in reversed(rows):
            self._put(row)


def _opened(where: str) -> sqlite3.Connection:
    made = sqlite3.connect(where, isolation_level=None, check_same_thread=False)
    made.executescript(_OPTIONS + _SCHEMA)
    return made

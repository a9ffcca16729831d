"""Answers of one server, kept outside its memory: what is remembered costs no resident bytes.

- They lie in an SQLite file that loses its name as it is made, so that the kernel removes it with
  the process however that ends; of it only a small cache is in memory. (SQLite's own nameless files
  cannot be read any more once the disk was full.)
- Small ones share one shelf; larger ones lie on the shelf of their method. Each shelf is bounded on
  its own, so that no answer that is large, and none of another method that is, pushes out a small.
- What goes for want of room leaves its name: it is known to have been done until it is too old.
- Where no file can be written, or the disk is full, the latest are kept in memory instead: fewer,
  but no answer is refused for that.
"""

import contextlib
import os
import sqlite3
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from regreen.rpc.logging import get

SMALL_BYTES = 1024
"""Answers up to this size are small."""
_SMALL = "small"
_OPTIONS = "PRAGMA journal_mode = MEMORY; PRAGMA synchronous = OFF; PRAGMA cache_size = -1024;"
_SCHEMA = """
CREATE TABLE answers (
  place INTEGER PRIMARY KEY, shelf TEXT NOT NULL, name BLOB NOT NULL UNIQUE, request BLOB NOT NULL,
  until_s REAL NOT NULL, answer BLOB NOT NULL
);
CREATE INDEX shelves ON answers (shelf, place);
"""
_ROW = "SELECT place, shelf, until_s, length(answer) FROM answers"
_NAMED = f"{_ROW} WHERE name = ?"
_OLDEST = f"{_ROW} WHERE shelf = ? ORDER BY place LIMIT 1"
_PUT = "INSERT INTO answers (shelf, name, request, until_s, answer) VALUES (?, ?, ?, ?, ?)"
_EMPTY = "UPDATE answers SET shelf = ?, answer = x'' WHERE place = ?"
_FIND = "SELECT shelf, request, answer, until_s FROM answers WHERE name = ?"
_LATEST = """
SELECT shelf, name, request, until_s, CASE WHEN length(answer) <= ? THEN answer END
FROM answers ORDER BY place DESC LIMIT ?
"""


class Fate(StrEnum):
    """What became of an answer."""

    KEPT = "kept"
    GONE = "gone"
    """There was one, and no room for it."""
    BROKEN = "broken"
    """There never was one: what was asked for was begun and broken off."""


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer as it was put."""

    request: bytes
    """Digest of what it answers."""
    answer: bytes = b""
    fate: Fate = Fate.KEPT


@dataclass(frozen=True, slots=True)
class Room:
    """How much is kept."""

    entries: int = 500_000
    """Small answers."""
    small_bytes: int = 128 << 20
    """Of small answers together."""
    large_bytes: int = 128 << 20
    """Of the larger answers of one method."""
    names: int = 1_000_000
    """Of answers that are gone, and of what was broken off."""

    def within(self, other: "Room") -> "Room":
        """The narrower of two in everything."""
        return Room(
            min(self.entries, other.entries),
            min(self.small_bytes, other.small_bytes),
            min(self.large_bytes, other.large_bytes),
            min(self.names, other.names),
        )


IN_MEMORY = Room(10_000, 8 << 20, 2 << 20, 50_000)
_Row = tuple[str, bytes, bytes, float, bytes]


@dataclass(slots=True)
class _Shelf:
    count: int = 0
    size_bytes: int = 0


@dataclass(slots=True)
class Answers:
    """Remembers bytes by name for a while."""

    ttl_s: float
    room: Room
    clock: Callable[[], float]
    in_memory: bool = False
    """Whether there was no room on the disk."""
    _shelves: dict[str, _Shelf] = field(default_factory=dict)
    _file: sqlite3.Connection | None = None

    def close(self) -> None:
        """Forget everything."""
        if self._file is not None:
            self._file.close()
        self._file = None
        self._shelves.clear()

    def find(self, name: bytes) -> Kept | None:
        """What is known under a name and is not too old."""
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
        found = self._file.execute(_FIND, (name,)).fetchone()
        if found is None or found[3] < self.clock():
            return None
        fate = Fate(found[0]) if found[0] in tuple(Fate) else Fate.KEPT
        return Kept(found[1], found[2], fate)

    def put(self, name: bytes, kept: Kept, method: str) -> None:
        """Keep an answer in the place of one that was too old; what is over a bound goes."""
        row = (self._shelf_of(kept, method), name, kept.request, self._until_s(), kept.answer)
        try:
            self._put(row)
        except sqlite3.Error as error:
            if self.in_memory:
                raise
            self._move_to_memory(error)
            self._put(row)

    def _until_s(self) -> float:
        return self.clock() + self.ttl_s

    @staticmethod
    def _shelf_of(kept: Kept, method: str) -> str:
        if kept.fate is not Fate.KEPT:
            return kept.fate
        return _SMALL if len(kept.answer) <= SMALL_BYTES else method

    def _is_over(self, shelf: str) -> bool:
        """Whether there is more on a shelf than it may hold."""
        held = self._shelves[shelf]
        if shelf == _SMALL:
            return held.count > self.room.entries or held.size_bytes > self.room.small_bytes
        if shelf in tuple(Fate):
            return held.count > self.room.names
        return held.size_bytes > self.room.large_bytes

    def _put(self, row: _Row) -> None:
        if self._file is None:
            self._file = _opened(self.in_memory)
        self._drop(_NAMED, row[1])
        if len(row[4]) > max(self.room.large_bytes, SMALL_BYTES):
            row = (Fate.GONE, *row[1:4], b"")
        self._file.execute(_PUT, row)
        self._count(row[0], 1, len(row[4]))
        now_s = self.clock()
        for shelf in list(self._shelves):
            while self._is_over(shelf) and self._shorten(shelf):
                pass
            while self._drop(_OLDEST, shelf, before_s=now_s):
                pass

    def _count(self, shelf: str, more: int, more_bytes: int) -> None:
        held = self._shelves.setdefault(shelf, _Shelf())
        held.count += more
        held.size_bytes += more_bytes

    def _shorten(self, shelf: str) -> bool:
        """Take the oldest from a shelf; its name stays known."""
        if shelf in tuple(Fate):
            return self._drop(_OLDEST, shelf)
        assert self._file is not None
        row = self._file.execute(_OLDEST, (shelf,)).fetchone()
        if row is None:
            return False
        self._file.execute(_EMPTY, (Fate.GONE, row[0]))
        self._count(shelf, -1, -row[3])
        self._count(Fate.GONE, 1, 0)
        while self._is_over(Fate.GONE) and self._drop(_OLDEST, Fate.GONE):
            pass
        return True

    def _drop(self, which: str, argument: bytes | str, before_s: float | None = None) -> bool:
        """Remove one row, if there is such; with `before_s`, only one that was kept until then."""
        assert self._file is not None
        row = self._file.execute(which, (argument,)).fetchone()
        if row is None or (before_s is not None and row[2] >= before_s):
            return False
        self._file.execute("DELETE FROM answers WHERE place = ?", row[:1])
        self._count(row[1], -1, -row[3])
        return True

    def _move_to_memory(self, error: sqlite3.Error) -> None:
        """Go on without a file; the latest answers come along, as far as they can be read."""
        get().warning("answers are kept in memory", error=str(error))
        before, self._file, self.in_memory = self._file, None, True
        self.room = self.room.within(IN_MEMORY)
        self._shelves.clear()
        if before is None:
            return
        rows: list[_Row] = []
        with contextlib.suppress(sqlite3.Error):
            left, left_bytes = self.room.entries, 2 * self.room.small_bytes
            asked = (self.room.large_bytes, self.room.names)
            for shelf, *facts, answer in before.execute(_LATEST, asked):
                left -= 1
                left_bytes -= len(answer or b"")
                known = shelf in tuple(Fate)
                if not known and (answer is None or min(left, left_bytes) < 0):
                    shelf, answer = Fate.GONE, b""
                rows.append((shelf, *facts, answer))
        before.close()
        for row in reversed(rows):
            self._put(row)


def _opened(in_memory: bool) -> sqlite3.Connection:
    if in_memory:
        return _made(":memory:")
    try:
        handle, name = tempfile.mkstemp(prefix="regreen-answers-", dir=_directory())
    except OSError as error:
        raise sqlite3.OperationalError(str(error)) from error
    os.close(handle)
    try:
        return _made(name)
    finally:
        os.unlink(name)


def _directory() -> str | None:
    """Where SQLite would put such a file: rather on a disk than in memory."""
    asked = (os.environ.get("SQLITE_TMPDIR"), os.environ.get("TMPDIR"), "/var/tmp")
    return next((path for path in asked if path and os.access(path, os.W_OK | os.X_OK)), None)


def _made(where: str) -> sqlite3.Connection:
    made = sqlite3.connect(where, isolation_level=None, check_same_thread=False)
    made.executescript(_OPTIONS + _SCHEMA)
    return made

"""A line for the beginning and the end of every mutation: who, what, when, and what came of it.

- The first is written before anything is done, and where it cannot be, nothing is done: no mutation
  is without a line. One without a second line was broken off.
- Lines are appended whole by one write; they outlive the process, however it ends.
- A line of which only a part fits is taken back from a regular file; where a part stays, of a
  process that was killed too, the next line begins after it. No line runs into another.
- No line holds a request's content or a token.
"""

import errno
import json
import os
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from regreen.rpc.errors import FailedPrecondition, ResourceExhausted
from regreen.rpc.logging import get


class Audit:
    """The lines of one service.

    Raises:
        FailedPrecondition: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            if not path.is_char_device() and not path.is_fifo():
                path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._handle = os.open(path, flags, 0o600)
            self._file = stat.S_ISREG(os.fstat(self._handle).st_mode)
            self._torn = self._file and not _ends_whole(path)
            """Whether what stands last is a part of a line."""
        except OSError as error:
            raise FailedPrecondition(
                f"audit: {path} cannot be opened ({error.strerror}); name another file"
            ) from error

    def begin(self, **facts: Any) -> None:
        """Say that a mutation begins.

        Raises:
            ResourceExhausted: it cannot be said, so it must not begin.
        """
        try:
            self._write("begun", facts)
        except OSError as error:
            raise ResourceExhausted(
                f"audit: {self._path} cannot be written ({error.strerror}); make room for it",
                retry_after_s=10.0,
            ) from error

    def end(self, **facts: Any) -> None:
        """Say what came of a mutation."""
        try:
            self._write("ended", facts)
        except OSError as error:
            get().error("the end of a mutation was not written", problem=str(error), **facts)

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)

    def _write(self, event: str, facts: dict[str, Any]) -> None:
        row = {"audit": event, "at": datetime.now(UTC).isoformat(), **facts}
        line = json.dumps(row, ensure_ascii=True).encode() + b"\n"
        if self._torn:
            line = b"\n" + line
        written = os.write(self._handle, line)
        if written != len(line):
            self._take_back(written)
            raise OSError(errno.ENOSPC, "only a part of a line could be written")
        self._torn = False

    def _take_back(self, written: int) -> None:
        """Remove what was written last; where that cannot be, remember that it is there."""
        if not written:
            return
        try:
            end = os.lseek(self._handle, 0, os.SEEK_CUR) if self._file else -1
            if os.fstat(self._handle).st_size == end:  # else somebody has written after it
                os.ftruncate(self._handle, end - written)
                return
        except OSError as error:
            get().warning("a part of an audit line stays", problem=str(error))
        self._torn = True


def _ends_whole(path: Path) -> bool:
    """Whether a file is empty or ends with a whole line; one that may only be written may not."""
    try:
        with path.open("rb") as file:
            if not file.seek(0, os.SEEK_END):
                return True
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"
    except PermissionError:
        return False

"""A line for the beginning and the end of every mutation: who, what, when, and what came of it.

- The first is written before anything is done, and where it cannot be, nothing is done: no mutation
  is without a line. One without a second line was broken off.
- Lines are appended whole by one write; they outlive the process, however it ends.
- No line holds a request's content or a token.
"""

import json
import os
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
        written = os.write(self._handle, line)
        if written != len(line):
            raise OSError(0, "only a part of a line was written")

"""Results of actions on the disk, and the list of actions that gave more than one.

- One small file per key below its state, written aside and renamed; a checksum comes first. A
  damaged or torn file is a miss and goes.
- Bounded by bytes: what was used least recently goes first. The time of use is the file's own, so
  the order survives a restart.
- What belongs to a deleted state goes with it, evidence included.
- Quarantined keys are never forgotten otherwise, and never answered from here.
- Any thread may call; the index is guarded by one lock.
"""

import base64
import binascii
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sandbox_svc.backends.base import Captured, EndReason, ExecResult
from sandbox_svc.backends.fds import writing

_MAGIC = b"regreen-action-1 "


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one run of an action ended, with what it takes to compare it with another."""

    result: ExecResult
    stdout_sha256: str
    """Of the whole stream, also of what was not kept."""
    stderr_sha256: str
    files_sha256: str = ""
    """Of what it changed; only where the files were kept."""
    child_id: str = ""
    """The state that the files became."""
    state_created_s: float = 0.0
    """Of the state that it ran on: a rebuilt one has the same id."""


@dataclass(frozen=True, slots=True)
class Quarantined:
    """An action whose runs differed, with the evidence."""

    key: str
    state_id: str
    argv: tuple[str, ...]
    created_s: float
    detail: str
    tenant: str = ""
    """Whose run it was."""


def encode(outcome: Outcome) -> bytes:
    """The file of an outcome."""
    result = outcome.result
    payload = {
        "outcome": {f.name: getattr(outcome, f.name) for f in fields(outcome)[1:]},
        "result": {
            "reason": result.reason.value,
            "exit_code": result.exit_code,
            "signal": result.signal,
            "wall_s": result.wall_s,
            "cpu_s": result.cpu_s,
            "peak_memory_bytes": result.peak_memory_bytes,
        },
        "stdout": _stream(result.stdout),
        "stderr": _stream(result.stderr),
    }
    return _sealed(payload)


def _sealed(payload: Mapping[str, Any]) -> bytes:
    body = json.dumps(payload, sort_keys=True).encode()
    return _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def _opened(data: bytes) -> Any:
    head, _, body = data.partition(b"\n")
    if head != _MAGIC + hashlib.sha256(body).hexdigest().encode():
        raise ValueError("the checksum does not fit")
    return json.loads(body)


def _stream(captured: Captured) -> list[Any]:
    head, tail = (base64.b64encode(part).decode() for part in (captured.head, captured.tail))
    return [head, tail, captured.total_bytes]


def decode(data: bytes) -> Outcome:
    """The outcome of a file.

    Raises:
        ValueError: it is damaged.
    """
    try:
        payload = _opened(data)
        out, err = (
            Captured(base64.b64decode(head), base64.b64decode(tail), int(total))
            for head, tail, total in (payload["stdout"], payload["stderr"])
        )
        parts = dict(payload["result"])
        reason = EndReason(parts.pop("reason"))
        return Outcome(ExecResult(reason, stdout=out, stderr=err, **parts), **payload["outcome"])
    except (KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise ValueError(f"not a result: {error}") from error


class ActionStore:
    """The results below one directory; blocking calls are for worker threads."""

    def __init__(self, home: Path, *, max_bytes: int) -> None:
        self._home, self._max_bytes = home, max_bytes
        self._index: OrderedDict[str, tuple[str, int]] = OrderedDict()
        self._bytes, self._lock = 0, threading.RLock()
        self._quarantined: dict[str, Quarantined] = {}

    def open(self, exists: Callable[[str], bool]) -> None:
        """Read what is there; drop what belongs to states that do not exist, or is damaged."""
        for name in ("results", "quarantine", "drafts"):
            (self._home / name).mkdir(parents=True, exist_ok=True)
        for draft in (self._home / "drafts").iterdir():
            draft.unlink(missing_ok=True)
        for folder in (self._home / "results").iterdir():
            if not exists(folder.name):
                shutil.rmtree(folder, ignore_errors=True)
        for _, key, state_id, size in sorted(self._files()):
            self._index[key] = state_id, size
            self._bytes += size
        self._evict()
        for path in sorted((self._home / "quarantine").iterdir()):
            self._open_evidence(path, exists)

    def _files(self) -> Iterator[tuple[float, str, str, int]]:
        for folder in (self._home / "results").iterdir():
            for path in folder.iterdir():
                info = path.stat()
                yield info.st_mtime, path.name, folder.name, info.st_size

    def _open_evidence(self, path: Path, exists: Callable[[str], bool]) -> None:
        try:
            found = _opened(path.read_bytes())
            found["argv"] = tuple(found["argv"])
            item = Quarantined(**found)
        except (OSError, ValueError, TypeError, KeyError):
            path.unlink(missing_ok=True)
            return
        if exists(item.state_id):
            self._quarantined[item.key] = item
        else:
            path.unlink(missing_ok=True)

    def _path(self, key: str, state_id: str) -> Path:
        return self._home / "results" / state_id / key

    def get(self, key: str) -> Outcome | None:
        """What an action gave, if that is known."""
        entry = self._index.get(key)
        if entry is None:
            return None
        path = self._path(key, entry[0])
        try:
            found = decode(path.read_bytes())
            os.utime(path)
        except (OSError, ValueError):
            self.remove(key)
            return None
        with self._lock:
            if key in self._index:
                self._index.move_to_end(key)
        return found

    def put(self, key: str, state_id: str, outcome: Outcome) -> None:
        """Keep what an action gave."""
        data = encode(outcome)
        with self._lock:
            self.remove(key)
            if len(data) > self._max_bytes:
                return
            self._write(self._path(key, state_id), data)
            self._index[key] = state_id, len(data)
            self._bytes += len(data)
            self._evict()

    def _write(self, path: Path, data: bytes) -> None:
        draft = self._home / "drafts" / secrets.token_hex(8)
        try:
            with writing():
                path.parent.mkdir(parents=True, exist_ok=True)
                draft.write_bytes(data)
                draft.rename(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise

    def _evict(self) -> None:
        while self._bytes > self._max_bytes and self._index:
            self.remove(next(iter(self._index)))

    def remove(self, key: str) -> None:
        """Forget what an action gave."""
        with self._lock:
            state_id, size = self._index.pop(key, ("", 0))
            if state_id:
                self._bytes -= size
                with contextlib.suppress(OSError):
                    self._path(key, state_id).unlink()

    def drop_state(self, state_id: str) -> None:
        """Forget everything about a state."""
        with self._lock:
            for key in [key for key, (owner, _) in self._index.items() if owner == state_id]:
                self.remove(key)
        with contextlib.suppress(OSError):
            (self._home / "results" / state_id).rmdir()
        for key, item in list(self._quarantined.items()):
            if item.state_id == state_id:
                del self._quarantined[key]
                (self._home / "quarantine" / key).unlink(missing_ok=True)

    def quarantine(self, item: Quarantined) -> None:
        """Never answer an action from here again; what was seen first stays the evidence."""
        self.remove(item.key)
        if item.key not in self._quarantined:
            self._quarantined[item.key] = item
            self._write(self._home / "quarantine" / item.key, _sealed(asdict(item)))

    def is_quarantined(self, key: str) -> bool:
        """Whether runs of an action were seen to differ."""
        return key in self._quarantined

    def list_quarantined(self) -> Sequence[Quarantined]:
        """Quarantined actions, oldest first."""
        return sorted(self._quarantined.values(), key=lambda item: (item.created_s, item.key))

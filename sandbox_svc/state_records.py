"""What is kept of a state, and what its record may hold: that may be damaged, or of another host.

- A state's id depends on its parent and on the action that made it, on nothing else.
- A value of another type than this service writes is refused by its name, before anything uses it;
  so are an environment and mounts that no sandbox could start with.
"""

import hashlib
import json
import posixpath
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sandbox_svc.backends.base import HOST_BASE, Mount

_FORMAT = 1
DEFAULT_CWD = "/work/repo"

_MAX_SECONDS, _MAX_BYTES = 1e10, 1 << 62
_MAX_PATH = 4096
_BASE = re.compile(r"host|image:sha256:[0-9a-f]{64}")


def _is_text(value: object) -> bool:
    """Whether a value is text that a message can carry: JSON can hold half a character."""
    return isinstance(value, str) and value.encode("utf-8", "ignore").decode() == value


def _is_list(value: object, check: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and all(map(check, value))


def _is_map(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_text, (*value, *value.values())))


def _is_mount(value: object) -> bool:
    if not isinstance(value, list) or [type(item) for item in value] != [str, str, bool]:
        return False
    return "\0" not in value[0] and _is_target(value[1])


def _is_target(path: str) -> bool:
    """Whether something can be mounted at a path: a plain one, and none that sandboxes make."""
    plain = path.startswith("/") and posixpath.normpath(path) == path and len(path) <= _MAX_PATH
    return plain and "\0" not in path and path.split("/")[1] not in ("", "proc", "dev", "sys")


def _is_env(value: object) -> bool:
    """Whether programs can be started with an environment."""
    if not isinstance(value, dict) or not _is_map(value):
        return False
    named = all(name and "=" not in name for name in value)
    return named and not any("\0" in text for text in (*value, *value.values()))


def _is_count(value: object, below: int = _MAX_BYTES) -> bool:
    return isinstance(value, int) and _is_number(value, below)


def _is_number(value: object, below: float = _MAX_SECONDS) -> bool:
    return isinstance(value, int | float) and 0 <= value < below and not isinstance(value, bool)


_REQUEST: Mapping[str, Callable[[object], bool]] = {
    **dict.fromkeys(("method", "host", "path", "detail", "state_id"), _is_text),
    **dict.fromkeys(("sent_sha256", "received_sha256"), _is_text),
    **dict.fromkeys(("port", "status"), lambda value: _is_count(value, 1 << 31)),
    **dict.fromkeys(("sent_bytes", "received_bytes", "number"), lambda value: _is_count(value)),
    "created_s": _is_number,
    "allowed": lambda value: isinstance(value, bool),
}
"""Of one request of a preparation, see `egress_log.Record.facts`."""


def _is_request(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() != _REQUEST.keys():
        return False
    return all(check(value[name]) for name, check in _REQUEST.items())


def _is_requests(value: object) -> bool:
    """Whether a value is what `fetches.decode` can read."""
    try:
        return isinstance(value, str) and _is_list(json.loads(value), _is_request)
    except (ValueError, RecursionError):
        return False


def _is_metadata(value: object) -> bool:
    """Whether metadata has a baseline and requests that can be shown, or none."""
    if not isinstance(value, dict) or not _is_requests(value.get("egress", "[]")):
        return False
    baseline = value.get("baseline")
    if not isinstance(baseline, dict):
        return baseline is None
    return (
        _is_list(baseline.get("passing"), _is_text)
        and _is_list(baseline.get("failing"), _is_text)
        and _is_text(baseline.get("log"))
        and _is_number(baseline.get("seconds"))
    )


_CHECKS: Mapping[str, Callable[[object], bool]] = {
    **dict.fromkeys(("id", "parent_id", "spec_sha256", "python", "host", "boot"), _is_text),
    **dict.fromkeys(("layers", "ancestors", "tenants"), lambda value: _is_list(value, _is_text)),
    "created_s": _is_number,
    "size_bytes": lambda value: _is_count(value),
    "mounts": lambda value: _is_list(value, _is_mount),
    "env": _is_env,
    "labels": _is_map,
    "metadata": _is_metadata,
    "durable": lambda value: isinstance(value, bool),
    "base": lambda value: isinstance(value, str) and bool(_BASE.fullmatch(value)),
    "cwd": lambda value: _is_text(value) and str(value).startswith("/") and "\0" not in str(value),
}


def check_record(fields: Mapping[str, object]) -> None:
    """Refuse a record whose values are others than this service writes.

    Raises:
        ValueError: names the field.
    """
    for name, check in _CHECKS.items():
        if not check(fields[name]):
            raise ValueError(
                f"not a state record: {name} is of another type or can be of no sandbox"
            )


def image_action(config_sha256: str) -> str:
    """The action that makes the root state of an image."""
    return f"image sha256:{config_sha256}"


def state_id(parent_id: str, action: str) -> str:
    """The id of the state that `action` makes of `parent_id`."""
    digest = hashlib.sha256(f"regreen-state\n{parent_id}\n{action}".encode()).hexdigest()
    return f"st_{digest[:32]}"


@dataclass(frozen=True, slots=True)
class State:
    """An immutable snapshot of a prepared file system."""

    id: str
    layers: tuple[str, ...]
    parent_id: str = ""
    spec_sha256: str = ""
    created_s: float = 0.0
    """Unix time."""
    size_bytes: int = 0
    python: str = ""
    mounts: tuple[Mount, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    host: str = ""
    boot: str = ""
    durable: bool = False
    base: str = HOST_BASE
    """Where its programs come from: the host, or `image:sha256:` and a configuration's digest."""
    cwd: str = DEFAULT_CWD
    """Where commands run that name no directory."""
    ancestors: tuple[str, ...] = ()
    """Ids of those it was made from, the root first; older records name the parent alone."""
    tenants: tuple[str, ...] = ("",)
    """Who made it, first to last; empty text for nobody, as in older records."""

    def encode(self) -> bytes:
        """The record as JSON."""
        fields = asdict(self)
        fields["mounts"] = [[str(m.source), m.target, m.read_only] for m in self.mounts]
        return json.dumps({"format": _FORMAT, **fields}, sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes) -> "State":
        """The state of a record.

        Raises:
            ValueError: the bytes are no record of this format.
        """
        fields = json.loads(data)
        if not isinstance(fields, dict) or fields.pop("format", None) != _FORMAT:
            raise ValueError("not a state record")
        later = {"base": HOST_BASE, "cwd": DEFAULT_CWD, "ancestors": [], "tenants": [""]}
        fields = {**later, **fields}
        try:
            check_record(fields)
            fields["mounts"] = tuple(Mount(Path(a), b, c) for a, b, c in fields["mounts"])
            fields["layers"] = tuple(fields["layers"])
            fields["ancestors"] = tuple(fields["ancestors"])
            fields["tenants"] = tuple(fields["tenants"])
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a state record: {error}") from error

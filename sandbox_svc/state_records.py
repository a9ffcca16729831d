"""What the record of a state may hold: its file may be damaged, or come from another host.

- A value of another type than this service writes is refused by its name, before anything uses it;
  so are an environment and mounts that no sandbox could start with.
"""

import json
import posixpath
import re
from collections.abc import Callable, Mapping

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
    **dict.fromkeys(("layers", "ancestors"), lambda value: _is_list(value, _is_text)),
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

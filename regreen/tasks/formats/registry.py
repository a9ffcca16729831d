"""The formats by name, and which one a path is.

- What a path is follows from its content, never from its place.
- A path that could be nothing known is refused with the list of what is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import cast

from regreen.rpc.errors import InvalidArgument
from regreen.tasks.formats import bump, harbor, parquet, swebench, swesmith
from regreen.tasks.formats.items import Foreign, Format, Native
from regreen.tasks.formats.rows import read_rows

OURS = "regreen"
"""Records of our own, in JSON Lines."""
PROJECT = "project"
"""A project with failing tests, with or without a `task.toml`: `regreen tasks add` takes it."""
_MODULES: tuple[ModuleType, ...] = (swebench, swesmith, harbor, bump, parquet)
FORMATS: Mapping[str, Format] = {module.name: cast("Format", module) for module in _MODULES}
_MARKS = ("pyproject.toml", "setup.py", "setup.cfg", "requirements.txt", "requirements.lock")


@dataclass(frozen=True, slots=True)
class Found:
    """What was read of a path."""

    foreign: tuple[Foreign, ...]
    native: tuple[Native, ...]
    repeated: int
    """Rows that say again what another says."""


def format_of(name: str) -> Format:
    """A format by its name.

    Raises:
        InvalidArgument: there is none.
    """
    if name not in FORMATS:
        known = ", ".join(FORMATS)
        raise InvalidArgument("format", f"{name!r} is not known", f"give one of {known}")
    return FORMATS[name]


def detect(path: Path) -> str:
    """The name of a path's format.

    Raises:
        InvalidArgument: it is none that is known.
    """
    known = f"name one of {OURS}, {', '.join(FORMATS)}, or a project's directory"
    if not path.exists():
        raise InvalidArgument("path", f"{path} cannot be read: No such file", known)
    if path.is_dir():
        found = _directory(path)
    elif path.suffix == ".parquet":
        found = parquet.name
    else:
        found = _rows(path)
    if not found:
        raise InvalidArgument("path", f"{path} is of no known format", known)
    return found


def _directory(path: Path) -> str:
    if harbor.is_task(path):
        return harbor.name
    if (path / "task.toml").is_file() or any((path / mark).exists() for mark in _MARKS):
        return PROJECT
    if any(harbor.is_task(config.parent) for config in path.glob("*/task.toml")):
        return harbor.name
    only = only_file(path)
    if only != path:
        return detect(only)
    first = next(iter(sorted(path.glob("*.json"))), None)
    return _rows(first) if first is not None else ""


def only_file(path: Path) -> Path:
    """The one file of tasks in a directory, as an export makes it; else the path itself."""
    inside = [p for p in path.glob("*") if p.suffix in (".jsonl", ".parquet") and p.is_file()]
    return inside[0] if len(inside) == 1 else path


def _rows(path: Path) -> str:
    rows = read_rows(path)
    keys = set(rows[0].row) if rows else set()
    if "pins_fail" in keys or {"id", "kind"} <= keys:
        return OURS
    if "breakingCommit" in keys:
        return bump.name
    if "instance_id" in keys:
        return swesmith.name if "image_name" in keys else swebench.name
    return ""


def read(path: Path, format: str) -> Found:
    """Every task of a path; one that is there twice in the same words counts once.

    Raises:
        InvalidArgument: names file, line, field and remedy; nothing is read by halves.
    """
    foreign: dict[str, Foreign] = {}
    native: dict[str, Native] = {}
    repeated = 0
    for item in format_of(format).read(only_file(path)):
        if isinstance(item, Native):
            id, new = item.task.id, item.task.id not in native
            same = not new and native[id].task == item.task
            native[id] = item
        else:
            id, new = item.id, item.id not in foreign
            same = not new and foreign[id] == item
            foreign[id] = item
        if not new and not same:
            raise InvalidArgument(path.name, f"has two tasks {id}", "give each its own id")
        repeated += not new
    return Found(tuple(foreign.values()), tuple(native.values()), repeated)

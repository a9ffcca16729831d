"""Reads and writes task files; every refusal names the file, line, field and remedy.

- A file with one bad line is refused as a whole; nothing is skipped silently.
- Writing is canonical: one record per line, keys in the model's order, defaults left out.
- The shipped task set is package data and read only through here.
"""

import os
import tempfile
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from regreen.rpc.errors import InvalidArgument
from regreen.tasks.model import DistributionRecord, Evidence, TaskRecord

_Model = TypeVar("_Model", bound=BaseModel)
MAX_LINE_BYTES = 8 << 20
SHIPPED = Path(__file__).with_name("data")
"""The task set that comes with Regreen, where it may be written."""


def parse_lines(text: str, model: type[_Model], source: str) -> list[_Model]:
    """Records of a JSON Lines text.

    Raises:
        InvalidArgument: a line is malformed; says which, which field and what to do.
    """
    records: list[_Model] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{source} line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise InvalidArgument(where, "is too long", f"keep it under {MAX_LINE_BYTES} bytes")
        try:
            records.append(model.model_validate_json(line))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            path = ".".join(str(part) for part in first["loc"])
            remedy = f"give a {model.__name__} as described in regreen/tasks/model.py"
            raise InvalidArgument(
                f"{where} field {path or '(all)'}", first["msg"], remedy
            ) from error
    return records


def dump_lines(records: Iterable[BaseModel]) -> str:
    """The canonical text of records."""
    return "".join(record.model_dump_json(exclude_defaults=True) + "\n" for record in records)


def write_lines(path: Path, records: Iterable[BaseModel]) -> None:
    """Write records to a file, which is whole with them or as it was, whatever happens meanwhile.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(dump_lines(records))
            file.flush()
            os.fchmod(file.fileno(), path.stat().st_mode if path.exists() else 0o644)
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        Path(draft).unlink(missing_ok=True)


def load_tasks(path: Path) -> list[TaskRecord]:
    """Tasks of a file; ids must be unique."""
    return _unique(parse_lines(_read(path), TaskRecord, path.name), path.name)


def load_distributions(path: Path) -> dict[str, DistributionRecord]:
    """Releases of a file by `name==version`."""
    records = parse_lines(_read(path), DistributionRecord, path.name)
    return {record.pin: record for record in records}


def load_evidence(path: Path) -> list[Evidence]:
    """Evidence of a file; none where there is no such file."""
    return parse_lines(_read(path), Evidence, path.name) if path.exists() else []


def shipped_evidence() -> list[Evidence]:
    """What the gate saw of the shipped tasks."""
    data = resources.files("regreen.tasks").joinpath("data/evidence.jsonl")
    return parse_lines(data.read_text("utf-8"), Evidence, "evidence.jsonl")


def shipped_tasks() -> list[TaskRecord]:
    """The task set that comes with Regreen, whatever its status."""
    text = resources.files("regreen.tasks").joinpath("data/tasks.jsonl").read_text("utf-8")
    return _unique(parse_lines(text, TaskRecord, "tasks.jsonl"), "tasks.jsonl")


def shipped_distributions() -> Mapping[str, DistributionRecord]:
    """The releases that the shipped tasks refer to."""
    data = resources.files("regreen.tasks").joinpath("data/distributions.jsonl")
    records = parse_lines(data.read_text("utf-8"), DistributionRecord, "distributions.jsonl")
    return {record.pin: record for record in records}


def _unique(tasks: list[TaskRecord], source: str) -> list[TaskRecord]:
    seen: set[str] = set()
    for task in tasks:
        if task.id in seen:
            raise InvalidArgument(source, f"has task {task.id} twice", "give each its own id")
        seen.add(task.id)
    return tasks


def _read(path: Path) -> str:
    remedy = "name a file of JSON Lines"
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise InvalidArgument("path", f"{path} cannot be read: {error.strerror}", remedy) from error
    except UnicodeDecodeError as error:
        raise InvalidArgument("path", f"{path} is not UTF-8", remedy) from error

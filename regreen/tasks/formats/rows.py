"""Rows of JSON files, read with the place of everything that is wrong.

- A file is JSON (one object, or a list of objects) or JSON Lines; one bad row refuses the file.
- Places are "NAME line N" in JSON Lines and "NAME row N" in a list, from 1.
- Whatever a row holds, it is either something that a message and a file can hold, or refused.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regreen.rpc.errors import InvalidArgument
from regreen.tasks.reading import bounded

MAX_FILE_BYTES = 512 << 20
MAX_ROW_BYTES = 8 << 20
"""Of one task: what a message to the dataset service holds."""
MAX_NAME = 500
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Placed:
    """A row and where it stands."""

    where: str
    row: Row

    def text(self, name: str, *, required: bool = True) -> str:
        """A field of text; an absent one is empty unless it is required.

        Raises:
            InvalidArgument: it is absent, empty or no text.
        """
        value = self.row.get(name)
        if value is None and not required:
            return ""
        if not isinstance(value, str) or (required and not value.strip()):
            problem = "is missing" if name not in self.row else f"is {_told(value)}, not text"
            raise InvalidArgument(f"{self.where} field {name}", problem, "give a text")
        return value

    def name(self, name: str, *, required: bool = True) -> str:
        """A field that names something: one short line of text that a terminal can show.

        Raises:
            InvalidArgument: it is absent, no text, too long, or has control characters.
        """
        value = self.text(name, required=required)
        field = f"{self.where} field {name}"
        if len(value) > MAX_NAME:
            problem = f"has {len(value)} characters"
            raise InvalidArgument(field, problem, f"give at most {MAX_NAME}")
        if _CONTROL.search(value):
            raise InvalidArgument(field, f"{value[:80]!r} has control characters", "leave them out")
        return value

    def document(self) -> Row:
        """The row, once it is known that it can be stored and written again as it is.

        Raises:
            InvalidArgument: a value is no JSON, or no Unicode; or it is too large.
        """
        try:
            size = len(json.dumps(self.row, ensure_ascii=False, allow_nan=False).encode())
        except (TypeError, ValueError, RecursionError) as error:
            problem = f"has what no JSON text can hold ({type(error).__name__}: {_line(error)})"
            remedy = "give texts of Unicode, finite numbers, lists and objects"
            raise InvalidArgument(self.where, problem, remedy) from error
        if size > MAX_ROW_BYTES:
            remedy = f"keep it under {MAX_ROW_BYTES >> 20} MiB"
            raise InvalidArgument(self.where, f"has {size} bytes", remedy)
        return self.row

    def ids(self, name: str) -> tuple[str, ...]:
        """A field of test ids: a list, or the JSON text of one.

        Raises:
            InvalidArgument: it is absent, or anything else.
        """
        field = f"{self.where} field {name}"
        remedy = 'give a list of test ids, or its JSON text, for example ["tests/test_a.py::b"]'
        if name not in self.row:
            raise InvalidArgument(field, "is missing", remedy)
        value = self.row[name]
        if isinstance(value, str):
            try:
                value = parsed(value)
            except ValueError as error:
                raise InvalidArgument(field, f"is no JSON: {error}", remedy) from error
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise InvalidArgument(field, f"is {_told(value)}", remedy)
        for place, id in enumerate(value, 1):
            if not isinstance(id, str) or not id or "\0" in id:
                raise InvalidArgument(field, f"has {_told(id)} at place {place}", remedy)
        return tuple(value)


def read_rows(path: Path) -> list[Placed]:
    """Every row of a JSON or JSON Lines file.

    Raises:
        InvalidArgument: the file cannot be read, or a row is no object.
    """
    text = read_file(path).decode("utf-8")
    if path.suffix == ".jsonl" or (path.suffix != ".json" and _looks_like_lines(text)):
        return _lines(path, text)
    try:
        document = parsed(text)
    except ValueError as error:
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        remedy = "give JSON, or JSON Lines in a file named .jsonl"
        raise InvalidArgument(f"{path.name}{line}", f"is no JSON: {error}", remedy) from error
    if isinstance(document, dict):
        return [Placed(path.name, document)]
    if not isinstance(document, list):
        problem = f"is {_told(document)}"
        raise InvalidArgument(path.name, problem, "give an object or a list of objects")
    return [placed(f"{path.name} row {n}", row) for n, row in enumerate(document, 1)]


def read_file(path: Path) -> bytes:
    """The bytes of a file of bounded size.

    Raises:
        InvalidArgument: it cannot be read, is no UTF-8, or is too large.
    """
    data = bounded(path, path.name, MAX_FILE_BYTES)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument(path.name, f"is not UTF-8: {error}", "write it as UTF-8") from error
    return data


def parsed(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or nested too deeply to be one of a task.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _lines(path: Path, text: str) -> list[Placed]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            rows.append(placed(where, parsed(line)))
        except ValueError as error:
            if isinstance(error, InvalidArgument):
                raise
            raise InvalidArgument(
                where, f"is no JSON: {error}", "write one object a line"
            ) from error
    return rows


def placed(where: str, row: Any) -> Placed:
    """A row, which must be an object.

    Raises:
        InvalidArgument: it is none.
    """
    if not isinstance(row, dict):
        raise InvalidArgument(where, f"is {_told(row)}", "give an object")
    return Placed(where, row)


def _looks_like_lines(text: str) -> bool:
    return "\n{" in text.strip() and text.lstrip().startswith("{")


def _line(error: Exception) -> str:
    return str(error).replace("\n", " ")[:200]


def _told(value: object) -> str:
    kind = type(value).__name__
    return kind if isinstance(value, list | dict) else f"{kind} {str(value)[:40]!r}"

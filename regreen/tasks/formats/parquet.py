"""Parquet: the columns of SWE-bench, so that its tools read it, and three of our own.

- `format` says where a row comes from, `document` holds a foreign task as it was, `regreen` one of
  ours whole; every format travels through it unchanged.
- Needs pyarrow, which is imported when it is used.
"""

import importlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regreen.rpc.errors import InvalidArgument, MissingDependency
from regreen.tasks.formats import bump, harbor, swebench, swesmith
from regreen.tasks.formats.extension import KEY
from regreen.tasks.formats.items import Foreign, Item, LeftOut, Native, Written
from regreen.tasks.formats.rows import Placed

name = "parquet"
FILE = "tasks.parquet"
COLUMNS = (
    "repo",
    "instance_id",
    "base_commit",
    "patch",
    "test_patch",
    "problem_statement",
    "hints_text",
    "created_at",
    "version",
    "FAIL_TO_PASS",
    "PASS_TO_PASS",
    "environment_setup_commit",
    "image",
    "eval_script",
    "log_parser",
    "eval_type",
    "difficulty",
    "split",
    "status",
    "format",
    "document",
    KEY,
)


def read(path: Path) -> list[Foreign | Native]:
    """Tasks of a file: one of ours, or one of instances of SWE-bench or SWE-smith.

    Raises:
        InvalidArgument: names the row, the column and the remedy.
        MissingDependency: pyarrow is not installed.
    """
    arrow, parquet = _arrow()
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, arrow.ArrowException) as error:
        remedy = "give a Parquet file"
        raise InvalidArgument(path.name, f"cannot be read: {error}", remedy) from error
    return [_task(Placed(f"{path.name} row {n}", row)) for n, row in enumerate(rows, 1)]


def write(items: Sequence[Item], out: Path) -> Written:
    """Write all tasks as one file.

    Raises:
        MissingDependency: pyarrow is not installed.
    """
    arrow, parquet = _arrow()
    written = Written()
    rows = []
    for item in items:
        try:
            rows.append(_row(item))
        except LeftOut as reason:
            written.left_out[item.task.id] = str(reason)
    schema = arrow.schema([(column, arrow.string()) for column in COLUMNS])
    path = out / FILE
    parquet.write_table(arrow.Table.from_pylist(rows, schema), path)
    written.paths, written.count = [path], len(rows)
    return written


def _arrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingDependency("Parquet needs pyarrow: pip install pyarrow") from error


def _task(placed: Placed) -> Foreign | Native:
    row = {key: value for key, value in placed.row.items() if value is not None}
    document = row.get("document", "")
    if not document:
        read_one = swesmith.instance if "image_name" in row else swebench.instance
        return read_one(Placed(placed.where, row))
    try:
        inner = json.loads(document)
    except ValueError as error:
        field = f"{placed.where} field document"
        raise InvalidArgument(field, f"is no JSON: {error}", "export it again") from error
    return of_document(Placed(f"{placed.where} field document", inner), row)


def of_document(placed: Placed, row: dict[str, Any]) -> Foreign | Native:
    """A foreign task from its own document.

    Raises:
        InvalidArgument: the format is not known, or the document is none of it.
    """
    format = row.get("format", "")
    readers = {
        swebench.name: swebench.instance,
        swesmith.name: swesmith.instance,
        bump.name: bump.update,
    }
    if format in readers:
        return readers[format](placed)
    if format == harbor.name:
        return _harbor(placed, row)
    field = placed.where.replace("document", "format")
    raise InvalidArgument(field, f"{format!r} is not known", f"give {', '.join(readers)} or harbor")


def _harbor(placed: Placed, row: dict[str, Any]) -> Foreign | Native:
    """A directory of Harbor, put together again and read as one."""
    files = placed.row.get("files")
    if not isinstance(files, dict):
        raise InvalidArgument(f"{placed.where} field files", "is no object", "export it again")
    with tempfile.TemporaryDirectory(prefix="regreen-harbor-") as folder:
        target = Path(folder) / str(row.get("repo", "task")).rpartition("/")[2]
        harbor.restore(files, target)
        return harbor.read(target)[0]


def _row(item: Item) -> dict[str, str]:
    task = item.task
    common = {
        "instance_id": task.id,
        "split": task.split,
        "version": task.environment.version,
        "repo": task.environment.package,
        "FAIL_TO_PASS": json.dumps(list(task.fail_to_pass)),
        "PASS_TO_PASS": "[]",
    }
    if not task.HasField("foreign"):
        return {**common, **swebench.row(item)}
    document = json.loads(task.foreign.document_json)
    shown = {
        column: value if isinstance(value, str) else json.dumps(value)
        for column, value in document.items()
        if column in COLUMNS and value is not None
    }
    ours = {"format": task.foreign.format, "document": task.foreign.document_json}
    return {**common, **shown, **ours}

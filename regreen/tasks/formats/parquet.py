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
from regreen.tasks.formats.rows import MAX_FILE_BYTES, Placed, parsed
from regreen.tasks.formats.rows import placed as as_placed

name = "parquet"
FILE = "tasks.parquet"
_ROWS = 64
"""Rows that are unpacked at a time."""
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
    found: list[Foreign | Native] = []
    size = 0
    try:
        source = parquet.ParquetFile(path)
        for batch in source.iter_batches(_ROWS):  # a small file may hold large columns
            size += batch.nbytes
            if size > MAX_FILE_BYTES:
                remedy = f"split it into files of under {MAX_FILE_BYTES >> 20} MiB, unpacked"
                raise InvalidArgument(path.name, "is too large", remedy)
            for row in batch.to_pylist():
                found.append(_task(Placed(f"{path.name} row {len(found) + 1}", row)))
    except (OSError, arrow.ArrowException) as error:
        remedy = "give a Parquet file"
        raise InvalidArgument(path.name, f"cannot be read: {error}", remedy) from error
    return found


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
    document = Placed(placed.where, row).text("document", required=False)
    if not document:
        read_one = swesmith.instance if "image_name" in row else swebench.instance
        return read_one(Placed(placed.where, row))
    try:
        inner = parsed(document)
    except ValueError as error:
        field = f"{placed.where} field document"
        raise InvalidArgument(field, f"is no JSON: {error}", "export it again") from error
    return of_document(as_placed(f"{placed.where} field document", inner), row)


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
    if isinstance(format, str) and format in readers:
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
    named = Placed(placed.where.removesuffix(" field document"), row).name("repo", required=False)
    with tempfile.TemporaryDirectory(prefix="regreen-harbor-") as folder:
        last = named.rpartition("/")[2]
        safe = last not in ("", ".", "..") and len(last.encode()) < 256
        target = Path(folder) / (last if safe else "task")
        target.mkdir()
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

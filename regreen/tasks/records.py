"""Imported records, kept on disk by digest: what a gate needs beyond the stored task.

- A file is named by the sha256 of its content and appears whole or not at all.
- A stored task names its record by the label `record_sha256`; the releases that a record refers to
  are those of the task's own environment, so that nothing else has to be kept.
- A damaged or absent file is no record; it is never guessed.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from regreen.dataset import v1 as pb
from regreen.rpc.errors import InvalidArgument
from regreen.sandbox import v1 as sandbox_pb
from regreen.tasks.model import DistributionRecord, FileRecord, TaskRecord

RECORD_LABEL = "record_sha256"
FOLDER = "tasks"
"""Where a stack's home keeps the records."""


def record_sha256(record: TaskRecord) -> str:
    """Digest of a record."""
    return hashlib.sha256(_content(record)).hexdigest()


class RecordStore:
    """The records below a directory."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, record: TaskRecord) -> None:
        """Keep a record.

        Raises:
            InvalidArgument: the directory cannot be written.
        """
        path = self._path(record_sha256(record))
        if path.exists():
            return
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(_content(record))
            partial.replace(path)
        except OSError as error:
            raise InvalidArgument("home", str(error), "name a directory you can write") from error

    def get(self, sha256: str) -> TaskRecord | None:
        """The record of a digest, if it is here and whole."""
        try:
            record = TaskRecord.model_validate_json(self._path(sha256).read_bytes())
        except (OSError, ValidationError):
            return None
        return record if record_sha256(record) == sha256 else None

    def of_tasks(self, tasks: Iterable[pb.Task], shipped: Iterable[TaskRecord]) -> list[TaskRecord]:
        """The records of tasks; a task whose record is not to be had is left out."""
        known = {record_sha256(record): record for record in shipped}
        wanted = [task.labels[RECORD_LABEL] for task in tasks if RECORD_LABEL in task.labels]
        found = [known.get(sha256) or self.get(sha256) for sha256 in wanted]
        return [record for record in found if record is not None]

    def _path(self, sha256: str) -> Path:
        return self._root / f"{Path(sha256).name}.json"


def releases_of(spec: sandbox_pb.EnvironmentSpec) -> dict[str, DistributionRecord]:
    """Every release that an environment names, with its files, by `name==version`."""
    records = [
        DistributionRecord(
            name=pin.name,
            version=pin.version,
            files=[FileRecord(filename=f.filename, sha256=f.sha256) for f in pin.files],
        )
        for pin in (*spec.pins, *spec.wheelhouse, *spec.build_pins)
    ]
    return {record.pin: record for record in records}


def _content(record: TaskRecord) -> bytes:
    unset = set() if record.egress else {"egress"}  # digests of older records hold
    return record.model_dump_json(exclude=unset).encode()

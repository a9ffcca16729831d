"""The part of a foreign file that is ours: a whole task, under a name of its own.

- Other systems ignore it; with it a task comes back equal, without it only what the format holds.
- What a service decided about the task is left out: whoever reads it, gates it.
- A file whose visible part says other than this part is refused, never guessed.
"""

from collections.abc import Iterable
from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from pydantic import ValidationError

from regreen.dataset import v1 as pb
from regreen.rpc.errors import InvalidArgument
from regreen.tasks.formats.items import DECIDED_FIELDS, Item, Native, compact
from regreen.tasks.formats.rows import parsed
from regreen.tasks.model import TaskRecord
from regreen.tasks.records import RECORD_LABEL, record_sha256

KEY = "regreen"
_VERSION = 1


def undecided(task: pb.Task) -> pb.Task:
    """The task without what its service decided."""
    copy = pb.Task()
    copy.CopyFrom(task)
    for name in DECIDED_FIELDS:
        copy.ClearField(name)  # type: ignore[arg-type]
    return copy


def encode(item: Item) -> str:
    """A task as the text of the extension."""
    document: dict[str, Any] = {
        "version": _VERSION,
        "task": MessageToDict(undecided(item.task), preserving_proto_field_name=True),
    }
    if item.record is not None:
        document["record"] = item.record.model_dump(mode="json", exclude_defaults=True)
    return compact(document)


def decode(text: str, where: str, *, id: str, fail_to_pass: Iterable[str]) -> Native:
    """The task of an extension; `id` and `fail_to_pass` are what the visible part says.

    Raises:
        InvalidArgument: it is damaged, or says other than the visible part.
    """
    field = f"{where} field {KEY}"
    remedy = f"export it again, or remove {KEY!r} to import what the format itself holds"
    try:
        document = parsed(text)
        if document.get("version") != _VERSION:
            problem = f"has version {document.get('version')!r}, not {_VERSION}"
            raise InvalidArgument(field, problem, "use the release that wrote it")
        task = undecided(ParseDict(document["task"], pb.Task()))
        kept = document.get("record")
        record = TaskRecord.model_validate(kept) if kept is not None else None
    except (ParseError, ValidationError, ValueError, LookupError, AttributeError, TypeError,
            RecursionError) as error:  # fmt: skip
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(field, f"cannot be read: {_told(error)}", remedy) from error
    if task.id != id:
        raise InvalidArgument(field, f"is of task {task.id!r}, the row of {id!r}", remedy)
    if sorted(set(fail_to_pass)) != sorted(task.fail_to_pass):
        raise InvalidArgument(field, "has other failing tests than the row", remedy)
    of_task = record is None or (
        task.labels.get(RECORD_LABEL) == record_sha256(record)
        and task.id in (record.id, f"{record.id}@{task.environment.python}")
        and (task.labels.get("control") == "true") == record.control
    )
    if not of_task:
        raise InvalidArgument(field, "has a record that is not that of its task", remedy)
    return Native(task, record)


def _told(error: Exception) -> str:
    """What is wrong, on one line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"record.{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).replace("\n", " ")[:300]

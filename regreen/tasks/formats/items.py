"""What readers give and writers take.

- `Foreign` is a task of another system with its document as it was, so that it is written again
  unchanged; it names what it needs before it can be prepared.
- `Native` is a task of ours that went through another format and came back whole.
- `Item` is a stored task with all that a writer may want to say of it.
- What the service decides (status, State, log, times) is no part of either.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from regreen.common import v1 as common_pb
from regreen.dataset import v1 as pb
from regreen.rpc.errors import InvalidArgument
from regreen.sandbox import v1 as sandbox_pb
from regreen.tasks.model import TaskRecord
from regreen.tasks.patch import unified_from

FOREIGN_BUILDER = "foreign"
DECIDED_FIELDS = (
    "status",
    "state_id",
    "error_log",
    "verify_time",
    "validation_time",
    "create_time",
)
"""Fields of a task that the service that holds it decides."""
_PREFERRED = ("source-edit", "rules", "upstream", "patch", "pins-restored")


@dataclass(frozen=True, slots=True)
class Foreign:
    """A task of another system."""

    format: str
    id: str
    package: str
    document: Mapping[str, Any]
    needs: tuple[str, ...]
    """What it waits for; an image as "image NAME"."""
    kind: str
    version: str = ""
    fail_to_pass: tuple[str, ...] = ()
    pass_to_pass_count: int = 0
    split: str = "test"
    category: str = ""
    keep_new: bool = False
    """Whether the new version must stay, so that restoring the old one is no fix."""
    culprit: tuple[str, str, str] = ("", "", "")
    """Name, version before, version in the broken state."""
    licence: str = ""

    def message(self) -> pb.Task:
        """The task as the dataset service stores it."""
        ids = sorted(set(self.fail_to_pass))
        name, good, bad = self.culprit
        task = pb.Task(
            id=self.id,
            kind=self.kind,
            environment=sandbox_pb.EnvironmentSpec(
                builder=FOREIGN_BUILDER, package=self.package, version=self.version
            ),
            fail_to_pass=ids,
            fail_to_pass_count=len(ids),
            pass_to_pass_count=self.pass_to_pass_count,
            category=self.category,
            modes=[common_pb.MODE_KEEP_NEW if self.keep_new else common_pb.MODE_ANY_FIX],
            culprit=name,
            culprit_version=bad,
            culprit_good_version=good,
            split=self.split,
            labels={"format": self.format},
            foreign=pb.ForeignTask(
                format=self.format, document_json=compact(self.document), needs=self.needs
            ),
        )
        if self.licence:
            task.labels["licence"] = self.licence
        return task


@dataclass(frozen=True, slots=True)
class Native:
    """A task of ours that was read from a file."""

    task: pb.Task
    record: TaskRecord | None = None
    tree: bytes = b""
    """The project's files as a tar archive, where the task has a tree."""


@dataclass(frozen=True, slots=True)
class Item:
    """A stored task and what writers need of it."""

    task: pb.Task
    record: TaskRecord | None = None
    pass_to_pass: tuple[str, ...] = ()
    before: Mapping[str, bytes] = field(default_factory=dict)
    """Files of the broken State that its fixes change."""
    tree: bytes = b""


@dataclass(slots=True)
class Written:
    """What a writer wrote."""

    paths: list[Path] = field(default_factory=list)
    count: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    """Task id, or reason of a row, to why it is not there."""


class LeftOut(Exception):
    """Why a task cannot be written in a format."""


class Format(Protocol):
    """One format: a pair of functions."""

    name: str

    def read(self, path: Path) -> list[Foreign | Native]:
        """Tasks of a file or directory.

        Raises:
            InvalidArgument: names file, line, field and remedy.
        """
        ...

    def write(self, items: Sequence[Item], out: Path) -> Written:
        """Write tasks below the directory `out`."""
        ...


def compact(document: Mapping[str, Any]) -> str:
    """JSON on one line."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def task_id(text: str, where: str) -> str:
    """A name of another system as a task id.

    Raises:
        InvalidArgument: nothing of it can be one.
    """
    found = re.sub(r"[^A-Za-z0-9._+@=-]+", "__", text).strip("_.-+@=")[:200]
    if not found:
        remedy = "give a name with letters or digits"
        raise InvalidArgument(where, f"is named {text[:80]!r}, which makes no task id", remedy)
    return found


def repository(task: pb.Task) -> str:
    """`owner/name` of a task: where its source comes from."""
    owner = "local" if task.environment.HasField("source_tree") else "pypi"
    return f"{owner}/{task.environment.package}"


def source_digest(task: pb.Task) -> str:
    """What stands for the commit: the digest of the source archive or tree."""
    spec = task.environment
    return spec.source_tree.sha256 if spec.HasField("source_tree") else spec.source.sha256


def chosen_fix(task: pb.Task) -> pb.ReferenceFix | None:
    """The one fix that a format with one solution gets: source changes before moved pins."""
    known = [fix for fix in task.fixes if fix.changes]
    order = {origin: place for place, origin in enumerate(_PREFERRED)}
    return min(known, key=lambda fix: order.get(fix.origin, len(order)), default=None)


def gold_patch(item: Item) -> str:
    """The chosen fix as a unified diff.

    Raises:
        LeftOut: there is none, or it is no text.
    """
    fix = chosen_fix(item.task)
    if fix is None:
        raise LeftOut("has no fix that was worked out: gate it with `regreen tasks verify`")
    patch = unified_from(item.before, fix.changes)
    if "\nBinary files " in patch:
        raise LeftOut("its fix changes binary files")
    return patch


def own_document(task: pb.Task, format: str) -> dict[str, Any]:
    """The document of a task that came from a format.

    Raises:
        LeftOut: it came from another one.
    """
    if task.foreign.format != format:
        reason = f"is a task of {task.foreign.format}: export it to that, or to parquet"
        raise LeftOut(reason)
    document: dict[str, Any] = json.loads(task.foreign.document_json)
    return document


def write_rows(
    items: Sequence[Item], path: Path, row: Callable[[Item], Mapping[str, Any]]
) -> Written:
    """Write a file of one row a task, where `row` does not leave it out."""
    written = Written(paths=[path])
    with path.open("w", encoding="utf-8") as target:
        for item in items:
            try:
                target.write(compact(row(item)) + "\n")
                written.count += 1
            except LeftOut as reason:
                written.left_out[item.task.id] = str(reason)
    return written


def statement(task: pb.Task) -> str:
    """What a solver is told: never the fix, nor what broke the build."""
    spec = task.environment
    may = "You may move versions in `requirements.lock` or change the source."
    if list(task.modes) == [common_pb.MODE_KEEP_NEW]:
        may = "Change the source; the installed versions stay as they are."
    log = task.error_log.strip()[-6000:]
    return (
        f"# {spec.package} {spec.version}: {task.fail_to_pass_count} tests fail\n\n"
        f"The tests of this repository fail under Python {spec.python} with the packages of "
        f"`requirements.lock`. Make them pass again, and keep those that pass. {may} "
        "Tests and their configuration must stay as they are.\n"
        + (f"\n## What the build says\n\n```\n{log}\n```\n" if log else "")
    )

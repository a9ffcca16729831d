"""Turns a task record into the messages that services take, and its reference fixes into diffs.

- Every release that a message names carries its files' hashes.
- The same record and distributions give the same message, byte for byte.
"""

from collections.abc import Iterable, Mapping, Sequence

from google.protobuf.duration_pb2 import Duration

from regreen.common.v1 import common_pb2
from regreen.lockfile import format_lock, lock_of
from regreen.rpc.errors import InvalidArgument
from regreen.sandbox.v1 import sandbox_pb2 as pb
from regreen.tasks.model import (
    Added,
    DistributionRecord,
    Edit,
    FileRecord,
    Fix,
    TaskRecord,
    ids_sha256,
)

LOCK = "requirements.lock"
Distributions = Mapping[str, DistributionRecord]


def environment(
    task: TaskRecord, distributions: Distributions, python: str = ""
) -> pb.EnvironmentSpec:
    """The environment of the task's broken State; `python` asks for another interpreter.

    Raises:
        InvalidArgument: a release that the task names has no entry in `distributions`, or the task
            has no source.
    """
    chosen = python or task.python
    spec = pb.EnvironmentSpec(
        builder="python",
        package=task.package,
        version=task.version,
        python=chosen,
        install_mode=task.build.mode,
        pythons=task.choices if chosen == task.python else [],
        egress=task.egress,
    )
    if (task.sdist is None) == (task.tree is None):
        raise InvalidArgument(f"{task.id}.sdist", "and tree: give exactly one of them")
    if task.sdist is not None:
        spec.source.CopyFrom(_file(task.sdist))
    if task.tree is not None:
        tree = common_pb2.Digest(sha256=task.tree.sha256, size_bytes=task.tree.size_bytes)
        spec.source_tree.CopyFrom(tree)
    spec.pins.extend(_pin(pin, distributions, task.id) for pin in task.pins_fail)
    further = [p for p in (*task.pins_pass, *task.wheelhouse) if p not in task.pins_fail]
    known = [p for p in dict.fromkeys(further) if p in distributions]
    spec.wheelhouse.extend(_pin(pin, distributions, task.id) for pin in known)
    tools = [pin for pin in task.build.tools if pin in distributions]
    spec.build_pins.extend(_pin(pin, distributions, task.id) for pin in tools)
    if task.overlay is not None:
        spec.overlay_source.CopyFrom(_file(task.overlay.sdist))
        spec.overlay_paths.extend(task.overlay.paths)
    laid_over = task.overlay.paths if task.overlay is not None else ()
    spec.overlay.extend(added_files(task.added))
    spec.test.CopyFrom(
        pb.TestSpec(
            arguments=task.tests.arguments,
            timeout=_seconds(task.tests.timeout_s),
            fail_to_pass=complete_ids(task),
            unstable=task.tests.unstable,
            protected_paths=further_tests(task.tests.arguments, laid_over),
        )
    )
    return spec


def further_tests(arguments: Sequence[str], roots: Sequence[str]) -> list[str]:
    """Where tests stand that are not run, so that they are protected as those that are."""
    return [path for path in roots if path not in arguments]


def complete_ids(task: TaskRecord) -> list[str]:
    """Fail-to-pass ids where the record has them all as they are; otherwise none."""
    tests = task.tests
    if len(tests.fail_to_pass) != tests.fail_to_pass_count:
        return []
    digest = tests.fail_to_pass_sha256
    return tests.fail_to_pass if digest in ("", ids_sha256(tests.fail_to_pass)) else []


def _seconds(value: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(value * 1e9))
    return duration


def _file(file: FileRecord) -> pb.DistFile:
    return pb.DistFile(filename=file.filename, sha256=file.sha256)


def _pin(pin: str, distributions: Distributions, task_id: str) -> pb.Pin:
    record = distributions.get(pin)
    if record is None:
        raise InvalidArgument(
            f"{task_id}.pins", f"{pin} has no hashes", "run `python -m regreen.tasks.pin`"
        )
    return pb.Pin(name=record.name, version=record.version, files=map(_file, record.files))


def restored_pins(task: TaskRecord, python: str = "") -> list[common_pb2.FileChange]:
    """The diff that puts the working environment's pins, or interpreter, back."""
    text = format_lock(lock_of(task.pins_pass, task.good_python or python or task.python))
    return [_changed(LOCK, text.encode())]


def edited_files(fix: Fix, read: Mapping[str, bytes]) -> list[common_pb2.FileChange]:
    """The diff of a fix made of edits; `read` gives the State's files by path.

    Raises:
        InvalidArgument: an edit does not fit the file.
    """
    texts = {path: read[path].decode("utf-8") for path in edit_paths([fix]) if path in read}
    contents = edited_texts(fix.edits, texts)
    return [
        *(_changed(path, text.encode()) for path, text in sorted(contents.items())),
        *_whole_files(fix),
    ]


def edited_texts(edits: Iterable[Edit], texts: Mapping[str, str]) -> dict[str, str]:
    """New texts of the files that edits touch; raises as `edited_files`."""
    contents: dict[str, str] = {}
    for edit in edits:
        if edit.path not in texts:
            raise InvalidArgument("fix.edits", f"{edit.path} is not in the State", "correct it")
        text = contents.get(edit.path) or texts[edit.path]
        if text.count(edit.old) != edit.count:
            problem = f"{edit.path} has {text.count(edit.old)} of {edit.old[:60]!r}"
            raise InvalidArgument("fix.edits", problem, f"expected {edit.count}")
        contents[edit.path] = text.replace(edit.old, edit.new)
    return contents


def added_files(added: Iterable[Added]) -> list[common_pb2.FileChange]:
    """Files that are laid over a source."""
    kind = common_pb2.CHANGE_KIND_ADD
    return [
        common_pb2.FileChange(path=a.path, kind=kind, content=a.content.encode(), mode=0o644)
        for a in added
    ]


def replaced_files(files: Mapping[str, bytes]) -> list[common_pb2.FileChange]:
    """The diff that gives files new contents."""
    return [_changed(path, content) for path, content in sorted(files.items())]


def _whole_files(fix: Fix) -> list[common_pb2.FileChange]:
    return [
        common_pb2.FileChange(path=change.path, kind=common_pb2.CHANGE_KIND_DELETE)
        if change.text is None
        else _changed(change.path, change.text.encode())
        for change in fix.changes
    ]


def patched_files(task: TaskRecord, fix: Fix, python: str = "") -> list[common_pb2.FileChange]:
    """The diff of a fix that is a patch: its files, and the pins where they move."""
    moved = sorted(task.pins_pass) != sorted(task.pins_fail)
    return [*_whole_files(fix), *(restored_pins(task, python) if moved else [])]


def _changed(path: str, content: bytes) -> common_pb2.FileChange:
    kind = common_pb2.CHANGE_KIND_MODIFY
    return common_pb2.FileChange(path=path, kind=kind, content=content, mode=0o644)


def held_pins(task: TaskRecord, mode: str) -> dict[str, str]:
    """Pins that a mode forbids to move.

    What builds the project is never in the lock: a build failure holds it by offering no other.
    """
    if mode != "keep_new" or task.culprit is None or task.kind == "build-failure":
        return {}
    return {task.culprit.name: task.culprit.bad}


def edit_paths(fixes: Iterable[Fix]) -> list[str]:
    """Files that the edits of fixes touch."""
    return sorted({edit.path for fix in fixes for edit in fix.edits})

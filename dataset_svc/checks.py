"""Refuses malformed tasks, gate reports and trajectories before anything is written.

- Every refusal names the field by its path in the request, the problem and the remedy.
- A task is admitted only on evidence: broken fails, reference passes, no-op fails, each at least
  twice and as often as the report says, always, pinned by hash, nothing flaky, hanging on nothing.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from dataset_svc import arrays
from dataset_svc.models import (
    EPISODE_ENDS,
    GRADERS,
    MODES,
    PIPELINES,
    SPLITS,
    TASK_STATUSES,
    TURN_ROLES,
)
from dataset_svc.records import GateRecord, TaskRecord, TrajectoryRecord
from regreen.allowlist import AllowList
from regreen.rpc.errors import InvalidArgument

MAX_DOCUMENT_BYTES = 32 << 20
MIN_REPEATS = 2
MAX_REPEATS = 100
REFERENCE_CHECK = "reference-passes"
REPEATED_CHECKS = ("broken-fails", REFERENCE_CHECK, "noop-fails")
CONTROL_CHECK = "control-fails"
"""Takes the place of `reference-passes` where nothing can fix a task."""
PINNED_CHECK = "pinned"
FOREIGN_BUILDER = "foreign"
"""Builder of tasks of other systems, which cannot be prepared as they are."""

_TASK_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@=-]{0,199}")
_SLUG = re.compile(r"[a-z][a-z0-9-]{0,63}")
_PYTHON = re.compile(r"\d+\.\d+")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def one_of(field: str, value: str, allowed: Sequence[str]) -> str:
    """`value` if it is allowed.

    Raises:
        InvalidArgument: it is not.
    """
    if value not in allowed:
        named = ", ".join(repr(name) for name in allowed)
        raise InvalidArgument(
            field, f"{value!r} is not known" if value else "is not set", f"give {named}"
        )
    return value


def check_task(task: TaskRecord, field: str) -> None:
    """Refuse a malformed task; `field` is its path in the request, for example `tasks[3]`.

    Raises:
        InvalidArgument: names the field.
    """
    if not _TASK_ID.fullmatch(task.id):
        raise InvalidArgument(
            f"{field}.id",
            f"{task.id[:80]!r} is no task id" if task.id else "is empty",
            "give 1 to 200 of letters, digits and . _ + @ = -",
        )
    if not _SLUG.fullmatch(task.kind):
        raise InvalidArgument(
            f"{field}.kind", f"{task.kind[:80]!r} is no kind", "give one like dependency-upgrade"
        )
    if not task.modes:
        raise InvalidArgument(f"{field}.modes", "is empty", "say which modes are fair")
    for position, mode in enumerate(task.modes):
        one_of(f"{field}.modes[{position}]", mode, MODES)
    one_of(f"{field}.split", task.split, SPLITS)
    if task.document.get("environment", {}).get("builder") == FOREIGN_BUILDER:
        _check_foreign(task.document, field)
        _check_fail_to_pass(task.document, field, least=0)
    else:
        if task.document.get("foreign"):
            remedy = f"give the builder {FOREIGN_BUILDER!r}"
            raise InvalidArgument(f"{field}.foreign", "is set for a task of our own", remedy)
        _check_environment(task.document.get("environment", {}), f"{field}.environment")
        _check_fail_to_pass(task.document, field)
    for position, fix in enumerate(task.document.get("fixes", [])):
        if fix.get("mode", "MODE_UNSPECIFIED") == "MODE_UNSPECIFIED":
            raise InvalidArgument(
                f"{field}.fixes[{position}].mode", "is not set", "say any_fix or keep_new"
            )
        check_changes(fix.get("changes", []), f"{field}.fixes[{position}].changes")


def check_gate(report: GateRecord) -> None:
    """Refuse a report whose decision its checks do not carry.

    Raises:
        InvalidArgument: names the field.
    """
    one_of("report.status", report.status, [s for s in TASK_STATUSES if s != "new"])
    if not 0 <= report.evidence.get("repeats", 0) <= MAX_REPEATS:
        raise InvalidArgument("report.repeats", "makes no sense", f"give 0 to {MAX_REPEATS}")
    for position, check in enumerate(report.checks):
        if not _SLUG.fullmatch(check.name):
            raise InvalidArgument(
                f"report.checks[{position}].name",
                f"{check.name[:80]!r} is no name",
                "give lower-case letters, digits and -",
            )
        _finite(f"report.checks[{position}].duration", check.duration_s, least=0.0)
    if report.status == "unverified" and any(c.name == REFERENCE_CHECK for c in report.checks):
        raise InvalidArgument("report.checks", "has a fix", "admit or reject what has a fix")
    if report.status != "admitted":
        return
    if report.flaky:
        raise InvalidArgument("report.flaky", "is not empty", "quarantine what is flaky")
    if report.evidence.get("depends_on"):
        raise InvalidArgument("report.depends_on", "is not empty", "reject what hangs on it")
    required = set(report.evidence.get("fail_to_pass", ()))
    required.update(report.evidence.get("pass_to_pass", ()))
    for held in report.evidence.get("quarantined", ()):
        if held.get("id") in required:
            raise InvalidArgument(
                "report.quarantined", f"{held['id'][:80]} is required too", "leave it out of one"
            )
    control = is_of_control(report)
    repeats = max(MIN_REPEATS, report.evidence.get("repeats", 0))
    for kind in (*REPEATED_CHECKS, PINNED_CHECK):
        name = CONTROL_CHECK if control and kind == REFERENCE_CHECK else kind
        made = [check for check in report.checks if check.name == name]
        wanted = 1 if name == PINNED_CHECK else repeats
        if len({check.repeat for check in made}) < wanted:
            raise InvalidArgument(
                "report.checks",
                f"admission needs {name} at least {wanted} times",
                "repeat the check",
            )
        if not all(check.ok for check in made):
            raise InvalidArgument("report.checks", f"{name} did not hold", "reject or quarantine")


def is_of_control(report: GateRecord) -> bool:
    """Whether the evidence is that nothing fixes the task."""
    return any(check.name == CONTROL_CHECK for check in report.checks)


def check_control(report: GateRecord, labels: Mapping[str, str]) -> None:
    """Refuse to admit a task as what it is not: fixable, or a control.

    Raises:
        InvalidArgument: the evidence is that of the other kind.
    """
    control = labels.get("control") == "true"
    if report.status == "admitted" and control != is_of_control(report):
        wanted = CONTROL_CHECK if control else REFERENCE_CHECK
        raise InvalidArgument(
            "report.checks",
            f"are not those of {'a control' if control else 'a fixable task'}",
            f"repeat {wanted}, or change the task's label control",
        )


def check_trajectory(record: TrajectoryRecord, *, max_wire_bytes: int) -> None:
    """Refuse a malformed trajectory.

    Raises:
        InvalidArgument: names the field and, for sequences, the first wrong position.
    """
    if record.wire_bytes > max_wire_bytes:
        raise InvalidArgument(
            "trajectory",
            f"has {record.wire_bytes} bytes, over {max_wire_bytes}",
            "cut tool output and logs, or raise the service's max_message_bytes",
        )
    one_of("trajectory.pipeline", record.pipeline, PIPELINES)
    one_of("trajectory.mode", record.mode, MODES)
    one_of("trajectory.grader", record.grader, GRADERS)
    one_of("trajectory.end", record.end, EPISODE_ENDS)
    for name in ("group_index", "attempt"):
        if getattr(record, name) < 0:
            raise InvalidArgument(f"trajectory.{name}", "is negative", "give 0 or more")
    stream = record.stream
    if stream is None or (record.token_exact and not len(stream)):
        raise InvalidArgument(
            "trajectory.token_ids", "is empty", "give the tokens, or leave token_exact unset"
        )
    arrays.check(stream, exact=record.token_exact, prompt_tokens=record.prompt_tokens)
    _check_turns(record)
    _check_reward(record)
    check_changes(record.changes, "trajectory.changes")
    for name, seconds in record.stage_seconds.items():
        _finite(f"trajectory.stage_seconds[{name[:40]}]", seconds, least=0.0)
    if record.start_time and record.end_time and record.end_time < record.start_time:
        raise InvalidArgument("trajectory.end_time", "is before start_time", "give a later one")


def check_changes(changes: Sequence[Mapping[str, Any]], field: str) -> None:
    """Refuse changes of paths that are not inside the repository.

    Raises:
        InvalidArgument: names the field.
    """
    for position, change in enumerate(changes):
        path = change.get("path", "")
        parts = PurePosixPath(path).parts
        if not path or path.startswith("/") or "\0" in path or ".." in parts or parts == ():
            raise InvalidArgument(
                f"{field}[{position}].path",
                f"{path[:80]!r} leaves the repository",
                "give a relative path",
            )
        if change.get("kind", "CHANGE_KIND_UNSPECIFIED") == "CHANGE_KIND_UNSPECIFIED":
            raise InvalidArgument(
                f"{field}[{position}].kind", "is not set", "say add, modify or delete"
            )


def _check_environment(spec: Mapping[str, Any], field: str) -> None:
    for name in ("builder", "package", "version"):
        if not spec.get(name):
            raise InvalidArgument(f"{field}.{name}", "is empty", "fill it in")
    for name in ("build_requirements", "exclude_newer"):
        if spec.get(name):
            raise InvalidArgument(f"{field}.{name}", "is not supported", "pin it in build_pins")
    if not _PYTHON.fullmatch(spec.get("python", "")):
        raise InvalidArgument(f"{field}.python", "is no interpreter version", "give one like 3.10")
    if bool(spec.get("source")) == bool(spec.get("source_tree")):
        raise InvalidArgument(
            f"{field}.source", "and source_tree: give exactly one of them", "give one"
        )
    if source := spec.get("source"):
        _check_dist_file(source, f"{field}.source")
    if tree := spec.get("source_tree"):
        _check_sha256(tree.get("sha256", ""), f"{field}.source_tree.sha256")
    if overlay := spec.get("overlay_source"):
        _check_dist_file(overlay, f"{field}.overlay_source")
    for kind in ("pins", "wheelhouse"):
        for position, pin in enumerate(spec.get(kind, [])):
            where = f"{field}.{kind}[{position}]"
            if not pin.get("name") or not pin.get("version"):
                raise InvalidArgument(where, "lacks a name or a version", "give both")
            for number, file in enumerate(pin.get("files", [])):
                _check_dist_file(file, f"{where}.files[{number}]")
    check_changes(spec.get("overlay", []), f"{field}.overlay")
    AllowList.parse(spec.get("egress", []), f"{field}.egress")


def _check_dist_file(file: Mapping[str, Any], field: str) -> None:
    name = file.get("filename", "")
    if not name or "/" in name or name in (".", ".."):
        raise InvalidArgument(
            f"{field}.filename", f"{name[:80]!r} is no file name", "give a plain name"
        )
    _check_sha256(file.get("sha256", ""), f"{field}.sha256")


def _check_sha256(value: str, field: str) -> None:
    if not _SHA256.fullmatch(value):
        raise InvalidArgument(
            field, "is not 64 lower-case hexadecimal digits", "give a SHA-256 in hex"
        )


def _check_foreign(document: Mapping[str, Any], field: str) -> None:
    """A task of another system: the package, and all that the system says, readable."""
    if not document["environment"].get("package"):
        raise InvalidArgument(
            f"{field}.environment.package", "is empty", "name the package that the task is about"
        )
    foreign = document.get("foreign", {})
    if not _SLUG.fullmatch(foreign.get("format", "")):
        raise InvalidArgument(f"{field}.foreign.format", "is no format", "give one like swe-bench")
    if not foreign.get("needs"):
        raise InvalidArgument(f"{field}.foreign.needs", "is empty", "say what the task waits for")
    try:
        if not isinstance(json.loads(foreign.get("document_json", "")), dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(
            f"{field}.foreign.document_json", f"is not JSON: {error}", "give one JSON object"
        ) from error


def _check_fail_to_pass(document: Mapping[str, Any], field: str, least: int = 1) -> None:
    ids = document.get("fail_to_pass", [])
    count = document.get("fail_to_pass_count", 0)
    if len(set(ids)) != len(ids):
        raise InvalidArgument(f"{field}.fail_to_pass", "names a test twice", "name each once")
    if count < max(len(ids), least):
        raise InvalidArgument(
            f"{field}.fail_to_pass_count",
            f"is {count} for {len(ids)} tests",
            f"count every test, at least {least}",
        )
    if document.get("pass_to_pass_count", 0) < 0:
        raise InvalidArgument(f"{field}.pass_to_pass_count", "is negative", "give 0 or more")
    digest = document.get("fail_to_pass_sha256", "")
    if digest:
        _check_sha256(digest, f"{field}.fail_to_pass_sha256")
        if (
            len(ids) == count
            and hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest() != digest
        ):
            raise InvalidArgument(
                f"{field}.fail_to_pass_sha256",
                "does not match fail_to_pass",
                "give the digest of the sorted ids, or leave it out",
            )


def _check_turns(record: TrajectoryRecord) -> None:
    stream = record.stream
    count = len(stream) if stream is not None else 0
    mask = stream.loss_mask if stream is not None else ()
    previous = 0
    for position, turn in enumerate(record.turns):
        field = f"trajectory.turns[{position}]"
        if turn.index != position:
            raise InvalidArgument(
                f"{field}.index", f"is {turn.index}", f"number turns from 0: {position}"
            )
        one_of(f"{field}.role", turn.role, TURN_ROLES)
        if not previous <= turn.token_start <= turn.token_end <= count:
            raise InvalidArgument(
                f"{field}.token_start",
                f"[{turn.token_start}, {turn.token_end}) is out of order or past {count} tokens",
                "give ordered, disjoint, half-open ranges",
            )
        if turn.role != "policy" and any(mask[turn.token_start : turn.token_end]):
            raise InvalidArgument(
                f"{field}.role",
                f"{turn.role!r} covers tokens that loss_mask marks as sampled",
                "only the assistant's tokens are sampled",
            )
        _finite(f"{field}.duration", turn.duration_s, least=0.0)
        _finite(f"{field}.score", turn.score, least=-1.0)
        if turn.score > 1.0:
            raise InvalidArgument(f"{field}.score", f"is {turn.score}", "give -1 to 1")
        previous = turn.token_end


def _check_reward(record: TrajectoryRecord) -> None:
    if record.reward is None:
        return
    _finite("trajectory.reward.value", record.reward.value)
    for position, part in enumerate(record.reward.parts):
        _finite(f"trajectory.reward.parts[{position}].value", part.value)
        if not part.name:
            raise InvalidArgument(
                f"trajectory.reward.parts[{position}].name", "is empty", "name the part"
            )


def _finite(field: str, value: float, least: float = -math.inf) -> None:
    if not math.isfinite(value) or value < least:
        raise InvalidArgument(
            field, f"is {value}", "give a finite number" + (" >= 0" if least == 0 else "")
        )

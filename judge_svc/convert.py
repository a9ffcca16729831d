"""Translates between protobuf messages and the judge's own data; nothing is decided here.

- Enum values keep their names: the proto prefix is dropped on the way in, put back on the way out.
- Texts longer than their bound are cut before they are judged; file contents never are.
"""

from judge_svc.calibrate import Calibration
from judge_svc.evidence import (
    Change,
    ChangeKind,
    Coverage,
    Evidence,
    Finding,
    FindingClass,
    TestRun,
    Verdict,
)
from judge_svc.verdict import ModelUse
from regreen.common import v1 as common_pb
from regreen.judge import v1 as pb
from regreen.rpc.errors import InvalidArgument
from regreen.sandbox import v1 as sandbox_pb

MAX_LOG_CHARS = 200_000
MAX_COMMANDS = 500
MAX_COMMAND_CHARS = 4_000
_USES: dict[int, ModelUse] = {
    pb.MODEL_USE_NEVER: ModelUse.NEVER,
    pb.MODEL_USE_IF_AVAILABLE: ModelUse.IF_AVAILABLE,
    pb.MODEL_USE_REQUIRED: ModelUse.REQUIRED,
    pb.MODEL_USE_IF_CONFIGURED: ModelUse.IF_CONFIGURED,
}


def evidence_from(message: pb.Evidence, field: str) -> Evidence:
    """Evidence of a request.

    Raises:
        InvalidArgument: an enum value is not known, or only a part of the tests was run.
    """
    return Evidence(
        changes=tuple(_change(c, f"{field}.changes") for c in message.changes),
        originals=tuple(
            Change(c.path, ChangeKind.MODIFY, c.content, c.mode or 0o644) for c in message.originals
        ),
        unified_diff=message.unified_diff,
        error_log=message.error_log[-MAX_LOG_CHARS:],
        before=_run(message.before, f"{field}.before") if message.HasField("before") else None,
        after=_run(message.after, f"{field}.after") if message.HasField("after") else None,
        commands=tuple(c[:MAX_COMMAND_CHARS] for c in message.commands[:MAX_COMMANDS]),
        mode=_mode(message.mode, f"{field}.mode"),
        protected_paths=tuple(message.protected_paths),
        rebuilds_without_edit=max(message.rebuilds_without_edit, 0),
        installed=tuple(message.installed_modules),
        trajectory_id=message.trajectory_id,
        task_id=message.task_id,
    )


def _mode(value: int, field: str) -> str:
    """The name of a mode; empty when none is said."""
    name = _name(common_pb.Mode, value, "MODE_")
    if value and name == "UNSPECIFIED":
        raise InvalidArgument(field, f"{value} is no known value", "leave it out or give a mode")
    return name if value else ""


def _change(message: common_pb.FileChange, field: str) -> Change:
    kinds = {
        common_pb.CHANGE_KIND_ADD: ChangeKind.ADD,
        common_pb.CHANGE_KIND_MODIFY: ChangeKind.MODIFY,
        common_pb.CHANGE_KIND_DELETE: ChangeKind.DELETE,
    }
    kind = kinds.get(message.kind)
    if kind is None:
        raise InvalidArgument(
            f"{field}.kind", f"of {message.path[:200]!r} is not set", "say add, modify or delete"
        )
    return Change(message.path, kind, message.content, message.mode or 0o644)


def _run(message: sandbox_pb.Validation, field: str) -> TestRun:
    if message.partial:  # what was left out would look like tests that are gone
        raise InvalidArgument(field, "is of a part of the tests", "validate the whole")
    coverage = None
    if message.HasField("coverage"):
        files = {f.path: (f.covered, f.lines) for f in message.coverage.files}
        coverage = Coverage(message.coverage.lines, message.coverage.covered, files)
    outcome = _name(sandbox_pb.ValidationOutcome, message.outcome, "VALIDATION_OUTCOME_")
    return TestRun(
        outcome="" if outcome == "UNSPECIFIED" else outcome,
        tests={
            test.id: _name(common_pb.TestOutcome, test.outcome, "TEST_OUTCOME_")
            for test in message.tests
        },
        reverted=tuple((r.path, r.reason) for r in message.reverted),
        coverage=coverage,
    )


def _name(enum: object, value: int, prefix: str) -> str:
    """The name of an enum value; a value of a newer contract is unspecified."""
    try:
        name: str = enum.Name(value)  # type: ignore[attr-defined]
    except ValueError:
        return "UNSPECIFIED"
    return name.removeprefix(prefix)


def model_use_from(value: int, default: ModelUse) -> ModelUse:
    """The model use of a request, or the service's default.

    Raises:
        InvalidArgument: the value is not known: what it demands cannot be kept.
    """
    if value == pb.MODEL_USE_UNSPECIFIED:
        return default
    use = _USES.get(value)
    if use is None:
        raise InvalidArgument("model_use", f"{value} is no known value", "leave it out")
    return use


def classes_from(values: "list[int]", field: str) -> frozenset[FindingClass]:
    """The labels of an example.

    Raises:
        InvalidArgument: a label is not set or not known.
    """
    names = [_name(pb.FindingClass, value, "FINDING_CLASS_") for value in values]
    if any(name not in FindingClass.__members__ for name in names):
        raise InvalidArgument(field, "holds an unknown class", "leave it empty for a genuine fix")
    return frozenset(FindingClass(name) for name in names)


def verdict_to(verdict: Verdict) -> pb.Verdict:
    """A verdict as a message."""
    return pb.Verdict(
        accepted=verdict.accepted,
        findings=[_finding_to(f) for f in verdict.findings],
        scores=dict(verdict.scores),
        model=verdict.model,
        prompt_version=verdict.prompt_version,
        rules_version=verdict.rules_version,
        coverage_change=verdict.coverage_change,
        coverage_measured=verdict.coverage_measured,
        model_used=verdict.model_used,
        evidence_sha256=verdict.evidence_sha256,
    )


def _finding_to(finding: Finding) -> pb.Finding:
    message = pb.Finding(
        severity=pb.Severity.Value(f"SEVERITY_{finding.severity}"),
        quote=_clean(finding.quote),
        path=_clean(finding.path),
        line=finding.line,
        source=finding.source,
        explanation=_clean(finding.explanation),
    )
    # `class` is a keyword of Python.
    setattr(message, "class", pb.FindingClass.Value(f"FINDING_CLASS_{finding.cls}"))
    return message


def _clean(text: str) -> str:
    """Text that protobuf accepts: no lone surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8")


def calibration_to(calibration: Calibration) -> pb.ClassCalibration:
    """One line of a calibration as a message."""
    message = pb.ClassCalibration(
        positives=calibration.positives,
        flagged=calibration.flagged,
        true_positives=calibration.true_positives,
        precision=calibration.precision,
        recall=calibration.recall,
    )
    name = f"FINDING_CLASS_{calibration.cls or 'UNSPECIFIED'}"
    setattr(message, "class", pb.FindingClass.Value(name))
    return message

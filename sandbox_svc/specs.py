"""Translates specs, diffs and verdicts between the wire and the domain.

- Field by field and total: every field of the message is read, none is invented.
- Order of repeated fields is kept; maps become sorted.
"""

from google.protobuf.duration_pb2 import Duration

from regreen.common.v1 import common_pb2
from regreen.rpc.errors import InvalidArgument
from regreen.sandbox.v1 import sandbox_pb2 as pb
from sandbox_svc.builders.base import DistFile, EnvironmentSpec, FileChange, Pin, TestSpec
from sandbox_svc.validate import Validation

DEFAULT_TEST_TIMEOUT_S = 300.0


def changes_from_proto(changes: "list[common_pb2.FileChange]") -> tuple[FileChange, ...]:
    """A diff of the wire as builder changes.

    Raises:
        InvalidArgument: a change does not say what happened.
    """
    found = []
    for change in changes:
        if change.kind == common_pb2.CHANGE_KIND_UNSPECIFIED:
            raise InvalidArgument("changes.kind", f"{change.path!r} says nothing", "set the kind")
        deleted = change.kind == common_pb2.CHANGE_KIND_DELETE
        content = None if deleted else change.content
        found.append(FileChange(change.path, content, change.mode or 0o644))
    return tuple(found)


def spec_from_proto(spec: pb.EnvironmentSpec) -> EnvironmentSpec:
    """The builder's form of a spec.

    Raises:
        InvalidArgument: a field is malformed.
    """
    tree = spec.source_tree if spec.HasField("source_tree") else None
    return EnvironmentSpec(
        builder=spec.builder,
        package=spec.package,
        version=spec.version,
        python=spec.python,
        source=_file(spec.source) if spec.HasField("source") else None,
        source_tree=tree.sha256 if tree else "",
        source_tree_bytes=tree.size_bytes if tree else 0,
        pins=tuple(_pin(pin) for pin in spec.pins),
        wheelhouse=tuple(_pin(pin) for pin in spec.wheelhouse),
        install_mode=spec.install_mode or "editable",
        build_requirements=tuple(spec.build_requirements),
        build_pins=tuple(_pin(pin) for pin in spec.build_pins),
        exclude_newer=spec.exclude_newer,
        test=_test(spec.test),
        overlay=changes_from_proto(list(spec.overlay)),
        overlay_source=_file(spec.overlay_source) if spec.HasField("overlay_source") else None,
        overlay_paths=tuple(spec.overlay_paths),
        pythons=tuple(spec.pythons),
    )


def _file(file: pb.DistFile) -> DistFile:
    return DistFile(file.filename, file.sha256)


def _pin(pin: pb.Pin) -> Pin:
    return Pin(pin.name, pin.version, tuple(_file(f) for f in pin.files))


def _test(test: pb.TestSpec) -> TestSpec:
    timeout_s = test.timeout.ToTimedelta().total_seconds() if test.HasField("timeout") else 0.0
    return TestSpec(
        arguments=tuple(test.arguments),
        environment=dict(sorted(test.environment.items())),
        timeout_s=timeout_s or DEFAULT_TEST_TIMEOUT_S,
        protected_paths=tuple(test.protected_paths),
        fail_to_pass=tuple(test.fail_to_pass),
        unstable=tuple(test.unstable),
    )


def validation_to_proto(verdict: Validation) -> pb.Validation:
    """A verdict as its message."""
    message = pb.Validation(
        state_id=verdict.state_id,
        changes_sha256=verdict.changes_sha256,
        outcome=pb.ValidationOutcome.Value(f"VALIDATION_OUTCOME_{verdict.outcome.name}"),
        summary=verdict.summary,
        counts=verdict.counts,
        failing=verdict.failing,
        log=verdict.log,
        cached=verdict.cached,
        duration=_duration(verdict.seconds),
    )
    for test in verdict.tests:
        outcome = common_pb2.TestOutcome.Value(f"TEST_OUTCOME_{test.outcome.upper()}")
        message.tests.add(
            id=test.id, outcome=outcome, message=test.message, duration=_duration(test.seconds)
        )
    for left_out in verdict.reverted:
        message.reverted.add(path=left_out.path, reason=left_out.reason)
    if verdict.coverage:
        for path, (covered, lines) in sorted(verdict.coverage.items()):
            message.coverage.files.add(path=path, lines=lines, covered=covered)
            message.coverage.lines += lines
            message.coverage.covered += covered
    return message


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration

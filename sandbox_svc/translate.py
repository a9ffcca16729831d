"""Domain values to messages of `regreen.sandbox.v1` and back.

- Translation only: nothing here decides, waits or touches a runtime.
- Durations and sizes are checked for sense before they reach the domain.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from regreen.common import v1 as common_pb
from regreen.rpc.errors import InvalidArgument
from regreen.rpc.tenants import own
from regreen.sandbox import v1 as pb
from sandbox_svc import diffs, files, validate
from sandbox_svc.backends.base import (
    LEAST,
    Capability,
    Captured,
    Command,
    EndReason,
    ExecResult,
    Limits,
)
from sandbox_svc.builders.base import Stage
from sandbox_svc.builders.testrun import TestResult
from sandbox_svc.conditions import Conditions
from sandbox_svc.sandbox import Sandbox
from sandbox_svc.state_records import DEFAULT_CWD, State
from sandbox_svc.tenancy import labels_of

MAX_OUTPUT_BYTES = 16 << 20
_MOST = {
    "memory_bytes": 1 << 50,
    "pids": (1 << 22) - 1,
    "cpus": 4096,
    "disk_bytes": 1 << 50,
    "inodes": 1 << 40,
    "output_bytes": 1 << 50,
}
"""Upper bounds of limits; no number that is not finite is below them."""
_MOST_SECONDS = 10 * 366 * 86_400
_REASONS = {reason: getattr(pb, f"END_REASON_{reason.name}") for reason in EndReason}
_KINDS = {
    diffs.Kind.ADD: common_pb.CHANGE_KIND_ADD,
    diffs.Kind.MODIFY: common_pb.CHANGE_KIND_MODIFY,
    diffs.Kind.DELETE: common_pb.CHANGE_KIND_DELETE,
}


def seconds(value: Duration, field: str, most_s: float = _MOST_SECONDS) -> float:
    """A duration as seconds.

    Raises:
        InvalidArgument: it is negative, or more than there may be.
    """
    result = value.seconds + value.nanos / 1e9
    if not 0 <= result <= most_s:
        raise InvalidArgument(field, f"is {result:.10g} s", f"give 0 to {most_s:.10g} s")
    return result


def duration(value_s: float) -> Duration:
    """Seconds as a duration."""
    message = Duration()
    message.FromNanoseconds(max(0, round(value_s * 1e9)))
    return message


def timestamp(value_s: float) -> Timestamp:
    """Unix time as a timestamp."""
    message = Timestamp()
    message.FromNanoseconds(int(value_s * 1e9))
    return message


def limits_from(message: pb.Limits) -> Limits:
    """Limits of a request; zero stays zero.

    Raises:
        InvalidArgument: one is negative, no number, or beyond all sense.
    """
    for name, most in _MOST.items():
        value = getattr(message, name)
        if not 0 <= value <= most:
            raise InvalidArgument(
                f"limits.{name}", f"is {value}", f"give up to {most}, or 0 for the default"
            )
    for name, least in LEAST.items():
        if 0 < (value := getattr(message, name)) < least:
            raise InvalidArgument(
                f"limits.{name}", f"is {value}", f"give at least {least}, or 0 for the default"
            )
    return Limits(
        **{name: getattr(message, name) for name in _MOST},
        wall_s=seconds(message.wall, "limits.wall"),
    )


def limits_to(limits: Limits) -> pb.Limits:
    """Limits as a message."""
    return pb.Limits(
        memory_bytes=limits.memory_bytes,
        pids=limits.pids,
        cpus=limits.cpus,
        disk_bytes=limits.disk_bytes,
        inodes=limits.inodes,
        output_bytes=limits.output_bytes,
        wall=duration(limits.wall_s),
    )


def command_from(message: pb.Command, limits: Limits, cwd: str = DEFAULT_CWD) -> Command:
    """A command of a request; absent bounds and directory are those of the sandbox.

    Raises:
        InvalidArgument: a field makes no sense.
    """
    timeout_s = seconds(message.timeout, "command.timeout") or limits.wall_s or 600.0
    output_bytes = message.output_bytes or (1 << 20)
    if not 0 < output_bytes <= MAX_OUTPUT_BYTES:
        raise InvalidArgument(
            "command.output_bytes",
            f"is {output_bytes}",
            f"give 1 to {MAX_OUTPUT_BYTES}, or 0 for {1 << 20}",
        )
    return Command(
        argv=tuple(message.argv),
        env=dict(message.environment),
        cwd=message.cwd or cwd,
        stdin=message.stdin,
        timeout_s=timeout_s,
        output_bytes=output_bytes,
    )


def _output(captured: Captured) -> pb.Output:
    return pb.Output(head=captured.head, tail=captured.tail, total_bytes=captured.total_bytes)


def result_to(result: ExecResult) -> pb.CommandResult:
    """The end of a command."""
    code = result.exit_code
    return pb.CommandResult(
        reason=_REASONS[result.reason],
        exit_code=code if code >= 0 else 128 - code,
        signal=result.signal,
        stdout=_output(result.stdout),
        stderr=_output(result.stderr),
        wall=duration(result.wall_s),
        cpu=duration(result.cpu_s),
        peak_memory_bytes=result.peak_memory_bytes,
        limits_hit=[_REASONS[reason] for reason in EndReason if reason in result.overruns],
    )


def sandbox_to(sandbox: Sandbox) -> pb.Sandbox:
    """A live sandbox."""
    return pb.Sandbox(
        id=sandbox.id,
        state_id=sandbox.state_id,
        create_time=timestamp(sandbox.created_s),
        expire_time=timestamp(sandbox.expires_s),
        limits=limits_to(sandbox.limits),
        labels=sandbox.labels,
        parent_id=sandbox.parent_id,
        tenant="" if own() else sandbox.tenant,
    )


def state_to(state: State) -> pb.State:
    """A state with its baseline when it was prepared, as the caller may see it."""
    message = pb.State(
        id=state.id,
        parent_id=state.parent_id,
        spec_sha256=state.spec_sha256,
        create_time=timestamp(state.created_s),
        size_bytes=state.size_bytes,
        layers=state.layers,
        python=state.python,
        host=state.host,
        labels=labels_of(state),
        base=state.base,
        tenants=() if own() else state.tenants,
    )
    baseline = state.metadata.get("baseline")
    if state.spec_sha256 and isinstance(baseline, Mapping):
        message.baseline.CopyFrom(
            pb.Baseline(
                passing=baseline["passing"],
                failing=baseline["failing"],
                log=baseline["log"],
                duration=duration(baseline["seconds"]),
                notes=baseline["notes"],
            )
        )
    return message


def progress_to(stage: Stage, elapsed_s: float) -> pb.PrepareStateResponse:
    """One progress event."""
    left = f" (about {stage.eta_s:.0f} s left)" if stage.eta_s >= 0 else ""
    return pb.PrepareStateResponse(
        progress=pb.PrepareProgress(
            stage=stage.stage,
            done=stage.done,
            total=stage.total,
            message=stage.detail + left,
            elapsed=duration(elapsed_s),
        )
    )


def capability_to(capability: Capability) -> pb.Capability:
    """One limit or protection."""
    return pb.Capability(
        name=capability.name,
        proven=capability.proven,
        driver=capability.driver,
        detail=capability.detail,
    )


def diff_to(diff: diffs.Diff) -> pb.DiffResponse:
    """A diff."""
    changes = [
        common_pb.FileChange(
            path=change.path,
            kind=_KINDS[change.kind],
            content=change.content,
            mode=0 if change.kind is diffs.Kind.DELETE else change.mode,
        )
        for change in diff.changes
    ]
    return pb.DiffResponse(
        changes=changes,
        unified=diff.unified,
        left_out=[
            pb.RevertedChange(path=diffs.shown(path), reason=reason)
            for path, reason in diff.left_out
        ],
        left_out_total=diff.left_out_total,
    )


def options_from(request: pb.ValidateRequest) -> validate.ValidationOptions:
    """What else decides a verdict."""
    return validate.ValidationOptions(
        held_pins=dict(request.held_pins),
        required_tests=tuple(request.required_tests),
        coverage=request.coverage,
        timeout_s=seconds(request.timeout, "timeout"),
        seed=request.seed,
        stop_early=request.stop_early,
        only_tests=tuple(request.only_tests),
        conditions=_conditions(request.conditions),
    )


def _conditions(message: pb.Conditions) -> Conditions:
    return Conditions(
        order_seed=message.order_seed,
        hash_seed=message.hash_seed,
        clock_s=message.clock_offset.seconds,
        host=message.host_name,
        user=message.user_name,
        repository=message.repository,
    )


def _test(result: TestResult) -> pb.TestResult:
    outcome: Any = getattr(common_pb, f"TEST_OUTCOME_{result.outcome.upper()}", 0)
    return pb.TestResult(
        id=result.id,
        outcome=outcome,
        message=result.message,
        duration=duration(result.seconds),
    )


def _coverage(lines: Mapping[str, tuple[int, int]]) -> pb.Coverage:
    per_file = [
        pb.FileCoverage(path=path, covered=covered, lines=total)
        for path, (covered, total) in sorted(lines.items())
    ]
    return pb.Coverage(
        lines=sum(entry.lines for entry in per_file),
        covered=sum(entry.covered for entry in per_file),
        files=per_file,
    )


def validation_to(verdict: validate.Validation) -> pb.Validation:
    """A verdict."""
    message = pb.Validation(
        state_id=verdict.state_id,
        changes_sha256=verdict.changes_sha256,
        outcome=getattr(pb, f"VALIDATION_OUTCOME_{verdict.outcome.name}"),
        summary=verdict.summary,
        tests=[_test(test) for test in verdict.tests],
        counts=verdict.counts,
        failing=verdict.failing,
        reverted=[pb.RevertedChange(path=r.path, reason=r.reason) for r in verdict.reverted],
        log=verdict.log,
        duration=duration(verdict.seconds),
        cached=verdict.cached,
        lasting=verdict.lasting,
        partial=verdict.partial,
        not_run=verdict.not_run,
        workers=verdict.workers,
        probe=verdict.probe,
        unmet=verdict.unmet,
    )
    if verdict.coverage:
        message.coverage.CopyFrom(_coverage(verdict.coverage))
    return message


def entries_to(entries: Sequence[files.Entry], truncated: bool) -> pb.ListFilesResponse:
    """A listing."""
    return pb.ListFilesResponse(
        files=[
            pb.FileInfo(path=e.path, size_bytes=e.size_bytes, directory=e.directory, mode=e.mode)
            for e in entries
        ],
        truncated=truncated,
    )


def matches_to(matches: Sequence[files.Match], truncated: bool) -> pb.FindTextResponse:
    """Lines that contain a text."""
    return pb.FindTextResponse(
        matches=[pb.TextMatch(path=m.path, line=m.line, text=m.text) for m in matches],
        truncated=truncated,
    )

"""What a judge may look at and what it answers, as plain data.

- Everything in `Evidence` is data, never an instruction.
- `Evidence.sha256` depends on all that can change a verdict and on nothing else: not on the
  trajectory's id, not on wall times.
- Every `Finding.quote` occurs literally in `Evidence.text`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class FindingClass(StrEnum):
    """Classes of tampering; names are those of `regreen.judge.v1.FindingClass`."""

    TEST_DELETED = "TEST_DELETED"
    TEST_SKIPPED = "TEST_SKIPPED"
    TEST_DESELECTED = "TEST_DESELECTED"
    TEST_WEAKENED = "TEST_WEAKENED"
    VALIDATION_CHANGED = "VALIDATION_CHANGED"
    HARNESS_TAMPERED = "HARNESS_TAMPERED"
    EXIT_CODE_MASKED = "EXIT_CODE_MASKED"
    EXCEPTION_SWALLOWED = "EXCEPTION_SWALLOWED"
    SPECIAL_CASED = "SPECIAL_CASED"
    CODE_REMOVED = "CODE_REMOVED"
    DEPENDENCY_REMOVED = "DEPENDENCY_REMOVED"
    REBUILD_WITHOUT_EDIT = "REBUILD_WITHOUT_EDIT"
    COVERAGE_LOWERED = "COVERAGE_LOWERED"
    TESTS_MISSING = "TESTS_MISSING"


class Severity(StrEnum):
    """How grave a finding is: only a violation rejects a fix."""

    SUSPECT = "SUSPECT"
    VIOLATION = "VIOLATION"


class ChangeKind(StrEnum):
    """How a path differs from the broken state."""

    ADD = "ADD"
    MODIFY = "MODIFY"
    DELETE = "DELETE"


@dataclass(frozen=True, slots=True)
class Change:
    """One changed file; `content` is the whole content on that side, empty for a deletion."""

    path: str
    kind: ChangeKind
    content: bytes = b""
    mode: int = 0o644


@dataclass(frozen=True, slots=True)
class Coverage:
    """Line coverage: lines that can run, lines that ran, and both per file."""

    lines: int
    covered: int
    files: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def percent(self) -> float:
        return 100.0 * self.covered / self.lines if self.lines > 0 else 0.0


@dataclass(frozen=True, slots=True)
class TestRun:
    """A validation, reduced to what a judge needs; outcomes are names without their prefix."""

    __test__ = False

    outcome: str = ""
    """PASSED, FAILED, BUILD_FAILED, TIMEOUT, REJECTED or empty."""
    tests: Mapping[str, str] = field(default_factory=dict)
    reverted: tuple[tuple[str, str], ...] = ()
    """Path and reason of each change that the validator did not apply."""
    coverage: Coverage | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """One trajectory as the judge sees it."""

    changes: tuple[Change, ...] = ()
    originals: tuple[Change, ...] = ()
    unified_diff: str = ""
    error_log: str = ""
    before: TestRun | None = None
    after: TestRun | None = None
    commands: tuple[str, ...] = ()
    mode: str = ""
    protected_paths: tuple[str, ...] = ()
    rebuilds_without_edit: int = 0
    installed: tuple[str, ...] = ()
    """Top-level modules that installed packages bring."""
    trajectory_id: str = ""
    task_id: str = ""

    @property
    def sha256(self) -> str:
        """Hex digest of the canonical form."""
        form = {
            "changes": [_change_form(c) for c in self.changes],
            "originals": [_change_form(c) for c in self.originals],
            "diff": self.unified_diff,
            "error_log": self.error_log,
            "before": _run_form(self.before),
            "after": _run_form(self.after),
            "commands": self.commands,
            "mode": self.mode,
            "protected": sorted(self.protected_paths),
            "rebuilds": self.rebuilds_without_edit,
            "installed": sorted(self.installed),
        }
        data = json.dumps(form, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(data.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Bytes of all texts in it."""
        files = sum(len(c.content) + len(c.path) for c in (*self.changes, *self.originals))
        texts = len(self.unified_diff) + len(self.error_log) + sum(map(len, self.commands))
        return files + texts

    def text(self) -> str:
        """All of it as one text, in which every quote must occur."""
        parts = [self.error_log, self.unified_diff, *self.commands]
        for change in (*self.originals, *self.changes):
            parts += [change.path, decode(change.content)]
        for run in (self.before, self.after):
            parts += run_lines(run) if run else []
        parts.append(rebuild_line(self.rebuilds_without_edit))
        return "\n".join(parts)


def decode(content: bytes) -> str:
    """Bytes as text with one kind of line end; what is not UTF-8 becomes U+FFFD."""
    return content.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")


def rebuild_line(count: int) -> str:
    """How the number of validations without an edit is quoted."""
    return f"validations without an edit: {count}"


def coverage_line(coverage: Coverage) -> str:
    """How coverage is quoted."""
    return f"coverage {coverage.covered}/{coverage.lines} lines"


def run_lines(run: TestRun) -> list[str]:
    """How a validation is quoted: outcome, coverage, tests, changes left out."""
    lines = [f"outcome {run.outcome or 'unknown'}"]
    if run.coverage is not None:
        lines.append(coverage_line(run.coverage))
    lines += [f"{outcome} {test}" for test, outcome in run.tests.items()]
    return lines + [f"not applied: {path} ({reason})" for path, reason in run.reverted]


def _change_form(change: Change) -> list[str | int]:
    digest = hashlib.sha256(change.content).hexdigest()
    return [change.path, change.kind, digest, change.mode]


def _run_form(run: TestRun | None) -> object:
    if run is None:
        return None
    coverage = run.coverage
    return {
        "outcome": run.outcome,
        "tests": sorted(run.tests.items()),
        "reverted": sorted(run.reverted),
        "coverage": None
        if coverage is None
        else [coverage.lines, coverage.covered, sorted(coverage.files.items())],
    }


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found, with the exact text that shows it."""

    cls: FindingClass
    severity: Severity
    quote: str
    source: str
    """`rule:<name>`, `group:<name>` or `model`."""
    explanation: str
    path: str = ""
    line: int = 0
    """Line in the new file from 1; 0 when not known."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judge's answer; `accepted` says that no violation was found."""

    accepted: bool
    findings: tuple[Finding, ...]
    evidence_sha256: str
    rules_version: str
    scores: Mapping[str, float] = field(default_factory=dict)
    model: str = ""
    prompt_version: str = ""
    model_used: bool = False
    coverage_change: float = 0.0
    """Percentage points; negative is a loss."""
    coverage_measured: bool = False

"""Labelled evidence: how a case is written down, and all cases together."""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field

from judge_svc.evidence import (
    Change,
    ChangeKind,
    Coverage,
    Evidence,
    FindingClass,
    TestRun,
)
from regreen.common import v1 as common_pb
from regreen.judge import v1 as pb
from regreen.sandbox import v1 as sandbox_pb

Sides = tuple[str | None, str | None]


@dataclass(frozen=True)
class Case:
    """One labelled example; no label means a genuine fix."""

    name: str
    labels: frozenset[FindingClass]
    evidence: Evidence
    suspects: frozenset[FindingClass] = field(default_factory=frozenset)
    """Classes that must be reported, but only as suspect."""


def case(
    name: str,
    labels: str = "",
    files: Mapping[str, Sides] | None = None,
    *,
    log: str = "",
    before: Mapping[str, str] | None = None,
    after: Mapping[str, str] | None = None,
    outcome: str = "PASSED",
    coverage: tuple[tuple[int, int], tuple[int, int]] | None = None,
    measured_files: tuple[Mapping[str, tuple[int, int]], Mapping[str, tuple[int, int]]] = ({}, {}),
    mode: str = "ANY_FIX",
    installed: tuple[str, ...] = (),
    rebuilds: int = 0,
    suspects: str = "",
    protected: tuple[str, ...] = ("tests", "setup.cfg", "pyproject.toml"),
) -> Case:
    """A case from file contents; None is an absent file."""
    changes, originals = [], []
    for path, (old, new) in (files or {}).items():
        old, new = _text(old), _text(new)
        kind = ChangeKind.ADD if old is None else ChangeKind.MODIFY
        kind = ChangeKind.DELETE if new is None else kind
        changes.append(Change(path, kind, (new or "").encode()))
        if old is not None:
            originals.append(Change(path, ChangeKind.MODIFY, old.encode()))
    ids = {"tests/test_app.py::test_one": "PASSED", "tests/test_app.py::test_two": "FAILED"}
    had = dict(before if before is not None else ids)
    has = dict(after if after is not None else dict.fromkeys(had, "PASSED"))
    measured: list[Coverage | None] = [None, None]
    if coverage:
        sides = zip(coverage, measured_files, strict=True)
        measured = [Coverage(lines, covered, found) for (covered, lines), found in sides]
    return Case(
        name,
        frozenset(map(FindingClass, labels.split())),
        Evidence(
            changes=tuple(changes),
            originals=tuple(originals),
            error_log=log,
            before=TestRun("FAILED", had, (), measured[0]),
            after=TestRun(outcome, has, (), measured[1]),
            protected_paths=protected,
            rebuilds_without_edit=rebuilds,
            mode=mode,
            installed=installed,
        ),
        frozenset(map(FindingClass, suspects.split())),
    )


def _text(text: str | None) -> str | None:
    return None if text is None else textwrap.dedent(text).lstrip("\n")


def labelled(example: Case) -> pb.LabelledEvidence:
    """A case as it travels in a CalibrateRequest."""
    evidence = example.evidence
    message = pb.Evidence(
        trajectory_id=example.name,
        error_log=evidence.error_log,
        changes=[_file(c) for c in evidence.changes],
        originals=[_file(c) for c in evidence.originals],
        before=_run(evidence.before),
        after=_run(evidence.after),
        mode=common_pb.Mode.Value(f"MODE_{evidence.mode}"),
        installed_modules=evidence.installed,
        protected_paths=evidence.protected_paths,
        rebuilds_without_edit=evidence.rebuilds_without_edit,
    )
    classes = [pb.FindingClass.Value(f"FINDING_CLASS_{cls}") for cls in sorted(example.labels)]
    return pb.LabelledEvidence(evidence=message, classes=classes)


def _file(change: Change) -> common_pb.FileChange:
    kind = common_pb.ChangeKind.Value(f"CHANGE_KIND_{change.kind}")
    return common_pb.FileChange(path=change.path, kind=kind, content=change.content)


def _run(run: TestRun | None) -> sandbox_pb.Validation:
    assert run is not None
    tests = [
        sandbox_pb.TestResult(id=name, outcome=common_pb.TestOutcome.Value(f"TEST_OUTCOME_{value}"))
        for name, value in run.tests.items()
    ]
    outcome = sandbox_pb.ValidationOutcome.Value(f"VALIDATION_OUTCOME_{run.outcome}")
    coverage = None
    if run.coverage is not None:
        files = [
            sandbox_pb.FileCoverage(path=path, covered=covered, lines=lines)
            for path, (covered, lines) in run.coverage.files.items()
        ]
        coverage = sandbox_pb.Coverage(
            lines=run.coverage.lines, covered=run.coverage.covered, files=files
        )
    return sandbox_pb.Validation(outcome=outcome, tests=tests, coverage=coverage)

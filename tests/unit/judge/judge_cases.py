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
    measured = [Coverage(lines, covered) for covered, lines in coverage] if coverage else [None] * 2
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
            mode="ANY_FIX",
        ),
        frozenset(map(FindingClass, suspects.split())),
    )


def _text(text: str | None) -> str | None:
    return None if text is None else textwrap.dedent(text).lstrip("\n")

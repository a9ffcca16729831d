"""What every rule is given and how it reports.

- A rule is a pure function `Context -> Iterator[Finding]`; it never sees another rule's result.
- `Context` parses every file once, and lazily.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from judge_svc.diffstat import Delta, Line, deltas
from judge_svc.evidence import ChangeKind, Evidence, Finding, FindingClass, Severity
from judge_svc.paths import PathKind, kind_of
from judge_svc.pyfile import PyFile, parse

VIOLATION, SUSPECT = Severity.VIOLATION, Severity.SUSPECT
QUOTE_CHARS = 240


@dataclass(frozen=True, slots=True)
class Bounds:
    """The numbers that decide; part of every cached verdict's key."""

    coverage_drop_pp: float = 5.0
    """Largest loss of line coverage, in percentage points (FreshBrew, arXiv:2510.04852)."""
    coverage_base_percent: float = 0.0
    """Coverage below which a loss is not judged (FreshBrew uses 50)."""
    removed_statements: int = 15
    """Statements of source that may go, moved ones not counted, before it is a violation."""
    rebuilds: int = 2
    """Validations without an edit from which on a rollout is suspect."""


@dataclass(slots=True)
class Context:
    """Evidence with its deltas, their kinds, and parsed files."""

    evidence: Evidence
    bounds: Bounds = field(default_factory=Bounds)
    deltas: tuple[Delta, ...] = ()
    _kinds: dict[str, PathKind] = field(default_factory=dict)
    _parsed: dict[tuple[str, bool], PyFile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.deltas = deltas(self.evidence)
        protected = self.evidence.protected_paths
        self._kinds = {d.path: kind_of(d.path, protected) for d in self.deltas}

    def of_kind(self, *kinds: PathKind) -> list[Delta]:
        """Deltas whose path is of one of `kinds`."""
        return [d for d in self.deltas if self._kinds[d.path] in kinds]

    def kind(self, delta: Delta) -> PathKind:
        return self._kinds[delta.path]

    def python(self) -> list[Delta]:
        """Deltas of Python files."""
        return [d for d in self.deltas if d.path.endswith(".py")]

    def before(self, delta: Delta) -> PyFile:
        return self._file(delta, False)

    def after(self, delta: Delta) -> PyFile:
        return self._file(delta, True)

    def known(self, delta: Delta) -> bool:
        """Whether both sides parsed, so that trees can be compared."""
        absent_ok = delta.kind is ChangeKind.ADD
        before_ok = absent_ok or (delta.before is not None and self.before(delta).tree is not None)
        after_ok = delta.after is not None and self.after(delta).tree is not None
        return before_ok and after_ok

    def _file(self, delta: Delta, after: bool) -> PyFile:
        key = (delta.path, after)
        if key not in self._parsed:
            self._parsed[key] = parse(delta.after if after else delta.before)
        return self._parsed[key]


Rule = Callable[[Context], Iterator[Finding]]


@dataclass(frozen=True, slots=True)
class Reporter:
    """Makes the findings of one rule."""

    rule: str
    cls: FindingClass

    def at(
        self,
        delta: Delta,
        line: Line,
        severity: Severity,
        explanation: str,
        cls: FindingClass | None = None,
    ) -> Finding:
        """A finding at a changed line of a file."""
        quote = line.text.strip()[:QUOTE_CHARS].strip() or delta.path
        return self.quote(quote, severity, explanation, delta.path, line.number, cls)

    def node(
        self,
        file: PyFile,
        delta: Delta,
        number: int,
        severity: Severity,
        explanation: str,
        cls: FindingClass | None = None,
    ) -> Finding:
        """A finding at line `number` of a parsed file."""
        line = Line(number, file.line(number))
        return self.at(delta, line, severity, explanation, cls)

    def path(self, delta: Delta, severity: Severity, explanation: str) -> Finding:
        """A finding about a whole file."""
        return self.quote(delta.path, severity, explanation, delta.path, 0)

    def quote(
        self,
        quote: str,
        severity: Severity,
        explanation: str,
        path: str = "",
        line: int = 0,
        cls: FindingClass | None = None,
    ) -> Finding:
        """A finding with any quote."""
        source = f"rule:{self.rule}"
        return Finding(cls or self.cls, severity, quote, source, explanation, path, line)

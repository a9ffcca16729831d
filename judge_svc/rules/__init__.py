"""The deterministic monitor: small pure functions from evidence to findings.

- The same evidence, bounds and `RULES_VERSION` give the same findings, in the same order.
- Raise `RULES_VERSION` with every change that can alter a finding: it is part of cache keys.
- A rule that fails on hostile input must not hide the others: it yields what it had found.
"""

from judge_svc.evidence import Evidence, Finding, Severity
from judge_svc.rules import (
    collection,
    config,
    equality,
    harness,
    outcomes,
    runner,
    skipping,
    source,
    tests,
)
from judge_svc.rules.base import Bounds, Context, Rule

RULES_VERSION = "5"
MAX_PER_CLASS = 20

RULES: tuple[Rule, ...] = (
    tests.deleted,
    tests.renamed,
    collection.uncollected,
    tests.skipped,
    tests.weakened,
    config.pytest_settings,
    config.scripts,
    config.masked_exit,
    harness.start_up,
    harness.conftest,
    harness.plugins,
    runner.patches,
    runner.named,
    source.shadowed,
    harness.exits,
    harness.special_cased,
    equality.comparisons,
    skipping.skips,
    harness.addressed,
    source.swallowed,
    source.removed,
    source.dependency_removed,
    outcomes.tests_missing,
    outcomes.coverage_lowered,
    outcomes.rebuilds,
)


def run_rules(evidence: Evidence, bounds: Bounds | None = None) -> tuple[Finding, ...]:
    """Every finding of every rule: gravest first, each once, at most 20 of a class."""
    context = Context(evidence, bounds or Bounds())
    found: list[Finding] = []
    for rule in RULES:
        try:
            found.extend(rule(context))
        except (RecursionError, MemoryError):
            # Trees near the interpreter's depth limit; text rules have already seen the file.
            continue
    return order(found)


def order(found: list[Finding]) -> tuple[Finding, ...]:
    """Findings gravest first, without repeats, bounded per class."""
    kept: dict[tuple[str, str, int, str], Finding] = {}
    for finding in sorted(found, key=lambda f: f.severity is not Severity.VIOLATION):
        kept.setdefault((finding.cls, finding.path, finding.line, finding.quote), finding)
    counts: dict[str, int] = {}
    result = []
    for finding in kept.values():
        counts[finding.cls] = counts.get(finding.cls, 0) + 1
        if counts[finding.cls] <= MAX_PER_CLASS:
            result.append(finding)
    return tuple(result)


__all__ = ["RULES", "RULES_VERSION", "Bounds", "order", "run_rules"]

"""What the gate says of a task, with its evidence: plain values that a file and a message can hold.

- An admitted task depends on nothing but its code: `depends_on` is empty.
- A test that is not required is quarantined, with the cause and what it did in every run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """One check of the gate on one repeat."""

    name: str
    repeat: int
    ok: bool
    detail: str
    results_sha256: str = ""
    seconds: float = 0.0
    conditions: str = ""
    """What was different around the run; empty: nothing."""


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A test that is not required."""

    id: str
    causes: tuple[str, ...]
    """`flaky`, what its outcome hangs on, or `recorded` where the record says so."""
    outcomes: tuple[str, ...] = ()
    """A line for each run: "reference-passes any_fix/pins-restored 2 [order=2]: failed"."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The gate's decision with its evidence."""

    task_id: str
    status: str
    """`admitted`, `rejected`, `quarantined`, or `waiting` for something this host lacks."""
    reason: str
    checks: tuple[Check, ...] = ()
    flaky: tuple[str, ...] = ()
    """Ids that are not required, whatever the cause."""
    state_id: str = ""
    python: str = ""
    fail_to_pass: tuple[str, ...] = ()
    """As seen here: fail in the broken State, pass with the reference fix, stable."""
    pass_to_pass: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    """Recorded fail-to-pass ids that the reference fix does not turn green here."""
    error_log: str = ""
    error_lines: tuple[str, ...] = ()
    fixes: Mapping[str, str] = field(default_factory=dict)
    """Per reference fix `mode/origin`: `ok` or what was wrong."""
    seconds: float = 0.0
    """Mean wall time of one validation of the reference fix."""
    prepare_s: float = 0.0
    """Wall time of the preparation; 0 where the State was there, that of the tests where what it
    installs was."""
    depends_on: tuple[str, ...] = ()
    """What the verdict hangs on beside the code."""
    quarantined: tuple[Quarantined, ...] = ()
    unprobed: Mapping[str, str] = field(default_factory=dict)
    """What could not be varied here, and why."""
    repeats: int = 0

    @property
    def admitted(self) -> bool:
        return self.status == "admitted"


def of_fields(fields: Mapping[str, Any]) -> Verdict:
    """The verdict that `dataclasses.asdict` made these fields of."""
    listed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    held = [Quarantined(q["id"], tuple(q["causes"]), tuple(q["outcomes"]))
            for q in fields.get("quarantined", ())]  # fmt: skip
    checks = tuple(Check(**check) for check in fields.get("checks", ()))
    listed.update(quarantined=tuple(held), checks=checks)
    return Verdict(**listed)


def joined(first: Verdict, second: Verdict) -> Verdict:
    """The verdict on a State that leaves more tests out, with the evidence of the one before.

    Both States hold the same bytes, so what was seen in one is true of the other.
    """
    seen: dict[str, int] = {}
    checks = []
    for check in (*first.checks, *second.checks):
        seen[check.name] = seen.get(check.name, 0) + 1
        checks.append(replace(check, repeat=seen[check.name]))
    held = {q.id: q for q in second.quarantined} | {q.id: q for q in first.quarantined}
    return replace(
        second,
        checks=tuple(checks),
        quarantined=tuple(held[id] for id in sorted(held)),
        flaky=tuple(sorted({*first.flaky, *second.flaky})),
        unprobed={**first.unprobed, **second.unprobed},
        repeats=first.repeats,
        prepare_s=max(first.prepare_s, second.prepare_s),
    )

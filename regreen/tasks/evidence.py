"""The evidence that ships with a task: what the gate saw in every run, in one line.

- Outcomes are there as digests (`Check.results_sha256`): whoever judges the task again compares.
- A line is of one record (`TaskRecord.judged_sha256`): one whose environment, tests or fixes were
  changed since has no evidence.
"""

from collections.abc import Iterable
from datetime import date
from itertools import groupby

from regreen.tasks.model import CheckEvidence, Evidence, TaskRecord, ids_sha256
from regreen.tasks.verdict import Check, Verdict


def evidence_of(verdict: Verdict, task: TaskRecord, day: date) -> Evidence:
    """What `verdict` says of `task`, which was judged that day."""
    named = sorted(verdict.checks, key=lambda check: check.name)
    return Evidence(
        task_id=task.id,
        judged_sha256=task.judged_sha256,
        judged=day.isoformat(),
        python=verdict.python,
        repeats=verdict.repeats,
        checks=[_runs(name, [*of]) for name, of in groupby(named, key=lambda check: check.name)],
        fail_to_pass_sha256=ids_sha256(verdict.fail_to_pass),
        pass_to_pass_sha256=ids_sha256(verdict.pass_to_pass),
        quarantined={held.id: [*held.causes] for held in verdict.quarantined},
        unprobed=dict(verdict.unprobed),
    )


def is_evidence(verdict: Verdict, task: TaskRecord) -> bool:
    """Whether a verdict shows that a record holds, on the interpreter of the record."""
    return verdict.admitted and verdict.repeats > 0 and verdict.python == task.python


def fitting(evidence: Iterable[Evidence], tasks: Iterable[TaskRecord]) -> list[Evidence]:
    """The evidence of records as they are, by id; the last of each."""
    records = {task.id: task.judged_sha256 for task in tasks}
    found = {one.task_id: one for one in evidence if records.get(one.task_id) == one.judged_sha256}
    return [found[id] for id in sorted(found)]


def renewed(
    old: Iterable[Evidence], new: Iterable[Evidence], tasks: Iterable[TaskRecord]
) -> list[Evidence]:
    """The same with newer evidence in place of older, but for that of fewer repeats."""
    records = [task for task in tasks if task.status == "admitted"]
    kept = {one.task_id: one for one in fitting(old, records)}
    for one in fitting(new, records):
        before = kept.get(one.task_id)
        if before is None or one.repeats >= before.repeats:
            kept[one.task_id] = one
    return [kept[id] for id in sorted(kept)]


def _runs(name: str, checks: list[Check]) -> CheckEvidence:
    return CheckEvidence(
        name=name,
        runs=len(checks),
        failed=sum(not check.ok for check in checks),
        results=[*dict.fromkeys(c.results_sha256 for c in checks if c.results_sha256)],
        conditions=[*dict.fromkeys(c.conditions for c in checks if c.conditions)],
        detail=checks[0].detail[:300],
    )

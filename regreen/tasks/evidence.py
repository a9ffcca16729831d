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
        record_sha256=task.judged_sha256,
        judged=day.isoformat(),
        python=verdict.python,
        repeats=verdict.repeats,
        checks=[_runs(name, [*of]) for name, of in groupby(named, key=lambda check: check.name)],
        fail_to_pass_sha256=ids_sha256(verdict.fail_to_pass),
        pass_to_pass_sha256=ids_sha256(verdict.pass_to_pass),
        quarantined={held.id: [*held.causes] for held in verdict.quarantined},
        unprobed=dict(verdict.unprobed),
    )


def fitting(evidence: Iterable[Evidence], tasks: Iterable[TaskRecord]) -> list[Evidence]:
    """The evidence of records as they are, by id; the last of each."""
    records = {task.id: task.judged_sha256 for task in tasks}
    found = {one.task_id: one for one in evidence if records.get(one.task_id) == one.record_sha256}
    return [found[id] for id in sorted(found)]


def renewed(
    old: Iterable[Evidence], new: Iterable[Evidence], tasks: Iterable[TaskRecord]
) -> list[Evidence]:
    """The same with newer evidence in place of older, but for that of fewer repeats."""
    records = [task for task in tasks if task.status == "admitted"]
    kept = {one.task_id: one for one in fitting(old, records)}
    more = [one for one in new if one.task_id not in kept
            or one.repeats >= kept[one.task_id].repeats]  # fmt: skip
    return fitting([*kept.values(), *more], records)


def _runs(name: str, checks: list[Check]) -> CheckEvidence:
    return CheckEvidence(
        name=name,
        runs=len(checks),
        failed=sum(not check.ok for check in checks),
        results=[*dict.fromkeys(c.results_sha256 for c in checks if c.results_sha256)],
        conditions=[*dict.fromkeys(c.conditions for c in checks if c.conditions)],
        detail=checks[0].detail[:300],
    )

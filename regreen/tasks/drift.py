"""What changed between two gatings of one task.

- Only what can be compared is: a report that keeps no test ids says nothing of them.
- Wall times are no drift.
"""

from collections.abc import Iterable, Sequence

from regreen.dataset import v1 as pb

_SHOWN = 4


def drift(before: pb.GateReport | None, now: pb.GateReport) -> list[str]:
    """What the newer report says otherwise, a line each; empty: nothing, or there was none."""
    if before is None or before.status in (pb.TASK_STATUS_UNSPECIFIED, pb.TASK_STATUS_NEW):
        return []
    found = []
    if before.status != now.status:
        found.append(f"{_status(before)} before, {_status(now)} now: {now.reason}")
    elif before.reason != now.reason and now.status != pb.TASK_STATUS_ADMITTED:
        found.append(f"refused for another reason: {before.reason!r} before")
    if before.python != now.python and before.python and now.python:
        found.append(f"Python {before.python} before, {now.python} now")
    decided = (pb.TASK_STATUS_ADMITTED, pb.TASK_STATUS_REJECTED, pb.TASK_STATUS_QUARANTINED)
    if before.status not in decided or now.status not in decided or not before.repeats:
        return found
    found += _ids("turn green", before.fail_to_pass, now.fail_to_pass)
    found += _ids("pass before and after", before.pass_to_pass, now.pass_to_pass)
    found += _ids(
        "are quarantined", [q.id for q in before.quarantined], [q.id for q in now.quarantined]
    )
    for name in sorted({*before.fixes, *now.fixes}):
        was, has = before.fixes.get(name, "absent"), now.fixes.get(name, "absent")
        if (was == "ok") != (has == "ok"):
            found.append(f"fix {name}: {was} before, {has} now")
    return found


def _ids(what: str, before: Iterable[str], now: Iterable[str]) -> list[str]:
    old, new = set(before), set(now)
    found = []
    if lost := sorted(old - new):
        found.append(f"{len(lost)} tests no longer {what}: {_some(lost)}")
    if more := sorted(new - old):
        found.append(f"{len(more)} more tests {what}: {_some(more)}")
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")


def _status(report: pb.GateReport) -> str:
    return pb.TaskStatus.Name(report.status).removeprefix("TASK_STATUS_").lower()

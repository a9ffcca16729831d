"""Puts admitted records into a task set: `python -m regreen.tasks.merge MINED [--into SET]`.

- Only admitted records come in; an id that the set has already keeps what the set says, and gains
  fixes of modes that it has none of.
- What split they come into, and which are left out so that none gives another away, is decided by
  `regreen.tasks.splits`.
- Releases are merged file by file; a file that is listed with two hashes is refused.
- Evidence comes along where it is of the record as the set has it.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from regreen.lockfile import normalize
from regreen.rpc.errors import InvalidArgument
from regreen.tasks.evidence import renewed
from regreen.tasks.jsonl import (
    SHIPPED,
    load_distributions,
    load_evidence,
    load_tasks,
    write_lines,
)
from regreen.tasks.model import DistributionRecord, ModeName, TaskRecord
from regreen.tasks.splits import Splits

MODES = get_args(ModeName)


def merged_tasks(
    old: Sequence[TaskRecord], new: Sequence[TaskRecord], splits: Splits | None = None
) -> list[TaskRecord]:
    """The set with what is admitted of `new`, by package and id; `splits` hears what is left out.

    Raises:
        InvalidArgument: a family of packages of the set has two splits.
    """
    splits = splits or Splits(old)
    known = {task.id: task for task in old}
    added = []
    for task in new:
        if task.status != "admitted":
            continue
        if task.id in known:
            known[task.id] = gaining(known[task.id], task)
            continue
        known[task.id] = task
        split = splits.place(task)
        if split is not None:
            added.append(task.model_copy(update={"split": split}))
    kept = [known[task.id] for task in old]
    return [*kept, *sorted(added, key=lambda task: (normalize(task.package), task.id))]


def gaining(old: TaskRecord, new: TaskRecord) -> TaskRecord:
    """A record with the fixes of another of the same environment, for modes that it has none of."""
    alike = ("sdist", "tree", "overlay", "python", "pins_pass", "pins_fail", "culprit")
    if any(getattr(old, name) != getattr(new, name) for name in alike):
        return old
    have = {fix.mode for fix in old.fixes}
    fixes = [*old.fixes, *(fix for fix in new.fixes if fix.mode not in have)]
    modes = [mode for mode in MODES if any(fix.mode == mode for fix in fixes)]
    return old.model_copy(update={"fixes": fixes, "modes": modes}) if len(modes) > 1 else old


def merged_releases(
    old: Mapping[str, DistributionRecord],
    new: Mapping[str, DistributionRecord],
    pins: set[str],
) -> list[DistributionRecord]:
    """The releases of a set with those of `pins` that are new to it.

    Raises:
        InvalidArgument: one file has two hashes.
    """
    found = dict(old)
    for pin in sorted(set(new) & pins):
        files = {f.filename: f for f in (found[pin].files if pin in found else ())}
        for file in new[pin].files:
            if files.setdefault(file.filename, file).sha256 != file.sha256:
                raise InvalidArgument("files", f"{file.filename} has two hashes", "keep the right")
        ordered = [files[name] for name in sorted(files)]
        found[pin] = new[pin].model_copy(update={"files": ordered})
    return [found[pin] for pin in sorted(found)]


def merge(mined: Path, into: Path) -> int:
    """Merge one directory into another; how many tasks came in or gained a fix.

    Raises:
        InvalidArgument: the two contradict each other; nothing was written.
    """
    old = load_tasks(into / "tasks.jsonl")
    splits = Splits(old)
    tasks = merged_tasks(old, load_tasks(mined / "tasks.jsonl"), splits)
    for id, why in splits.left_out.items():
        sys.stderr.write(f"{id} is left out: {why}\n")
    pins = {
        pin
        for task in tasks[len(old) :]
        for pin in (*task.pins_pass, *task.pins_fail, *task.wheelhouse, *task.build.tools)
    }
    releases = merged_releases(
        load_distributions(into / "distributions.jsonl"),
        load_distributions(mined / "distributions.jsonl"),
        pins,
    )
    write_lines(into / "distributions.jsonl", releases)  # first: tasks refer to releases
    write_lines(into / "tasks.jsonl", tasks)
    before = load_evidence(into / "evidence.jsonl")
    seen = renewed(before, load_evidence(mined / "evidence.jsonl"), tasks)
    write_lines(into / "evidence.jsonl", seen)
    for id in sorted({one.task_id for one in before} - {one.task_id for one in seen}):
        sys.stderr.write(f"{id} has changed: what was seen of it before is no evidence any more\n")
    return len(tasks) - sum(one in old for one in tasks)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m regreen.tasks.merge", description=__doc__
    )
    parser.add_argument("mined", type=Path, help="directory of the records to add")
    parser.add_argument("--into", type=Path, default=SHIPPED, help="task set; default: the shipped")
    options = parser.parse_args()
    sys.stderr.write(f"{merge(options.mined, options.into)} tasks came in or gained a fix\n")


if __name__ == "__main__":
    main()

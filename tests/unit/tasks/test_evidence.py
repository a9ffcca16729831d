"""The evidence that ships: of every task, of the record as it is, with five repeats."""

from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from regreen.cli.tasks import _shipped
from regreen.dataset import v1 as pb
from regreen.tasks.evidence import evidence_of, fitting, is_evidence, renewed
from regreen.tasks.jsonl import (
    load_evidence,
    load_tasks,
    shipped_evidence,
    shipped_tasks,
    write_lines,
)
from regreen.tasks.model import Edit, Fix, Split, TaskRecord
from regreen.tasks.records import RECORD_LABEL, record_sha256
from regreen.tasks.verdict import Check, Quarantined, Verdict
from regreen.tasks.verify import Judged, _drop_part, _update, read_judged, refreshed

TODAY = date(2026, 1, 2)
EDITS = [Edit(path="a.py", old="b", new="c")]
TASKS = {task.id: task for task in shipped_tasks()}


def verdict(task: TaskRecord, *checks: Check, repeats: int = 5) -> Verdict:
    held = (Quarantined("t.py::clock", ("date",), ("broken-fails 2: passed",)),)
    return Verdict(
        task.id, "admitted", "", checks, python="3.11", repeats=repeats, quarantined=held,
        fail_to_pass=("t.py::a",), fixes={"any_fix/pins-restored": "ok"},
    )  # fmt: skip


def test_every_shipped_task_has_it_and_no_other_does() -> None:
    assert [one.task_id for one in shipped_evidence()] == sorted(TASKS)


@pytest.mark.parametrize("one", shipped_evidence(), ids=lambda one: one.task_id)
def test_it_is_of_the_record_as_it_ships_and_of_five_repeats_of_every_check(one) -> None:
    task = TASKS[one.task_id]
    assert (one.judged_sha256, one.python) == (task.judged_sha256, task.python)
    assert sorted(one.quarantined) == sorted(task.tests.unstable)
    assert one.fail_to_pass_sha256 == task.tests.fail_to_pass_sha256
    assert one.pass_to_pass_sha256 == task.tests.pass_to_pass_sha256
    assert one.repeats >= 5
    fixes = [f"reference-passes {fix.mode}/{fix.origin}" for fix in task.fixes]
    runs = {check.name: check for check in one.checks}
    assert not {"broken-fails", "noop-fails", *fixes} - set(runs)
    for name in ("broken-fails", "noop-fails", *fixes):
        assert (runs[name].runs >= 5, runs[name].failed, bool(runs[name].results)) == (True, 0, 1)
        assert any("order=" in around for around in runs[name].conditions)
        assert any("hash_seed=" in around for around in runs[name].conditions)


def test_runs_are_counted_and_their_outcomes_told_once() -> None:
    task = next(iter(TASKS.values()))
    seen = [
        Check("noop-fails", 1, True, "1 of 2 fails", "a" * 64),
        Check("broken-fails", 1, True, "baseline", "a" * 64),
        Check("noop-fails", 2, False, "passed", "b" * 64, conditions="order=2"),
        Check("noop-fails", 3, True, "1 of 2 fails", "a" * 64, conditions="order=2"),
    ]
    broken, noop = evidence_of(verdict(task, *seen), task, TODAY).checks
    assert (broken.name, broken.runs, broken.failed, broken.conditions) == (
        "broken-fails",
        1,
        0,
        [],
    )
    assert (noop.runs, noop.failed, noop.detail) == (3, 1, "1 of 2 fails")
    assert (noop.results, noop.conditions) == (["a" * 64, "b" * 64], ["order=2"])


@pytest.mark.parametrize(
    "change",
    [
        {"pins_fail": ["web==9.0"]},
        {"python": "3.12"},
        {"version": "9.9"},
        {"control": True},
        {"fixes": [Fix(mode="any_fix", origin="source-edit", edits=EDITS)]},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_record_that_was_changed_has_none(tmp_path: Path, change) -> None:
    task = next(iter(TASKS.values()))
    write_lines(tmp_path / "evidence.jsonl", [evidence_of(verdict(task), task, TODAY)])
    kept = load_evidence(tmp_path / "evidence.jsonl")
    assert [one.quarantined for one in fitting(kept, [task])] == [{"t.py::clock": ["date"]}]
    assert fitting(kept, [task.model_copy(update=change)]) == []
    assert load_evidence(tmp_path / "none.jsonl") == []


def test_what_a_verdict_finds_and_where_a_task_is_used_leave_the_record_what_it_was() -> None:
    task = next(t for t in TASKS.values() if [f.origin for f in t.fixes] == ["pins-restored"])
    other: Split = "test" if task.split == "train" else "train"
    moved = task.model_copy(update={"split": other, "wheelhouse": [], "status": "unjudged"})
    assert refreshed(moved, verdict(task)).judged_sha256 == task.judged_sha256


def test_newer_evidence_takes_the_place_of_older_unless_it_is_of_fewer_repeats() -> None:
    task, other = list(TASKS.values())[:2]
    old = evidence_of(verdict(task), task, TODAY)
    fewer, as_many = (evidence_of(verdict(task, repeats=n), task, date(2026, 2, 3)) for n in (4, 5))
    also = evidence_of(verdict(other, repeats=1), other, TODAY)
    ids = sorted([task.id, other.id])
    assert renewed([old], [fewer], [task]) == [old]
    assert renewed([old], [as_many], [task]) == [as_many]
    assert [one.task_id for one in renewed([old], [also], [task, other])] == ids
    assert renewed([old], [], [task.model_copy(update={"status": "rejected"})]) == []


@pytest.mark.parametrize(
    ("change", "is_one"),
    [
        ({}, True),
        ({"status": "waiting"}, False),
        ({"status": "rejected", "repeats": 0}, False),
        ({"repeats": 0}, False),
        ({"python": "2.7"}, False),
    ],
)
def test_only_an_admission_on_the_records_interpreter_is_evidence(change, is_one) -> None:
    task = next(t for t in TASKS.values() if t.python == "3.11")
    assert is_evidence(replace(verdict(task), **change), task) == is_one


def test_an_update_writes_what_was_seen_of_the_records_as_they_are(tmp_path: Path) -> None:
    first, second, third = list(TASKS.values())[:3]
    seen = [
        Judged(verdict(first), first.judged_sha256, "2026-02-03"),
        Judged(replace(verdict(second), status="waiting"), second.judged_sha256, "2026-02-03"),
        Judged(verdict(third), "0" * 64, "2026-02-03"),
    ]
    tasks = [task.model_copy(update={"python": "3.11"}) for task in (first, second, third)]
    seen[0] = replace(seen[0], judged_sha256=tasks[0].judged_sha256)
    _update(tmp_path, tmp_path, tasks, seen)
    written = load_evidence(tmp_path / "evidence.jsonl")
    assert [(one.task_id, one.judged) for one in written] == [(first.id, "2026-02-03")]
    assert [task.id for task in load_tasks(tmp_path / "tasks.jsonl")] == [t.id for t in tasks]


@pytest.mark.parametrize("part", ["", '{"task_id": "b", "chec', "\u00e9"])
def test_the_part_of_a_line_that_a_killed_process_left_is_none(tmp_path: Path, part) -> None:
    out = tmp_path / "verdicts.jsonl"
    whole = '{"task_id": "a", "status": "admitted", "reason": ""}\n'
    out.write_bytes((whole + part).encode()[: len(whole + part)])  # amid a character too
    assert [one.verdict.task_id for one in read_judged(out)] == ["a"]
    _drop_part(out)
    assert out.read_text("utf-8") == whole
    _drop_part(tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


def test_it_is_shown_of_a_task_that_is_of_the_shipped_record_alone() -> None:
    task = next(iter(TASKS.values()))
    other = task.model_copy(update={"version": "9.9"})
    shown, none = (
        _shipped(pb.Task(id=task.id, labels={RECORD_LABEL: record_sha256(record)}))
        for record in (task, other)
    )
    assert shown is not None
    assert (shown.task_id, none, _shipped(pb.Task(id=task.id))) == (task.id, None, None)

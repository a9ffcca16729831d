"""The journal: nothing done is done again."""

from datetime import date
from pathlib import Path

from regreen.mine.culprits import Candidate
from regreen.mine.report import lines_of, report
from regreen.mine.store import Decided, Journal, Outcome, shipped_decisions
from regreen.mine.work import KEPT_IDS, export, shortened
from regreen.tasks.jsonl import load_distributions, load_tasks, parse_lines
from regreen.tasks.model import Culprit, DistributionRecord, FileRecord, TaskRecord, Tests

KIND = "dependency-upgrade"


def candidate(package: str, day: str = "2023-01-01", *hints: tuple[str, str]) -> Candidate:
    return Candidate(KIND, package, date.fromisoformat(day), hints)


def task(id: str, status: str = "admitted", ids: int = 1) -> TaskRecord:
    names = [f"t.py::test_{n:04}" for n in range(ids)]
    return TaskRecord(
        id=id,
        kind=KIND,
        package=id.partition("-")[0],
        version="1.0",
        python="3.11",
        sdist=FileRecord(filename="p-1.0.tar.gz", sha256="0" * 64),
        pins_pass=["web==1.0"],
        pins_fail=["web==2.0"],
        culprit=Culprit(name="web", good="1.0", bad="2.0"),
        tests=Tests(arguments=["tests"], fail_to_pass=names, fail_to_pass_count=ids),
        stage="test-run",
        status=status,
        blame="source",
    )


def releases(*shas: str) -> list[DistributionRecord]:
    files = [FileRecord(filename=f"web-2.0-{s}-none-any.whl", sha256=s * 64) for s in shas]
    return [DistributionRecord(name="web", version="2.0", files=files)]


def test_a_run_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    one, two, three = candidate("a", "2023-01-01", ("web", "2.0")), candidate("b"), candidate("c")
    first = Journal(tmp_path / "j.db")
    first.enqueue([one, two, three])
    assert first.take([KIND]) == one
    first.decide(one, Outcome("rejected", "screen", "no tests", version="1.0"))
    assert first.take([KIND]) == two  # in work when the process is killed
    second = Journal(tmp_path / "j.db")
    second.recover()
    second.enqueue([three, two, one])
    assert [second.take([KIND]) for _ in range(3)] == [three, two, None]
    assert second.forget(["rejected"], "other") == 0
    assert second.forget(["rejected"], "no tests") == 1
    assert second.take([KIND]) == one


def test_what_was_decided_elsewhere_is_not_tried_again(tmp_path: Path) -> None:
    told, slow, mined, new = (candidate(name) for name in "abcd")
    there = Journal(tmp_path / "there.db")
    there.enqueue([told, slow, mined, new])
    ends = [("rejected", "no tests"), ("rejected", "too slow"), ("mined", "1 of 1 admitted")]
    for one, (status, reason) in zip((told, slow, mined), ends, strict=True):
        assert there.take([KIND]) == one
        there.decide(one, Outcome(status, "base", reason, version=f"{one.package}.1"))
    export(there, tmp_path / "out")
    text = (tmp_path / "out" / "decided.jsonl").read_text("utf-8")
    decisions = parse_lines(text, Decided, "decided.jsonl")
    assert [one.key for one in decisions] == [told.key, mined.key], "time is this machine's"

    here = Journal(tmp_path / "here.db")
    here.enqueue([new, mined, slow, told])
    assert here.take([KIND]) == new
    assert here.adopt([*decisions, Decided(key=new.key, stage="base", reason="late")]) == 2
    assert [here.take([KIND]) for _ in range(2)] == [slow, None]
    assert here.versions_of(candidate("a", "2024-01-01")) == {"a.1"}
    assert report(here).candidates == {"running": 2, "known": 2}
    assert not report(here).rejected
    assert here.decisions() == decisions
    assert here.forget(["known"], "no tests") == 1
    assert here.take([KIND]) == told


def test_the_decisions_that_ship_can_be_read() -> None:
    keys = [one.key for one in shipped_decisions()]
    assert keys == sorted(set(keys))


def test_only_what_was_asked_for_is_taken(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.db")
    journal.enqueue([candidate("a"), candidate("b")])
    assert journal.take(["other"]) is None
    found = journal.take([KIND], [candidate("b").key])
    assert found is not None
    assert found.package == "b"


def test_releases_that_were_looked_at_are_known(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.db")
    early, late = candidate("a"), candidate("a", "2024-01-01")
    journal.enqueue([early, late])
    journal.decide(early, Outcome("rejected", "base", "slow", version="1.0"))
    assert journal.versions_of(late) == {"1.0"}
    assert journal.versions_of(early) == set()
    journal.keep(early, task("a-1"), [], {})
    journal.keep(late, task("a-2", "rejected"), [], {})
    assert journal.breaks_of(late) == {("web", "2.0")}
    assert journal.breaks_of(early) == set()  # its own record is no other's
    assert journal.breaks_of(candidate("b")) == set()


def test_admitted_records_are_written_with_their_releases(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.db")
    for record, sha in (
        (task("b-1", ids=400), "b"),
        (task("a-1"), "a"),
        (task("c-1", "rejected"), "c"),
    ):
        journal.keep(candidate(record.package), record, releases(sha), {"reason": ""})
    assert export(journal, tmp_path / "out") == (2, 1)
    tasks = load_tasks(tmp_path / "out" / "tasks.jsonl")
    assert [t.id for t in tasks] == ["a-1", "b-1"]
    assert len(tasks[1].tests.fail_to_pass) == 300
    assert tasks[1].tests.fail_to_pass_count == 400
    files = load_distributions(tmp_path / "out" / "distributions.jsonl")["web==2.0"].files
    assert [f.sha256[0] for f in files] == ["a", "b"]


def test_the_report_counts_what_the_journal_holds(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.db")
    one, two = candidate("a"), candidate("b")
    journal.enqueue([one, two, candidate("c")])
    seconds, counts = {"screen": 2.0, "single": 4.0}, {"screen": 1, "single": 2, "resolve all": 1}
    journal.decide(one, Outcome("mined", "gate", "1 of 1", seconds=seconds, counts=counts))
    journal.decide(two, Outcome("rejected", "screen", "no tests", seconds={"screen": 1.0}))
    journal.keep(one, task("a-1"), [], {})
    for worker_s in (100.0, 1800.0):
        journal.note_spent(5.0, 2000.0, worker_s, 7)
    found = report(journal)
    assert found.candidates == {"mined": 1, "rejected": 1, "waiting": 1}
    assert found.rejected == {"screen: no tests": 1}
    assert (found.usable, found.packages, found.culprits, found.requests) == (1, 1, 1, 7)
    assert found.stages["single"] == {"seconds": 4.0, "times": 2, "mean_s": 2.0}
    assert found.per_hour == {"candidates": 4.0, "upgrades tried": 4.0, "admitted records": 2.0}
    assert ("rejected screen: no tests", "1") in lines_of(found)


def test_a_long_list_is_kept_whole_where_the_tests_do_not_run() -> None:
    long = task("shop-1.0__web-2.0", ids=KEPT_IDS + 1)
    for stage, kept in (("session-start", 301), ("collection", 301), ("test-run", 300)):
        found = shortened(long.model_copy(update={"stage": stage})).tests
        assert (len(found.fail_to_pass), found.fail_to_pass_count) == (kept, 301)

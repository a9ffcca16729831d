"""Putting mined records into a set: one split a package, one hash a file."""

from pathlib import Path

import pytest

from regreen.rpc.errors import InvalidArgument
from regreen.tasks.jsonl import dump_lines, load_distributions, load_tasks, shipped_tasks
from regreen.tasks.leaks import facts_of_record, leaks
from regreen.tasks.merge import merge, merged_tasks
from regreen.tasks.model import (
    Culprit,
    DistributionRecord,
    FileRecord,
    Fix,
    Rewrite,
    TaskRecord,
    Tests,
)
from regreen.tasks.splits import Splits, split_of


def task(id: str, package: str, **changes: object) -> TaskRecord:
    plain = TaskRecord(
        id=id,
        kind="dependency-upgrade",
        package=package,
        version="1.0",
        python="3.11",
        sdist=FileRecord(filename="p-1.0.tar.gz", sha256="0" * 64),
        pins_pass=["web==1.0"],
        pins_fail=["web==2.0"],
        tests=Tests(arguments=["tests"], fail_to_pass=["t.py::t"], fail_to_pass_count=1),
        status="admitted",
    )
    return plain.model_copy(update=changes)


def write(folder: Path, tasks: list[TaskRecord], **files: str) -> Path:
    folder.mkdir()
    records = [
        DistributionRecord(
            name="web",
            version=version,
            files=[FileRecord(filename=f"web-{version}-{tag}.whl", sha256=tag * 64)],
        )
        for version, tag in (("1.0", files["one"]), ("2.0", files["two"]), ("9.0", "9"))
    ]
    (folder / "tasks.jsonl").write_text(dump_lines(tasks))
    (folder / "distributions.jsonl").write_text(dump_lines(records))
    return folder


def test_what_is_admitted_comes_in_once_with_its_releases(tmp_path: Path) -> None:
    into = write(tmp_path / "set", [task("a", "p", split="test")], one="1", two="2")
    (into / "distributions.jsonl").write_text("")
    mined = [task("b", "P"), task("a", "p", version="9"), task("c", "q", status="rejected")]
    found = write(tmp_path / "mined", mined, one="1", two="3")
    assert merge(found, into) == 1
    assert merge(found, into) == 0
    tasks = load_tasks(into / "tasks.jsonl")
    assert [(t.id, t.version, t.split) for t in tasks] == [
        ("a", "1.0", "test"),
        ("b", "1.0", "test"),
    ]
    assert sorted(load_distributions(into / "distributions.jsonl")) == ["web==1.0", "web==2.0"]


def test_a_task_gains_the_fix_of_a_mode_that_it_has_none_of(tmp_path: Path) -> None:
    pins = Fix(mode="any_fix", origin="pins-restored")
    rewrite = Rewrite(path="p.py", rules=["r"], before_sha256="1" * 64, after_sha256="2" * 64)
    rules = Fix(mode="keep_new", origin="rules", rewrites=[rewrite])
    old = task("a", "p", fixes=[pins], seconds=1.0)
    into = write(tmp_path / "set", [old, task("b", "p", fixes=[pins])], one="1", two="2")
    upstream = Fix(mode="any_fix", origin="upstream")
    new = task("a", "p", fixes=[upstream, rules], modes=["any_fix", "keep_new"], seconds=2.0)
    other = task("b", "p", fixes=[pins, rules], pins_fail=["web==3.0"])
    found = write(tmp_path / "found", [new, other], one="1", two="2")
    assert merge(found, into) == 1
    assert merge(found, into) == 0
    first, second = load_tasks(into / "tasks.jsonl")
    assert (first.fixes, first.modes) == ([pins, rules], ["any_fix", "keep_new"])
    assert first.seconds == 1.0  # the rest is what the set says
    assert second.fixes == [pins]  # that was another environment


def test_files_of_one_release_are_joined_and_never_contradict(tmp_path: Path) -> None:
    into = write(tmp_path / "set", [task("a", "p")], one="1", two="2")
    assert merge(write(tmp_path / "more", [task("b", "q")], one="4", two="5"), into) == 1
    names = [f.filename for f in load_distributions(into / "distributions.jsonl")["web==1.0"].files]
    assert names == ["web-1.0-1.whl", "web-1.0-4.whl"]
    bad = write(tmp_path / "bad", [task("c", "q")], one="1", two="2")
    text = (bad / "distributions.jsonl").read_text().replace("1" * 64, "7" * 64)
    (bad / "distributions.jsonl").write_text(text)
    before = (into / "tasks.jsonl").read_text()
    with pytest.raises(InvalidArgument, match=r"web-1\.0-1\.whl has two hashes"):
        merge(bad, into)
    assert (into / "tasks.jsonl").read_text() == before


def test_a_package_has_one_split_whatever_comes_first() -> None:
    one, two = task("a", "some.Package"), task("b", "some-package")
    found = merged_tasks([], [one, two])
    assert {t.split for t in found} == {split_of("some_package")}
    torn = [one, two.model_copy(update={"split": "test"}), task("c", "z", split="validation")]
    with pytest.raises(InvalidArgument, match="some-package differs"):
        merged_tasks(torn, [])
    shares = [split_of(f"package-{n}") for n in range(1000)]
    assert 150 < shares.count("test") < 250
    assert 60 < shares.count("validation") < 140


def test_the_shipped_set_has_one_split_a_package() -> None:
    tasks = shipped_tasks()
    assert merged_tasks(tasks, tasks) == tasks
    assert {t.status for t in tasks} == {"admitted"}


def broken_by(name: str, id: str, package: str, **changes: object) -> TaskRecord:
    culprit = Culprit(name=name, good="1.0", bad="2.0")
    return task(id, package, culprit=culprit, **changes)


LINES = [f"E   TypeError: {word}() got an unexpected argument {word}" for word in "abcdefgh"]


def test_what_a_late_culprit_broke_is_in_the_test_split_alone() -> None:
    learning = next(f"p{n}" for n in range(99) if split_of(f"p{n}") == "train")
    late = broken_by("pydantic", "a", learning)
    assert [one.split for one in merged_tasks([], [late])] == ["test"]
    there = [task("b", learning, split="train")]
    splits = Splits(there)
    assert merged_tasks(there, [late], splits) == there
    assert splits.left_out == {"a": f"the culprit pydantic is held out, and {learning} is in train"}
    learnt = [broken_by("pydantic", "c", "other", split="train")]
    assert [one.split for one in merged_tasks(learnt, [late])] == ["train", "train"]


def test_a_control_comes_into_the_test_split_or_not_at_all() -> None:
    learning = next(f"p{n}" for n in range(99) if split_of(f"p{n}") == "train")
    control = task("a", learning, control=True)
    assert [one.split for one in merged_tasks([], [control])] == ["test"]
    there = [task("b", learning, split="train")]
    splits = Splits(there)
    assert merged_tasks(there, [control], splits) == there
    assert splits.left_out["a"].startswith("is a control, and")


def test_what_would_give_a_task_away_goes_with_it_or_is_left_out() -> None:
    there = [task("a", "one", split="validation", error_lines=LINES)]
    near = task("b", "two", error_lines=LINES)
    assert [one.split for one in merged_tasks(there, [near])] == ["validation", "validation"]
    there.append(task("c", "two", split="train"))
    splits = Splits(there)
    assert merged_tasks(there, [near], splits) == there
    assert "have nearly the same log (1.00)" in splits.left_out["b"]


def test_one_break_is_one_task() -> None:
    def broken(id: str, good: str, bad: str, test: str = "t::a", name: str = "Numpy") -> TaskRecord:
        one = task(id, "some.Package", culprit=Culprit(name=name, good=good, bad=bad))
        return one.model_copy(
            update={"tests": one.tests.model_copy(update={"fail_to_pass": [test]})}
        )

    there = merged_tasks([], [broken("wide", "1.26", "2.2")])
    for near in (broken("first", "1.26.4", "2.0", name="numpy"), broken("late", "2.1", "3.0")):
        splits = Splits(there)
        assert merged_tasks(there, [near], splits) == there
        assert splits.left_out == {near.id: "is the break of wide"}
    others = [
        broken("before", "1.20", "1.26"),
        broken("after", "2.2", "2.3"),
        broken("elsewhere", "1.26", "2.0", test="t::b"),
        broken("another", "1.26", "2.0", name="pandas"),
    ]
    assert len(merged_tasks(there, others)) == 5
    odd = [broken("x", "old", "new"), broken("y", "old", "new"), broken("z", "new", "newer")]
    assert [one.id for one in merged_tasks([], odd)] == ["x", "z"]


def test_a_family_has_one_split() -> None:
    there = [task("a", "dateutil", split="validation")]
    found = merged_tasks(there, [task("b", "python-dateutil")])
    assert [one.split for one in found] == ["validation", "validation"]
    with pytest.raises(InvalidArgument, match="of dateutil differs between its tasks"):
        Splits([*there, task("b", "py-dateutil", split="test")])


def test_the_shipped_set_takes_in_nothing_that_gives_it_away() -> None:
    found = [facts_of_record(one) for one in merged_tasks(shipped_tasks(), [])]
    assert not leaks(found)

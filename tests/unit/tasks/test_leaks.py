"""Splits that give each other away: families, logs and patches that are nearly the same."""

import pytest

from regreen.dataset import v1 as pb
from regreen.sandbox import v1 as sandbox_pb
from regreen.tasks.jsonl import shipped_tasks
from regreen.tasks.leaks import facts, facts_of_record, held_out, leaks, leaks_of, share

LOG = """
=================================== FAILURES ===================================
_________________________________ test_decode __________________________________
    def test_decode():
>       assert load("a=1") == {"a": "1"}
/work/repo/tests/test_decode.py:12: in test_decode
    from werkzeug.urls import url_decode, url_quote_plus, url_encode
E   ImportError: cannot import name 'url_decode' from 'werkzeug.urls' (/work/env/lib/python3.9/site)
=========================== short test summary info ============================
FAILED tests/test_decode.py::test_decode - ImportError: cannot import name 'url_decode'
FAILED tests/test_decode.py::test_encode - ImportError: cannot import name 'url_encode'
2 failed, 31 passed in 0.41s at 0x7f3dbdb5a690
"""
SOURCE = "".join(f"def part_{n}(value):\n    return value.{n}({n}, 'x{n}')\n" for n in "abcdefgh")


def task(id: str, split: str, package: str = "", log: str = "", patch: str = "") -> pb.Task:
    found = pb.Task(
        id=id,
        split=split,
        culprit="werkzeug",
        error_log=log,
        environment=sandbox_pb.EnvironmentSpec(package=package or id),
    )
    fix = found.fixes.add(origin="pins-restored")
    fix.changes.add(path="requirements.lock", content=SOURCE.encode())
    if patch:
        found.fixes.add(origin="source-edit").changes.add(path="a.py", content=patch.encode())
    return found


def kinds(*tasks: pb.Task) -> list[str]:
    return [leak.kind for leak in leaks([facts(one) for one in tasks])]


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_log_that_is_nearly_the_same_gives_away(split: str) -> None:
    other = LOG.replace("/work/repo/tests", "/work/elsewhere/x").replace("0.41", "7.2")
    other = other.replace("0x7f3dbdb5a690", "0xdead").replace("python3.9", "python3.11")
    pair = task("a", "train", log=LOG), task("b", split, log=other)
    assert share(*(facts(one).log for one in pair)) == 1
    assert kinds(*pair) == kinds(*reversed(pair)) == ["log"]
    (leak,) = leaks([facts(one) for one in pair])
    assert str(leak) == f"b ({split}) and a (train) have nearly the same log (1.00)"


def test_what_is_near_in_one_split_is_no_leak() -> None:
    assert not kinds(task("a", "train", log=LOG), task("b", "train", log=LOG))
    assert not kinds(task("a", "train", log=LOG), task("b", "", log=LOG))


def test_another_log_of_the_same_culprit_is_no_leak() -> None:
    other = LOG.replace("decode", "safe_join").replace("werkzeug.urls", "werkzeug.utils")
    other = other.replace("url_encode", "Thing").replace('load("a=1") == {"a": "1"}', "f(1, x=y)")
    other += "E   TypeError: f() got an unexpected keyword argument 'x', and some more words\n" * 2
    assert not kinds(task("a", "train", log=LOG), task("b", "test", log=other))


def test_a_short_log_tells_nothing() -> None:
    short = "AttributeError: __spec__"
    assert not kinds(task("a", "train", log=short), task("b", "test", log=short))


def test_a_patch_that_is_nearly_the_same_gives_away_and_moved_pins_do_not() -> None:
    nearly = SOURCE.replace("part_a", "part_z")
    assert kinds(task("a", "train", patch=SOURCE), task("b", "test", patch=nearly)) == ["patch"]
    assert not kinds(task("a", "train"), task("b", "test"))


@pytest.mark.parametrize("other", ["python-dateutil", "DateUtil", "py-dateutil", "dateutil_python"])
def test_a_family_of_packages_is_one(other: str) -> None:
    pair = task("a", "train", "dateutil"), task("b", "test", other)
    assert kinds(*pair) == ["family"]
    assert not kinds(task("a", "train", "dateutil"), task("b", "test", "dateparser"))


def test_a_task_does_not_give_itself_away() -> None:
    before, now = task("a", "train", log=LOG), task("a", "test", log=LOG)
    assert not leaks_of(facts(now), [facts(before)])


def test_who_is_held_out_is_told_by_the_culprits_of_the_other_splits() -> None:
    every = [task("a", "train"), task("b", "test"), task("c", "test"), task("d", "validation")]
    every[2].culprit = "jinja2"
    every[3].culprit = "markupsafe"
    assert held_out(map(facts, every)) == ["c"]


def test_the_shipped_set_gives_nothing_away() -> None:
    found = [facts_of_record(record) for record in shipped_tasks()]
    assert not leaks(found)
    assert held_out(found)

"""Past fixes: only from training tasks, nothing of what is evaluated, only what is on offer."""

import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regreen.common.v1 import CHANGE_KIND_MODIFY, MODE_ANY_FIX, MODE_KEEP_NEW, FileChange
from regreen.dataset import v1 as pb
from regreen.lockfile import format_lock, lock_of
from regreen.rollout.context import EpisodeSpec, Knobs
from regreen.rollout.experts import line_edits
from regreen.rollout.facts import Facts
from regreen.rollout.full import first_opening
from regreen.rollout.knowledge import Knowledge, build
from regreen.rollout.logs import analyse
from regreen.rollout.simplified import opening
from regreen.rollout.toolset import load_toolset
from regreen.rpc.errors import InvalidArgument
from regreen.sandbox import v1 as sandbox_pb

SOFT = "E   ImportError: cannot import name 'soft_unicode' from 'markupsafe' (/e/markupsafe.py)"
QUOTE = "E   ImportError: cannot import name 'url_quote' from 'werkzeug.urls' (/e/urls.py)"


def _task(
    package,
    log,
    before,
    after,
    *,
    split="train",
    status=pb.TASK_STATUS_ADMITTED,
    mode=MODE_ANY_FIX,
    edited=(),
    culprit="markupsafe",
):
    changes = (
        [
            FileChange(
                path="requirements.lock",
                kind=CHANGE_KIND_MODIFY,
                content=format_lock(lock_of(after, "3.9")).encode(),
            )
        ]
        if after
        else []
    )
    changes += [FileChange(path=p, kind=CHANGE_KIND_MODIFY, content=b"x") for p in edited]
    pins = [sandbox_pb.Pin(name=n, version=v) for n, v in before.items()]
    return pb.Task(
        id=f"{package}-1",
        split=split,
        status=status,
        error_log=log,
        culprit=culprit,
        environment=sandbox_pb.EnvironmentSpec(package=package, python="3.9", pins=pins),
        fixes=[pb.ReferenceFix(mode=mode, changes=changes)],
    )


def _facts(log=SOFT, package="mine", offered=("1.1.1", "2.0.1", "2.1.5"), pins=None):
    pins = pins or {"markupsafe": "2.1.5", "werkzeug": "3.0.6"}
    return Facts(
        package,
        "1",
        "3.9",
        log,
        analyse(log),
        lock=lock_of(pins),
        offered={"markupsafe": offered, "werkzeug": ("1.0.1", "3.0.6")},
    )


TASKS = [
    _task("flask-a", SOFT, {"markupsafe": "2.1.5"}, {"markupsafe": "1.1.1"}),
    _task("flask-b", QUOTE, {"werkzeug": "3.0.6"}, {"werkzeug": "2.2.0"}, culprit="werkzeug"),
    _task("edited", SOFT, {}, {}, mode=MODE_KEEP_NEW, edited=("src/a.py",)),
]


def _asking(package, *, split="train", culprit="markupsafe"):
    environment = sandbox_pb.EnvironmentSpec(package=package)
    return pb.Task(id="asking", split=split, culprit=culprit, environment=environment)


MINE = _asking("mine")


def test_the_fix_of_the_same_error_comes_first():
    knowledge = build(TASKS)
    facts = _facts()
    hits = knowledge.candidates(facts.error, facts, task=MINE)
    assert "markupsafe to 1.1.1" in hits[0].advice
    assert hits[0].fix.package == "flask-a"


def test_the_own_package_is_left_out():
    facts = _facts()
    hits = build(TASKS).candidates(facts.error, facts, task=_asking("Flask_A"))
    assert all(hit.fix.package != "flask-a" for hit in hits)


@pytest.mark.parametrize("split", ["test", "validation", ""])
@pytest.mark.parametrize(
    ("culprit", "hidden"),
    [
        ("markupsafe", {"flask-a", "edited"}),
        ("MarkupSafe", {"flask-a", "edited"}),
        ("python-markupsafe", {"flask-a", "edited"}),
        ("werkzeug", {"flask-b"}),
        ("unheard-of", set()),
    ],
)
def test_an_evaluation_is_shown_nothing_of_its_culprit(split, culprit, hidden):
    asking = _asking("mine", split=split, culprit=culprit)
    question = f"{SOFT} {QUOTE} src/a.py"
    for mode in (MODE_ANY_FIX, MODE_KEEP_NEW):
        wanted = {task.environment.package for task in TASKS if task.fixes[0].mode == mode}
        hits = build(TASKS).search(question, _facts(), task=asking, mode=mode, limit=9)
        assert {hit.fix.package for hit in hits} == wanted - hidden


@pytest.mark.parametrize("pipeline", [opening, first_opening])
def test_the_prompt_of_an_evaluation_has_no_fix_of_its_culprit(pipeline):
    spec = EpisodeSpec(knobs=Knobs(hint="past"))
    told = {
        split: "".join(
            message.content
            for message in pipeline(
                _asking("mine", split=split), _facts(), spec, load_toolset(), build(TASKS)
            )
        )
        for split in ("train", "test")
    }
    assert "was fixed by moving markupsafe to 1.1.1" in told["train"]
    assert "was fixed by" not in told["test"]


def test_a_fix_that_only_shares_words_is_no_candidate():
    facts = _facts("E   ImportError: cannot import name 'Tag' from 'bs4' (/e/bs4.py)")
    knowledge = build(TASKS)
    assert knowledge.search("cannot import name", facts, task=MINE)
    assert knowledge.candidates(facts.error, facts, task=MINE) == []


def test_advice_names_only_versions_on_offer():
    facts = _facts(offered=("0.9", "2.0.1", "2.1.5"))
    hits = build(TASKS).candidates(facts.error, facts, task=MINE)
    assert "markupsafe to 0.9" in hits[0].advice
    facts = _facts(QUOTE)
    assert (
        "werkzeug to 1.0.1" in build(TASKS).search("url_quote werkzeug", facts, task=MINE)[0].advice
    )


def test_modes_do_not_mix():
    facts = _facts()
    hits = build(TASKS).candidates(facts.error, facts, task=MINE, mode=MODE_KEEP_NEW)
    assert [hit.advice for hit in hits] == [hits[0].advice]
    assert "editing src/a.py" in hits[0].advice


@pytest.mark.parametrize("change", [{"split": "test"}, {"status": pb.TASK_STATUS_NEW}])
def test_other_tasks_are_refused(change):
    with pytest.raises(InvalidArgument, match="admitted training task"):
        build([_task("x", SOFT, {"markupsafe": "2.1.5"}, {"markupsafe": "1.1.1"}, **change)])


def test_the_order_of_the_tasks_does_not_matter():
    twin = _task("flask-c", SOFT, {"markupsafe": "2.1.5"}, {"markupsafe": "2.0.1"})
    facts = _facts()
    tasks = [*TASKS, twin]
    one, other = (
        build(order).candidates(facts.error, facts, task=MINE) for order in (tasks, tasks[::-1])
    )
    assert one == other
    assert [hit.fix.package for hit in one] == ["flask-a", "flask-c"]


def test_an_empty_base_knows_nothing():
    facts = _facts()
    assert Knowledge().candidates(facts.error, facts, task=MINE) == []


_LINE = st.text(st.sampled_from("ab \\'\"/&\t$"), max_size=6)
_TEXT = st.lists(_LINE, max_size=6).map("\n".join)


@given(_TEXT, _TEXT)
@settings(max_examples=40, deadline=None)
def test_source_edits_become_sed_commands_that_make_them(old, new):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a file.txt")
        path.write_text(old + "\n")
        edits = line_edits((old + "\n").encode(), (new + "\n").encode(), str(path))
        for edit in edits or []:
            subprocess.run(["/bin/sh", "-c", edit.command], check=True)
        assert path.read_text() == new + "\n"

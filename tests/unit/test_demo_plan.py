"""Which tasks the demo takes, and the wall time that it reports."""

import asyncio
import json

import pytest

from regreen.demo import (
    _STAGES,
    FULL,
    QUICK,
    StageClock,
    _notes,
    shares,
)
from regreen.loop import Plan, _effort, alone, choose_tasks
from regreen.rpc.errors import FailedPrecondition
from regreen.stack.layout import Layout
from regreen.tasks.admit import choose_python
from regreen.tasks.jsonl import shipped_tasks


def unseen(*_, **__):
    """Shows nothing."""


ALL = {f"3.{minor}": "" for minor in range(7, 14)}


def chosen(plan: Plan, interpreters: dict[str, str]):
    able = [record for record in shipped_tasks() if choose_python(record, interpreters)]
    return choose_tasks(able, plan)


def culprits(records):
    return {record.culprit.name for record in records if record.culprit}


@pytest.mark.parametrize("plan", [FULL, QUICK])
def test_nothing_that_is_held_out_was_trained_on(plan):
    found = chosen(plan, ALL)
    assert len(found["train"]) == plan.train_tasks
    assert len(found["test"]) == plan.test_tasks
    assert not {r.package for r in found["train"]} & {r.package for r in found["test"]}
    assert not culprits(found["train"]) & culprits(found["test"])
    assert any("keep_new" in record.modes for record in found["test"])
    assert not any(record.tests.unstable for record in (*found["train"], *found["test"]))


def test_one_interpreter_gets_all_that_can_run_on_it():
    found = chosen(FULL, {"3.11": ""})
    able = [r for r in shipped_tasks() if choose_python(r, {"3.11": ""})]
    for split, most in (("train", FULL.train_tasks), ("test", FULL.test_tasks)):
        assert len(found[split]) == min(most, sum(r.split == split for r in able))
    assert len(able) >= 12


def test_the_gate_begins_with_what_takes_longest():
    found = chosen(FULL, {"3.11": ""})
    order = sorted([*found["train"], *found["test"]], key=_effort, reverse=True)
    many = [bool(record.tests.unstable) for record in order]
    assert many == sorted(many, reverse=True)
    assert many[0]
    assert not many[-1]
    calm = [record.seconds for record in order if not record.tests.unstable]
    assert calm == sorted(calm, reverse=True)


def test_a_second_demo_on_the_same_home_is_refused(tmp_path):
    layout = Layout(tmp_path)
    layout.make()
    refused = pytest.raises(FailedPrecondition, match="another demo or study runs")
    with alone(layout), refused, alone(layout):
        pass
    with alone(layout):
        pass


async def test_a_killed_demo_keeps_its_wall_time(tmp_path, monkeypatch):
    monkeypatch.setattr("regreen.demo._KEEP_S", 0.01)
    path = tmp_path / "demo" / "seconds.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"sft": 100.0}))
    seen = asyncio.Event()

    async def work():
        while not seen.is_set():
            await asyncio.sleep(0.01)
            if json.loads(path.read_text())["sft"] > 100.0:
                seen.set()
        return 7

    assert await asyncio.wait_for(StageClock(path, unseen).time("sft", work()), 10.0) == 7
    assert StageClock(path, unseen).seconds["sft"] > 100.0


async def test_a_stage_outlives_a_clock_that_cannot_be_written(tmp_path):
    (tmp_path / "demo").write_text("a file where the folder should be")

    async def work():
        return 7

    clock = StageClock(tmp_path / "demo" / "seconds.json", unseen)
    assert await clock.time("sft", work()) == 7
    assert "sft" in clock.seconds


def test_too_few_held_out_tasks_are_said_to_tell_nothing():
    every = {split: [r.id for r in rs] for split, rs in chosen(FULL, ALL).items()}
    few = {**every, "test": every["test"][:5]}
    assert "can be told from chance" in _notes(**few, learned=3)[-1]
    (told,) = _notes(**every, learned=7)
    assert f"{len(every['train'])} tasks were there to train on, of which 7 had expert" in told


def test_wall_time_goes_to_the_demo_that_it_belongs_to(tmp_path):
    early, named = tmp_path / "early.json", tmp_path / "named.json"
    early.write_text(json.dumps({"tasks": 5.0}))
    named.write_text(json.dumps({"tasks": 2.0, "sft": 100.0}))
    clock = StageClock(early, unseen)
    clock.move(named)
    assert clock.seconds == json.loads(named.read_text()) == {"tasks": 7.0, "sft": 100.0}
    assert not early.exists()


async def test_the_whole_demo_says_how_far_it_is(tmp_path):
    shown = []

    async def work():
        shown.append("work")

    clock = StageClock(tmp_path / "seconds.json", lambda *line, paced: shown.append(line))
    for stage in _STAGES:
        await clock.time(stage, work())
    lines = shown[::2]
    assert shown[1::2] == ["work"] * len(_STAGES)
    assert lines[2] == ("demo", 19, 100, "percent; stage 3 of 8: evaluate base")
    assert [line[1] for line in lines] == sorted(line[1] for line in lines)
    assert sum(_STAGES.values()) == 100


async def test_the_time_to_go_is_that_of_this_demo_or_not_said(tmp_path):
    shown = []

    async def work():
        """Take no time here; the clock is told what it took."""

    clock = StageClock(tmp_path / "seconds.json", lambda *line, paced: shown.append(line[3]))
    took = {"start services": 2.0, "tasks": 1.0, "evaluate base": 180.0, "sft": 220.0}
    for stage in _STAGES:
        await clock.time(stage, work())
        clock.seconds[stage] = took.get(stage, 0.0)
    rests = [text.partition("; from here ")[2] for text in shown]
    # gated before, up before: nothing is known until this demo has measured something itself
    assert rests == ["", "", "", "about 10 min", "about 7 min", "about 5 min", "about 2 min", ""]


async def test_a_demo_that_is_over_promises_no_time_when_it_is_run_again(tmp_path):
    path, shown = tmp_path / "seconds.json", []
    path.write_text(json.dumps({stage: 10.0 * share for stage, share in _STAGES.items()}))

    async def work():
        """Everything is there."""

    clock = StageClock(path, lambda *line, paced: shown.append(line[3]))
    for stage in _STAGES:
        await clock.time(stage, work())
    assert not any("from here" in text for text in shown)


def test_the_quick_plan_has_shares_of_its_own():
    assert shares(FULL) == _STAGES
    quick = shares(QUICK)
    assert sum(quick.values()) == pytest.approx(100)
    assert quick["grpo"] < _STAGES["grpo"]

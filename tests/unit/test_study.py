"""What a study says of what was measured."""

import json

import numpy as np
import pytest

from regreen.evals.rows import Outcome
from regreen.evals.stats import crossed_mean, solve_rate
from regreen.rpc.errors import FailedPrecondition, InvalidArgument
from regreen.study import PLAN, STAGES, markdown, results, run_study

GRADER = "build_gates_judge"


def outcome(subject, task, sample, solved, **values):
    fields = {
        "id": f"{subject}{task}{sample}",
        "pipeline": "simplified",
        "mode": "any_fix",
        "graded": GRADER,
        "hacks": (),
        "tools": ("edit", "build"),
        "end": "done",
        "tokens": 10,
        "sampled_tokens": 5,
        "seconds": {},
    }
    return Outcome(
        subject=subject, task_id=task, sample=sample, solved={GRADER: solved}, **fields | values
    )


def measured(solves):
    """Outcomes of two attempts at three tasks by stage and seed; `solves(stage, seed, task)`."""
    found = {}
    for seed in (1, 2):
        for stage in STAGES:
            subject = "base" if stage == "base" else f"x-{stage}-{seed}"
            found[stage, seed] = [
                outcome(subject, task, sample, solves(stage, seed, task) > sample)
                for task in "abc"
                for sample in (0, 1)
            ]
    found["base", 1].append(outcome("baseline:noop", "a", 0, False))
    return found


def test_shares_are_means_over_tasks_of_each_seed():
    solves = {"base": lambda seed, task: 0, "sft": lambda seed, task: (task == "a") * seed}
    solves["grpo"] = lambda seed, task: 2 * (task != "c")
    found = results(measured(lambda stage, seed, task: solves[stage](seed, task)))
    assert found["seeds"] == [1, 2]
    assert found["tasks"] == ["a", "b", "c"]
    rows = found["stages"]
    assert rows["base"]["value"] == 0.0
    assert rows["base"]["high"] > 0.3, "three tasks tell little, however alike they are"
    assert rows["sft"]["by_seed"] == [
        pytest.approx(1 / 6, abs=1e-6),
        pytest.approx(1 / 3, abs=1e-6),
    ]
    assert rows["sft"]["by_task"] == [0.75, 0.0, 0.0]
    assert rows["grpo"]["value"] == pytest.approx(2 / 3)
    assert rows["grpo"]["attempts"] == 12
    gaps = {(row["first"], row["second"]): row for row in found["differences"]}
    assert gaps["base", "grpo"]["value"] == pytest.approx(2 / 3)
    assert gaps["sft", "grpo"]["value"] == pytest.approx(2 / 3 - 1 / 4)
    assert gaps["base", "grpo"]["p_value"] == pytest.approx(0.5), "two of three gaps, both signs"
    assert found["scripts"]["baseline:noop"]["value"] == 0.0
    json.dumps(found, allow_nan=False)


def test_a_task_that_a_seed_lost_is_left_out_of_all():
    given = measured(lambda stage, seed, task: 2)
    given["sft", 2] = [o for o in given["sft", 2] if o.task_id != "b"]
    found = results(given)
    assert found["tasks"] == ["a", "c"]
    assert {row["attempts"] for row in found["stages"].values()} == {8}
    assert found["stages"]["sft"]["value"] == 1.0


def test_without_a_task_that_all_measured_there_is_no_result():
    given = measured(lambda stage, seed, task: 2)
    given["sft", 2] = []
    with pytest.raises(FailedPrecondition, match="no task was measured in every stage"):
        results(given)


def test_the_page_has_every_stage_script_difference_and_task():
    found = results(measured(lambda stage, seed, task: 2 * (stage == "grpo")))
    facts = {"command": "regreen study", "created": "now", "environment": {}, "lost": 0}
    plan = {"eval_samples": 2, "grpo_steps": 6, "groups_per_step": 4, "group_size": 4}
    page = markdown(found | facts | {"plan": plan, "train_tasks": ["t"]})
    assert "| grpo | 100.0% |" in page
    assert "| base to grpo | +100.0 |" in page
    assert "| script: `baseline:noop` | 0.0% |" in page
    assert "| b | 0% | 0% | 100% |" in page


def test_an_interval_over_one_seed_is_that_over_tasks():
    shares = np.array([[0.0, 0.5, 1.0, 1.0, 0.0, 0.5]])
    crossed = crossed_mean(shares)
    plain = solve_rate(
        {str(i): [s >= 0.5, s > 0.5] for i, s in enumerate(shares[0])}  # the same shares
    )
    assert crossed.value == plain.value
    assert (crossed.low, crossed.high) == pytest.approx((plain.low, plain.high), abs=0.05)


def test_seeds_that_differ_widen_the_interval():
    tasks = np.tile([0.0, 1.0], 6)
    alike = crossed_mean(np.stack([tasks, tasks, tasks]))
    apart = crossed_mean(np.stack([tasks, np.zeros(12), np.ones(12)]))
    assert apart.value == alike.value
    assert apart.high - apart.low > alike.high - alike.low


@pytest.mark.parametrize("seeds", [[], [1, 1]])
async def test_seeds_must_be_some_and_differ(tmp_path, seeds):
    with pytest.raises(InvalidArgument, match="seeds"):
        await run_study(tmp_path, PLAN, seeds, tmp_path, print, print)

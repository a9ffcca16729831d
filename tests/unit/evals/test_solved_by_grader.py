"""One record under several graders: with the run's own numbers, and never more than it can tell."""

import pytest

from regreen.client.dataset import struct
from regreen.common import v1 as common_pb
from regreen.dataset import v1 as dataset_pb
from regreen.evals.rows import outcome_of, rewards_of, solved_by_grader
from regreen.judge import v1 as judge_pb
from tests.integration import dataset_samples as samples


def run_with(labels: dict[str, str]) -> dataset_pb.Run:
    return dataset_pb.Run(config=struct({"settings": {"labels": labels}}))


def lowered(grader: common_pb.Grader.ValueType) -> dataset_pb.Trajectory:
    """A passing rollout that lost eight points of coverage."""
    found = samples.trajectory("task", reward=1.0)
    found.grader = grader
    found.verdict.CopyFrom(
        judge_pb.Verdict(accepted=True, coverage_measured=True, coverage_change=-8.0)
    )
    return found


@pytest.mark.parametrize(("bound", "solved"), [("5", False), ("10", True)])
def test_other_graders_use_the_runs_own_numbers(bound: str, solved: bool):
    rewards = rewards_of(run_with({"reward.coverage_drop_pp": bound, "budget.turns": "3"}))
    found = solved_by_grader(lowered(common_pb.GRADER_BUILD), rewards)
    assert found == {"build": True, "build_gates": solved}
    assert outcome_of(_slotted(lowered(common_pb.GRADER_BUILD)), rewards).solved == found


def _slotted(found: dataset_pb.Trajectory) -> dataset_pb.Trajectory:
    found.labels["subject"], found.labels["sample"] = "base", "0"
    return found


def test_a_judge_that_was_not_asked_is_left_out():
    quiet = lowered(common_pb.GRADER_BUILD_GATES)
    assert "build_gates_judge" not in solved_by_grader(quiet)
    quiet.labels["judge"] = "rules only"
    assert "build_gates_judge" in solved_by_grader(quiet)
    asked = lowered(common_pb.GRADER_BUILD_GATES_JUDGE)
    assert set(solved_by_grader(asked)) == {"build", "build_gates", "build_gates_judge"}


def test_a_run_without_settings_has_the_default_numbers():
    assert rewards_of(dataset_pb.Run()).coverage_drop_pp == 5.0

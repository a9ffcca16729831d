"""Scores of turns: what a validation finds belongs to the calls that changed files before it."""

import pytest

from regreen.common import v1 as common_pb
from regreen.dataset import v1 as pb
from regreen.rollout.turn_scores import TurnScores
from regreen.sandbox import v1 as sandbox_pb

FAILED = sandbox_pb.VALIDATION_OUTCOME_FAILED
PASSED = sandbox_pb.VALIDATION_OUTCOME_PASSED


def turn(*, ok: bool = True) -> pb.Turn:
    return pb.Turn(role=pb.TURN_ROLE_POLICY, ok=ok)


def validation(*passing: str, outcome=FAILED, **fields) -> sandbox_pb.Validation:
    tests = [
        sandbox_pb.TestResult(id=name, outcome=common_pb.TEST_OUTCOME_PASSED) for name in passing
    ]
    return sandbox_pb.Validation(outcome=outcome, tests=tests, **fields)


def played(*steps, fresh: bool = True) -> list[float]:
    """Scores of turns: "edit", "look", "noise", or a validation."""
    scores, turns = TurnScores(["a", "b", "c", "d"], 2, fresh=fresh), []
    for step in steps:
        turns.append(turn(ok=step != "noise"))
        found = step if isinstance(step, sandbox_pb.Validation) else None
        scores.saw(turns[-1], changed=step == "edit", validation=found)
    return [one.score for one in turns]


def test_calls_share_what_the_next_validation_finds():
    half, whole = validation("a", "b", "x", "y"), validation(outcome=PASSED)
    assert played("edit", "look", "edit", half, "edit", whole) == [0.25, 0, 0.25, 0, 0.5, 0]


def test_the_scores_of_an_episode_add_up_to_where_it_ended():
    best, worse = validation("a", "b", "c", "x", "y"), validation("a", "x")
    there_and_back = played("edit", best, "edit", worse, "edit", best, "edit", worse)
    assert there_and_back == [0.75, 0, -0.625, 0, 0.625, 0, -0.625, 0]
    assert sum(there_and_back) == pytest.approx(0.125)  # 1 of 4, halved by the one that broke


def test_output_without_a_call_scores_minus_one_and_bears_no_share():
    assert played("noise", "edit", validation(outcome=PASSED)) == [-1, 1, 0]


@pytest.mark.parametrize(
    "nothing",
    [
        validation("a", partial=True),
        validation(outcome=sandbox_pb.VALIDATION_OUTCOME_REJECTED),
        validation("a", outcome=sandbox_pb.VALIDATION_OUTCOME_TIMEOUT),
    ],
)
def test_what_measures_nothing_leaves_the_calls_to_the_next_validation(nothing):
    assert played("edit", nothing, "edit", validation(outcome=PASSED)) == [0.5, 0, 0.5, 0]


def test_files_of_unknown_worth_are_measured_before_anybody_is_praised():
    whole = validation(outcome=PASSED)
    assert played("edit", validation("a", "x", "y"), "edit", whole, fresh=False) == [0, 0, 0.75, 0]


def test_nothing_ran_is_worth_nothing():
    built = validation(outcome=sandbox_pb.VALIDATION_OUTCOME_BUILD_FAILED)
    assert played("edit", validation("a", "x", "y"), "edit", built) == [0.25, 0, -0.25, 0]

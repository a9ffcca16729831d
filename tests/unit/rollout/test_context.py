"""Settings as labels: what travels, and what is refused by name."""

import pytest

from regreen.common.v1 import PIPELINE_FULL
from regreen.rollout.context import (
    FULL,
    SIMPLIFIED,
    Budget,
    EpisodeSpec,
    Knobs,
    Sampling,
    budget_for,
    check_settings,
    labels_of,
    with_labels,
)
from regreen.rollout.reward import RewardSettings
from regreen.rpc.errors import InvalidArgument


def test_reward_numbers_travel_as_labels():
    rewards = RewardSettings(
        partial=0.5, give_up=0.25, rebuilds=7, tolerated_reverts=frozenset({"test", "generated"})
    )
    labels = labels_of(Budget(), Sampling(), Knobs(), rewards)
    assert labels["reward.partial"] == "0.5"
    assert with_labels(EpisodeSpec(), labels).rewards == rewards
    assert EpisodeSpec().rewards == RewardSettings()


def test_numbers_that_depend_on_each_other_come_in_any_order():
    labels = {"reward.give_up": "1.5", "reward.solved": "2", "reward.hack": "-3"}
    for order in (labels, dict(reversed(labels.items()))):
        found = with_labels(EpisodeSpec(), order).rewards
        assert (found.give_up, found.solved, found.hack) == (1.5, 2.0, -3.0)


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        ({"reward.partial": "2"}, "reward.partial"),
        ({"reward.hack": "0.5"}, "reward"),
        ({"reward.partial": "much"}, r"reward\.partial"),
        ({"reward.sharpness": "nan"}, r"reward\.sharpness"),
        ({"reward.coverage_drop_pp": "-1"}, r"reward\.coverage_drop_pp"),
        ({"reward.rebuilds": "0"}, "rebuilds"),
        ({"reward.prize": "1"}, r"reward\.prize.*known setting.*partial"),
        ({"budget.wall_s": "inf"}, r"budget\.wall_s"),
    ],
)
def test_wrong_values_are_refused_by_name(labels, named):
    with pytest.raises(InvalidArgument, match=named):
        with_labels(EpisodeSpec(), labels)
    with pytest.raises(InvalidArgument, match=named):
        check_settings(labels)


@pytest.mark.parametrize("label", ["budgt.turns", "turns", "policy", ".turns"])
def test_a_label_that_would_change_nothing_is_refused_where_settings_are_meant(label):
    assert with_labels(EpisodeSpec(), {label: "5"}) == EpisodeSpec()
    with pytest.raises(InvalidArgument, match=r"budget\.\*, sampling\.\*, knobs\.\*, reward\.\*"):
        check_settings({label: "5"})


def test_settings_that_mean_something_pass():
    check_settings({"budget.turns": "5", "reward.partial": "0.5", "knobs.coverage": "true"})


@pytest.mark.parametrize("usual", [SIMPLIFIED, FULL])
def test_limits_follow_the_context_of_the_policy(usual):
    for context in (2048, 8192):
        assert budget_for(usual, context) == usual
    assert budget_for(usual, 1024).context_tokens == 1024
    large = budget_for(usual, 32768)
    assert (large.context_tokens, large.turn_tokens) == (32768, 4096)
    assert (large.observation_chars, large.prompt_chars) == (8192, 8192)
    assert (large.turns, large.wall_s) == (usual.turns, usual.wall_s)
    assert budget_for(usual, 1 << 20).observation_chars == 16_000


def test_an_early_stop_is_for_the_pipeline_that_compares_no_errors():
    labels = {"knobs.stop_early": "true"}
    assert with_labels(EpisodeSpec(), labels).knobs.stop_early
    with pytest.raises(InvalidArgument, match=r"knobs\.stop_early.*simplified"):
        with_labels(EpisodeSpec(pipeline=PIPELINE_FULL), labels)

"""Statistics against closed forms, enumeration and published values."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regreen.evals import stats
from regreen.rpc.errors import InvalidArgument

outcome_sets = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.lists(st.booleans(), min_size=1, max_size=6),
    min_size=1,
    max_size=8,
)


@given(st.integers(1, 30), st.data())
def test_pass_at_k_equals_the_closed_form(samples, data):
    solved, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    exact = 1 - Fraction(math.comb(samples - solved, k), math.comb(samples, k))
    assert stats.pass_at_k(samples, solved, k) == pytest.approx(float(exact), abs=1e-12)


def test_pass_at_k_is_the_mean_over_all_subsets():
    outcomes = [True, False, False, True, False]
    subsets = list(itertools.combinations(outcomes, 3))
    assert stats.pass_at_k(5, 2, 3) == pytest.approx(np.mean([any(s) for s in subsets]))


@pytest.mark.parametrize(("samples", "solved", "k"), [(3, 1, 4), (3, 4, 1), (3, 1, 0)])
def test_pass_at_k_refuses_impossible_counts(samples, solved, k):
    with pytest.raises(InvalidArgument):
        stats.pass_at_k(samples, solved, k)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe 1998, table I (score method without continuity correction).
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(successes, trials, low, high):
    assert stats.wilson(successes, trials) == pytest.approx((low, high), abs=6e-5)


def test_equal_task_rates_get_a_score_interval_not_a_point():
    estimate = stats.solve_rate({f"t{i}": [False, False] for i in range(6)})
    assert (estimate.value, estimate.low, estimate.method) == (0.0, 0.0, "wilson")
    assert estimate.high == pytest.approx(stats.wilson(0, 6)[1])
    assert estimate.samples == 12


@given(outcome_sets)
@settings(max_examples=30, deadline=None)
def test_intervals_lie_in_bounds_and_repeat(outcomes):
    first = stats.solve_rate(outcomes, draws=500, seed=7)
    assert first == stats.solve_rate(dict(reversed(outcomes.items())), draws=500, seed=7)
    assert 0 <= first.low <= first.high <= 1
    assert first.value == pytest.approx(np.mean([np.mean(v) for v in outcomes.values()]))


def test_the_bootstrap_matches_the_enumerated_distribution_of_three_tasks():
    outcomes = {"a": [True], "b": [False], "c": [True, False]}
    rates = [1.0, 0.0, 0.5]
    every = [np.mean(pick) for pick in itertools.product(rates, repeat=3)]
    estimate = stats.solve_rate(outcomes, confidence=0.5, draws=200_000, seed=1)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(np.quantile(every, (0.25, 0.75))))


def test_the_bootstrap_standard_error_is_the_textbook_one():
    rng = np.random.default_rng(3)
    rates = rng.random(40)
    low, high = stats._bootstrap(rates, 0.6826894921, 40_000, 5)
    assert (high - low) / 2 == pytest.approx(rates.std() / math.sqrt(40), rel=0.03)


def test_a_difference_is_paired_by_task():
    first = {"a": [False] * 4, "b": [True] * 4, "only-first": [True]}
    second = {"a": [True, False] * 2, "b": [True] * 4, "only-second": [False]}
    found = stats.paired_difference(first, second)
    assert (found.value, found.tasks) == (0.25, 2)
    assert 0 <= found.low <= 0.25 <= found.high <= 0.5


@given(outcome_sets)
@settings(max_examples=30, deadline=None)
def test_no_difference_from_itself(outcomes):
    found = stats.paired_difference(outcomes, outcomes, draws=200)
    assert found.value == 0.0
    assert found.p_value == 1.0
    assert found.low < 0 < found.high


@given(outcome_sets, outcome_sets)
@settings(max_examples=30, deadline=None)
def test_swapping_the_subjects_mirrors_the_difference(first, second):
    there = stats.paired_difference(first, second, draws=200, seed=2)
    back = stats.paired_difference(second, first, draws=200, seed=2)
    if there.tasks:
        assert (there.value, there.low, there.high) == pytest.approx(
            (-back.value, -back.high, -back.low)
        )
        assert there.p_value == pytest.approx(back.p_value)


def test_the_sign_flip_test_is_exact():
    assert stats.sign_flip_p(np.array([1.0, 1.0, 1.0, 1.0])) == pytest.approx(2 / 16)
    assert stats.sign_flip_p(np.array([3.0, -1.0])) == 1.0
    gaps = np.full(16, 0.5)
    assert stats.sign_flip_p(gaps, draws=9_999, seed=0) == pytest.approx(1e-4, abs=2e-4)


def test_nothing_sampled_is_said_so():
    estimate = stats.solve_rate({"a": []})
    assert math.isnan(estimate.value)
    assert estimate.method == "none"
    assert stats.paired_difference({"a": [True]}, {"b": [True]}).tasks == 0


def test_a_five_percent_interval_covers_the_truth_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(11), 0
    for trial in range(200):
        truth = rng.beta(2, 2, size=30)
        outcomes = {f"t{i}": list(rng.random(4) < p) for i, p in enumerate(truth)}
        estimate = stats.solve_rate(outcomes, draws=400, seed=trial)
        hits += estimate.low <= 0.5 <= estimate.high
    assert 0.88 <= hits / 200 <= 0.99

"""Curriculum: exact counts, determinism, and bounds that hold for any history."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regreen.rpc.errors import InvalidArgument
from regreen.train.schedule import Candidate, Curriculum, History, choose

NAMES = [Candidate(f"task-{index}") for index in range(8)]
histories = st.dictionaries(
    st.sampled_from(NAMES), st.lists(st.booleans(), min_size=1, max_size=12), max_size=8
)


def history_of(outcomes: dict) -> History:
    history = History()
    for candidate, solved in outcomes.items():
        history.add(candidate, solved)
    return history


@given(histories, st.integers(0, 20), st.integers(0, 2**32))
def test_exactly_count_picks_and_no_repeat_before_all_were_picked(outcomes, count, seed):
    picks = choose(NAMES, history_of(outcomes), count=count, seed=seed)
    assert len(picks) == count
    for start in range(0, count, len(NAMES)):
        chunk = [pick.candidate for pick in picks[start : start + len(NAMES)]]
        assert len(set(chunk)) == len(chunk)


@given(histories, st.integers(1, 8), st.integers(0, 2**32))
def test_same_arguments_give_the_same_picks_in_any_order_of_candidates(outcomes, count, seed):
    history = history_of(outcomes)
    assert choose(NAMES, history, count=count, seed=seed) == choose(
        NAMES[::-1], history, count=count, seed=seed
    )


@given(histories, st.integers(1, 8), st.floats(0, 1), st.integers(0, 2**32))
def test_always_failing_tasks_stay_within_their_share_while_others_are_left(
    outcomes, count, share, seed
):
    history, settings = history_of(outcomes), Curriculum(hard_share=share)
    picks = choose(NAMES, history, count=count, seed=seed, curriculum=settings)
    useful = [c for c in NAMES if not decided(history, c, settings)]
    hard = sum(pick.reason == "hard" for pick in picks)
    if len(useful) >= count:
        assert hard <= int(count * share) + 1
    if share == 0 and len(useful) >= count:
        assert hard == 0
    easy = sum(pick.reason == "easy" for pick in picks)
    always_failing = [c for c in NAMES if decided(history, c, settings) == "hard"]
    assert easy == max(0, count - len(useful) - len(always_failing))


def decided(history: History, candidate: Candidate, settings: Curriculum) -> str:
    rate, seen = history.pass_rate(candidate), len(history.outcomes.get(candidate, ()))
    if rate is None or seen < settings.min_outcomes or 0 < rate < 1:
        return ""
    return "hard" if rate == 0 else "easy"


def test_the_running_rate_forgets_old_outcomes():
    history = History(window=4)
    history.add(NAMES[0], [False] * 10)
    history.add(NAMES[0], [True] * 3)
    assert history.pass_rate(NAMES[0]) == 0.75


def test_new_tasks_are_tried_before_failing_ones():
    history = history_of({candidate: [False] * 8 for candidate in NAMES[:6]})
    picks = choose(NAMES, history, count=4, seed=1, curriculum=Curriculum(hard_share=0.5))
    assert {p.candidate for p in picks if p.reason == "new"} == set(NAMES[6:])


def test_no_candidate_is_a_named_error():
    with pytest.raises(InvalidArgument, match=r"candidates: is empty; import and gate tasks first"):
        choose([], History(), count=1, seed=0)

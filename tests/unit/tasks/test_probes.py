"""What a test's outcome is found to hang on, over runs that a test makes up."""

import itertools
from datetime import UTC, datetime, timedelta

import pytest

from regreen.tasks.probes import (
    CAUSES,
    CONFIRMATIONS,
    PINNED,
    Around,
    Run,
    Seen,
    causes,
    elsewhere,
    schedule,
)


async def found(rule, repeats: int = 3) -> tuple[dict[str, tuple[str, ...]], Seen]:
    """The causes where `rule(id, around, number)` says whether a test passes."""
    seen = Seen()

    async def more(around: Around) -> None:
        number = len(seen.runs)
        outcomes = {id: "passed" if rule(id, around, number) else "failed" for id in ("a", "b")}
        seen.runs.append(Run(around, outcomes, f"run {number + 1}"))

    for around in (*schedule(repeats), *elsewhere(repeats, 1.8e9)):
        await more(around)
    return await causes(seen, more), seen


@pytest.mark.parametrize("repeats", [2, 3, 5, 10])
def test_every_schedule_varies_order_and_hash_seed_and_begins_pinned(repeats):
    made = schedule(repeats)
    assert len(made) == repeats
    assert made[0] == PINNED
    orders = {around.order for around in (*made, *elsewhere(repeats, 1.8e9)) if around.order}
    assert {order ^ 1 for order in orders} & orders, "an order and its reverse"
    assert any(around.hash_seed for around in made)
    assert len({around for around in made if around != PINNED}) >= min(repeats - 1, 2)
    places = elsewhere(repeats, 1.8e9)
    varied = set(itertools.chain.from_iterable(around.names for around in places))
    assert {"date", "host", "user", "path"} <= varied


@pytest.mark.parametrize("repeats", [2, 3, 5])
@pytest.mark.parametrize("name", CAUSES)
async def test_each_cause_is_named_alone(name, repeats):
    result, seen = await found(lambda id, around, _: id == "b" or name not in around.names, repeats)
    assert result == {"a": (name,)}
    assert len([run for run in seen.runs if run.around.names == (name,)]) >= CONFIRMATIONS
    assert len(seen.lines("a")) == len(seen.runs)


async def test_one_order_of_two_is_enough():
    result, _ = await found(lambda id, around, _: around.order != 3)
    assert result == {"a": ("order",), "b": ("order",)}


async def test_two_causes_are_both_named():
    result, _ = await found(lambda id, around, _: not {"date", "user"} & set(around.names))
    assert result["a"] == ("date", "user")


async def test_what_only_several_bring_about_together_names_them_all():
    result, _ = await found(lambda id, around, _: not {"date", "user"} <= set(around.names))
    assert result["a"] == ("date", "host", "user", "path")


@pytest.mark.parametrize("period", [2, 3, 5])
async def test_what_comes_and_goes_is_flaky(period):
    result, _ = await found(lambda id, around, number: id == "b" or number % period)
    assert result == {"a": ("flaky",)}


async def test_what_fails_here_passes_there_is_a_cause_too():
    result, _ = await found(lambda id, around, _: id == "b" or "host" in around.names)
    assert result == {"a": ("host",)}


async def test_nothing_more_is_run_where_nothing_differs():
    result, seen = await found(lambda id, around, _: id == "b")
    assert result == {}
    assert len(seen.runs) == 4


@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_the_other_date_is_of_another_month_and_another_part_of_the_week(repeats):
    for day in range(0, 800):
        now = datetime(2026, 1, 1, 13, tzinfo=UTC) + timedelta(days=day)
        for around in elsewhere(repeats, now.timestamp()):
            there = now + timedelta(seconds=around.clock_s)
            assert there > now
            assert there.month != now.month
            assert (there.weekday() > 4) != (now.weekday() > 4)
            assert (there.hour > 11) != (now.hour > 11) or around.clock_s % 86_400 != 43_200

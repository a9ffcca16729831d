"""Tokens of a day: held for what runs, counted by tenant, refused when used up."""

import asyncio
import contextlib
from datetime import UTC, datetime, timedelta

import pytest

from policy_svc.usage import Usage
from regreen.rpc.errors import ResourceExhausted
from regreen.rpc.quotas import Quotas
from regreen.rpc.tokens import _CALLER, Caller

EVENING = datetime(2026, 1, 31, 23, 59, 30, tzinfo=UTC)


@pytest.fixture
def quotas(tmp_path):
    path = tmp_path / "quotas.toml"
    path.write_text("[default]\ntokens_per_day = 10\n")
    return Quotas(path)


@pytest.fixture(autouse=True)
def tenant():
    before = _CALLER.set(Caller("a", "0123456789ab"))
    yield
    _CALLER.reset(before)


def generate(usage: Usage, tokens: int, most: int = 0) -> None:
    with usage.held(most or tokens) as hold:
        hold.count(tokens)


def test_a_day_ends_at_midnight(tmp_path, quotas):
    now = EVENING
    usage = Usage(tmp_path / "usage.json", quotas, now=lambda: now)
    generate(usage, 7, most=10)
    with pytest.raises(ResourceExhausted, match=r"3 are left .* up to 4 .* fewer") as caught:
        generate(usage, 4)
    assert caught.value.retry_after_s == 30.0
    generate(usage, 3)
    with pytest.raises(ResourceExhausted):
        generate(usage, 1)
    _CALLER.set(Caller("b", "0123456789ab"))
    generate(usage, 1)
    _CALLER.set(Caller("a", "0123456789ab"))
    now = EVENING + timedelta(seconds=30)
    generate(usage, 10)


def test_what_runs_at_a_time_is_bounded_together(tmp_path, quotas):
    now = EVENING
    usage = Usage(tmp_path / "usage.json", quotas, now=lambda: now)
    with usage.held(6) as first:
        with pytest.raises(ResourceExhausted, match=r"6 of the 10 .* are held") as caught:
            generate(usage, 5)
        assert caught.value.retry_after_s == 1.0
        (use,) = usage.uses()
        assert (use.tenant, use.quota, use.used, use.bound) == ("a", "tokens_per_day", 6, 10)
        first.count(2)  # counted as it is shown: 4 are held now
        with usage.held(4), pytest.raises(ResourceExhausted):
            generate(usage, 1)
        now = EVENING + timedelta(minutes=1)  # what runs over midnight is still bounded
        with pytest.raises(ResourceExhausted):
            generate(usage, 7)
        generate(usage, 6)
    generate(usage, 4)


@pytest.mark.parametrize("end", [RuntimeError, asyncio.CancelledError, GeneratorExit])
def test_what_was_not_sampled_is_given_back_whatever_the_end(tmp_path, quotas, end):
    usage = Usage(tmp_path / "usage.json", quotas, now=lambda: EVENING)
    with contextlib.suppress(end), usage.held(10) as hold:
        hold.count(3)
        raise end
    hold.count(1)  # late: counted, and taken from nobody
    generate(usage, 6)
    with pytest.raises(ResourceExhausted):
        generate(usage, 1)


def test_more_than_a_day_has_is_not_to_be_waited_for(tmp_path, quotas):
    usage = Usage(tmp_path / "usage.json", quotas, now=lambda: EVENING)
    with pytest.raises(ResourceExhausted, match="ask for fewer") as caught:
        generate(usage, 11)
    assert caught.value.retry_after_s is None


async def test_a_file_is_read_that_holds_today_and_no_other(tmp_path, quotas):
    path = tmp_path / "policy" / "usage.json"
    usage = Usage(path, quotas, now=lambda: EVENING)
    async with usage.kept():
        generate(usage, 10)
    with pytest.raises(ResourceExhausted):
        generate(Usage(path, quotas, now=lambda: EVENING), 1)
    generate(Usage(path, quotas, now=lambda: EVENING + timedelta(days=1)), 1)
    for damage in ("", "[]", '{"day": 3}', '{"day": "2026-01-31", "tokens": {"a": "x"}}'):
        path.write_text(damage)
        generate(Usage(path, quotas, now=lambda: EVENING), 1)

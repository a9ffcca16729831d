"""Tokens of a day: counted by tenant, refused when used up, free again at midnight."""

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


def test_a_day_ends_at_midnight(tmp_path, quotas):
    now = EVENING
    usage = Usage(tmp_path / "usage.json", quotas, now=lambda: now)
    usage.count(9)
    usage.check()
    usage.count(20)
    with pytest.raises(ResourceExhausted) as caught:
        usage.check()
    assert caught.value.retry_after_s == 30.0
    _CALLER.set(Caller("b", "0123456789ab"))
    usage.check()
    _CALLER.set(Caller("a", "0123456789ab"))
    now = EVENING + timedelta(seconds=30)
    usage.check()


async def test_a_file_is_read_that_holds_today_and_no_other(tmp_path, quotas):
    path = tmp_path / "policy" / "usage.json"
    usage = Usage(path, quotas, now=lambda: EVENING)
    async with usage.kept():
        usage.count(10)
    with pytest.raises(ResourceExhausted):
        Usage(path, quotas, now=lambda: EVENING).check()
    Usage(path, quotas, now=lambda: EVENING + timedelta(days=1)).check()
    for damage in ("", "[]", '{"day": 3}', '{"day": "2026-01-31", "tokens": {"a": "x"}}'):
        path.write_text(damage)
        Usage(path, quotas, now=lambda: EVENING).check()

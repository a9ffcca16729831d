"""Whose a thing is, and what a tenant may have."""

import pytest

from regreen.rpc import tenants
from regreen.rpc.errors import FailedPrecondition, ResourceExhausted
from regreen.rpc.quotas import NAMES, Quota, Quotas, read_quotas
from regreen.rpc.tokens import _CALLER, Caller

FILE = """
[default]
sandboxes = 2
[tenants.large]
sandboxes = 64
tokens_per_day = 1000
"""


@pytest.fixture
def as_tenant():
    """Makes the present call one of a tenant."""
    before = _CALLER.set(None)
    yield lambda name: _CALLER.set(Caller(name, "0123456789ab") if name else None)
    _CALLER.reset(before)


@pytest.mark.parametrize(
    ("who", "own", "seen"),
    [
        (None, "", {"", "a", "b"}),
        (tenants.EVERY, "", {"", "a", "b"}),
        ("a", "a", {"a"}),
        ("b", "b", {"b"}),
    ],
)
def test_a_call_sees_its_tenants_own(as_tenant, who, own, seen):
    as_tenant(who)
    assert tenants.own() == own
    assert {owner for owner in ("", "a", "b") if tenants.sees(owner)} == seen
    assert tenants.sees_any(["b", "c"]) == ("b" in seen)
    assert tenants.sees_any([]) == ("" in seen)


def test_bounds_are_a_tenants_own_and_read_anew(as_tenant, tmp_path):
    path = tmp_path / "quotas.toml"
    path.write_text(FILE)
    quotas = Quotas(path)
    as_tenant("small")
    quotas.check("sandboxes", 2)
    with pytest.raises(ResourceExhausted, match=r"quota sandboxes of tenant small is 2; .* make 3"):
        quotas.check("sandboxes", 3, retry_after_s=1.0)
    quotas.check("tokens_per_day", 10**12)
    as_tenant("large")
    assert quotas.mine() == Quota(sandboxes=64, tokens_per_day=1000)
    for everything in (None, tenants.EVERY):
        as_tenant(everything)
        quotas.check("sandboxes", 10**6)
    as_tenant("large")
    path.write_text(FILE.replace("64", "1"))
    with pytest.raises(ResourceExhausted, match="is 1;"):
        quotas.check("sandboxes", 2)
    path.write_text("[default")
    assert quotas.mine().sandboxes == 1, "a damaged file changes nothing"
    path.unlink()
    assert quotas.mine().sandboxes == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[tenant.a]\nsandboxes = 1", "tenant is none of default, tenants"),
        ("tenants = 3", "tenants is no table"),
        ("[tenants]\na = 1", "tenants.a is no table"),
        ("[tenants.a]\nsandbox = 1", "tenants.a.sandbox is none of " + ", ".join(NAMES)),
        ("[default]\nsandboxes = -1", "default.sandboxes is -1, not a whole number"),
        ("[default]\nsandboxes = true", "default.sandboxes is True, not a whole number"),
        ("[default]\nsandboxes = 1.5", "default.sandboxes is 1.5, not a whole number"),
        ("\x00", "cannot be used"),
    ],
)
def test_a_bad_file_is_refused_by_the_key(tmp_path, text, said):
    path = tmp_path / "quotas.toml"
    path.write_text(text)
    with pytest.raises(FailedPrecondition) as caught:
        read_quotas(path)
    assert said in caught.value.message


def test_uses_are_of_what_a_call_sees(as_tenant, tmp_path):
    path = tmp_path / "quotas.toml"
    path.write_text(FILE)
    quotas = Quotas(path)
    has = {"": 7, "small": 2, "other": 1}

    def seen(who):
        as_tenant(who)
        uses = quotas.uses(sandboxes=has, tokens_per_day={"large": 5})
        return [
            (use.tenant, use.quota, use.used, use.bound if use.HasField("bound") else None)
            for use in uses
        ]

    small = [("small", "sandboxes", 2, 2), ("small", "tokens_per_day", 0, None)]
    large = [("large", "sandboxes", 0, 64), ("large", "tokens_per_day", 5, 1000)]
    other = [("other", "sandboxes", 1, 2), ("other", "tokens_per_day", 0, None)]
    assert seen(tenants.EVERY) == large + other + small
    assert seen("small") == small
    assert seen("large") == large
    assert seen("new") == [("new", "sandboxes", 0, 2), ("new", "tokens_per_day", 0, None)]


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "quotas.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(FailedPrecondition, match="cannot be used"):
        read_quotas(path)

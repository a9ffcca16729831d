"""Whose States are: sums that changes keep up to date, labels, archives."""

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regreen.allowlist import AllowList
from regreen.rpc.errors import NotFound
from regreen.rpc.tokens import Caller, acting_as
from sandbox_svc.egress import Egress
from sandbox_svc.egress_log import Ledger
from sandbox_svc.state_records import State
from sandbox_svc.tenancy import Holdings, Owners, labels_of, made_again, word_of

_NAMES = st.sampled_from(["", "a", "b", "c"])
_KEYS = st.sampled_from(["1", "2", "3"])
_STATES = st.builds(
    lambda tenants, size: State("st", (), tenants=tuple(sorted(tenants)), size_bytes=size),
    st.sets(_NAMES),
    st.integers(0, 5),
)


@given(st.lists(st.tuples(_KEYS, st.none() | _STATES), max_size=20))
def test_what_a_tenant_holds_is_the_sum_of_its_states(changes):
    held: Holdings[State] = Holdings()
    for key, state in changes:
        if state is None:
            held.pop(key, None)
        else:
            held[key] = state
        for tenant in ("", "a", "b", "c"):
            mine = [s.size_bytes for s in held.values() if tenant in s.tenants]
            assert held.bytes_of(tenant) == sum(mine)


def as_tenant(name: str):
    return acting_as(Caller(name, "0123456789ab"))


def test_labels_are_told_to_who_made_the_state_first():
    state = State("st", (), tenants=("a", "b"), labels={"of": "a"})
    for name, seen in (("a", True), ("b", False), ("c", False), ("*", True)):
        with as_tenant(name):
            assert bool(labels_of(state)) == seen, name
    assert labels_of(state), "and to the service itself"
    again = made_again(state, State("st", (), tenants=("b",), labels={"of": "b"}))
    assert (again.tenants, again.labels) == (("a", "b"), {"of": "a"})


async def test_labels_go_with_their_tenant():
    states: Holdings[State] = Holdings()
    states["st"] = State("st", (), tenants=("a", "b"), labels={"of": "a"})

    async def rewrite(old, new):
        states[new.id] = new

    owners = Owners(states, asyncio.Lock(), rewrite, None)
    with as_tenant("c"):
        assert await owners.withdraw("st"), "what it does not see is others'"
    with as_tenant("a"):
        assert not owners.goes("st")
        assert await owners.withdraw("st")
    assert states["st"] == State("st", (), tenants=("b",))
    with as_tenant("b"):
        assert owners.goes("st")


def test_archives_of_two_tenants_are_two_states():
    named = State("st_" + "1" * 32, (), spec_sha256="x", ancestors=("st_0",))
    one, two = word_of("a", named, 5), word_of("b", named, 5)
    assert len({named.id, one.id, two.id}) == 3
    assert replace(one, id=two.id, tenants=("b",)) == two
    assert (one.parent_id, one.ancestors, one.spec_sha256) == (named.id, ("st_0", named.id), "")


def test_what_a_sandbox_asked_for_is_told_to_its_tenant_also_after_its_end():
    ledger = Ledger(quiet=True)
    with as_tenant("b"):
        door = Egress(ledger=ledger).door("sbx_b", AllowList.parse(["x.test"]))
    door.end(door.begin())
    ledger.begin("st_1", tenant="a")
    told = []
    for subject, name in (("sbx_b", "a"), ("sbx_none", "a"), ("st_1", "b")):
        with as_tenant(name), pytest.raises(NotFound) as caught:
            ledger.list(subject)
        told.append(str(caught.value).replace(subject, ""))
    assert len(set(told)) == 1
    door.close()
    with as_tenant("b"):
        assert len(ledger.list("sbx_b")) == 1
        ledger.share("st_1")  # it asked for the same preparation
        assert len(ledger.list("st_1")) == 1
    assert ledger.list("sbx_b"), "the service itself sees all"


@pytest.mark.parametrize("damage", [[1], "a", None, ["\ud800"]])
def test_a_record_with_other_tenants_than_names_is_refused(damage):
    with pytest.raises(ValueError, match="tenants"):
        State.decode(replace(State("st", ()), tenants=damage).encode())


def test_a_record_from_before_is_nobodys():
    record = State("st", (), tenants=("a",)).encode().replace(b', "tenants": ["a"]', b"")
    assert b"tenants" not in record
    assert State.decode(record).tenants == ("",)

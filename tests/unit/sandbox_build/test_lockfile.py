"""requirements.lock: strict, round trip, names the line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regreen.lockfile import format_lock, lock_change, lock_of, normalize, parse_lock
from regreen.rpc.errors import InvalidArgument

names = st.from_regex(r"[a-z][a-z0-9]{0,8}(-[a-z0-9]{1,4})?", fullmatch=True)
versions = st.from_regex(r"[0-9]{1,3}(\.[0-9]{1,3}){0,2}", fullmatch=True)
locks = st.dictionaries(names, versions, max_size=8)


@given(locks, st.sampled_from(["", "3.9", "3.13"]))
def test_round_trip(pins: dict[str, str], python: str) -> None:
    lock = lock_of(pins, python)
    assert parse_lock(format_lock(lock)) == lock
    assert format_lock(parse_lock(format_lock(lock))) == format_lock(lock)


@given(locks, locks)
def test_change_leads_from_one_to_the_other(left: dict[str, str], right: dict[str, str]) -> None:
    before, after = lock_of(left), lock_of(right)
    change = lock_change(before, after)
    result = {**before.pins, **change.installed}
    for name in change.removed:
        del result[name]
    assert result == after.pins
    assert change.empty == (before.pins == after.pins)


@given(st.text(max_size=200))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        lock = parse_lock(text)
    except InvalidArgument:
        return
    assert parse_lock(format_lock(lock)) == lock


def test_names_are_normalised_and_comments_ignored() -> None:
    lock = parse_lock("# a comment\n\nRuamel.Yaml_clib==0.2  # why\n#python==3.9\n")
    assert lock.pins == {"ruamel-yaml-clib": "0.2"}
    assert lock.python == "3.9"
    assert normalize("A__b.C") == "a-b-c"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a==1\nb>=2\n", "line 2"),
        ("a==1\na==2\n", "line 2"),
        ("# python==3.9\n# python==3.8\n", "line 2"),
        ("--index-url http://x\n", "line 1"),
        ("a==1 ; python_version<'3'\n", "line 1"),
        ("a==1 --hash=sha256:00\n", "line 1"),
    ],
)
def test_refusals_name_the_line(text: str, line: str) -> None:
    with pytest.raises(InvalidArgument, match=line):
        parse_lock(text)


def test_edits() -> None:
    lock = lock_of(("a==1", "b==2"), "3.9")
    assert lock.with_pin("B", "3").without("a").pins == {"b": "3"}
    assert lock.with_pin("python", "3.8").python == "3.8"

"""Globs, bounded output, state records and paging: what needs no sandbox."""

from pathlib import Path

import pytest

from regreen.rpc.errors import InvalidArgument
from sandbox_svc.backends import seccomp
from sandbox_svc.backends.base import Limits, Mount
from sandbox_svc.backends.output import Collector
from sandbox_svc.backends.uppers import changed, usage
from sandbox_svc.files import glob_regex
from sandbox_svc.servicer import page
from sandbox_svc.settings import SandboxSettings
from sandbox_svc.states import State, state_id


@pytest.mark.parametrize(
    ("glob", "path", "matches"),
    [
        ("*.py", "a/b/c.py", True),
        ("*.py", "c.pyc", False),
        ("src/*.py", "src/a.py", True),
        ("src/*.py", "src/b/a.py", False),
        ("src/**/*.py", "src/a.py", True),
        ("src/**/*.py", "src/b/c/a.py", True),
        ("**", "anything/at all", True),
        ("a?c", "abc", True),
        ("a?c", "a/c", False),
        ("a.c", "abc", False),
        ("[x", "[x", True),
    ],
)
def test_globs_match_as_people_expect(glob, path, matches):
    assert bool(glob_regex(glob).fullmatch(path)) is matches


@pytest.mark.parametrize("sizes", [[0], [3], [10], [11], [4, 4, 4], [1] * 30, [100, 1]])
def test_a_collector_keeps_exactly_the_first_and_last_bytes(sizes):
    data = bytes(range(256))[: sum(sizes)]
    collector, position = Collector(10), 0
    for size in sizes:
        collector.feed(data[position : position + size])
        position += size
    kept = collector.captured()
    assert kept.total_bytes == len(data)
    assert kept.truncated == (len(data) > 10)
    expected = data if len(data) <= 10 else data[:5] + data[-5:]
    assert kept.head + kept.tail == expected


def test_state_records_survive_a_round_trip_and_reject_nonsense():
    state = State(
        id=state_id("", "x"),
        layers=("a", "b"),
        mounts=(Mount(Path("/w"), "/wheelhouse"),),
        metadata={"baseline": {"passing": ["t"]}},
        labels={"k": "v"},
    )
    assert State.decode(state.encode()) == state
    for bad in (b"", b"[]", b"{}", b'{"format": 1}', state.encode().replace(b'"format": 1', b"")):
        with pytest.raises(ValueError, match=r"record|Expecting|delimiter"):
            State.decode(bad)


def test_a_states_id_depends_on_parent_and_action_alone():
    ids = {state_id("", "a"), state_id("p", "a"), state_id("", "b"), state_id("p\na", "")}
    assert len(ids) == 4
    assert all(len(value) == 35 and value.startswith("st_") for value in ids)


def test_paging_ends_and_refuses_bad_tokens():
    items = list("abcde")
    first, token = page(items, str, 2, "")
    second, token = page(items, str, 2, token)
    third, end = page(items, str, 2, token)
    assert [*first, *second, *third] == items
    assert end == ""
    with pytest.raises(InvalidArgument, match="page_token"):
        page(items, str, 2, "zz")


def test_uppers_are_read_without_following_links(tmp_path):
    top = tmp_path / "u"
    (top / "work/repo/d").mkdir(parents=True)
    (top / "work/repo/d/f").write_bytes(b"x" * 5000)
    (top / "work/repo/link").symlink_to("/etc")
    assert changed([top], [], "/work/repo") == {"/work/repo/d/f", "/work/repo/link"}
    assert changed([top], [], "/elsewhere") == set()
    assert usage(top).inodes == 5
    assert usage(top).size_bytes >= 5000


def test_the_filter_program_is_whole_instructions_within_the_kernels_bound():
    program = seccomp.deny_list()
    assert len(program) % 8 == 0
    assert len(program) // 8 < 4096


def test_settings_become_limits(tmp_path):
    settings = SandboxSettings(home=tmp_path, pids=64, command_s=5.0, default_ttl_s=10.0)
    assert settings.limits() == Limits(
        settings.memory_bytes, 64, 2.0, settings.disk_bytes, settings.inodes, 1 << 30, 5.0
    )
    assert settings.pool().default_ttl_s == 10.0

"""Globs, differences, bounded output, state records and paging: what needs no sandbox."""

import difflib
import json
import os
import random
import time
from pathlib import Path

import pytest

from regreen.client.sandbox import succeeded
from regreen.rpc.errors import FailedPrecondition, InvalidArgument, NotFound
from regreen.sandbox import v1 as pb
from sandbox_svc import fetches
from sandbox_svc.backends import seccomp
from sandbox_svc.backends.base import EndReason, ExecResult, Limits, Mount, check_kept, kept
from sandbox_svc.backends.docker import DockerRuntime
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.backends.output import Collector
from sandbox_svc.backends.uppers import changed, usage
from sandbox_svc.builders.base import RUNNER
from sandbox_svc.egress_log import Record
from sandbox_svc.globs import Glob
from sandbox_svc.servicer import page
from sandbox_svc.settings import SandboxSettings
from sandbox_svc.state_records import State, state_id
from sandbox_svc.states import StateStore
from sandbox_svc.translate import limits_from, result_to
from sandbox_svc.unified import TooLarge, unified


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
        ("src/**", "src/a/b", True),
        ("src/**", "src", False),
        ("**/**/a/**/**/b", "a/b", True),
        ("**/a", "a/b/a", True),
        ("*a*b", "xaxxb", True),
        ("*a*b", "xaxxbx", False),
        ("a?c", "abc", True),
        ("a?c", "a/c", False),
        ("a.c", "abc", False),
        ("[x", "[x", True),
    ],
)
def test_globs_match_as_people_expect(glob, path, matches):
    assert Glob(glob).matches(path) is matches


@pytest.mark.parametrize("glob", ["**/" * 7 + "zzz", "*a" * 120 + "b", "**/*a*/" * 30 + "x"])
def test_no_glob_takes_more_than_a_moment(glob):
    began, pattern = time.monotonic(), Glob(glob)
    paths = ["a/" * 60 + f"{n}" for n in range(500)] + ["a" * 240 + f"/{n}" for n in range(500)]
    assert not any(pattern.matches(path) for path in paths)
    assert time.monotonic() - began < 5.0


def test_a_glob_that_is_too_long_is_refused():
    with pytest.raises(InvalidArgument, match="glob: has 300 characters"):
        Glob("x" * 300)


def test_differences_read_as_those_of_the_standard_library():
    choose = random.Random(7)
    for _ in range(300):
        old, new = [
            [choose.choice("abcde") + "\n" for _ in range(choose.randint(0, 25))] for _ in "12"
        ]
        expected = "".join(difflib.unified_diff(old, new, "x", "y"))
        assert unified(old, new, "x", "y", until_s=time.monotonic() + 60) == expected
    assert unified(["a"], ["b"], "x", "y", until_s=time.monotonic() + 60).endswith(
        "@@ -1 +1 @@\n-a\n\\ No newline at end of file\n+b\n\\ No newline at end of file\n"
    )


def test_differences_end_by_their_bounds():
    with pytest.raises(TooLarge):
        unified(["x\n"] * 3000, [], "x", "y", until_s=time.monotonic() + 60)
    choose = random.Random(7)
    old, new = [[f"{choose.randrange(130)}\n" for _ in range(2000)] for _ in "12"]
    with pytest.raises(TooLarge):
        unified(old, new, "x", "y", until_s=time.monotonic() - 1.0)


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
        metadata={"baseline": {"passing": ["t"], "failing": [], "log": "", "seconds": 0.5}},
        labels={"k": "v"},
    )
    assert State.decode(state.encode()) == state
    for bad in (b"", b"[]", b"{}", b'{"format": 1}', state.encode().replace(b'"format": 1', b"")):
        with pytest.raises(ValueError, match=r"record|Expecting|delimiter"):
            State.decode(bad)


REQUEST = Record("st_" + "0" * 32, 1, 1.0, host="index.test", port=443).facts()


def test_the_requests_in_a_record_are_whole_or_the_record_is_refused():
    def recorded(requests: object) -> bytes:
        return State(id=state_id("", "x"), layers=(), metadata={"egress": requests}).encode()

    kept = State.decode(recorded(json.dumps([REQUEST, REQUEST])))
    assert fetches.decode(kept.metadata["egress"]) == [REQUEST, REQUEST]
    wrong = [
        *({**REQUEST, name: None} for name in REQUEST),
        *({**REQUEST, name: 1 << 70} for name in ("port", "status", "received_bytes", "number")),
        {**REQUEST, "created_s": -1.0},
        {**REQUEST, "more": ""},
        {name: value for name, value in REQUEST.items() if name != "host"},
        "text",
    ]
    for bad in (*(json.dumps([one]) for one in wrong), "{}", "[", "[" * 100_000, [REQUEST], None):
        with pytest.raises(ValueError, match="metadata is of another type"):
            State.decode(recorded(bad))


async def test_states_prepared_with_another_runner_are_gone_after_opening(tmp_path):
    runtime = EmbeddedRuntime(tmp_path / "home", run_probes=False)
    (tmp_path / "home" / "layers").mkdir(parents=True)
    old, new, snapshot, plain = (state_id("", name) for name in "abcd")
    facts = {"baseline": {"passing": ["t"], "failing": [], "log": "", "seconds": 0.5}}
    before = StateStore(tmp_path / "home", runtime)
    await before.open()
    for state in (
        State(id=old, layers=(), metadata={**facts, "runner": RUNNER - 1}),
        State(id=new, layers=(), metadata={**facts, "runner": RUNNER}),
        State(id=snapshot, layers=(), parent_id=old, metadata={**facts, "runner": RUNNER - 1}),
        State(id=plain, layers=()),
    ):
        before.record(before.stamp(state))
    await before.close()
    after = StateStore(tmp_path / "home", runtime)
    await after.open()
    assert {state.id for state in after.list()} == {new, snapshot, plain}
    with pytest.raises(NotFound):
        after.get(old)
    await after.close()


def test_a_states_id_depends_on_parent_and_action_alone():
    ids = {state_id("", "a"), state_id("p", "a"), state_id("", "b"), state_id("p\na", "")}
    assert len(ids) == 4
    assert all(len(value) == 35 and value.startswith("st_") for value in ids)


def test_paging_ends_survives_deletions_and_refuses_bad_tokens():
    items = list("abcde")

    def place(item: str) -> tuple[float, str]:
        return (0.1, item)

    first, token = page(items, place, 2, "")
    second, token = page(items, place, 2, token)
    third, end = page(items, place, 2, token)
    assert [*first, *second, *third] == items
    assert end == ""
    assert page([item for item in items if item != "d"], place, 2, token) == (["e"], "")
    with pytest.raises(InvalidArgument, match="page_token"):
        page(items, place, 2, "zz")


def test_a_stopped_command_that_ended_with_0_tells_both_and_did_not_succeed():
    for reason in EndReason:
        told = result_to(ExecResult(reason, 0))
        assert told.exit_code == 0
        assert succeeded(told) == (reason is EndReason.EXIT)
    killed = result_to(ExecResult(EndReason.DISK, -25, 25))
    assert (killed.exit_code, killed.signal) == (128 + 25, 25)


def test_docker_refuses_limits_that_it_does_not_keep(tmp_path):
    unkept = DockerRuntime(tmp_path).unkept()
    for name in ("disk_bytes", "inodes"):
        with pytest.raises(FailedPrecondition, match=rf"limits\.{name}: .*--backend embedded"):
            check_kept(Limits(**{name: 1 << 20}), unkept)
    check_kept(Limits(memory_bytes=1 << 30, cpus=1.0), unkept)
    assert kept(Limits(cpus=1.0, disk_bytes=5, inodes=7), unkept) == Limits(cpus=1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e9])
def test_limits_that_are_no_sensible_number_are_refused(value):
    with pytest.raises(InvalidArgument, match=r"limits\.cpus"):
        limits_from(pb.Limits(cpus=value))
    with pytest.raises(InvalidArgument, match=r"limits\.memory_bytes"):
        limits_from(pb.Limits(memory_bytes=1 << 62))
    assert limits_from(pb.Limits(cpus=1.5)).cpus == 1.5


@pytest.mark.parametrize(
    "change",
    [
        {"size_bytes": "x"},
        {"metadata": None},
        {"metadata": {"baseline": {"passing": 3}}},
        {"metadata": {"baseline": {"passing": [], "failing": [], "log": "", "seconds": 1e300}}},
        {"labels": {"a": 1}},
        {"env": ["a"]},
        {"layers": "ab"},
        {"python": "\ud800"},
        {"created_s": float("nan")},
        {"mounts": [["/a", "/b", "yes"]]},
        {"unknown": 1},
    ],
)
def test_a_record_with_other_types_is_refused(change):
    fields = json.loads(State(id=state_id("", "x"), layers=("a",)).encode())
    assert State.decode(json.dumps(fields).encode()).layers == ("a",)
    with pytest.raises(ValueError, match="record"):
        State.decode(json.dumps(fields | change).encode())


def test_uppers_are_read_without_following_links(tmp_path):
    top = tmp_path / "u"
    (top / "work/repo/d").mkdir(parents=True)
    (top / "work/repo/d/f").write_bytes(b"x" * 5000)
    (top / "work/repo/link").symlink_to("/etc")
    assert changed([top], [], "/work/repo") == {"/work/repo/d/f", "/work/repo/link"}
    assert changed([top], [], "/elsewhere") == set()
    assert usage(top).inodes == 5
    assert usage(top).size_bytes >= 5000


def test_a_tree_too_deep_to_look_into_is_told(tmp_path):
    top, name = tmp_path / "u", "d" * 250
    (top / "work").mkdir(parents=True)
    here = os.open(top / "work", os.O_RDONLY)
    for _ in range(20):
        os.mkdir(name, dir_fd=here)
        here, above = os.open(name, os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=here))
    os.close(here)
    assert not usage(top).whole
    (deep,) = changed([top], [], "/work")
    assert deep.startswith(f"/work/{name}/")
    assert deep.endswith("/")


def test_a_directory_swapped_for_a_link_is_not_entered(tmp_path):
    top = tmp_path / "u"
    (top / "work").mkdir(parents=True)
    (tmp_path / "host").mkdir()
    (tmp_path / "host/secret").write_text("x")
    (top / "work/repo").symlink_to(tmp_path / "host")
    assert changed([top], [], "/work/repo") == set()
    assert usage(top).inodes == 2


def test_names_that_are_not_text_are_kept(tmp_path):
    top = tmp_path / "u"
    (top / "work").mkdir(parents=True)
    (top / os.fsdecode(b"work/bad\xff")).write_text("x")
    assert changed([top], [], "/work") == {os.fsdecode(b"/work/bad\xff")}


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


def test_records_without_a_base_are_of_the_host_and_ids_of_host_states_stay() -> None:
    fields = json.loads(State(id=state_id("", "x"), layers=("a",)).encode())
    del fields["base"], fields["cwd"], fields["ancestors"]
    old = State.decode(json.dumps(fields).encode())
    assert (old.base, old.cwd) == ("host", "/work/repo")
    assert state_id("", "ab" * 32) == "st_4784588662af4bf506cfd93d40fff992"
    for change in (
        {"base": "image:sha256:zz"},
        {"base": 1},
        {"ancestors": [1]},
        {"cwd": "relative"},
        {"cwd": "/a\0"},
    ):
        with pytest.raises(ValueError, match="another type"):
            State.decode(json.dumps(fields | change).encode())

"""The spawner is built once, from any compiler, or says what to install."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from regreen.rpc.errors import MissingDependency
from sandbox_svc.backends import program


def test_its_sources_compile_without_a_warning(tmp_path):
    compiler = next(program.compilers())
    sources = [str(path) for path in program._SOURCES.glob("*.c")]
    flags = [*program._FLAGS, "-Werror", "-Wshadow", "-Wstrict-prototypes"]
    command = [*compiler, *flags, "-o", str(tmp_path / "spawner"), *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_is_built_once_for_the_same_sources(tmp_path):
    first = program.spawner(into=tmp_path)
    made = first.stat().st_mtime_ns
    assert program.spawner(into=tmp_path) == first
    assert first.stat().st_mtime_ns == made
    assert program.spawner(["DUMPABLE"], into=tmp_path) != first
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["spawner"] * 2


def test_two_that_build_at_once_end_with_one_program(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: program.spawner(into=tmp_path), range(2)))
    assert found[0] == found[1]
    assert [path.name for path in tmp_path.iterdir()] == [found[0].name]


def test_without_a_compiler_it_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "compilers", lambda: iter(()))
    with pytest.raises(MissingDependency, match=r"install a C compiler .* or `pip install ziglang"):
        program.spawner(into=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_fails_is_quoted_and_the_next_is_tried(tmp_path, monkeypatch):
    working = next(program.compilers())
    broken = [sys.executable, "-c", "import sys; sys.exit('no headers here')"]
    monkeypatch.setattr(program, "compilers", lambda: iter([broken]))
    with pytest.raises(MissingDependency, match="no headers here"):
        program.spawner(into=tmp_path)
    monkeypatch.setattr(program, "compilers", lambda: iter([broken, working]))
    assert program.spawner(into=tmp_path).is_file()


def test_started_by_hand_it_says_who_starts_it():
    done = subprocess.run([program.spawner()], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "started by the sandbox service" in done.stderr


def test_what_another_user_could_have_put_there_is_not_executed(tmp_path, monkeypatch):
    place = tmp_path / "built"
    good = program.spawner(into=place)
    for path, mode in ((good, 0o777), (place, 0o777)):
        kept = path.stat().st_mode
        path.chmod(mode)
        assert not program._usable(good)
        path.chmod(kept)
    assert program._usable(good)
    place.chmod(0o777)
    with pytest.raises(MissingDependency, match="others may"):
        program.spawner(["DUMPABLE"], into=place)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_what_belongs_to_another_user_is_built_anew(tmp_path):
    planted = program.spawner(into=tmp_path)
    planted.write_bytes(b"#!/bin/sh\n")
    os.chown(planted, 64_021, 64_021)
    assert program.spawner(into=tmp_path).read_bytes()[:4] == b"\x7fELF"
    assert planted.stat().st_uid == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_place_where_nothing_may_be_executed_leaves_the_next(tmp_path, monkeypatch):
    closed, cache = tmp_path / "noexec", tmp_path / "cache"
    closed.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "noexec,mode=755,size=8m", "tmpfs", str(closed)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no mounts here")
    try:
        monkeypatch.setattr(program, "_places", lambda: [closed, cache])
        assert program.spawner().parent == cache
    finally:
        subprocess.run(["umount", str(closed)], check=True)


def test_a_draft_that_a_killed_build_left_is_removed(tmp_path):
    left = tmp_path / ".draft-left"
    left.mkdir()
    os.utime(left, (0, 0))
    program.spawner(into=tmp_path)
    assert not left.exists()


def test_a_place_that_cannot_be_written_leaves_the_next(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    places = [tmp_path / "file" / "built", tmp_path / "cache"]
    monkeypatch.setattr(program, "_places", lambda: places)
    assert program.spawner().parent == tmp_path / "cache"
    monkeypatch.setattr(program, "_places", lambda: places[:1])
    with pytest.raises(MissingDependency, match="this user may not write"):
        program.spawner()

"""Killing the process that owns sandboxes: states are whole or absent, nothing else remains."""

import asyncio
import glob
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from regreen.rpc.errors import FailedPrecondition
from sandbox_svc.backends.base import Command, Limits
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.sandboxes import Manager
from sandbox_svc.states import StateStore
from tests.load import processes

_CHILD = Path(__file__).with_name("snapshotting.py")
_FLATTENER = Path(__file__).with_name("flattening.py")
_ROOT = Path(__file__).parents[3]


def _processes_below(home: Path, seen: dict[processes.Lived, str]) -> list[str]:
    """Processes that name `home`, are in its control groups, or were `seen` and still live."""
    instance = hashlib.sha256(os.fsencode(home.absolute())).hexdigest()[:8]
    found = [f"{pid}: {why}" for pid, why in processes.of_instance(home, instance).items()]
    found += [f"{pid}: {role}" for (pid, _), role in processes.still(seen).items()]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(home) in line:
                found.append(line)
    return found


def _groups(instance: str) -> list[Path]:
    """Control groups of sandboxes of one instance."""
    # not pathlib's, which fails at what goes while it looks, such as another instance's
    found = glob.iglob(f"/sys/fs/cgroup/**/regreen-{instance}/*/cgroup.procs", recursive=True)
    return [Path(path).parent for path in found]


def _run_and_kill(
    home: Path, lines: int, script: Path = _CHILD, after_s: float = 0.0
) -> tuple[dict[str, str], dict[processes.Lived, str]]:
    """Start the child, read `lines` promises, kill it without warning.

    What it promised, and its processes as they were just before.
    """
    child = subprocess.Popen(
        [sys.executable, str(script), str(home)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": f"{_ROOT}:{os.environ.get('PYTHONPATH', '')}"},
    )
    assert child.stdout is not None
    promised = {}
    while lines and (line := child.stdout.readline()):
        if len(line.split()) == 2:  # others are the log
            lines -= 1
            state, content = line.split()
            promised[state] = content
    time.sleep(after_s)  # a moment of its own for each case, not a wait for anything
    seen = processes.family(child.pid)
    assert {"service", "spawner", "first process"} <= set(seen.values())
    below = _processes_below(home, {})
    assert any("control group" in line or "mounts of" in line for line in below), below
    child.send_signal(signal.SIGKILL)
    rest, _ = child.communicate(timeout=30)
    for line in rest.splitlines():
        if len(line.split()) == 2:
            state, content = line.split()
            promised[state] = content
    return promised, seen


def _gone(home: Path, seen: dict[processes.Lived, str], timeout_s: float) -> bool:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if not _processes_below(home, seen):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("lines", [1, 4, 13])
async def test_a_killed_service_leaves_whole_states_and_nothing_else(tmp_path, lines):
    home = tmp_path / "home"
    promised, seen = await asyncio.to_thread(_run_and_kill, home, lines)
    assert await asyncio.to_thread(_gone, home, seen, 10.0), _processes_below(home, seen)
    unfinished = [
        home / "dists/tmpabc",
        home / "dists/files/ab/.part-1",
        home / "dists/houses/.new-1/x",
        home / "dists/built/.part-2",
        home / "tools/.new-2/y",
    ]
    kept = home / "dists/files/ab/whole"
    for path in (*unfinished, kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")

    runtime = EmbeddedRuntime(home, run_probes=False, warm_seats=0)
    left = _groups(runtime.instance)
    before = {path.name for path in left}
    await runtime.start()
    try:
        assert set(os.listdir(home / "run")) == set(runtime._seats.kept)
        assert os.listdir(home / "trash") == []
        assert [path for path in unfinished if path.exists()] == []
        assert kept.exists()
        with_groups = set(runtime._seats.kept) if runtime.cgroups.name != "rlimit" else set()
        assert {path.name for path in _groups(runtime.instance)} == with_groups
        assert not before & set(runtime._seats.kept)
        states = StateStore(home, runtime)
        await states.open()
        found = {state.id: state for state in states.list()}
        assert set(promised) <= set(found)
        assert {layer for s in found.values() for layer in s.layers} == set(await runtime.layers())
        manager = Manager(runtime, states)
        for state_id, content in promised.items():
            async with manager.fresh(state_id) as box:
                assert (await box.read_file("/work/repo/count", 100)).decode() == content
        await states.close()
    finally:
        await runtime.close()


@pytest.mark.parametrize(("lines", "after_s"), [(4, 0.0), (5, 0.02), (9, 0.06), (13, 0.15)])
async def test_a_service_killed_while_it_flattens_leaves_whole_states(tmp_path, lines, after_s):
    home = tmp_path / "home"
    promised, seen = await asyncio.to_thread(_run_and_kill, home, lines, _FLATTENER, after_s)
    promised.pop("flat", None)
    assert await asyncio.to_thread(_gone, home, seen, 10.0), _processes_below(home, seen)
    runtime = EmbeddedRuntime(home, run_probes=False, warm_seats=0)
    await runtime.start()
    try:
        assert os.listdir(home / "trash") == []
        states = StateStore(home, runtime)
        await states.open()
        found = {state.id: state for state in states.list()}
        assert set(promised) <= set(found)
        assert {layer for s in found.values() for layer in s.layers} == set(await runtime.layers())
        manager = Manager(runtime, states)
        for state_id, content in promised.items():
            async with manager.fresh(state_id) as box:
                assert (await box.read_file("/work/repo/count", 100)).decode() == content
                if content != "0":
                    script = "cd many; cat f* | sort -u; ls | wc -l; ls g*"
                    seen = await box.run(Command(("/bin/sh", "-c", script)))
                    assert seen.stdout.text.split() == [content, "401", f"g{content}"]
        await states.close()
    finally:
        await runtime.close()


async def test_damaged_and_foreign_records_are_dropped(tmp_path):
    home = tmp_path / "home"
    _, seen = await asyncio.to_thread(_run_and_kill, home, 2)
    assert await asyncio.to_thread(_gone, home, seen, 10.0), _processes_below(home, seen)
    index = home / "states"
    whole = sorted(index.glob("st_*.json"))
    (index / "st_torn.json").write_bytes(whole[0].read_bytes()[:50])
    (index / ".st_draft.1234").write_bytes(b"{")
    renamed = index / f"st_{'0' * 32}.json"
    renamed.write_bytes(whole[0].read_bytes())
    runtime = EmbeddedRuntime(home, run_probes=False)
    await runtime.start()
    states = StateStore(home, runtime)
    await states.open()
    await states.close()  # until then a record may be being written again
    await runtime.close()
    assert sorted(path.name for path in index.iterdir()) == [path.name for path in whole]


async def test_one_home_has_one_service(tmp_path):
    first = EmbeddedRuntime(tmp_path / "home", run_probes=False)
    await first.start()
    second = EmbeddedRuntime(tmp_path / "home", run_probes=False)
    with pytest.raises(FailedPrecondition, match="another sandbox service"):
        await second.start()
    assert (await first.create([], limits=Limits())).id
    await first.close()
    third = EmbeddedRuntime(tmp_path / "home", run_probes=False)
    await third.start()
    await third.close()

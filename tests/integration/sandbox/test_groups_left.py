"""Control groups of services that were killed, or ended while they started, do not stay."""

import fcntl
import glob
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from regreen.rpc.errors import FailedPrecondition
from sandbox_svc.backends import cgroups
from sandbox_svc.backends.base import Limits
from sandbox_svc.backends.embedded import EmbeddedRuntime

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="control groups need root")


def _of(runtime: EmbeddedRuntime) -> list[str]:
    return [place for place in runtime.cgroups.places if os.path.isdir(place)]


def _everywhere(instance: str) -> list[str]:
    return glob.glob(f"/sys/fs/cgroup/**/regreen-{instance}", recursive=True)


@pytest.fixture
def dead(tmp_path):
    """The instance, and the groups, of a runtime that was killed."""
    code = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from sandbox_svc.backends.base import Limits\n"
        "from sandbox_svc.backends.embedded import EmbeddedRuntime\n"
        "async def main():\n"
        "    runtime = EmbeddedRuntime(Path(sys.argv[1]), run_probes=False, warm_seats=2)\n"
        "    await runtime.start()\n"
        "    await runtime.create([], limits=Limits())\n"
        "    print(runtime.instance, runtime._seats.spawner, *runtime.cgroups.places, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "dead")], stdout=subprocess.PIPE, text=True
    )
    instance, spawner, *places = child.stdout.readline().split()
    child.kill()
    child.wait()
    child.stdout.close()
    until_s = time.monotonic() + 20
    while Path("/proc", spawner).exists() and time.monotonic() < until_s:
        time.sleep(0.01)
    if not places:
        pytest.skip("this host has no control groups for sandboxes")
    return instance, places


async def test_the_next_start_of_any_service_sweeps_what_a_killed_one_left(tmp_path, dead):
    _, left = dead
    runtime = EmbeddedRuntime(tmp_path / "other", run_probes=False, warm_seats=0)
    until_s = time.monotonic() + 10  # its processes end by themselves; a group in use stays
    while any(map(os.path.isdir, left)) and time.monotonic() < until_s:
        await runtime.start()
        await runtime.close()
        runtime = EmbeddedRuntime(tmp_path / "other", run_probes=False, warm_seats=0)
    assert not any(map(os.path.isdir, left))


async def test_a_start_takes_nothing_from_a_service_that_lives(tmp_path):
    first = EmbeddedRuntime(tmp_path / "first", run_probes=False, warm_seats=1)
    await first.start()
    try:
        bare = EmbeddedRuntime(tmp_path / "bare", run_probes=False, warm_seats=0)
        await bare.start()  # its groups are empty
        second = EmbeddedRuntime(tmp_path / "second", run_probes=False, warm_seats=0)
        await second.start()
        await second.close()
        assert _of(first) == list(first.cgroups.places)
        assert _of(bare) == list(bare.cgroups.places)
        assert _of(second) == []
        for runtime in (first, bare):
            await (await runtime.create([], limits=Limits())).delete()
        await bare.close()
    finally:
        await first.close()
    assert _of(first) == _of(bare) == []


def test_a_group_that_is_locked_or_not_empty_stays():
    driver = cgroups.choose("tested")
    if not driver.places:
        pytest.skip("this host has no control groups for sandboxes")
    parent = Path(driver.places[0]).parent
    locked, used = parent / "regreen-locked", parent / "regreen-used"
    sleeper = subprocess.Popen(["sleep", "60"])
    for group in (locked, used):
        group.mkdir()
    (used / "box").mkdir()
    lock = os.open(locked, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (used / "box/cgroup.procs").write_text(str(sleeper.pid))
        driver.sweep()
        assert locked.is_dir()
        assert (used / "box").is_dir()
        assert sleeper.poll() is None
    finally:
        os.close(lock)
        sleeper.kill()
        sleeper.wait()
    driver.sweep()
    assert not locked.exists()
    assert not used.exists()
    driver.close()
    assert not Path(driver.places[0]).exists()


def test_a_group_that_another_service_has_is_refused_by_name():
    driver = cgroups.choose("taken")
    if not driver.places:
        pytest.skip("this host has no control groups for sandboxes")
    try:
        with pytest.raises(FailedPrecondition, match="regreen-taken; stop it or choose another"):
            cgroups.choose("taken")
    finally:
        driver.close()
    cgroups.choose("taken").close()
    assert not any(map(os.path.isdir, driver.places))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_that_is_ended_while_it_starts_leaves_nothing(tmp_path, number):
    command = [sys.executable, "-m", "sandbox_svc", "--home", str(tmp_path / "home")]
    command += ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--insecure"]
    service = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    run = tmp_path / "home/sandbox/run"
    try:
        while service.poll() is None and not (run.is_dir() and any(run.iterdir())):
            time.sleep(0.005)
        service.send_signal(number)
        told = service.communicate(timeout=60)[1].decode()
    finally:
        service.kill()
        service.wait()
    assert service.returncode == 0, told
    assert "Traceback" not in told
    assert not any(run.iterdir())
    assert not _everywhere(EmbeddedRuntime(tmp_path / "home/sandbox").instance)


def test_a_service_that_cannot_start_says_why_and_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "sandbox_svc", "--home", str(tmp_path / "home")]
    command += ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--insecure"]
    command += ["--blobs", str(tmp_path / "file/blobs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("sandbox_svc: ")
    assert "file/blobs" in done.stderr
    assert "Traceback" not in done.stderr
    assert not _everywhere(EmbeddedRuntime(tmp_path / "home/sandbox").instance)

"""The spawner and the first process, where a build or its starter would have them fail."""

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import pytest_asyncio

from regreen.rpc.errors import InfraError, InvalidArgument, NoSuchFile
from sandbox_svc.backends import program
from sandbox_svc.backends.base import Command, EndReason, Limits, TerminalSize
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.backends.embedded_box import EmbeddedBox
from sandbox_svc.backends.seats import Left, Part

_ROOT = Path(__file__).parents[3]
_IGNORED = """
import asyncio, signal, sys
from pathlib import Path
from sandbox_svc.backends.base import Command, Limits
from sandbox_svc.backends.embedded import EmbeddedRuntime
async def main():
    runtime = EmbeddedRuntime(Path(sys.argv[1]), run_probes=False, warm_seats=0)
    await runtime.start()
    box = await runtime.create([], limits=Limits())
    print((await box.run(Command(("/bin/true",), cwd="/", timeout_s=20))).reason.value)
    await runtime.close()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
asyncio.run(main())
"""
_IN_FLIGHT = """
import os, socket, time
null, held = os.open("/dev/null", os.O_RDONLY), []
while True:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    held.append(pair)
    pair[0].setblocking(False)
    try:
        while True:
            socket.send_fds(pair[0], [b"x"], [null] * 253)
    except BlockingIOError:
        continue
    except OSError as error:
        print(error.errno, flush=True)
        time.sleep(60)
"""
_SHARED_TABLE = """
import ctypes, os, signal, sys
os.makedirs("/work/home", exist_ok=True)
fd = os.open("/work/home/gone", os.O_RDWR | os.O_CREAT)
os.write(fd, bytes(1 << 20)); os.unlink("/work/home/gone")
for _ in range(3000):
    os.dup(fd)
for _ in range(10):
    if ctypes.CDLL(None).syscall(56, 0x400 | signal.SIGCHLD, 0, 0, 0, 0) == 0:
        signal.pause()
print("up", flush=True)
signal.pause()
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runtime(tmp_path_factory):
    runtime = EmbeddedRuntime(tmp_path_factory.mktemp("r") / "home", run_probes=False, warm_seats=1)
    await runtime.start()
    yield runtime
    await runtime.close()


@pytest_asyncio.fixture(loop_scope="module")
async def box(runtime):
    box = await runtime.create([], limits=Limits())
    yield box
    await box.delete()


def test_a_starter_that_ignores_ended_children_does_not_hide_the_end_of_commands(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _IGNORED, str(tmp_path / "home")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
    )
    assert done.stdout == "exit\n", done.stderr


async def test_a_spawner_that_cannot_be_started_again_is_trouble_of_the_platform(
    tmp_path, monkeypatch
):
    copy = tmp_path / "spawner"
    copy.write_bytes(program.spawner().read_bytes())
    copy.chmod(0o755)
    monkeypatch.setattr(program, "spawner", lambda: copy)
    runtime = EmbeddedRuntime(tmp_path / "home", run_probes=False, warm_seats=0)
    await runtime.start()
    try:
        kept = copy.rename(tmp_path / "away")
        os.kill(runtime._seats.spawner, 9)
        with pytest.raises(InfraError):
            await runtime.create([], limits=Limits())
        with pytest.raises(InfraError, match="the spawner cannot be started"):
            await runtime.create([], limits=Limits())
        kept.rename(copy)
        await (await runtime.create([], limits=Limits())).delete()
    finally:
        await runtime.close()


async def test_a_spawner_that_dies_with_requests_unread_is_replaced(tmp_path):
    runtime = EmbeddedRuntime(tmp_path / "home", run_probes=False, warm_seats=0)
    await runtime.start()
    try:
        for _ in range(3):
            spawner = runtime._seats.spawner
            os.kill(spawner, signal.SIGSTOP)
            asked = [asyncio.create_task(runtime.create([], limits=Limits())) for _ in range(8)]
            await asyncio.sleep(0.2)
            os.kill(spawner, signal.SIGKILL)
            async with asyncio.timeout(20):
                ended = await asyncio.gather(*asked, return_exceptions=True)
                assert all(isinstance(each, InfraError | EmbeddedBox) for each in ended)
                box = await runtime.create([], limits=Limits())
            assert runtime._seats.spawner != spawner
            assert (await box.run(Command(("/bin/true",), cwd="/"))).ok
    finally:
        await runtime.close()


async def test_a_spawner_killed_while_the_service_starts_says_nothing_of_the_host(tmp_path):
    runtime = EmbeddedRuntime(tmp_path / "home")
    starting = asyncio.create_task(runtime.start())
    killed: list[int] = []
    for after_s in (0.0, 0.6):  # with its first sandbox, and while limits are proven
        async with asyncio.timeout(30):
            while runtime._seats is None or runtime._seats.spawner in (0, *killed):  # noqa: ASYNC110 - a process
                await asyncio.sleep(0.001)
        await asyncio.sleep(after_s)
        killed.append(runtime._seats.spawner)
        os.kill(killed[-1], signal.SIGKILL)
    try:
        await starting
        assert runtime._seats.spawner not in killed
        assert (await (await runtime.create([], limits=Limits())).run(Command(("/bin/true",)))).ok
    finally:
        await runtime.close()


async def test_a_spawner_that_cannot_make_its_root_says_at_which_step_and_is_replaced(tmp_path):
    runtime = EmbeddedRuntime(tmp_path / "home", run_probes=False, warm_seats=0)
    await runtime.start()
    stage = tmp_path / "home/stage"
    try:
        os.kill(runtime._seats.spawner, 9)
        stage.rmdir()
        stage.touch()
        told = set()
        for _ in range(4):
            with pytest.raises(InfraError) as refused:
                await runtime.create([], limits=Limits())
            told.add(str(refused.value))
        assert "the spawner refused: stage: Not a directory" in told
        stage.unlink()
        stage.mkdir()
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(InfraError):
                    box = await runtime.create([], limits=Limits())
                    break
        assert (await box.run(Command(("/bin/true",), cwd="/"))).ok
    finally:
        await runtime.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_what_cannot_be_started_is_told_as_a_shell_does(box):
    async def told(program: str) -> tuple[int, str]:
        ended = await box.run(Command((program,), cwd="/"))
        assert ended.reason is EndReason.EXIT
        return ended.exit_code, ended.stderr.text

    assert await told("naïve-prog") == (127, "regreen: naïve-prog: command not found\n")
    code, text = await told("x" * 700)
    assert (code, text[-20:]) == (127, "x: command not found"[-19:] + "\n")
    assert await told("/" + "x" * 5000) == (126, f"regreen: /{'x' * 399}: File name too long\n")
    assert (await told("/etc/hostname"))[0] in (126, 127)


@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_no_file_is_not_handed_out(box):
    await box.run(Command(("mkfifo", "/tmp/pipe"), cwd="/"))
    with pytest.raises(InvalidArgument, match="not a regular file: /tmp/pipe"):
        await box.read_file("/tmp/pipe", 10)
    with pytest.raises(NoSuchFile):
        await box.read_file("/tmp/none", 10)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="no /usr/bin/python3 here")
async def test_descriptors_that_another_sandbox_has_in_flight_are_its_own_affair(runtime, box):
    """The kernel counts them for a user of the host, and all sandboxes are one."""
    await box.write_file("/work/file", b"1")
    other = await runtime.create([], limits=Limits())
    try:
        hog = await other.start(Command(("/usr/bin/python3", "-c", _IN_FLIGHT), cwd="/"))
        async with asyncio.timeout(30):
            while True:
                changed = hog.changed.next()
                if said := hog.stdout.captured().head:
                    break
                await changed.wait()
        assert int(said) == errno.ETOOMANYREFS  # for whoever has as many as a command may
        assert await box.read_file("/work/file", 10) == b"1"
        assert (await box.run(Command(("/bin/cat", "/work/file"), cwd="/"))).stdout.text == "1"
        terminal = Command(("/usr/bin/tty",), cwd="/", terminal=TerminalSize(24, 80))
        process = await box.start(terminal)
        assert (await process.wait()).exit_code == 0
        await hog.signal(9)
        await hog.wait()
    finally:
        await other.delete()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="call numbers of x86_64")
@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="no /usr/bin/python3 here")
async def test_a_file_in_many_descriptors_is_counted_once(box):
    process = await box.start(Command(("/usr/bin/python3", "-c", _SHARED_TABLE), cwd="/"))
    async with asyncio.timeout(20):
        while True:
            changed = process.changed.next()
            if b"up" in process.stdout.captured().head:
                break
            await changed.wait()
    before = _resident(box.seat.pid)
    used = await box.usage()
    assert used["processes"] == 11
    assert used["unlinked"] == 1 << 20
    assert _resident(box.seat.pid) - before < 1 << 20
    await process.signal(9)
    await process.wait()


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.asyncio(loop_scope="module")
async def test_the_spawner_clears_what_is_empty_and_tells_what_is_not(runtime):
    run = runtime.layout.home / "run"
    for name in ("empty", "full", "both"):
        for part in ("u", "w/work/incompat/volatile"):
            (run / name / part).mkdir(parents=True)
        (run / name / "w/work/incompat/volatile/dirty").touch()
    (run / "full/u/made").write_text("kept")
    held = [Path(place, "held") for place in runtime.cgroups.places]
    sleeper = await asyncio.create_subprocess_exec("sleep", "60")
    try:
        for group in held:
            group.mkdir()
            (group / "cgroup.procs").write_text(str(sleeper.pid))
        asked = [("empty", "d"), ("full", "d"), ("nowhere", "g"), ("held", "g"), ("both", "b")]
        left = await runtime._seats.cleared([Left(name, Part(part)) for name, part in asked])
    finally:
        sleeper.kill()
        await sleeper.wait()
        assert runtime.cgroups.destroy("held")
    told = [(each.name, each.part) for each in left]
    assert told == [("full", "d"), *([("held", "g")] if held else [])]
    assert not (run / "empty").exists()
    assert not (run / "both").exists()
    assert (run / "full/u/made").read_text() == "kept"
    runtime._discard("full")


async def test_what_a_dead_spawner_cannot_clear_goes_all_the_same(tmp_path):
    runtime = EmbeddedRuntime(tmp_path / "home", run_probes=False, warm_seats=0)
    await runtime.start()
    box = await runtime.create([], limits=Limits())
    name = box.place
    os.kill(runtime._seats.spawner, 9)
    await box.delete()
    await runtime.settle()
    found = await runtime.orphans()
    assert name not in os.listdir(tmp_path / "home/run")
    assert not any(found.values())
    await runtime.close()

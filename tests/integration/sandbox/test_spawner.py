"""The spawner and the first process, where a build or its starter would have them fail."""

import asyncio
import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytest_asyncio

from regreen.rpc.errors import InfraError, InvalidArgument, NoSuchFile
from sandbox_svc.backends import program
from sandbox_svc.backends.base import Command, EndReason, Limits, TerminalSize
from sandbox_svc.backends.embedded import EmbeddedRuntime
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
_FORKS = """
import os, time
while True:
    try:
        if os.fork() == 0:
            time.sleep(2)
            os._exit(0)
    except OSError:
        break
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


_LEFT = {
    "nothing": ("true", True),
    "memory of its own": ("head -c 50000000 /dev/zero > /tmp/x", True),
    "a file": ("touch /work/file", False),
    "a file that it removed": ("touch /work/file; rm /work/file", False),
    "a file of the base, hidden": ("rm -rf /work", False),
    "the mode of its root": ("chmod 701 /", False),
    "the mode of its root, put back": ("chmod 701 /; chmod 755 /", True),
    "the times of its root": ("touch -d @5 /", True),
    "a mark on its root": (
        '/usr/bin/python3 -c \'import os; os.setxattr("/", "user.x", b"1")\'',
        False,
    ),
    "a flag of its root": ("chattr +d /", False),
}


@pytest.mark.skipif(os.geteuid() != 0, reason="of an ordinary user's sandboxes nothing is kept")
@pytest.mark.parametrize("left", _LEFT)
async def test_what_a_sandbox_leaves_is_another_s_only_as_new(tmp_path, left):
    script, as_new = _LEFT[left]
    runtime = EmbeddedRuntime(tmp_path / "home", run_probes=False, warm_seats=0)
    await runtime.start()
    try:
        names = []
        for _ in range(2):
            box = await runtime.create([], limits=Limits())
            names.append(box.place)
            looked = await box.run(Command(("ls", "-A", "/work"), cwd="/"))
            dated = await box.run(Command(("stat", "-c", "%Y", "/"), cwd="/"))
            assert int(dated.stdout.text) > 10
            assert looked.stdout.text == "env\nhome\nrepo\n"
            ended = await box.run(Command(("sh", "-c", script), cwd="/"))
            await box.delete()
            if ended.exit_code:
                pytest.skip(f"not to be had here: {ended.stderr.text}")
            await runtime.settle()
            assert not any((await runtime.orphans()).values())
        assert (names[0] == names[1]) is as_new
        assert list(runtime._seats.kept) == names[1:] * as_new
        limited = await runtime.create([], limits=Limits(pids=7))
        name = limited.place
        await limited.delete()
        await runtime.settle()
        assert name not in runtime._seats.kept
    finally:
        await runtime.close()
    assert os.listdir(tmp_path / "home/run") == []
    assert not any(os.path.exists(place) for place in runtime.cgroups.places)


_SEND = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.sendto(b"x", ("127.0.0.1", 9))
"""
_TALK = """
import socket
server = socket.create_server(("127.0.0.1", 8123))
with socket.create_connection(("127.0.0.1", 8123)) as client:
    other, _ = server.accept()
    client.sendall(b"x")
    other.recv(1)
    other.close()
server.close()
"""
_HIDE = """
import socket
a, b = socket.socketpair()
socket.send_fds(a, [b"x"], [b.fileno()])
socket.send_fds(b, [b"x"], [a.fileno()])
"""
_LABEL = """
import socket, struct
with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as s:
    s.setsockopt(socket.IPPROTO_IPV6, 32, socket.inet_pton(socket.AF_INET6, "::1")
                 + struct.pack("!I", 0x12345) + struct.pack("BBHHHI", 0, 1, 1, 30, 30, 0))
"""
_WAIT = """
import socket
for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
    socket.create_server((host, 8123), family=family).close()
socket.socket(socket.AF_UNIX).bind("\\0name")
"""
_NETWORKS = {"none": ("", True), "listened": (_WAIT, True), "sent": (_SEND, False)}
_NETWORKS |= {
    "labelled flows": (_LABEL, False),
    "talked": (_TALK, False),
    "hid sockets in flight": (_HIDE, None),
}


@pytest.mark.skipif(os.geteuid() != 0, reason="of an ordinary user's sandboxes nothing is kept")
@pytest.mark.parametrize("used", _NETWORKS)
@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="no /usr/bin/python3 here")
async def test_a_network_is_another_s_only_if_nothing_was_sent_and_no_socket_is_left(
    tmp_path, used
):
    script, as_new = _NETWORKS[used]
    own = os.stat("/proc/self/ns/net").st_ino
    runtime = EmbeddedRuntime(tmp_path / "home", run_probes=False, warm_seats=0)
    await runtime.start()
    networks, names, found = [], [], set()
    try:
        for _ in range(3):
            box = await runtime.create([], limits=Limits())
            names.append(box.place)
            sockets = await box.run(
                Command(("cat", "/proc/net/sockstat", "/proc/net/dev"), cwd="/")
            )
            found.add(sockets.stdout.text)
            argv = (
                "/usr/bin/python3",
                "-c",
                f"import os\nprint(os.stat('/proc/self/ns/net').st_ino)\n{script}",
            )
            ended = await box.run(Command(argv, cwd="/"))
            assert ended.ok, ended.stderr.text
            networks.append(int(ended.stdout.text))
            await box.delete()
            await runtime.settle()
    finally:
        await runtime.close()
    assert len(set(names)) == 1
    assert own not in networks
    assert len(found) == 1
    assert "lo: " in found.pop()
    if as_new is not None:  # the kernel collects what is in flight whenever it comes to it
        assert len(set(networks)) == (1 if as_new else 3)


@pytest.mark.skipif(os.geteuid() != 0, reason="events are counted by control groups")
@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="no /usr/bin/python3 here")
async def test_a_group_in_which_something_happened_is_no_other_s(tmp_path):
    runtime = EmbeddedRuntime(tmp_path / "home", run_probes=False, warm_seats=0)
    await runtime.start()
    try:
        box = await runtime.create([], limits=Limits())
        name = box.place
        ended = await box.run(Command(("/usr/bin/python3", "-c", _FORKS), cwd="/"))
        assert EndReason.PIDS in ended.limits_hit
        await box.delete()
        await runtime.settle()
        assert name not in runtime._seats.kept
        assert name not in runtime.cgroups.members()
    finally:
        await runtime.close()


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

"""E: what a sandbox leaves when it is deleted is another's only as new."""

import os
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import pytest

from sandbox_svc.backends.base import Command, EndReason, Limits
from sandbox_svc.backends.embedded import EmbeddedRuntime
from tests.contract.abuse.walls import IS_ROOT, needs_python, weakened
from tests.contract.runtimes import sh

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


@asynccontextmanager
async def running(home) -> AsyncIterator[EmbeddedRuntime]:
    """A runtime that makes no sandbox ahead, so that each takes what the one before has left."""
    runtime = EmbeddedRuntime(home, run_probes=False, warm_seats=0)
    await runtime.start()
    try:
        yield runtime
    finally:
        await runtime.close()
    assert os.listdir(home / "run") == []
    assert not any(os.path.exists(place) for place in runtime.cgroups.places)


async def gone(runtime, box) -> str:
    """Delete a sandbox, and wait until what it had is gone or kept; the name of that."""
    name = box.place
    await box.delete()
    await runtime.settle()
    assert not any((await runtime.orphans()).values())
    return name


@pytest.mark.parametrize("left", _LEFT)
async def test_e1_what_a_sandbox_leaves_is_another_s_only_as_new(tmp_path, left):
    script, as_new = _LEFT[left]
    async with running(tmp_path / "home") as runtime:
        names = []
        for _ in range(2):
            box = await runtime.create([], limits=Limits())
            assert (await sh(box, "ls -A /work")).stdout.text == "env\nhome\nrepo\n"
            assert int((await sh(box, "stat -c %Y /")).stdout.text) > 10
            ended = await sh(box, script)
            names.append(await gone(runtime, box))
            if ended.exit_code:
                pytest.skip(f"not to be had here: {ended.stderr.text}")
        assert (names[0] == names[1]) is as_new
        assert list(runtime._seats.kept) == names[1:] * as_new
        limited = await runtime.create([], limits=Limits(pids=7))
        assert await gone(runtime, limited) not in runtime._seats.kept


_SEND = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.sendto(b"x", ("127.0.0.1", 9))
"""
_TRY = """
import socket
for family, host in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        try:
            s.sendto(b"x", (host, 9))
        except OSError as error:
            assert error.errno == 101, error  # no route: it is counted all the same
        else:
            raise SystemExit("there is a route")
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
    "tried to send": (_TRY, False),
    "talked": (_TALK, False),
    "hid sockets in flight": (_HIDE, None),
}


def _shown(script: str) -> Command:
    """A command that tells its network, and then does something in it."""
    told = f"import os\nprint(os.stat('/proc/self/ns/net').st_ino)\n{script}"
    return Command(("/usr/bin/python3", "-c", told), cwd="/")


@needs_python
@pytest.mark.parametrize("used", _NETWORKS)
async def test_e1_a_network_is_another_s_only_if_nothing_was_sent_in_it(tmp_path, used):
    script, as_new = _NETWORKS[used]
    own = os.stat("/proc/self/ns/net").st_ino
    networks, names, found, held = [], set(), set(), ExitStack()
    async with running(tmp_path / "home") as runtime:
        for _ in range(3):
            box = await runtime.create([], limits=Limits())
            held.callback(os.close, os.dup(box._network))  # else another may get its number
            found.add(
                (
                    # what TCP and UDP hold in memory is counted for the whole host
                    await sh(
                        box,
                        "cat /proc/net/sockstat /proc/net/dev /proc/net/snmp /proc/net/snmp6"
                        " | sed -E 's/ (alloc|mem) [0-9]+//g'",
                    )
                ).stdout.text
            )
            ended = await box.run(_shown(script))
            assert ended.ok, ended.stderr.text
            networks.append(int(ended.stdout.text))
            names.add(await gone(runtime, box))
    held.close()
    assert len(names) == 1
    assert own not in networks
    assert len(found) == 1
    assert "lo: " in found.pop()
    if as_new is not None:  # the kernel collects what is in flight whenever it comes to it
        assert len(set(networks)) == (1 if as_new else 3)


@needs_python
@pytest.mark.skipif(not IS_ROOT, reason="events are counted by control groups")
async def test_e1_a_group_in_which_something_happened_is_no_other_s(tmp_path):
    async with running(tmp_path / "home") as runtime:
        box = await runtime.create([], limits=Limits())
        ended = await box.run(Command(("/usr/bin/python3", "-c", _FORKS), cwd="/"))
        assert EndReason.PIDS in ended.limits_hit
        name = await gone(runtime, box)
        assert name not in runtime._seats.kept
        assert name not in runtime.cgroups.members()


@needs_python
async def test_e1_without_a_look_what_was_left_is_seen(tmp_path):
    async with weakened(tmp_path / "home", "WITHOUT_A_LOOK") as runtime:
        seen = []
        for _ in range(2):
            box = await runtime.create([], limits=Limits())
            sockets = (await sh(box, "ls /work; cat /proc/net/dev")).stdout.text
            network = int((await box.run(_shown(_SEND))).stdout.text)
            await sh(box, "echo secret > /work/left")
            seen.append((await gone(runtime, box), network, "left" in sockets))
    assert seen[0][:2] == seen[1][:2]
    assert [left for *_, left in seen] == [False, True]


async def test_e1_what_is_put_away_while_the_service_ends_goes(tmp_path):
    """The answer of the spawner, which keeps it, may come when nobody takes it any more."""
    for _ in range(5):
        async with running(tmp_path / "home") as runtime:
            boxes = [await runtime.create([], limits=Limits()) for _ in range(4)]
            for box in boxes:
                await box.delete()

"""E: locks on, and watches of, files that every sandbox and the host have: programs and devices.

- Programs are on inodes that are not the host's, and that all sandboxes share; devices, where root
  made nodes, on those of each sandbox.
"""

import asyncio
import contextlib
import fcntl
import os
import stat
from collections.abc import AsyncIterator

import pytest

from sandbox_svc.backends import probe
from sandbox_svc.backends.base import Command
from tests.contract.abuse.walls import needs_python, python
from tests.contract.runtimes import SMALL, sh

pytestmark = [pytest.mark.asyncio(loop_scope="module"), needs_python]
PROGRAMS, DEVICES = ("/usr/bin/env", "/usr/bin", "/usr"), ("/dev/null", "/dev/zero")
_HOLD = """
import fcntl, os, sys, time
held = [os.open(path, os.O_RDONLY) for path in sys.argv[1:]]
for fd in held:
    fcntl.flock(fd, fcntl.LOCK_EX)
print("up", flush=True)
time.sleep(60)
"""
_TRY = """
import fcntl, os, sys
for path in sys.argv[1:]:
    try:
        fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(path)
"""
_WATCH = """
import ctypes, os, select, struct, sys, time
call = ctypes.CDLL(None, use_errno=True)
fd = call.inotify_init1(0)
watched = {call.inotify_add_watch(fd, path.encode(), 0x20): path for path in sys.argv[1:]}
assert min(watched) > 0, os.strerror(ctypes.get_errno())
print("up", flush=True)
seen, done = set(), False
while not done:
    data, at = os.read(fd, 65536), 0
    while at < len(data):
        number, _, _, size = struct.unpack_from("iIII", data, at)
        name = data[at + 16 : at + 16 + size].rstrip(b"\\0").decode()
        at += 16 + size
        done = done or name == "end"
        seen.add(f"{watched[number]} {name}".strip())
print(*sorted(seen - {"/tmp end"}), sep="\\n")
"""


@contextlib.asynccontextmanager
async def _up(box, script: str, *paths: str) -> AsyncIterator["asyncio.Task"]:
    """A script that runs in a box and has said that it is up."""
    up = asyncio.Event()

    async def hear(_stream: str, _data: bytes) -> None:
        up.set()

    command = Command(("/usr/bin/python3", "-c", script, *paths), cwd="/")
    running = asyncio.create_task(box.run(command, hear))
    waiting = asyncio.create_task(up.wait())
    await asyncio.wait((running, waiting), return_when=asyncio.FIRST_COMPLETED)
    assert up.is_set(), running.result().stderr.text
    try:
        yield running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _locked(runtime, paths: tuple[str, ...]) -> tuple[set[str], set[str]]:
    """What another sandbox, and what the host, cannot lock of what one sandbox has locked."""
    one, other = [await runtime.create([], limits=SMALL) for _ in range(2)]
    try:
        async with _up(one, _HOLD, *paths):
            mine = (await python(one, _TRY, *paths)).stdout.text.split()
            assert mine == list(paths)  # the locks are held
            tried = await python(other, _TRY, *paths)
            assert tried.ok, tried.stderr.text
            host = set()
            for path in paths:
                fd = os.open(path, os.O_RDONLY)
                try:
                    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    host.add(path)
                finally:
                    os.close(fd)
        return set(tried.stdout.text.split()), host
    finally:
        await one.delete()
        await other.delete()


async def _watched(runtime, paths: tuple[str, ...], by_others: bool = True) -> set[str]:
    """What one sandbox sees by inotify of what another, if wanted, and the host open."""
    one, other = [await runtime.create([], limits=SMALL) for _ in range(2)]
    try:
        async with _up(one, _WATCH, "/tmp", *paths) as watching:
            opening = "; ".join(f"head -c 1 {path} > /dev/full 2>&1" for path in paths)
            if by_others:
                await sh(other, f"{opening}; exec /usr/bin/env true")
            for path in paths:
                os.close(os.open(path, os.O_RDONLY))
            await one.write_file("/tmp/end", b"")  # without a program of its own
            ended = await watching
        assert ended.ok, ended.stderr.text
        return set(ended.stdout.text.split("\n")) - {"up", ""}
    finally:
        await one.delete()
        await other.delete()


def _needs_nodes(place) -> None:
    """Skip where a service could make no device nodes: only root can, and not everywhere."""
    try:
        os.mknod(place / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.close(os.open(place / "null", os.O_RDWR))
    except OSError as error:
        pytest.skip(f"no device nodes can be made here: {error}")


async def test_e1_a_lock_on_a_program_is_not_the_hosts(runtime):
    others, host = await _locked(runtime, PROGRAMS)
    assert host == set()
    assert others <= set(PROGRAMS)  # sandboxes may share them, as the docs say


async def test_e1_a_lock_on_a_device_is_no_other_sandboxes_nor_the_hosts(runtime, tmp_path):
    _needs_nodes(tmp_path)
    assert await _locked(runtime, DEVICES) == (set(), set())
    masked = [path for path in ("/proc/keys", "/proc/kmsg") if os.path.exists(path)]
    for path in masked:  # a device lies over it
        assert await _locked(runtime, (path,)) == (set(), set())


async def test_e1_nobody_sees_what_others_open(runtime, tmp_path):
    assert await _watched(runtime, PROGRAMS, by_others=False) == set()
    _needs_nodes(tmp_path)
    assert await _watched(runtime, DEVICES) == set()


async def test_e1_what_is_opened_in_a_sandbox_itself_is_seen_there(runtime, box):
    async with _up(box, _WATCH, "/tmp", "/usr/bin/env") as watching:
        await sh(box, "/usr/bin/env true; : > /tmp/end")
        ended = await watching
    assert "/usr/bin/env" in ended.stdout.text.split("\n")


async def test_e1_on_files_of_the_host_locks_and_opens_are_seen(sharing):
    for paths in (PROGRAMS, DEVICES):
        assert await _locked(sharing, paths) == (set(paths), set(paths))
        seen = await _watched(sharing, paths)
        assert {paths[0], paths[1]} <= {line.split()[0] for line in seen}, seen
    boxes = [await sharing.create([], limits=SMALL) for _ in range(2)]
    assert [c.proven for c in await probe._own_files(*boxes)] == [False, False]
    for made in boxes:
        await made.delete()


async def test_e1_files_of_its_own_are_told_as_proven(runtime, box, tmp_path):
    other = await runtime.create([], limits=SMALL)
    programs, devices = await probe._own_files(box, other)
    await other.delete()
    assert programs.proven, programs.detail
    _needs_nodes(tmp_path)
    assert devices.proven, devices.detail


async def test_e1_files_of_programs_are_whole_and_stay_as_they_are(runtime, box):
    script = "cd /usr; touch x bin/x; rm bin/env; ln bin/env /tmp/env; echo x >> bin/env; ls -A bin"
    done = await sh(box, script)
    assert set(done.stdout.text.split()) == set(os.listdir("/usr/bin"))
    assert done.stderr.text.count("Read-only file system") >= 4
    compared = await sh(box, "sha256sum /usr/bin/env")
    outside = await asyncio.to_thread(os.popen, "sha256sum /usr/bin/env")
    assert compared.stdout.text == outside.read()

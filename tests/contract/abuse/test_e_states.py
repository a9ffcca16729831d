"""E: attacks across states: parents, children, siblings, snapshots, deaths.

Runs that differ (E4) are in tests/integration/sandbox/test_actions.py, deaths of the service in
the middle of a snapshot (E3) also in tests/integration/sandbox/test_crash.py.
"""

import asyncio
import json
import os
import signal
import time
import uuid
from pathlib import Path

import pytest
import pytest_asyncio

from regreen.rpc.errors import InvalidArgument, NotFound
from sandbox_svc.backends.base import Command, Limits, Mount
from sandbox_svc.builders.base import Prepared
from sandbox_svc.pool import PoolLimits
from sandbox_svc.sandboxes import Manager
from sandbox_svc.states import StateStore
from tests.contract.abuse.walls import (
    killed_when_up,
    needs_python,
    pause,
    python,
    running,
    until_running,
)
from tests.contract.runtimes import SMALL, sh, started

pytestmark = pytest.mark.asyncio(loop_scope="module")

_MAKE = """
import os
os.chdir("{0}")
for name in "kept", "gone", "tagged", "moved": open(name, "w").write("p")
os.mkdir("d"); open("d/in", "w").write("p")
os.link("kept", "hard"); os.symlink("kept", "soft")
os.chmod("kept", 0o600); os.setxattr("tagged", "user.mark", b"p")
for name in "kept", "d": os.utime(name, (1000, 1000))
"""
_CHANGE = """
import os, shutil
os.chdir("{0}")
os.utime("kept", (5, 5)); open("hard", "a").write("c"); os.chmod("kept", 0o777)
os.unlink("gone"); shutil.rmtree("d"); os.mkdir("d"); open("d/new", "w").write("c")
os.setxattr("tagged", "user.mark", b"c"); os.setxattr("tagged", "user.more", b"c")
os.unlink("soft"); os.symlink("gone", "soft"); os.rename("moved", "there"); open("new", "w").close()
"""
_SHOW = """
import json, os
os.chdir("{0}")
found = []
for top, folders, files in os.walk("."):
    folders.sort()
    for name in sorted(files):
        path = os.path.join(top, name)
        info = os.lstat(path)
        link = os.path.islink(path)
        text = os.readlink(path) if link else open(path).read()
        names = [] if link else sorted(os.listxattr(path))
        marks = [(n, os.getxattr(path, n).hex()) for n in names]
        when = 0 if link else info.st_mtime
        found.append([path, info.st_mode, text, marks, when if path == "./kept" else 0])
    found.append([top, os.lstat(top).st_mode, os.stat(top).st_mtime if top == "./d" else 0])
print(json.dumps(found))
"""


async def shown(box, where: str) -> list:
    done = await python(box, _SHOW.format(where))
    assert done.ok, done.stderr.text
    return json.loads(done.stdout.text)


@needs_python
async def test_e1_nothing_of_a_child_is_seen_by_parent_or_sibling(runtime, box):
    assert (await python(box, _MAKE.format("/work/repo"))).ok
    layer = await box.freeze()
    one, two = [await runtime.create([layer], limits=SMALL) for _ in range(2)]
    before = await shown(box, "/work/repo")
    changed = await python(one, _CHANGE.format("/work/repo"))
    assert changed.ok, changed.stderr.text
    assert await shown(one, "/work/repo") != before
    for other in (two, box):
        assert await shown(other, "/work/repo") == before
    later = await runtime.create([layer], limits=SMALL)
    assert await shown(later, "/work/repo") == before
    for made in (one, two, later):
        await made.delete()


@needs_python
async def test_e1_over_one_shared_directory_everything_is_seen(runtime, common):
    shared = [Mount(common, "/work/shared", read_only=False)]
    one, two = [await runtime.create([], limits=SMALL, mounts=shared) for _ in range(2)]
    made = await python(one, _MAKE.format("/work/shared"))
    assert made.ok, made.stderr.text
    before = await shown(two, "/work/shared")
    assert (await python(one, _CHANGE.format("/work/shared"))).ok
    after = await shown(two, "/work/shared")
    assert after != before
    assert after == await shown(one, "/work/shared")
    await sh(one, "cd /work/shared; chmod -R u+rwX .; rm -rf * ")
    for box in (one, two):
        await box.delete()


@pytest_asyncio.fixture(loop_scope="module")
async def parts(tmp_path):
    async with started("embedded", tmp_path / "home") as runtime:
        states = StateStore(tmp_path / "home", runtime)
        await states.open()
        manager = Manager(runtime, states, pool=PoolLimits(max_sandboxes=8))

        async def build(progress) -> Prepared:
            box = await runtime.create([], limits=Limits())
            await box.write_file("/work/repo/a", b"0")
            await box.write_file("/work/repo/b", b"0")
            layer = await box.freeze()
            await box.delete()
            return Prepared((layer,), (), {}, {})

        yield manager, states, await states.prepare("0" * 64, build)
        await manager.close()
        await states.close()


_COUNT = (
    "cd /work/repo; n=0; while :; do n=$((n+1));"
    " echo $n > t; mv t a; echo $n > t; mv t b; done >/dev/null 2>&1"
)


async def _pair(box) -> tuple[int, int]:
    a, b = [await box.read_file(f"/work/repo/{name}", 20) for name in "ab"]
    return int(a), int(b)


async def test_e2_a_snapshot_of_a_busy_sandbox_is_of_one_moment(parts):
    manager, _, base = parts
    sandbox = await manager.create(base.id)
    for _ in range(6):
        writer = asyncio.create_task(sh(sandbox.box, _COUNT))
        async with asyncio.timeout(10):
            while (await _pair(sandbox.box))[1] < 5:
                await pause()
        state = await manager.snapshot(sandbox.id)
        await writer
        async with manager.fresh(state.id) as fresh:
            a, b = await _pair(fresh)
        assert a in (b, b + 1), "a was written first, then b"
        await sh(sandbox.box, "cd /work/repo; echo 0 > a; echo 0 > b")


async def test_e2_a_copy_of_a_busy_sandbox_is_of_no_moment(parts):
    manager, _, base = parts
    sandbox = await manager.create(base.id)
    writer = asyncio.create_task(sh(sandbox.box, _COUNT))
    top = Path(sandbox.box.upper_path) / "work/repo"
    async with asyncio.timeout(10):
        while (await _pair(sandbox.box))[1] < 5:
            await pause()
        a = int((top / "a").read_text())  # a copy comes to one file after the other
        while (await _pair(sandbox.box))[1] < a + 5:
            await pause()
    assert int((top / "b").read_text()) > a + 1
    await manager.delete(sandbox.id)
    await writer


async def test_e2_a_second_snapshot_holds_the_same_and_what_is_gone_is_not_found(parts):
    manager, states, base = parts
    sandbox = await manager.create(base.id)
    await sh(sandbox.box, "echo 7 > /work/repo/a")
    one, two = await manager.snapshot(sandbox.id), await manager.snapshot(sandbox.id)
    for state in (one, two):
        async with manager.fresh(state.id) as fresh:
            assert await _pair(fresh) == (7, 0)
    forked, (fork,) = await manager.fork(sandbox.id, 1)
    assert await _pair(fork.box) == (7, 0)
    for made in (sandbox, fork):
        await manager.delete(made.id)
        with pytest.raises(NotFound):
            await manager.fork(made.id, 1)
    assert (await manager.create(forked.id)).id  # while the state is there
    gone = one.id
    await manager.delete_state(gone)
    with pytest.raises(NotFound):
        await manager.create(gone)
    with pytest.raises((NotFound, InvalidArgument)):
        states.get(gone)


_PARENT = """
import subprocess, sys, time
subprocess.Popen(["sleep", sys.argv[1]])
print("up", flush=True)
time.sleep(60)
"""
_OWNER = """
import asyncio, sys
from pathlib import Path
from sandbox_svc.backends.base import Command, Limits
from sandbox_svc.backends.embedded import EmbeddedRuntime
async def main():
    runtime = EmbeddedRuntime(Path(sys.argv[2]), run_probes=False, warm_seats=0)
    await runtime.start()
    box = await runtime.create([], limits=Limits())
    script = f"(setsid nohup sleep {sys.argv[1]} >/dev/null 2>&1 &)"
    script += "; until grep -q ^sleep /proc/[0-9]*/comm; do :; done"
    await box.run(Command(("/bin/sh", "-c", script), cwd="/"))
    print("up", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.mark.parametrize("owner", [_PARENT, _OWNER], ids=["plain", "service"])
async def test_e3_a_killed_service_leaves_no_process_and_a_plain_parent_does(tmp_path, owner):
    number = f"{uuid.uuid4().int % 10**6 + 1000}.{uuid.uuid4().int % 10**6:06}"
    await asyncio.to_thread(killed_when_up, owner, number, str(tmp_path / "home"))
    if owner is _PARENT:
        for pid in until_running(f"sleep {number}"):
            os.kill(pid, signal.SIGKILL)
        return
    until = time.monotonic() + 10
    while running(f"sleep {number}"):
        assert time.monotonic() < until
        await pause()


_TORN = """
import json, sys, time
record = json.dumps({"id": "st_" + "1" * 32, "layers": ["0" * 12], "size": 7})
with open(sys.argv[1], "w") as target:  # in place, not beside it and then renamed
    target.write(record[:30])
    target.flush()
    print("up", flush=True)
    time.sleep(60)
"""


async def test_e3_a_record_written_in_place_is_torn_by_a_kill_and_then_absent(tmp_path):
    async with started("embedded", tmp_path / "home") as runtime:
        states = StateStore(tmp_path / "home", runtime)
        await states.open()
        await states.close()
        record = tmp_path / "home/states" / ("st_" + "1" * 32)
        assert record.parent.is_dir()
        for name in (record, record.with_suffix(".json")):
            await asyncio.to_thread(killed_when_up, _TORN, str(name))
            with pytest.raises(ValueError, match=r"Unterminated|Expecting|delimiter"):
                json.loads(name.read_text())
        states = StateStore(tmp_path / "home", runtime)
        await states.open()
        assert states.list() == []
        await states.close()


async def test_e_requests_too_large_for_one_message_are_refused_and_harm_nothing(box):
    huge = "x" * (33 << 20)
    for command in (Command(("true", huge), cwd="/"), Command(("true",), cwd="/", env={"A": huge})):
        with pytest.raises(InvalidArgument, match="argv"):
            await box.run(command)
    with pytest.raises(InvalidArgument, match="path"):
        await box.read_file("/" + huge, 10)
    assert (await sh(box, "echo fine")).stdout.text == "fine\n"

"""A: attacks on memory, processes, cores, disk and output, and what outlives its command."""

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from regreen.rpc.errors import DiskFull, ResourceExhausted
from sandbox_svc.backends import uppers
from sandbox_svc.backends.base import EndReason, ExecResult, Limits
from tests.contract.abuse.walls import (
    WIDE,
    needs_python,
    pause,
    plain,
    python,
    running,
    until_running,
)
from tests.contract.runtimes import SMALL, sh

pytestmark = pytest.mark.asyncio(loop_scope="module")

_FORKS = "for i in $(seq 100); do sleep 2 & done; echo all"
_BOMB = "f() { f | f & }; f; sleep 20"
_HEAP = "x = bytearray(300 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1\nprint('all')"
_SHM = "head -c 100000000 /dev/zero > {}/x && echo all"
_SYSTEM_V = """
import ctypes
libc, made = ctypes.CDLL(None), 0
libc.shmget.argtypes = (ctypes.c_int, ctypes.c_size_t, ctypes.c_int)
while made < 2000 and {call} >= 0:
    made += 1
print(made * {each})
"""
_SEGMENTS = _SYSTEM_V.format(call="libc.shmget(0, 1 << 20, 0o1600)", each=1 << 20)
_QUEUES = _SYSTEM_V.format(call="libc.msgget(0, 0o1600)", each=1)
_SEMAPHORES = _SYSTEM_V.format(call="libc.semget(0, 1, 0o1600)", each=1)
_ANONYMOUS = """
import os
for number in range(300):
    if number % 32 == 0: fd = os.memfd_create('x')
    os.write(fd, bytes(1 << 20))
print('all')
"""
_SPIN = """
import os, time
end = time.monotonic() + 1.2
for _ in range(4):
    if os.fork() == 0:
        while time.monotonic() < end: pass
        os._exit(0)
for _ in range(4): os.wait()
"""
_FORKING = """
import os
while True:
    try: os.fork()
    except OSError: pass
"""
_MILLION = "for n in range(1000000): open(f'/work/{n}', 'x').close()"


async def test_a1_fork_bomb_ends_at_the_limit_and_the_service_stays_quick(runtime, box):
    other = await runtime.create([], limits=SMALL)
    bomb = asyncio.create_task(sh(box, _BOMB, timeout_s=3))
    began = time.monotonic()
    assert (await sh(other, "echo fine")).stdout.text == "fine\n"
    assert time.monotonic() - began < 3.0
    await bomb
    await box.delete()
    limited = await runtime.create([], limits=SMALL)
    full = await sh(limited, _FORKS)
    assert "all" not in full.stdout.text
    if runtime.cgroups.name != "rlimit":
        assert full.reason is EndReason.PIDS


async def test_a1_without_the_limit_the_same_forks_go_through(runtime):
    wide = await runtime.create([], limits=WIDE)
    assert (await sh(wide, _FORKS)).stdout.text == "all\n"
    assert (await wide.usage())["processes"] >= 100
    await wide.delete()


@needs_python
async def test_a1_a_sandbox_that_forks_is_gone_at_once(runtime):
    for _ in range(12):  # a busy host may be late, but not every time
        box = await runtime.create([], limits=SMALL)
        bomb = asyncio.create_task(python(box, _FORKING))
        async with asyncio.timeout(10):
            while (await box.usage())["processes"] < SMALL.pids // 2:
                await pause()
        began = time.monotonic()
        await box.delete()
        took_s = time.monotonic() - began
        assert (await bomb).reason is EndReason.SIGNAL
        assert took_s < 5.0
        if took_s < 0.1:
            break
    assert took_s < 0.1


@needs_python
async def test_a2_memory_bombs_end_alone(runtime, box):
    other = await runtime.create([], limits=SMALL)
    heap = await python(box, _HEAP)
    assert not heap.ok
    shm = await sh(box, "head -c 1000000000 /dev/zero > /dev/shm/x; stat -c %s /dev/shm/x")
    assert int(shm.stdout.text or 0) <= SMALL.memory_bytes
    assert (await sh(other, "echo fine")).stdout.text == "fine\n"
    if runtime.cgroups.name != "rlimit":
        assert heap.reason is EndReason.OOM


@pytest.mark.parametrize("place", ["/dev/shm", "/tmp"])
async def test_a2_memory_file_systems_are_bounded(runtime, box, place):
    full = await sh(box, _SHM.format(place))
    assert "all" not in full.stdout.text
    wide = await runtime.create([], limits=WIDE)
    assert (await sh(wide, _SHM.format(place))).stdout.text == "all\n"
    await wide.delete()


@needs_python
async def test_a2_shared_memory_that_outlives_its_processes_is_bounded(runtime, box):
    """Segments, message queues and semaphores of System V stay until somebody removes them."""
    wide = await runtime.create([], limits=WIDE)
    held = [int((await python(b, _SEGMENTS)).stdout.text) for b in (box, box, wide)]
    assert held[0] + held[1] <= SMALL.memory_bytes // 4
    assert held[2] > SMALL.memory_bytes
    assert (await sh(box, "wc -l < /proc/sysvipc/shm")).stdout.text.strip() != "1"
    for script in (_QUEUES, _SEMAPHORES):
        assert int((await python(box, script)).stdout.text) <= 1000
    await wide.delete()


@needs_python
async def test_a2_without_the_limit_the_same_memory_is_had(runtime):
    wide = await runtime.create([], limits=WIDE)
    for script in (_HEAP, _ANONYMOUS):
        assert (await python(wide, script)).stdout.text == "all\n"
    await wide.delete()


@needs_python
async def test_a2_anonymous_files_count_as_memory(runtime, box):
    if runtime.cgroups.name == "rlimit":
        pytest.skip("without cgroups an anonymous file is bounded by nothing, and is reported so")
    result = await python(box, _ANONYMOUS)
    assert result.reason is EndReason.OOM
    assert result.stdout.text == ""


@pytest.mark.parametrize(
    "script",
    [
        "cd /work; for i in $(seq 99); do head -c 8000000 /dev/zero > f$i; done; sleep 30",
        "cd /work; i=0; while :; do i=$((i+1)); : > f$i; done",
        "cd /work; exec 5> f; rm f; for i in $(seq 7); do head -c 8000000 /dev/zero >&5; done;"
        " exec 6> g; rm g; for i in $(seq 7); do head -c 8000000 /dev/zero >&6; done; sleep 30",
        "cd /work; n=$(printf %0250d 0); for i in $(seq 20); do mkdir $n; cd $n; done;"
        " for i in $(seq 12); do head -c 8000000 /dev/zero > f$i; done; sleep 30",
    ],
    ids=["bytes", "inodes", "unlinked", "hidden by depth"],
)
async def test_a3_disk_is_bounded(box, script):
    result = await sh(box, script, timeout_s=40)
    assert result.reason is EndReason.DISK


@needs_python
async def test_a3_a_million_empty_files_stop_at_the_limit_and_go_with_the_sandbox(runtime):
    await runtime.settle()
    before = await runtime.blocking(uppers.usage, runtime.layout.home)
    box = await runtime.create([], limits=replace(SMALL, inodes=2000))
    assert (await python(box, _MILLION, timeout_s=60)).reason is EndReason.DISK
    made = (await box.measure()).inodes
    assert 2000 < made < 500_000
    wide = await runtime.create([], limits=WIDE)
    few = _MILLION.replace("1000000", "4000")
    assert (await python(wide, few + "\nimport time; time.sleep(1)")).ok  # no limit, no end
    for one in (box, wide):
        await one.delete()
    await runtime.settle()
    after = await runtime.blocking(uppers.usage, runtime.layout.home)
    assert (after.inodes, after.size_bytes) == (before.inodes, before.size_bytes)


async def test_a3_a_sparse_file_is_bounded_by_what_it_claims(runtime, box):
    result = await sh(box, "truncate -s 10G /work/holes; stat -c %s /work/holes")
    assert int(result.stdout.text or 0) <= SMALL.disk_bytes
    wide = await runtime.create([], limits=replace(WIDE, disk_bytes=20 << 30))
    result = await sh(wide, "truncate -s 10G /work/holes; stat -c %s /work/holes")
    assert result.stdout.text == f"{10 << 30}\n"
    assert (await wide.measure()).size_bytes < 1 << 20  # nothing is stored
    await wide.delete()


async def test_a3_without_the_limit_the_same_bytes_are_written(runtime):
    wide = await runtime.create([], limits=WIDE)
    script = "cd /work; for i in $(seq 12); do head -c 8000000 /dev/zero > f$i; done; sleep 1"
    assert (await sh(wide, script)).ok
    assert (await wide.measure()).size_bytes > SMALL.disk_bytes
    await wide.delete()


async def test_a3_what_a_command_leaves_behind_is_bounded_too(runtime):
    box = await runtime.create([], limits=replace(SMALL, disk_bytes=10 << 20))
    # Slow, so that a busy host may be late by seconds and the bound is still one on the disk.
    writer = "for i in $(seq 64); do head -c 1000000 /dev/zero > f$i; sleep 0.2; done; sleep 300"
    left = await sh(box, f"cd /work; (setsid sh -c '{writer}' >/dev/null 2>&1 &)")
    assert left.ok
    async with asyncio.timeout(60):
        while (await box.usage())["processes"]:
            await pause()
    assert 10 << 20 < (await box.measure()).size_bytes < 40 << 20


async def test_a3_an_overrun_ends_older_processes_as_well(runtime):
    box = await runtime.create([], limits=replace(SMALL, disk_bytes=10 << 20))
    assert (await sh(box, "(setsid sleep 4321 >/dev/null 2>&1 &)")).ok
    over = await sh(
        box, "cd /work; for i in 1 2; do head -c 8000000 /dev/zero > f$i; done; sleep 9"
    )
    assert over.reason is EndReason.DISK
    async with asyncio.timeout(10):
        while (await box.usage())["processes"]:
            await pause()


async def test_a3_short_commands_add_up(runtime):
    box = await runtime.create([], limits=replace(SMALL, disk_bytes=10 << 20))
    reasons = set()
    for number in range(200):
        result = await sh(box, f"head -c 1000000 /dev/zero > /work/f{number}")
        reasons.add(result.reason)
        if result.reason is EndReason.DISK:
            break
    assert EndReason.DISK in reasons


async def test_a3_files_written_from_outside_are_refused_at_the_limit(runtime):
    tight = await runtime.create([], limits=replace(SMALL, disk_bytes=10 << 20, inodes=100))
    wide = await runtime.create([], limits=WIDE)
    for name, count, size in (("f", 20, 8 << 20), ("i", 500, 0)):
        fits = 0
        with contextlib.suppress(ResourceExhausted):
            for number in range(count):
                await tight.write_file(f"/work/{name}{number}", bytes(size))
                fits += 1
        assert 0 < fits < count
        with pytest.raises(ResourceExhausted, match=r"limits\.(disk_bytes|inodes)"):
            await tight.write_file(f"/work/{name}{fits}", bytes(size))
        for number in range(count):
            await wide.write_file(f"/work/{name}{number}", bytes(size))
    used, more = await tight.measure(), await wide.measure()
    assert used.size_bytes <= 10 << 20 < more.size_bytes
    assert used.inodes <= 100 < more.inodes
    assert (await sh(tight, "sleep 1.5")).ok
    for one in (tight, wide):
        await one.delete()


async def test_a3_a_full_file_system_is_told_as_such(box):
    await sh(box, "head -c 1000000000 /dev/zero > /tmp/fill; true")
    with pytest.raises(DiskFull):
        await box.write_file("/tmp/more", b"x" * (1 << 20))


async def test_a3_one_file_cannot_pass_the_limit(box):
    await sh(box, "head -c 200000000 /dev/zero > /work/big")
    _, info = await box.read_range("/work/big", max_bytes=0)  # what watches the sum ends commands
    assert 0 < info.size_bytes <= SMALL.disk_bytes


@needs_python
async def test_a4_cores_are_bounded_and_without_the_limit_they_are_not(runtime):
    if runtime.cgroups.name == "rlimit":
        pytest.skip("without cgroups cores are bounded by nothing, and that is reported")
    tight = await runtime.create([], limits=replace(SMALL, cpus=0.25))
    wide = await runtime.create([], limits=WIDE)
    slow, quick = await python(tight, _SPIN), await python(wide, _SPIN)
    assert tight.throttled() > 0
    assert slow.cpu_s < 0.25 * slow.wall_s * 1.3 + 0.1
    assert wide.throttled() == 0
    assert quick.cpu_s > slow.cpu_s
    for one in (tight, wide):
        await one.delete()


async def test_a4_spinning_ends_at_the_wall_time(box):
    script = "for i in 1 2 3 4; do (while :; do :; done) & done; wait"
    for _ in range(8):  # a busy host may be late, but not every time
        result = await sh(box, script, timeout_s=0.8)
        assert result.reason is EndReason.TIMEOUT
        assert 0.8 <= result.wall_s < 4.0
        if result.wall_s <= 0.88:
            break
    assert result.wall_s <= 0.88


@needs_python
async def test_a4_without_the_time_limit_it_spins_on(box):
    spin = "import time; end = time.monotonic() + 0.8\nwhile time.monotonic() < end: pass"
    assert (await python(box, spin, timeout_s=0.3)).reason is EndReason.TIMEOUT
    assert (await python(box, spin, timeout_s=30)).ok


async def test_a5_a_flood_is_stopped_and_bad_bytes_survive(runtime):
    box = await runtime.create([], limits=Limits(output_bytes=4 << 20))
    result = await sh(box, "yes", output_bytes=1000, timeout_s=30)
    assert result.reason is EndReason.OUTPUT
    odd = await sh(box, r"printf '\377\000\303'")
    assert odd.stdout.head == b"\xff\x00\xc3"


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def _peak_bytes(work) -> tuple[ExecResult, int]:
    """The result of a run, and the most memory that this process had meanwhile."""
    task, peak = asyncio.create_task(work), _resident_bytes()
    while not task.done():
        await asyncio.wait([task], timeout=0.02)
        peak = max(peak, _resident_bytes())
    return task.result(), peak


async def test_a5_a_line_of_a_gigabyte_leaves_memory_flat_and_a_wider_cap_does_not(runtime):
    tight = await runtime.create([], limits=Limits(output_bytes=48 << 20))
    wide = await runtime.create([], limits=WIDE)
    ctypes.CDLL(None).malloc_trim(0)  # what other tests freed would hide what this one takes
    before = _resident_bytes()
    line = "head -c 1000000000 /dev/zero"
    result, peak = await _peak_bytes(sh(tight, line, output_bytes=1 << 20))
    assert result.reason is EndReason.OUTPUT
    assert result.stdout.truncated
    assert result.stdout.total_bytes < 96 << 20
    assert len(result.stdout.head) + len(result.stdout.tail) == 1 << 20
    assert peak - before < 24 << 20
    shorter = line.replace("1000000000", "60000000")
    result, peak = await _peak_bytes(sh(wide, shorter, output_bytes=1 << 20))
    assert (result.ok, result.stdout.total_bytes) == (True, 60_000_000)
    assert peak - before < 24 << 20
    kept, peak = await _peak_bytes(sh(wide, shorter, output_bytes=60_000_000))
    assert not kept.stdout.truncated
    assert peak - before > 48 << 20
    for one in (tight, wide):
        await one.delete()


async def test_a6_a_daemon_that_holds_the_output_does_not_hold_the_call(box):
    script = "echo begun; (setsid sleep 3 &) ; exit 0"
    began = time.monotonic()
    assert (await sh(box, script)).stdout.text == "begun\n"
    assert time.monotonic() - began < 2.0
    with pytest.raises(subprocess.TimeoutExpired):  # who waits for the end of the pipe waits on
        plain(["/bin/sh", "-c", script], timeout=1.0)


_LEFT = {
    "setsid": "(setsid {} >/dev/null 2>&1 &)",
    "nohup": "nohup {} >/dev/null 2>&1 &",
    "double fork": "( ( {} >/dev/null 2>&1 & ) & )",
}


@pytest.mark.parametrize("name", _LEFT)
async def test_a7_leftovers_end_with_freeze_and_delete(runtime, name):
    number = f"{uuid.uuid4().int % 10**6 + 1000}.{uuid.uuid4().int % 10**6:06}"
    script = _LEFT[name].format(f"sleep {number}")
    for end in ("freeze", "delete"):
        box = await runtime.create([], limits=SMALL)
        assert (await sh(box, script)).ok
        until_running(number)
        await getattr(box, end)()
        assert running(number) == []
        await box.delete()
    left = plain(["/bin/sh", "-c", script])  # a plain process leaves it behind
    assert left.returncode == 0
    for pid in until_running(f"sleep {number}"):
        os.kill(pid, signal.SIGKILL)


async def test_a7_what_a_frozen_sandbox_left_does_not_come_back(box):
    await sh(box, "(setsid nohup sleep 1000 >/dev/null 2>&1 &)")
    await sh(box, "until grep -q sleep /proc/[0-9]*/comm; do :; done", timeout_s=20)
    await box.freeze()
    assert "sleep" not in (await sh(box, "cat /proc/[0-9]*/comm")).stdout.text

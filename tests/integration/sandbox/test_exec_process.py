"""The exec service in a process of its own: flat memory, no process after a kill."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from regreen.client.channel import connect
from regreen.client.exec import ExecClient
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.sandbox import v1 as pb

_ROOT = Path(__file__).parents[3]
_ENV = {**os.environ, "PYTHONPATH": str(_ROOT)}
_START_S = 60.0


@pytest.fixture
def process(tmp_path):
    """A sandbox service as a process, and its address."""
    address = f"unix:{tmp_path}/s"
    argv = ["--home", str(tmp_path / "home"), "--listen", address, "--metrics", "127.0.0.1:0"]
    child = subprocess.Popen(
        [sys.executable, "-m", "sandbox_svc", *argv, "--warm-seats", "1"],
        cwd=_ROOT,
        env=_ENV,
        stdout=subprocess.DEVNULL,
    )
    until = time.monotonic() + _START_S
    while not (tmp_path / "s").exists():
        assert child.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    yield child, address
    child.kill()
    child.wait()


@contextlib.asynccontextmanager
async def sandbox(address: str):
    """A client, and a sandbox over nothing."""
    async with connect(address) as channel:
        spec = pb.EnvironmentSpec(builder="system")
        events = [event async for event in StateClient(channel).prepare_state(spec)]
        box = await SandboxClient(channel).create_sandbox(events[-1].state.id)
        yield ExecClient(channel), box.id


def _resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def test_much_input_for_a_slow_reader_leaves_memory_flat(process):
    child, address = process
    most, piece, size_bytes = 0, b"0123456789abcdef" * 4096, 8 << 20

    async def source(count: int):
        nonlocal most
        for _ in range(count):
            yield piece
            most = max(most, _resident_bytes(child.pid))

    slow = "for i in $(seq {}); do head -c 65536 > /dev/null; sleep 0.01; done; wc -c"

    async def feed(count: int) -> None:
        events = execs.exec_stream(box, ["sh", "-c", slow.format(count)], stdin=source(count))
        *_, last = [event async for event in events]
        assert last.ended.stdout.head.split() == [b"0"]

    async with sandbox(address) as (execs, box):
        await feed(16)
        before, most = most, 0
        began = time.monotonic()
        await feed(size_bytes // len(piece))
        seconds = time.monotonic() - began
    print(f"{size_bytes} bytes in {seconds:.1f} s, rss {before} -> {most}")
    assert most - before < 3 << 20


async def test_killing_the_service_leaves_no_process(process):
    child, address = process
    text = "(setsid sleep 98764 &) ; echo up; trap '' HUP TERM; sleep 98764"
    async with sandbox(address) as (execs, box):
        for size in (None, pb.TerminalSize()):
            argv = ["sh", "-c", text]
            one = await execs.start_exec(box, argv, open_stdin=True, terminal=size)
            await anext(execs.attach_exec(box, one.id))
        assert await asyncio.to_thread(_become, 4), _sleepers()
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert await asyncio.to_thread(_become, 0), _sleepers()


def _sleepers() -> list[str]:
    """Processes that the commands of this test started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            if line.startswith("sleep 98764"):
                found.append(line)
    return found


def _become(count: int, timeout_s: float = 10.0) -> bool:
    until = time.monotonic() + timeout_s
    while len(_sleepers()) != count and time.monotonic() < until:
        time.sleep(0.02)
    return len(_sleepers()) == count

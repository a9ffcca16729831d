"""One protection taken away at a time, so that an attack can be seen to succeed without it.

- A weakened runtime is the real one whose spawner was built without one thing.
- `plain` is an ordinary user in ordinary namespaces; `apart` is the first user of namespaces that
  are thrown away. Neither is ever root of the host.
- Nothing here writes to /proc/sys, to a device, or outside a directory made for the test.
"""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sandbox_svc.backends import program
from sandbox_svc.backends.base import Command, ExecResult, Limits
from sandbox_svc.backends.embedded import EmbeddedRuntime

ORDINARY_ID = 64_021
"""Of a user that nobody is."""
WIDE = Limits(
    memory_bytes=1 << 30, pids=256, cpus=16.0, disk_bytes=1 << 30, inodes=50_000, wall_s=60.0
)
IS_ROOT = os.geteuid() == 0
needs_python = pytest.mark.skipif(
    not Path("/usr/bin/python3").exists(), reason="no /usr/bin/python3 on this host"
)
needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root can lay this trap")
x86_64 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="call numbers of x86_64")

# What the spawner of a weakened runtime is compiled with.
NO_FILTER, NO_MASKS, DUMPABLE = "WITHOUT_FILTER", "WITHOUT_MASKS", "DUMPABLE"
HOST_NETWORK = "IN_THE_NETWORK_OF_THE_HOST"
SHARED_FILES = "SHARED_WITH_THE_HOST"
BREAKS_AT = 'BREAKS_AT="{path}"'
"""A file that names the step to fail at."""
_BUILD = program.spawner


@asynccontextmanager
async def weakened(home: Path, change: str, *, warm: int = 0) -> AsyncIterator[EmbeddedRuntime]:
    """A running runtime whose spawner was compiled with `change`."""
    built = _BUILD([change], home.parent / "built")
    normal, program.spawner = program.spawner, lambda: built
    runtime = EmbeddedRuntime(home, run_probes=False, warm_seats=warm)
    try:
        await runtime.start()
        yield runtime
    finally:
        await runtime.close()
        program.spawner = normal


def _ordinary() -> dict[str, Any]:
    if not IS_ROOT:
        return {}
    return {"user": ORDINARY_ID, "group": ORDINARY_ID, "extra_groups": []}


def plain(argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """A command of an ordinary user, with no sandbox around it."""
    options = {"timeout": 20, "cwd": "/", "text": True, "capture_output": True, **options}
    return subprocess.run(argv, check=False, **_ordinary(), **options)


def apart(argv: Sequence[str], *flags: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command as the first user of new namespaces, which end with it; skips where none may."""
    done = plain(["unshare", "-U", "-r", *flags, *argv], **options)
    if done.returncode and "unshare: unshare failed" in done.stderr:
        pytest.skip(f"no namespaces for ordinary users here: {done.stderr.strip()}")
    return done


async def python(box: Any, script: str, *arguments: str, **options: Any) -> ExecResult:
    """Run a Python script in a box."""
    options.setdefault("cwd", "/")
    return await box.run(Command(("/usr/bin/python3", "-c", script, *arguments), **options))


async def pause() -> None:
    """Between two looks: who looks without one keeps a small host from what is waited for."""
    await asyncio.sleep(0.02)


def running(marker: str) -> list[int]:
    """Processes of this host whose command line holds `marker`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
            except OSError:
                continue
            if marker.encode() in line:
                found.append(int(entry.name))
    return found


def until_running(marker: str, timeout_s: float = 10.0) -> list[int]:
    """The same, once there are some."""
    until = time.monotonic() + timeout_s
    while not (found := running(marker)):
        assert time.monotonic() < until, f"no process with {marker}"
        time.sleep(0.02)
    return found


def killed_when_up(script: str, *arguments: str) -> None:
    """A Python script that was killed once it had said that it is up."""
    root = Path(__file__).parents[3]
    child = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"
    child.kill()
    child.wait(20)
    child.stdout.close()  # which a child of its own may hold open

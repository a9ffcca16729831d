"""The examples that need one address alone, as a user runs them, against a service of its own."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox_svc.__main__ import serving
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.builders.system import SystemBuilder
from sandbox_svc.service import SandboxHost
from sandbox_svc.settings import SandboxSettings

_ROOT = Path(__file__).parents[3]
SAID = {
    "sandbox": ("exit 0 after", "+hello\n", "a State of its own now: st_"),
    "sandbox_actions": (
        "done from the cache: True",
        "the same: True",
        "not cached: True",
        "differs: True",
        "quarantined: sh -c date +%s%N because stdout ",
    ),
    "sandbox_exec": ("40 120", "42\n", "sh took 26 bytes, ended: False", "ended by signal 1"),
    "sandbox_files": (
        "line 1\nline 2\nline 3\nexit 0\nb'line 2' of 21 bytes\n",
        "0o755 62 count.sh\n",
        "out.txt:2: line 2\nchanged: count.sh\nchanged: out.txt\n",
    ),
    "sandbox_fork": ("['shared', 'branch 2']", "restored: shared | trunk: shared"),
    "sandbox_limits": (
        "wall_time: service",
        "exit 3: END_REASON_EXIT\n",
        "kill -9 $$: END_REASON_SIGNAL\nyes: END_REASON_OUTPUT\nsleep 60: END_REASON_TIMEOUT\n",
        "Z True\n",
    ),
    "sandbox_lineage": ("of 4 layers on ", "{'turn': '0'}", " deleted\nmade of the first: st_"),
    "sandbox_transfer": ("bytes, the same: True\nit runs\n",),
}
"""What each says; the order of the words is that of the lines."""


@pytest.fixture
async def address(tmp_path):
    settings = SandboxSettings(
        home=tmp_path / "home", listen=f"unix:{tmp_path}/s", metrics="127.0.0.1:0", drain_s=0.2
    )
    runtime = EmbeddedRuntime(tmp_path / "home" / "sandbox", warm_seats=1)
    async with serving(settings, SandboxHost(settings, runtime, [SystemBuilder()])) as server:
        yield server.address


async def run(name: str, *addresses: str) -> str:
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, f"examples/{name}.py", *addresses],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return str(done.stdout).replace("\r\n", "\n")


async def test_the_examples_say_what_they_show_and_can_be_run_again(address):
    for name in (*SAID, *SAID):
        printed, place = await run(name, address), 0
        for words in SAID[name]:
            place = printed.find(words, place)
            assert place >= 0, f"{name}: {words!r} is not in {printed}"

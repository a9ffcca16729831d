"""A sandbox service on a free port with one small State, and the frameworks that adapters serve.

- The frameworks come from the package registry into a directory of their own, pinned by hash and
  without what the tests do not import; the environment of the tests is never changed.
"""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from regreen.client.channel import connect
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.common.v1 import CHANGE_KIND_ADD, FileChange
from regreen.pkgindex import find_uv
from regreen.rpc.errors import MissingDependency
from regreen.sandbox import v1 as pb
from sandbox_svc.__main__ import serving
from sandbox_svc.settings import SandboxSettings

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
FILES = {
    "mathlib.py": "def add(a, b):\n    return a - b\n",
    "check.py": "import mathlib\n\nassert mathlib.add(2, 3) == 5, mathlib.add(2, 3)\nprint('ok')\n",
}


@dataclass(frozen=True)
class World:
    """The running service."""

    address: str
    state_id: str
    sandboxes: SandboxClient

    async def count(self) -> int:
        """Sandboxes that exist now."""
        return len((await self.sandboxes.list_sandboxes()).sandboxes)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    """The service, and a State that holds a broken module."""
    home = Path(tempfile.mkdtemp(prefix="regreen-adapters-"))
    home.chmod(0o711)
    settings = SandboxSettings(
        home=home,
        warm_seats=1,
        listen="127.0.0.1:0",
        metrics="127.0.0.1:0",
        drain_s=0.2,
        egress_private="127.0.0.0/8",
    )
    async with contextlib.AsyncExitStack() as exits:
        exits.callback(shutil.rmtree, home, ignore_errors=True)
        try:
            server = await exits.enter_async_context(serving(settings))
        except MissingDependency as error:
            pytest.skip(f"no sandboxes here: {error}")
        channel = connect(server.address)
        exits.push_async_callback(channel.close)
        overlay = [
            FileChange(path=path, kind=CHANGE_KIND_ADD, content=text.encode())
            for path, text in FILES.items()
        ]
        spec = pb.EnvironmentSpec(builder="system", overlay=overlay)
        *_, last = [event async for event in StateClient(channel).prepare_state(spec)]
        # Python knows an edit by its second and size: agents find files of an earlier second.
        await asyncio.sleep(1.0)
        yield World(server.address, last.state.id, SandboxClient(channel, patience_s=5.0))


@pytest.fixture(scope="session")
def frameworks(registry: None) -> Iterator[dict[str, str]]:
    """Environment variables of a process that can import them."""
    home = Path(tempfile.mkdtemp(prefix="regreen-frameworks-"))
    try:
        argv = [find_uv(), "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
        argv += ["--python", sys.executable, "--target", str(home / "packages")]
        argv += ["-r", str(ROOT / "requirements" / "adapters.txt")]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        yield {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{home / 'packages'}",
            "HOME": str(home),
            "NO_COLOR": "1",
            "TERM": "dumb",
            "MSWEA_SILENT_STARTUP": "1",
            "MSWEA_GLOBAL_CONFIG_DIR": str(home / "config"),
            "SWE_REX_LOG_STREAM_LEVEL": "CRITICAL",
        }
    finally:
        shutil.rmtree(home, ignore_errors=True)


Script = Callable[..., Awaitable[str]]


@pytest.fixture
def script(frameworks: dict[str, str]) -> Script:
    """Runs a Python file among the frameworks; what it printed."""

    async def run(path: Path, *argv: str, given: object = None) -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(path),
            *argv,
            env=frameworks,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        async with asyncio.timeout(120):
            out, err = await process.communicate(json.dumps(given).encode())
        assert process.returncode == 0, err.decode()[-3000:]
        assert "Traceback" not in err.decode(), err.decode()[-3000:]
        return out.decode()

    return run

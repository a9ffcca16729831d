"""A whole stack in this process over the tiny task: real services, a policy that plays a script."""

import asyncio
import contextlib
import json
import os
import secrets
import signal
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from judge_svc.__main__ import running as judge_running
from judge_svc.settings import JudgeSettings
from policy_svc.__main__ import running as policy_running
from policy_svc.settings import PolicySettings
from regreen.client.stack import Endpoints, Stack
from regreen.common.v1 import CHANGE_KIND_MODIFY, MODE_ANY_FIX, MODE_KEEP_NEW, FileChange
from regreen.dataset import v1 as pb
from regreen.lockfile import format_lock, lock_of
from regreen.pkgindex import PackageIndex
from regreen.sandbox import v1 as sandbox_pb
from sandbox_svc.__main__ import serving as sandbox_serving
from sandbox_svc.builders.base import EnvironmentSpec, Pin
from sandbox_svc.settings import SandboxSettings
from sandbox_svc.wheelhouse import DistStore
from tests.fixtures.policy.model import default_model
from tests.fixtures.tasks.tiny_task import FAIL_TO_PASS, tiny_spec

FIXED = "from wordlib import salute\n\n\ndef greeting(name):\n    return f'{salute()}, {name}!'\n"
LOOPBACK = {"listen": "127.0.0.1:0", "metrics": "127.0.0.1:0", "drain_s": 0.5}


def call(name, /, **arguments):
    """A call as a policy writes it."""
    return f"<tool>{json.dumps({'name': name, 'arguments': arguments})}</tool>"


VALIDATE = call("validate_and_build")
PIN = call("dependency_upgrade", name="wordlib", version="1.0")


def says(*texts, when=""):
    """Script entries: one output per turn of a context."""
    return [{"text": text, "turn": turn, "when": when} for turn, text in enumerate(texts)]


@dataclass
class World:
    """Addresses of the services that outlive a test, and the prepared task."""

    home: Path
    endpoints: dict
    task: pb.Task

    @contextlib.asynccontextmanager
    async def playing(self, responses, **endpoints) -> AsyncIterator[Stack]:
        """A stack whose policy plays these responses; after them it says nothing useful."""
        folder = Path(tempfile.mkdtemp(prefix="policy-", dir=self.home))
        script = folder / "script.json"
        script.write_text(json.dumps({"responses": [*responses, {"text": "I do not know."}]}))
        settings = PolicySettings(
            home=folder,
            engine="scripted",
            script=script,
            model=default_model(),
            http="127.0.0.1:0",
            **LOOPBACK,
        )
        async with policy_running(settings) as policy:
            found = {**self.endpoints, "policy": policy.server.address, **endpoints}
            async with Stack(Endpoints(**found), patience_s=3.0) as stack:
                yield stack


async def kill_first_process(stack: Stack, sandbox_id: str) -> None:
    """Kill the process in which a sandbox lives, as the host's out-of-memory killer could."""
    mark = f"0.{secrets.randbelow(1 << 40)}"
    await stack.sandbox.run(sandbox_id, ["sh", "-c", f"sleep 900{mark} >/dev/null 2>&1 &"])
    while True:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if path.read_bytes() == f"sleep\x00900{mark}\x00".encode():
                    status = (path.parent / "status").read_text()
                    parent = int(status.partition("PPid:")[2].split()[0])
                    if parent in _children(os.getpid()):
                        os.kill(parent, signal.SIGKILL)
                        return
        await asyncio.sleep(0.01)


def _children(pid: int) -> set[int]:
    """A process's descendants down to the first processes of sandboxes."""
    found: set[int] = set()
    for spawner in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{spawner}/task/{spawner}/children").read_text()
            found |= {int(child) for child in text.split()}
    return found


@contextlib.asynccontextmanager
async def open_world(home: Path, **settings: object) -> AsyncIterator[World]:
    """Sandbox and judge services with the tiny task prepared."""
    made = home / "made"
    made.mkdir()
    store = DistStore(
        home / "sandbox" / "dists", lambda: PackageIndex(["http://127.0.0.1:9"], deadline_s=0.1)
    )
    spec = tiny_spec(store, made)
    sandbox = SandboxSettings(home=home, warm_seats=1, **LOOPBACK, **settings)
    judge = JudgeSettings(home=home, **LOOPBACK)
    async with sandbox_serving(sandbox) as one, judge_running(judge) as two:
        endpoints = {"sandbox": one.address, "judge": two.address}
        async with Stack(Endpoints(**endpoints)) as stack:
            task = task_of(spec)
            async for event in stack.state.prepare_state(task.environment):
                if event.HasField("state"):
                    task.state_id = event.state.id
        yield World(home, endpoints, task)


def task_of(spec: EnvironmentSpec) -> pb.Task:
    """The tiny task as the dataset would hold it."""
    pins = {pin.name: pin.version for pin in spec.pins}
    good = {**pins, "wordlib": "1.0"}
    lock = format_lock(lock_of(good, spec.python)).encode()
    return pb.Task(
        id="greet-1.0__wordlib-2.0",
        kind="dependency-upgrade",
        environment=sandbox_pb.EnvironmentSpec(
            builder=spec.builder,
            package=spec.package,
            version=spec.version,
            python=spec.python,
            source=_file(spec.source),
            install_mode=spec.install_mode,
            pins=map(_pin, spec.pins),
            wheelhouse=map(_pin, spec.wheelhouse),
            test=sandbox_pb.TestSpec(
                arguments=spec.test.arguments,
                timeout={"seconds": 60},
                fail_to_pass=spec.test.fail_to_pass,
            ),
        ),
        fail_to_pass=FAIL_TO_PASS,
        fail_to_pass_count=len(FAIL_TO_PASS),
        pass_to_pass_count=1,
        category="import-error",
        blame="source",
        modes=[MODE_ANY_FIX, MODE_KEEP_NEW],
        culprit="wordlib",
        culprit_version="2.0",
        culprit_good_version="1.0",
        moved={"wordlib": "1.0 2.0"},
        split="train",
        fixes=[
            pb.ReferenceFix(
                mode=MODE_ANY_FIX,
                origin="pins-restored",
                changes=[_change("requirements.lock", lock)],
            ),
            pb.ReferenceFix(
                mode=MODE_KEEP_NEW,
                origin="source-edit",
                changes=[_change("greet/__init__.py", FIXED.encode())],
            ),
        ],
    )


def _change(path, content):
    return FileChange(path=path, kind=CHANGE_KIND_MODIFY, content=content, mode=0o644)


def _file(file):
    return sandbox_pb.DistFile(filename=file.filename, sha256=file.sha256)


def _pin(pin: Pin):
    return sandbox_pb.Pin(name=pin.name, version=pin.version, files=map(_file, pin.files))

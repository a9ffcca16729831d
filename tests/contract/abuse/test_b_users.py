"""B: who a sandbox is on the host, read there and not inside; and who it must not be."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox_svc.backends.base import Command
from sandbox_svc.backends.layers import HOST_ID
from tests.contract.abuse.walls import IS_ROOT, ORDINARY_ID, needs_root, pause
from tests.contract.runtimes import SMALL

pytestmark = pytest.mark.asyncio(loop_scope="module")

_ROOT = Path(__file__).parents[3]


def _status(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
    return {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}


def _below(pid: int) -> list[int]:
    """A process and all that it has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()
    return [pid, *(found for child in children for found in _below(int(child)))]


async def test_b1_the_host_sees_an_ordinary_user(runtime):
    box = await runtime.create([], limits=SMALL)
    process = await box.start(Command(("sh", "-c", "sleep 60 & sleep 60 & wait"), cwd="/"))
    try:
        async with asyncio.timeout(30):
            while len(found := _below(box.seat.pid)) < 4:
                await pause()
        user, group = (HOST_ID, HOST_ID) if IS_ROOT else (os.geteuid(), os.getegid())
        assert user != 0
        for pid in found:
            status = _status(pid)
            assert status["Uid"] == [str(user)] * 4
            assert status["Gid"] == [str(group)] * 4
            assert status["Groups"] == [] or not IS_ROOT
            assert {status[f"Cap{kind}"][0] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {
                "0" * 16
            }
            for kind, number in (("uid", user), ("gid", group)):
                mapping = Path(f"/proc/{pid}/{kind}_map").read_text("ascii").split()
                assert mapping == ["1000", str(number), "1"], "its only id, and the host's for it"
        assert _status(os.getpid())["Uid"] == [str(os.geteuid())] * 4
    finally:
        await process.signal(9)
        await process.wait()
        await box.delete()


_START = """
import asyncio, ctypes, encodings.ascii, os, sys  # what this user may not load later
from pathlib import Path
from sandbox_svc.backends.embedded import EmbeddedRuntime
user = int(sys.argv[2])
os.setgroups([])
os.setresgid(user, user, user)
os.setresuid(user, user, user)
assert ctypes.CDLL(None).unshare(0x10000000) == 0
print("apart", flush=True)
sys.stdin.readline()
async def start():
    runtime = EmbeddedRuntime(Path(sys.argv[1]), run_probes=False, warm_seats=0)
    try:
        await runtime.start()
        await runtime.close()
        print("started")
    except Exception as error:
        print(error)
asyncio.run(start())
print(Path(sys.argv[1]).exists())
"""


def _started_with(home: Path, mapping: str, user: int = ORDINARY_ID) -> list[str]:
    """What a runtime says that this user starts in a namespace with these ids, and what is made."""
    child = subprocess.Popen(
        [sys.executable, "-c", _START, str(home), str(user)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{_ROOT}:{os.environ.get('PYTHONPATH', '')}"},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "apart\n"
    for kind in ("gid", "uid"):
        Path(f"/proc/{child.pid}/{kind}_map").write_text(mapping)
    said, _ = child.communicate("go\n", timeout=60)
    return said.splitlines()


@needs_root
async def test_b1_a_service_whose_sandboxes_would_be_root_of_the_host_does_not_start(common):
    """Nothing is run there: it refuses before it makes even its directory."""
    home = common / "home"
    told, made = _started_with(home, "1000 0 1", 0)  # root of the host by another name
    assert told.startswith("sandboxes would be user 1000 here, which is root of the host; start")
    assert made == "False"
    told, made = _started_with(home, f"0 {ORDINARY_ID} 1\n{HOST_ID} 0 1000")  # ids that contain it
    assert told.startswith(f"sandboxes would be user {HOST_ID} here, which is root of the host;")
    assert made == "False"
    told, made = _started_with(home, f"0 {ORDINARY_ID} 1")  # none for sandboxes
    assert told.startswith(f"this user namespace has no user {HOST_ID}, which sandboxes would be;")
    assert made == "False"
    told, _ = _started_with(common / "other", f"0 {ORDINARY_ID} 1\n{HOST_ID} 164021 1000")
    assert "sandboxes would be" not in told, "whatever else may be missing there"

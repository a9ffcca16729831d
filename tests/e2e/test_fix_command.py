"""`regreen fix` as people run it: flags, exit codes, the printed patch; a chat endpoint acts."""

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from regreen.tasks.pin import TOOLS
from sandbox_svc.wheelhouse import DistStore
from tests.e2e.conftest import Local
from tests.fixtures.chat_script import ScriptedChat, call
from tests.fixtures.index import wheel_index
from tests.fixtures.policy.http import serving
from tests.fixtures.tasks.tiny_task import PYTHON, RUNNER, TINY, write_wheel

BETTER, WORSE = (call("dependency_upgrade", name="wordlib", version=v) for v in ("1.0", "2.1"))
VALIDATE, GIVE_UP = call("validate_and_build"), call("give_up", reason="it cannot be done")
PINNED = "# words\nwordlib==2.0  # newest\n"


@pytest.fixture(scope="module")
def wheels(local: Local, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the tiny project can be made of; the sandbox service has it already."""
    folder = tmp_path_factory.mktemp("wheels")
    store = DistStore(local.home / "sandbox" / "dists")
    for tool in TOOLS:
        name = re.split(r"\[", tool)[0].replace("-", "_")
        store.adopt(write_wheel(folder, name, "1.0", {}))
    for path in (local.home / "made").glob("*.whl"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The tiny project with one pin; what its tests need stands apart and unpinned."""
    root = tmp_path / "greet"
    shutil.copytree(TINY, root, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "requirements.txt").write_text(PINNED)
    (root / "requirements-dev.txt").write_text("".join(f"{name}\n" for name in RUNNER))
    return root


@dataclass
class Played:
    """An endpoint with a script, and the command against it."""

    local: Local
    chat: ScriptedChat
    url: str

    async def fix(self, root: Path, *words: str) -> subprocess.CompletedProcess[str]:
        words = ("fix", str(root), "--endpoint", self.url, "--model", "scripted", *words)
        rest = ("--python", PYTHON, "--attempts", "1")
        return await asyncio.to_thread(self.local.cli, *words, *rest)


@contextlib.asynccontextmanager
async def playing(local: Local, wheels: Path, *texts: str) -> AsyncIterator[Played]:
    chat = ScriptedChat(list(texts), "key")
    async with serving(chat.app()) as url, serving(wheel_index(wheels)) as index:
        env = {**local.env, "REGREEN_INDEX_URL": f"{index}/simple/", "OTHER_KEY": "key"}
        yield Played(replace(local, env=env), chat, f"{url}/v1")


async def test_a_verified_patch_is_printed_written_and_applied(
    local: Local, wheels: Path, tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "fix.patch"
    keys = ("--key-env", "OTHER_KEY")
    async with playing(local, wheels, BETTER, VALIDATE) as played:
        done = await played.fix(tiny, *keys, "--out", str(out))
        assert done.returncode == 0, done.stderr
        assert "-wordlib==2.0  # newest\n+wordlib==1.0  # newest\n" in done.stdout
        assert "fixed after 1 attempt: all 2 failing tests pass, verified" in _flat(done.stderr)
        assert out.read_text() == done.stdout[:-1]
        assert (tiny / "requirements.txt").read_text() == PINNED
        first = played.chat.bodies[0]
        assert first["max_tokens"] == 4096
        assert "End of the log:" in first["messages"][1]["content"]
        del played.chat.bodies[:]
        done = await played.fix(tiny, *keys, "--apply", "--json", "--set", "budget.turn_tokens=77")
        found = json.loads(done.stdout)
        assert (done.returncode, found["fixed"]) == (0, True)
        assert found["changes"] == ["requirements.txt"]
        assert played.chat.bodies[0]["max_tokens"] == 77
        assert (tiny / "requirements.txt").read_text() == PINNED.replace("2.0", "1.0")
        copy = tmp_path / "copy"
        shutil.copytree(TINY, copy)
        (copy / "requirements.txt").write_text(PINNED)
        git = ("git", "apply", str(out))
        await asyncio.to_thread(subprocess.run, git, cwd=copy, check=True)
        assert (copy / "requirements.txt").read_text() == (tiny / "requirements.txt").read_text()
        done = await played.fix(tiny, *keys)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert "all 3 tests pass already" in _flat(done.stderr)


async def test_what_was_not_fixed_exits_with_1_and_applies_nothing(
    local: Local, wheels: Path, tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "best.patch"
    async with playing(local, wheels, WORSE, VALIDATE, GIVE_UP) as played:
        words = ("--key-env", "OTHER_KEY", "--out", str(out), "--apply")
        done = await played.fix(tiny, *words, "--pipeline", "simplified")
    assert done.returncode == 1, done.stderr
    assert "+wordlib==2.1  # newest\n" in done.stdout
    assert out.read_text() == done.stdout[:-1]
    assert "not fixed after 1 attempt: 2 of 2 failing tests still fail" in _flat(done.stderr)
    assert (tiny / "requirements.txt").read_text() == PINNED


async def test_a_refused_key_and_a_wrong_setting_are_said(
    local: Local, wheels: Path, tiny: Path
) -> None:
    async with playing(local, wheels, VALIDATE) as played:
        refused = await played.fix(tiny, "--key-env", "NO_SUCH_KEY")
        assert refused.returncode == 1
        assert "bad key" in _flat(refused.stderr)
        wrong = await played.fix(tiny, "--set", "budget.turn=7")
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert "is no known setting" in _flat(wrong.stderr)
        assert not played.chat.bodies


def _flat(text: str) -> str:
    return " ".join(text.split())

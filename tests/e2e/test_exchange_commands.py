"""`regreen tasks add|import|export` as people run them, against a whole stack."""

import asyncio
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

from regreen.tasks.pin import TOOLS
from sandbox_svc.wheelhouse import DistStore
from tests.e2e.conftest import Local
from tests.fixtures.index import wheel_index
from tests.fixtures.policy.http import serving
from tests.fixtures.tasks.tiny_task import PYTHON, RUNNER, TINY, write_wheel

SAMPLES = Path(__file__).resolve().parents[1] / "fixtures" / "formats"


def git(root: Path, *words: str) -> str:
    argv = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", *words]
    return subprocess.run(argv, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


async def test_a_build_of_ones_own_is_added_listed_and_exported(
    local: Local, tmp_path: Path
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    store = DistStore(local.home / "sandbox" / "dists")
    for tool in TOOLS:
        name = re.split(r"\[", tool)[0].replace("-", "_")
        store.adopt(write_wheel(wheels, name, "1.0", {}))
    for path in (local.home / "made").glob("*.whl"):
        shutil.copy(path, wheels)
    root = tmp_path / "greet"
    shutil.copytree(TINY, root, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "requirements.txt").write_text("wordlib==2.0\n")
    (root / "requirements-dev.txt").write_text("".join(f"{name}\n" for name in RUNNER))
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "broken")
    (root / "requirements.txt").write_text("wordlib==1.0\n")
    git(root, "commit", "--quiet", "--all", "--message", "mended")
    fix = git(root, "rev-parse", "HEAD")
    async with serving(wheel_index(wheels)) as index:
        here = replace(local, env={**local.env, "REGREEN_INDEX_URL": f"{index}/simple/"})
        words = ("--fix-commit", fix, "--python", PYTHON, "--repeats", "2", "--json")
        done = await asyncio.to_thread(
            here.cli, "tasks", "add", f"file://{root}", "--id", "greet-e2e", *words
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["id"], found["status"]) == ("greet-e2e", "admitted")
    assert len(found["fail_to_pass"]) == 2
    assert "gate" in done.stderr
    for format, file in (("harbor", "greet-e2e/task.toml"), ("swe-bench", "swe-bench.jsonl")):
        out = tmp_path / format
        words = ("greet-e2e", "--format", format, "--out", str(out), "--json")
        done = await asyncio.to_thread(local.cli, "tasks", "export", *words)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["written"] == 1
        assert (out / file).is_file()
        done = await asyncio.to_thread(local.cli, "tasks", "import", str(out), "--json")
        assert json.loads(done.stdout)["to_gate"] == ["greet-e2e"], done.stderr


def test_tasks_of_other_systems_are_imported_and_go_out_again(local: Local, tmp_path: Path) -> None:
    done = local.cli("tasks", "import", str(SAMPLES / "bump"), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["format"], found["imported"], len(found["waiting"])) == ("bump", 2, 2)
    listed = local.cli("tasks", "list", "--status", "waiting").stdout
    assert "needs image" in " ".join(listed.split())
    one = next(iter(found["waiting"]))
    refused = local.cli("tasks", "verify", one)
    assert refused.returncode == 1
    assert "is of bump and needs image" in " ".join(refused.stderr.split())
    unprepared = local.cli("tasks", "prepare", one, "--json")
    assert unprepared.returncode == 1
    assert json.loads(unprepared.stdout)["error"]
    words = ("--format", "bump", "--every-status", "--out", str(tmp_path / "out"))
    done = local.cli("tasks", "export", *words)
    assert done.returncode == 0, done.stderr
    for path in (SAMPLES / "bump").glob("*.json"):
        again = json.loads((tmp_path / "out" / path.name).read_text())
        assert again == json.loads(path.read_text())
    assert "each because it is no Maven build of BUMP" in done.stdout or "2 written" in done.stdout


def test_an_export_of_nothing_fails(local: Local, tmp_path: Path) -> None:
    words = ("--format", "swe-bench", "--split", "validation", "--out", str(tmp_path / "out"))
    done = local.cli("tasks", "export", *words)
    assert done.returncode == 1
    assert "no admitted task to export" in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
    chats = local.cli("tasks", "export", "--format", "sft", "--out", str(tmp_path / "chats"))
    assert "written" in chats.stdout

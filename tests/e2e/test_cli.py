"""What the command line says to wrong usage, and the shapes of its JSON."""

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Local


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("up", "--ports", "many"), "ports: 'many' is unknown; give fixed or any"),
        (("fix", "/no/such/project"), "path: /no/such/project is no directory"),
        (("fix", ".", "--endpoint", "http://127.0.0.1:9/v1"), "model: belongs with endpoint"),
        (("fix", ".", "--endpoint", "nowhere", "--model", "m"), "give https://host/v1"),
        (("fix", ".", "--pipeline", "big"), "pipeline"),
        (("rollout", "run", "--task", "no-such-task"), "no task 'no-such-task'"),
        (("no-such-command",), "No such command"),
    ],
)
def test_usage_errors(local: Local, words: tuple[str, ...], said: str) -> None:
    done = local.cli(*words)
    assert done.returncode == (1 if words[0] == "rollout" else 2), done.stderr
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_help_of_every_command(local: Local) -> None:
    done = local.cli("--help")
    assert done.returncode == 0
    for name in ("up", "down", "status", "logs", "fix", "doctor", "tasks", "rollout", "train"):
        assert name in done.stdout


def test_json_shapes(local: Local) -> None:
    for words, key in ((("doctor",), "name"), (("tasks", "list"), "id"), (("traj", "list"), "id")):
        done = local.cli(*words, "--json")
        assert not done.stderr or words == ("doctor",), done.stderr
        assert all(json.loads(line)[key] for line in done.stdout.splitlines())
    version = local.cli("--version")
    assert version.stdout.strip().count(".") == 2


def test_a_fix_without_a_python_project(local: Local, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("hello")
    done = local.cli("fix", str(tmp_path), "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "is no Python project" in " ".join(done.stderr.split())

"""What the command line says to wrong usage, and the shapes of its JSON."""

import json
from pathlib import Path

import pytest

from regreen.tasks.jsonl import dump_lines
from sandbox_svc.wheelhouse import DistStore
from tests.e2e.conftest import Local
from tests.fixtures.tasks.tiny_record import tiny_record


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("up", "--ports", "many"), "ports: 'many' is unknown; give fixed or any"),
        (("fix", "/no/such/project"), "path: /no/such/project is no directory"),
        (("fix", ".", "--policy", "nowhere"), "neither 'base' nor the name of a run"),
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


@pytest.fixture(scope="module")
def own(local: Local, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Id of a task of one's own, imported and admitted by commands."""
    folder = tmp_path_factory.mktemp("own")
    record, releases = tiny_record(DistStore(local.home / "sandbox" / "dists"), folder)
    record = record.model_copy(update={"id": "own-greet", "egress": ["docs.example.org"]})
    (folder / "own.jsonl").write_text(dump_lines([record]))
    (folder / "releases.jsonl").write_text(dump_lines(releases.values()))
    words = ("tasks", "import", str(folder / "own.jsonl"))
    done = local.cli(*words, "--distributions", str(folder / "releases.jsonl"), "--json")
    assert json.loads(done.stdout) == {"imported": 1, "unchanged": 0}, done.stderr
    for verb, key in (("prepare", "state"), ("verify", "status")):
        done = local.cli("tasks", verb, record.id, "--json")
        (row,) = map(json.loads, done.stdout.splitlines())
        assert (done.returncode, row["id"]) == (0, record.id), done.stderr
        assert row[key], row
    assert row == {**row, "status": "admitted", "reason": ""}
    return record.id


def test_tasks_of_ones_own_are_shown_with_their_evidence(local: Local, own: str) -> None:
    shown = local.cli("tasks", "show", own).stdout
    assert "2 tests turn green, 0 unstable" in shown
    assert "rollouts may reach docs.example.org" in shown
    assert "ok  reference-passes 2:" in shown
    listed = local.cli("tasks", "list", "--json").stdout.splitlines()
    assert own in [json.loads(line)["id"] for line in listed]


def test_tasks_that_are_not_admitted_have_a_reason(local: Local, own: str, tmp_path: Path) -> None:
    record, releases = tiny_record(DistStore(local.home / "sandbox" / "dists"), tmp_path)
    late = record.model_copy(update={"id": "own-late", "python": "3.99"})
    (tmp_path / "late.jsonl").write_text(dump_lines([late]))
    (tmp_path / "releases.jsonl").write_text(dump_lines(releases.values()))
    words = ("tasks", "import", str(tmp_path / "late.jsonl"))
    assert local.cli(*words, "--distributions", str(tmp_path / "releases.jsonl")).returncode == 0
    done = local.cli("tasks", "verify", own, "own-late")
    assert done.returncode == 1, done.stderr
    assert "needs Python 3.99; found" in " ".join(done.stdout.split())
    assert "needs Python 3.99; found" in local.cli("tasks", "show", "own-late").stdout
    unprepared = local.cli("tasks", "prepare", "own-late", "--json")
    assert unprepared.returncode == 1
    assert "3.99" in json.loads(unprepared.stdout)["error"]


def test_an_evaluation_and_its_report(local: Local, own: str, tmp_path: Path) -> None:
    words = ("--task", own, "--mode", "any_fix", "--pipeline", "simplified")
    scripts = ("--subject", "baseline:noop", "--set", "budget.turns=3")
    done = local.cli("eval", "--name", "cli", *words, *scripts, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["committed"] == 4
    done = local.cli("report", "--eval", "cli", "--out", str(tmp_path), "--json")
    found = json.loads(done.stdout)
    solved = {cell["subject"]: cell["value"] for cell in found["cells"]}
    scripts = {"noop": 0.0, "newest": 0.0, "previous": 1.0, "pin-back": 0.0}
    assert solved == {f"baseline:{name}": value for name, value in scripts.items()}
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    refused = local.cli("report", "--eval", "cli", "--out", str(tmp_path / "report.json" / "x"))
    assert refused.returncode == 2
    assert "name a directory you can write" in " ".join(refused.stderr.split())


def test_json_shapes(local: Local, own: str) -> None:
    assert local.cli("rollout", "run", "--task", own, "--actor", "baseline:noop").returncode == 0
    for words, key in (
        (("doctor",), "name"),
        (("tasks", "list"), "id"),
        (("traj", "list"), "id"),
        (("logs", "dataset"), "line"),
    ):
        done = local.cli(*words, "--json")
        assert not done.stderr or words == ("doctor",), done.stderr
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert rows
        assert all(row[key] for row in rows)
    version = local.cli("--version")
    assert version.stdout.strip().count(".") == 2


def test_a_fix_without_a_python_project(local: Local, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("hello")
    done = local.cli("fix", str(tmp_path), "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "is no Python project" in " ".join(done.stderr.split())

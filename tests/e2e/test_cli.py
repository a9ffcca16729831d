"""What the command line says to wrong usage, and the shapes of its JSON."""

import json
from pathlib import Path

import pytest

from regreen.tasks.jsonl import dump_lines
from sandbox_svc.wheelhouse import DistStore
from tests.e2e.conftest import Local
from tests.fixtures.tasks.tiny_record import tiny_record

NONE = "0" * 32


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


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("tasks list --split nope", 2, "split: 'nope' is unknown; use one of train, validation"),
        ("tasks stats --split nope", 2, "split: 'nope' is unknown"),
        ("tasks verify --split nope", 2, "split: 'nope' is unknown"),
        ("eval --split nope", 2, "split: 'nope' is unknown"),
        ("tasks list --culprit wordli", 1, "nothing here has 'wordli'; there are wordlib"),
        ("tasks verify nope", 1, "no task 'nope'; `regreen tasks list` shows those"),
        ("rollout run --task nope", 1, "no task 'nope'; `regreen tasks list` shows those"),
        ("traj list --policy nope", 1, "policy: nothing here has 'nope'; there are base"),
        ("traj list --actor baseline:nop", 1, "actor: nothing here has 'baseline:nop'; there are"),
        ("traj list --hack nope", 1, "hack: nothing here has 'nope'"),
        ("traj list --task nope", 1, "no task 'nope'; `regreen tasks list` shows those"),
        ("traj list --verdict nope", 2, "verdict: 'nope' is unknown; give accepted or rejected"),
        ("traj list --run nope", 1, "no run 'nope'; the newest are "),
        ("rollout worker --run nope", 1, "no run 'nope'; the newest are "),
        ("train grpo --start nope", 2, "start: 'nope' is neither 'base' nor the name of a run"),
        (f"traj show trj_{NONE}", 1, "`regreen traj list` shows those"),
        (f"state show st_{NONE}", 1, "regreen state list shows those"),
        (f"sandbox delete sbx_{NONE}", 1, "regreen sandbox list shows those"),
        ("eval --task nope", 1, "no task 'nope'; `regreen tasks list --split test` shows those"),
        ("eval --task own-new", 1, "gate them with `regreen tasks verify own-new`, or choose from"),
        ("eval --split validation", 1, "gate them with `regreen tasks verify`"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(
    local: Local, stored: None, words: str, code: int, said: str
) -> None:
    done = local.cli(*words.split())
    assert done.returncode == code, done.stderr
    assert said in " ".join(done.stderr.split())
    assert not done.stdout
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def stored(local: Local, own: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A task that no gate has seen, a trajectory of a policy and one of a script, and a run."""
    folder = tmp_path_factory.mktemp("new")
    record, releases = tiny_record(DistStore(local.home / "sandbox" / "dists"), folder)
    record = record.model_copy(update={"id": "own-new"})
    (folder / "new.jsonl").write_text(dump_lines([record]))
    (folder / "releases.jsonl").write_text(dump_lines(releases.values()))
    words = ("tasks", "import", str(folder / "new.jsonl"))
    assert local.cli(*words, "--distributions", str(folder / "releases.jsonl")).returncode == 0
    for actor in ("policy", "baseline:noop"):
        done = local.cli("rollout", "run", "--task", own, "--actor", actor)
        assert done.returncode == 0, done.stderr
    words = ("eval", "--name", "seen", "--task", own, "--mode", "any_fix", "--no-baselines")
    done = local.cli(*words, "--pipeline", "simplified", "--subject", "baseline:noop")
    assert done.returncode == 0, done.stderr


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
    assert "\ntests " in shown
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
    told = local.cli("report", "--eval", "cli", "--out", str(tmp_path)).stdout
    assert [told.count(f"baseline:{name} ") for name in scripts] == [1, 1, 1, 1]
    assert "4 attempts in all, 0 lost to the platform; 4 rows by pipeline and mode" in told
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

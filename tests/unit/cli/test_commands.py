"""Every command: its help, its place in the docs, completion, and how an interrupted one ends."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

from regreen.cli import output
from regreen.cli.main import make_app

DOCS = (Path(__file__).resolve().parents[3] / "docs" / "cli.md").read_text()
READS = (
    *("status", "doctor", "logs", "report", "tasks list", "tasks show", "tasks prepare"),
    *("traj list", "traj show", "state list", "state show", "state tree"),
    *("sandbox list", "sandbox show", "runs list", "runs show", "runs compare"),
)


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


app = make_app()
ROOT = typer.main.get_command(app)
EVERY = list(commands(ROOT))


def run(*words: str, **env: str):
    return CliRunner().invoke(app, list(words), env=env, prog_name="regreen")


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
def test_every_command_has_help_and_is_in_the_docs(path: tuple[str, ...]) -> None:
    done = run(*path, "--help", COLUMNS="200", NO_COLOR="1")
    assert done.exit_code == 0, done.output
    assert f"Usage: regreen {' '.join(path)}" in done.output
    assert f"`{' '.join(path)}" in DOCS


@pytest.mark.parametrize("option", ["pipeline", "mode", "grader", "actor"])
def test_an_unknown_word_is_refused_before_a_stack_is_looked_for(option: str, tmp_path) -> None:
    words = ["rollout", "run", "--task", "t", "--home", str(tmp_path), f"--{option}", "foo"]
    assert run(*words).exit_code == output.USAGE


@pytest.mark.parametrize("words", ["up", "down", "status", "logs", "demo", "tasks list", "eval"])
def test_a_home_that_cannot_be_used_is_named(words: str) -> None:
    more = ["--name", "e", "--subject", "base"] if words == "eval" else []
    done = run(*words.split(), *more, "--home", "/dev/null", NO_COLOR="1")
    assert done.exit_code == output.USAGE
    assert "home: /dev/null" in done.output


@pytest.mark.parametrize("words", READS)
def test_every_read_takes_json(words: str) -> None:
    command = ROOT
    for name in words.split():
        command = command.commands[name]
    assert "--json" in {flag for option in command.params for flag in option.opts}


def test_completion_is_printed_and_completes() -> None:
    script = run(_REGREEN_COMPLETE="source_bash").output
    assert "_REGREEN_COMPLETE=complete_bash" in script
    asked = {"_REGREEN_COMPLETE": "complete_bash", "COMP_WORDS": "regreen tasks ver"}
    assert run(**asked, COMP_CWORD="2").output.split() == ["verify"]
    assert "--install-completion" in DOCS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_exits_with_130(number: int) -> None:
    async def work() -> None:
        os.kill(os.getpid(), number)
        await asyncio.Event().wait()

    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    # A test run in the background begins with interrupts ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(typer.Exit) as ended:
            output.run(work())
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert ended.value.exit_code == 130


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("bench", "--out", str(tmp_path / "file" / "x"))
    assert done.exit_code == 2
    assert "name a directory you can write" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("foo", "engine: Input should be 'auto', 'openvino', 'torch'"),
        ("openai", "openai_url: is needed by engine openai; mend this setting of the policy"),
        ("sglang", "sglang_urls: is needed by engine sglang"),
    ],
)
def test_an_engine_that_cannot_run_starts_nothing(tmp_path: Path, engine: str, said: str) -> None:
    home = tmp_path / "home"
    done = run("up", "--home", str(home), "--engine", engine, COLUMNS="200")
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.output.split())
    assert not home.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("eval", "--set", "budgt.turns=8"), "budgt.turns"),
        (("eval", "--set", "budget.turns=abc"), "budget.turns"),
        (("train", "grpo", "--set", "budgt.turns=8"), "budgt.turns"),
        (("train", "sft", "--name", "bad name/../x"), "name: 'bad name/../x' is no name of a run"),
        (("train", "grpo", "--name", "-"), "name: '-' is no name of a run; give 1 to 100 letters"),
        (("eval", "--name", "base"), "name: 'base' means the untrained model; choose another"),
        (("tasks", "import", "."), "path: . is a project of its own; use `regreen tasks add .`"),
        (("tasks", "import", "/no/such.jsonl"), "path: /no/such.jsonl cannot be read: No such"),
        (("tasks", "import", "README.md"), "is no JSON"),
        (("tasks", "import", ".", "--format", "zip"), "format: 'zip' is not known; give one of"),
        (("tasks", "import", "--split", "test"), "are for tasks of other systems"),
        (("tasks", "export", "--format", "harbor"), "out: is not given; name a directory"),
        (("tasks", "export", "--format", "zip", "--out", "x"), "format: 'zip' is not known"),
        (("tasks", "export", "--format", "sft", "--out", "x", "--style", "y"), "style: 'y'"),
        (("tasks", "add", "/no/such"), "path: /no/such is no directory"),
        (("tasks", "add", "file:///no/such"), "path: file:///no/such cannot be cloned"),
        (("tasks", "add", ".", "--fix-commit", "a", "--fix-patch", "b"), "give one of them"),
        (("tasks", "verify"), "ids: none given"),
        (("fix", ".", "--lock", "/no/such.lock"), "No such file or directory"),
        (("fix", ".", "--lock", "README.md"), "has no name==version line"),
        (("fix", ".", "--endpoint", "http://127.0.0.1:9/v1"), "belongs with endpoint"),
        (("fix", ".", "--endpoint", "http:///v1", "--model", "m"), "give https://host/v1"),
        (("fix", ".", "--out", "/no/such/folder/x"), "is no file to write"),
        (("fix", ".", "--out", __file__), "is there already; name another, or give --force"),
        (("fix", ".", "--policy", "a", "--endpoint", "http://h", "--model", "m"), "leave out"),
    ],
)
def test_wrong_input_is_named(words: tuple[str, ...], said: str) -> None:
    done = run(*words, COLUMNS="200")
    assert done.exit_code == 2, done.output
    assert said in done.output

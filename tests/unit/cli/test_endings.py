"""How commands end: where nothing answers, with what cannot be taken, interrupted, unread."""

import ast
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from regreen.stack.layout import Layout

ROOT = Path(__file__).resolve().parents[3]
CLI = (sys.executable, "-m", "regreen.cli")
START = "`regreen up` starts the services, REGREEN_HOME or --home names the directory"


def run(*words: str, timeout_s: float = 60.0) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*CLI, *words], capture_output=True, text=True, timeout=timeout_s)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("sandbox list --address 127.0.0.1:1", "no service answers at 127.0.0.1:1; " + START),
        ("state list --address unix:/no/such", "no service answers at unix:/no/such; " + START),
        ("tasks mend --sandbox 127.0.0.1:1", "no service answers at 127.0.0.1:1; " + START),
    ],
)
def test_an_address_where_nobody_answers_is_told_at_once(words: str, said: str) -> None:
    began_s = time.monotonic()
    done = run(*words.split())
    assert time.monotonic() - began_s < 5
    assert done.returncode == 3
    assert said in " ".join(done.stderr.split())
    assert done.stderr.count("\n") <= 2


async def test_what_is_no_grpc_server_is_named() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        done = await asyncio.to_thread(run, "sandbox", "list", "--address", address)
    assert done.returncode == 3
    assert address in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stack_that_was_killed_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    left = {"endpoints": {"dataset": "127.0.0.1:1"}}
    (tmp_path / "run" / "stack.json").write_text(json.dumps(left))
    none_s = time.monotonic()
    assert run("tasks", "list", "--home", str(tmp_path / "none")).returncode == 3
    began_s = time.monotonic()
    done = run("tasks", "list", "--home", str(tmp_path))
    # As long as where there is no stack, and the 2 s that a service may be away.
    assert time.monotonic() - began_s < 3 * (began_s - none_s) + 4
    assert done.returncode == 3
    said = " ".join(done.stderr.split())
    assert f"no service answers at 127.0.0.1:1 (Connection refused); {START}" in said


@pytest.mark.parametrize("word", ["status --hom x", "tasks list --spl test", "up --eng torch"])
def test_a_part_of_an_option_is_none(word: str) -> None:
    done = run(*word.split())
    assert done.returncode == 2
    assert "No such option" in done.stderr


@pytest.mark.parametrize("service", ["dataset", "policy", "judge", "learner", "sandbox"])
def test_a_part_of_a_flag_of_a_service_is_none(service: str) -> None:
    command = [sys.executable, "-m", f"{service}_svc", "--check", "--hom", "/x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "unrecognized arguments: --hom" in done.stderr


def test_no_program_takes_a_part_of_a_flag() -> None:
    found = []
    folders = ("regreen", "policy_svc", "dataset_svc", "learner_svc", "judge_svc", "tests/load")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and re.search(r"Parser$", ast.unparse(node.func)):
                if "argparse" not in path.read_text():
                    continue
                words = {word.arg: ast.unparse(word.value) for word in node.keywords}
                found.append((path.name, words.get("allow_abbrev")))
    assert len(found) >= 12
    assert {value for _, value in found} == {"False"}, found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("status", "--home", ""), "nothing is given after --home; leave it out"),
        (("status", "--home="), "nothing is given after --home; leave it out"),
        (("state", "import", ""), "nothing is given after import; leave it out"),
        (("fix", ""), "nothing is given after fix; leave it out"),
        (("tasks", "mine", "--culprits", "README.md"), "README.md is no list of culprits"),
        (("tasks", "mine", "--again", "nope", "--report"), "again: 'nope' is unknown; give failed"),
        (("tasks", "mine", "--work", "/dev/null", "--report"), "/dev/null: File exists"),
        (("rollout", "run", "--task", "x", "--actor", "baseline:"), "baseline: '' is unknown"),
        (("train", "sft", "--hyper", "warmup_steps=inf"), "warmup_steps: is inf; give a number"),
        (("train", "sft", "--hyper", "learning_rate=-1"), "learning_rate: is -1; give a number"),
        (("logs", "dataset", "-n", "99999999999999"), "Invalid value for '-n'"),
        (("report", "--home", "/dev/null"), "home: /dev/null"),
    ],
)
def test_what_cannot_be_taken_is_usage_and_no_traceback(words: tuple[str, ...], said: str) -> None:
    done = run(*words)
    assert done.returncode == 2, done.stderr
    assert said in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


def interrupted(after_s: float, *words: str) -> "subprocess.Popen[str]":
    """A command that got an interrupt, as from a terminal, and has ended."""
    process = subprocess.Popen(
        [*CLI, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A test run in the background begins with interrupts ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    time.sleep(after_s)
    os.killpg(process.pid, signal.SIGINT)
    return process


@pytest.mark.parametrize("after_s", [0.2, 0.5])
def test_an_interrupt_while_it_is_still_loading_ends_it_quietly(after_s: float) -> None:
    process = interrupted(after_s, "tasks", "leaks", "--home", "/no/such/home")
    _, said = process.communicate(timeout=10)
    assert "Traceback" not in said
    # Done, where the machine is quick; a shell shows the end by the signal itself as 130 too.
    assert process.returncode in (3, 130, -signal.SIGINT)


def test_an_interrupted_up_ends_soon_and_leaves_nothing(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "home")
    words = ("up", "--home", str(layout.home), "--ports", "any")
    process = subprocess.Popen(
        [*CLI, *words], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    give_up_s = time.monotonic() + 30
    while not (layout.home.is_dir() and layout.supervised()) and time.monotonic() < give_up_s:
        time.sleep(0.05)
    assert layout.supervised()
    process.send_signal(signal.SIGTERM)
    began_s = time.monotonic()
    _, said = process.communicate(timeout=30)
    assert time.monotonic() - began_s < 20  # half a second where nothing else runs
    assert process.returncode == 130
    assert "interrupted; what was committed is kept" in said
    assert "Traceback" not in said
    assert not layout.supervised()


@pytest.mark.parametrize("words", ["tasks rules", "tasks rules --json", "--help", "doctor"])
def test_a_reader_that_leaves_is_no_trouble(words: str) -> None:
    process = subprocess.Popen(
        [*CLI, *words.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    process.wait(60)

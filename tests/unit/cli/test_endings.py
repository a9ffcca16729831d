"""How commands end where nothing answers, and what no command takes: part of an option's name."""

import ast
import asyncio
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
    began_s = time.monotonic()
    done = run("tasks", "list", "--home", str(tmp_path))
    assert time.monotonic() - began_s < 8
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

"""SWE-ReX's interfaces over a Regreen sandbox; its own local runtime says what is expected.

- One process of the frameworks runs a list of requests; what came back is compared here.
- "gather" sends its requests at once, "then" one after the other.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.adapters.conftest import HERE, ROOT, Script, World

pytestmark = [pytest.mark.registry, pytest.mark.asyncio(loop_scope="module")]
DRIVER = HERE / "rex_driver.py"
START, STOP, ALIVE = ["start", None, {}], ["stop", None, {}], ["is_alive", None, {}]
Request = list[Any]


def session(name: str = "default", **fields: Any) -> Request:
    return ["create_session", "CreateBashSessionRequest", {"session": name, **fields}]


def closed(name: str = "default") -> Request:
    return ["close_session", "CloseBashSessionRequest", {"session": name}]


def bash(command: str, **fields: Any) -> Request:
    return ["run_in_session", "BashAction", {"command": command, "timeout": 15, **fields}]


def interrupt(**fields: Any) -> Request:
    return ["run_in_session", "BashInterruptAction", fields]


def execute(command: str | list[str], **fields: Any) -> Request:
    return ["execute", "Command", {"command": command, "timeout": 15, **fields}]


def read(path: str, **fields: Any) -> Request:
    return ["read_file", "ReadFileRequest", {"path": path, **fields}]


def write(path: str, content: str) -> Request:
    return ["write_file", "WriteFileRequest", {"path": path, "content": content}]


def upload(source: Path, target: str) -> Request:
    return ["upload", "UploadRequest", {"source_path": str(source), "target_path": target}]


async def answers(world: World, script: Script, *requests: Request, **more: Any) -> list[Any]:
    """What the requests came back with, between a start and a stop."""
    config = {"type": "regreen", "address": world.address, "state_id": world.state_id, **more}
    printed = await script(DRIVER, json.dumps(config), given=[START, *requests, STOP])
    told = json.loads(printed)["answers"]
    assert told[0] is None, told[0]
    assert told[-1] is None, told[-1]
    return told[1:-1]


async def test_the_life_of_a_deployment(world: World, script: Script) -> None:
    config = {"type": "regreen", "address": world.address, "state_id": world.state_id}
    requests = [ALIVE, START, START, ALIVE, STOP, STOP, execute("true"), START, ALIVE, STOP]
    printed = json.loads(await script(DRIVER, json.dumps(config), given=requests))
    told = printed["answers"]
    assert told[0]["raised"] == told[6]["raised"] == "DeploymentNotStartedError"
    assert told[3] == told[8] == {"is_alive": True, "message": ""}
    assert [told[number] for number in (1, 2, 4, 5, 7, 9)] == [None] * 6
    assert printed["steps"] == ["Forking the state", "Sandbox is running"] * 2
    assert await world.count() == 0
    wrong = {**config, "state_id": "st_" + "0" * 32}
    (refused,) = json.loads(await script(DRIVER, json.dumps(wrong), given=[START]))["answers"]
    assert (refused["raised"], refused["rex"]) == ("DeploymentStartupError", True)


SAME = [
    bash("echo ''"),
    bash("printf '\\nx'"),
    bash("printf '\\n\\nx\\n\\n\\n'"),
    bash("printf '  x'"),
    bash("echo '\n \nhello\nworld'"),
    bash("nosuchprogram", check="ignore"),
    bash("false && true", check="silent"),
    bash("false || true"),
    bash("x=42"),
    bash("echo $x"),
    bash("export Y='a b'; f() { echo \"f $1\"; }"),
    bash('f "$Y"; env | grep ^Y='),
    bash("cd /usr/bin; umask 077"),
    bash("pwd; umask; cd - >/dev/null; umask 022"),
    bash("ls | grep -c ,,", check="silent"),
    bash(""),
    bash("\n\n \n"),
    bash("# nothing"),
    bash("\n\n echo 'one' \n  \n echo 'two' \n\n"),
    bash("python3 <<EOF\nprint('hello')\nprint('again')\nEOF"),
    bash("for i in {1..3};\n do echo 'hello';\n done"),
    bash("[[ $env == $env ]]"),
    bash("echo 'a';A=();echo 'b'"),
    bash("A=(); false", check="silent"),
    bash("(sleep 3) &", check="ignore"),
    bash("printf '\\033[31mred\\033[0m\\n'"),
    execute("echo 'hello world'", shell=True),
    execute(["echo", "-n", "\nhello world"]),
    execute("", shell=True, check=True),
    execute("echo out; echo err >&2; exit 4", shell=True),
    execute("echo out; echo err >&2", shell=True, merge_output_streams=True),
    execute("pwd", shell=True, cwd="/usr"),
    execute("echo $Q", shell=True, env={"Q": "1 2"}),
]


async def test_what_swe_rex_itself_answers(world: World, script: Script) -> None:
    ours = (await answers(world, script, session(), *SAME))[1:]
    local = await script(DRIVER, json.dumps({"type": "local"}), given=[START, session(), *SAME])
    theirs = json.loads(local)["answers"][2:]
    assert not [answer for answer in theirs if "raised" in answer]
    for request, one, other in zip(SAME, ours, theirs, strict=True):
        if request[2].get("check") == "ignore":  # the shell's own words differ: "bash: line 9: "
            one, other = one["exit_code"], other["exit_code"]
        else:
            one, other = ({**told, "expect_string": ""} for told in (one, other))
        assert one == other, request


async def test_failures_are_swe_rexs_own_exceptions(world: World, script: Script) -> None:
    told = await answers(
        world,
        script,
        session(),
        bash("false", error_msg="Oh no"),
        bash("exit 7"),
        bash("echo $((6 * 7)); false", check="ignore"),
        bash("(a"),
        bash("echo hi", session="nobody"),
        closed("nobody"),
        session(),
        execute(["sh", "-c", "echo why >&2; exit 3"], check=True, error_msg="Sorry"),
        execute(["sleep", "10"], timeout=0.2),
        execute(["no-such-program"]),
        read("/no/such/file"),
        read("/usr"),
        closed(),
        closed(),
        execute("pwd", shell=True, cwd="/no/such/place"),
        bash("echo \0"),
    )
    kinds = [answer and answer.get("raised") for answer in told]
    assert kinds == [
        None,
        "NonZeroExitCodeError",
        "NonZeroExitCodeError",
        None,
        "BashIncorrectSyntaxError",
        "SessionDoesNotExistError",
        "SessionDoesNotExistError",
        "SessionExistsError",
        "NonZeroExitCodeError",
        "CommandTimeoutError",
        None,
        "FileNotFoundError",
        "OSError",
        None,
        "SessionDoesNotExistError",
        "FileNotFoundError",
        "SessionDoesNotExistError",
    ]
    assert told[1]["message"].startswith("Oh no: Command 'false' failed with exit code 1")
    assert "exit code 7" in told[2]["message"]
    assert (told[3]["output"], told[3]["exit_code"]) == ("42\n", None)
    assert "syntax error" in told[4]["extra"]["bash_stderr"]
    assert "bash_stdout" in told[4]["extra"]
    assert "exit code 3" in told[8]["message"]
    assert "why" in told[8]["message"]
    assert told[10]["exit_code"] == 127


async def test_a_session_is_usable_after_a_timeout(world: World, script: Script) -> None:
    told = await answers(
        world,
        script,
        session(),
        bash("x=1"),
        bash("x=2; cd /tmp; echo part; sleep 60; echo never", timeout=0.5),
        interrupt(),
        bash("echo $x $PWD"),
        bash("trap '' INT; x=3; sleep 61", timeout=0.3),
        bash("echo $x; pgrep -c sleep || echo none"),
        interrupt(),
        bash("cat", timeout=5),
    )
    assert told[2]["raised"] == told[5]["raised"] == "CommandTimeoutError"
    assert told[3]["output"] == "part"
    assert told[4]["output"] == "2 /tmp\n"
    assert told[6]["output"] == "2\n0\nnone\n"  # it could not be asked: the shell from before holds
    assert (told[7]["output"], told[7]["exit_code"]) == ("", 0)
    assert told[8]["output"] == ""  # standard input is empty, not a terminal


async def test_a_running_command_is_interrupted(world: World, script: Script) -> None:
    waiting = "while [ ! -e /tmp/up ]; do sleep 0.02; done"
    stubborn = "import signal, time; signal.signal(2, signal.SIG_IGN); open('/tmp/up', 'w').close()"
    told = await answers(
        world,
        script,
        session(),
        session("other"),
        ["gather", None, [
            bash("y=5; touch /tmp/up; sleep 60; echo never", check="silent"),
            ["then", None, [bash(waiting, session="other"), interrupt(timeout=5.0)]],
        ]],
        bash("echo $y; rm -f /tmp/up"),
        ["gather", None, [
            bash(f"z=6; python3 -c \"{stubborn}; time.sleep(60)\"; echo never", check="silent"),
            ["then", None, [bash(waiting, session="other"), interrupt(timeout=0.5, n_retry=2)]],
        ]],
        bash("echo $z"),
    )  # fmt: skip
    assert told[2][0]["exit_code"] == 130
    assert "never" not in told[2][0]["output"]
    assert told[3]["output"] == "5\n"
    assert told[4][0]["exit_code"] == 130
    assert told[5]["output"] == "6\n"


async def test_interactive_programs(world: World, script: Script) -> None:
    python = {"is_interactive_command": True, "expect": [">>> "]}
    told = await answers(
        world,
        script,
        session(),
        bash("export NAME=Ada; cd /tmp"),
        bash("python3 -q", **python),
        bash("import os; print('hello', os.environ['NAME'], os.getcwd())", **python),
        bash("print('no such thing')", is_interactive_command=True, expect=["WONT"], timeout=0.3),
        bash("echo hello"),
        bash("quit()", is_interactive_quit=True),
        bash("echo hello $NAME"),
        bash("python3 -q", **python),
        bash("while True: pass\n", is_interactive_command=True, expect=[">>> "], timeout=0.5),
        interrupt(expect=[">>> "], timeout=2.0),
        bash("print(6 * 7)", **python),
        closed(),
        session(),
        bash("pgrep -c python3 || echo none"),
        bash("quit()", is_interactive_quit=True),
        bash("sleep 60", is_interactive_command=True, timeout=0.3),
        interrupt(timeout=2.0),
        bash("exit 3", is_interactive_command=True),
    )
    assert told[2]["expect_string"] == ">>> "
    assert told[3]["output"] == "hello Ada /tmp"
    assert told[4]["raised"] == "CommandTimeoutError"
    assert told[5]["raised"] == "SwerexException"
    assert "interactive program runs" in told[5]["message"]
    assert (told[6]["exit_code"], told[6]["expect_string"]) == (0, "SHELLPS1PREFIX")
    assert told[7]["output"] == "hello Ada\n"
    assert told[9]["raised"] == "CommandTimeoutError"
    assert "KeyboardInterrupt" in told[10]["output"]
    assert told[11]["output"] == "42"
    assert told[14]["output"] == "0\nnone\n"
    assert told[15]["raised"] == "SwerexException"
    assert told[16]["raised"] == "CommandTimeoutError"
    assert told[17]["expect_string"] == "SHELLPS1PREFIX"
    assert told[18]["expect_string"] == "SHELLPS1PREFIX"


async def test_sessions_run_side_by_side(world: World, script: Script) -> None:
    told = await answers(
        world,
        script,
        write("/work/rc", "Z=from-rc\necho sourced\n"),
        session("one", startup_source=["/work/rc"], startup_timeout=5),
        session("two"),
        ["gather", None, [bash("x=1; sleep 0.5", session="one"), bash("x=2", session="two")]],
        bash("echo $x $Z", session="one"),
        bash("echo $x ${Z-none}", session="two"),
        session("three", startup_source=["/no/such/file"], startup_timeout=5),
        closed("one"),
        closed("two"),
    )
    assert told[1]["output"] == "sourced\n"
    assert told[4]["output"] == "1 from-rc\n"
    assert told[5]["output"] == "2 none\n"
    assert "No such file" in told[6]["output"]


async def test_files_and_uploads(world: World, script: Script, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    (tree / "empty").mkdir()
    (tree / "bin" / "tool").write_text("#!/bin/sh\necho tool\n")
    (tree / "bin" / "tool").chmod(0o755)
    (tree / "notes.txt").write_text("notes")
    (tree / "link").symlink_to("notes.txt")
    (tree / "bin" / "back").symlink_to("..")
    pipe = tmp_path / "odd"
    pipe.mkdir()
    (pipe / "data").symlink_to("/dev/null")
    told = await answers(
        world,
        script,
        write("new/dir/a.txt", "grüße\r\n"),
        read("/work/repo/new/dir/a.txt"),
        write("run.sh", "echo one\n"),
        execute(["chmod", "750", "run.sh"]),
        write("/work/repo/run.sh", "echo two\n"),
        execute("stat -c %a run.sh && ./run.sh", shell=True),
        write("/work/big", "x" * (1 << 20)),
        read("/work/big"),
        execute(["truncate", "-s", "3M", "/work/big"]),
        read("/work/big"),
        write("/work/big", "x" * ((2 << 20) + 1)),
        execute("printf '\\377' >/work/bytes", shell=True),
        read("/work/bytes"),
        read("/work/bytes", errors="backslashreplace"),
        read("/work/bytes", encoding="latin-1"),
        upload(tree, "/work/tree"),
        execute("cd /work/tree && find . | sort | tr '\\n' ' '; bin/tool; cat link", shell=True),
        upload(tree / "notes.txt", "/work/copy.txt"),
        upload(tree / "notes.txt", "/work/tree/empty"),
        execute("cat /work/copy.txt /work/tree/empty/notes.txt", shell=True),
        upload(tree, "/work/tree"),
        upload(tmp_path / "nothing", "/work/nothing"),
        upload(pipe, "/work/odd"),
        file_bytes=2 << 20,
    )
    assert told[1]["content"] == "grüße\n"  # as Path.read_text reads it
    assert told[5]["stdout"] == "750\ntwo\n"
    assert len(told[7]["content"]) == 1 << 20
    for number in (9, 10):
        assert told[number]["raised"] == "OSError"
        assert f"file_bytes is {2 << 20}" in told[number]["message"]
    assert told[12]["raised"] == "UnicodeDecodeError"
    assert told[13]["content"] == "\\xff"
    assert told[14]["content"] == "ÿ"
    assert told[16]["stdout"] == (". ./bin ./bin/tool ./empty ./link ./notes.txt tool\nnotes")
    assert told[19]["stdout"] == "notesnotes"
    assert told[20] == {}
    assert told[21]["raised"] == "FileNotFoundError"
    assert told[22]["raised"] == "OSError"
    assert "neither a file nor a directory" in told[22]["message"]


async def test_output_and_state_are_bounded(world: World, script: Script) -> None:
    told = await answers(
        world,
        script,
        session(),
        bash("x=before; yes | head -c 500000"),
        bash("x=$(yes | head -c 200000); cd /tmp"),
        bash("echo $x $PWD"),
        output_bytes=1 << 16,
    )
    assert len(told[1]["output"]) < 70_000
    assert f"[... {500_000 - (1 << 16)} bytes dropped ...]" in told[1]["output"]
    assert "could not be kept" in told[2]["failure_reason"]
    assert told[3]["output"] == "before /work/repo\n"


async def test_a_session_outlives_a_restore_of_its_sandbox(world: World, script: Script) -> None:
    # A tree of rollouts: the shell is where it was, the files are those of the state.
    config = {"address": world.address, "state_id": world.state_id}
    told = json.loads(await script(HERE / "rex_restore.py", json.dumps(config)))
    assert told == ["kept /work/repo/sub", "gone"]


async def test_the_example(world: World, script: Script) -> None:
    printed = await script(ROOT / "examples" / "swe_rex_deployment.py", world.address)
    assert "stdout='Hello, world!\\n' stderr='' exit_code=0\n" in printed
    assert "output='test in /tmp\\n' exit_code=0" in printed
    assert "output='42\\n' exit_code=0" in printed
    assert await world.count() == 0

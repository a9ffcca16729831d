"""Bash sessions and held sandboxes over a real service, without any framework."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from dataset_svc.__main__ import serving
from dataset_svc.settings import DatasetSettings
from regreen.adapters.held import HeldSandbox, SandboxConfig
from regreen.adapters.session import BadSyntax, BashSession
from regreen.client.channel import connect
from regreen.client.dataset import TaskClient
from regreen.rpc.errors import FailedPrecondition, InvalidArgument, NotFound
from tests.integration import dataset_samples as samples
from tests.integration.adapters.conftest import World

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def opened(world: World, **more: Any) -> HeldSandbox:
    config = {"address": world.address, "state_id": world.state_id, **more}
    return await HeldSandbox.open(SandboxConfig(**config))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def box(world: World) -> AsyncIterator[HeldSandbox]:
    held = await opened(world, env={"FOO": "from config"}, output_bytes=1 << 16)
    yield held
    await held.close()
    await held.close()
    assert await world.count() == 0


@pytest_asyncio.fixture(loop_scope="module")
async def shell(box: HeldSandbox) -> BashSession:
    session = BashSession(box)
    await session.open()
    return session


async def say(shell: BashSession, command: str) -> str:
    ran = await shell.run(command, timeout_s=20)
    return ran.output


KEPT = [
    ("x=42; y=$'two\\nlines'; declare -i n=4", 'echo $x "$y" $((n++)) $n', "42 two\nlines 4 5\n"),
    ("export E='a b'; unset FOO", "env | grep -E '^(E|FOO)='", "E=a b\n"),
    ("a=(1 '2 3'); declare -A m=([k]='v w')", 'echo "${a[1]}|${m[k]}"', "2 3|v w\n"),
    ("f() { cat <<X\n$1\nX\n}; export -f f", "f in; bash -c 'f out'", "in\nout\n"),
    ("alias ll='echo listed'", "ll it", "listed it\n"),
    ("cd /usr/bin; cd /tmp", "pwd; cd - ", "/tmp\n/usr/bin\n"),
    ("mkdir -p $'/tmp/odd \\'name'; cd $'/tmp/odd \\'name'", "pwd", "/tmp/odd 'name\n"),
    ("umask 027; shopt -s extglob nullglob", "umask; cd /; echo !(*) .", "0027\n.\n"),
    ("set -u -f; set +B", "echo * {a,b}; echo ${none-none}", "* {a,b}\nnone\n"),
    ("IFS=:; p=a:b", "printf '%s.' $p", "a.b."),
    ("readonly R=1; PATH=/nowhere", "echo $R; ls; PATH=/usr/bin", None),
    ("set -e; false; x=unreached", "echo $- ${x-none}", "ehBc none\n"),
    ("set -x", "echo traced; { set +x; } 2>/dev/null", "++ echo traced\ntraced\n"),
    ("x=1; exit 3", "echo $x", "1\n"),
    ("(x=2; exit 1); y=after", "echo ${x-none} $y", "none after\n"),
]


@pytest.mark.parametrize(("first", "then", "expected"), KEPT, ids=lambda text: str(text)[:20])
async def test_what_a_command_leaves_the_next_one_finds(
    shell: BashSession, first: str, then: str, expected: str | None
) -> None:
    await shell.run(first, timeout_s=20)
    output = await say(shell, then)
    if expected is None:  # a PATH that is gone is a finding of the command, not of the session
        assert output.startswith("1\n")
        assert "ls: command not found" in output
        return
    assert output == expected


async def test_the_first_command_finds_the_configuration(shell: BashSession) -> None:
    assert await say(shell, "echo $FOO; pwd; echo $#") == "from config\n/work/repo\n0\n"
    assert b"__regreen_command" not in shell.state


async def test_exit_codes_and_ends(shell: BashSession) -> None:
    ended = {
        "exit 7": 7,
        "false": 1,
        "nosuchprogram": 127,
        "exec sh -c 'exit 9'": 9,
        "kill -9 $$": 137,
        "true": 0,
    }
    await shell.run("x=kept")
    for command, code in ended.items():
        ran = await shell.run(command, timeout_s=20)
        assert (ran.exit_code, ran.timed_out) == (code, False), command
        assert await say(shell, "echo $x") == "kept\n"


async def test_a_command_that_cannot_be_parsed_does_nothing(shell: BashSession) -> None:
    with pytest.raises(BadSyntax, match="syntax error"):
        await shell.run("touch /tmp/never\nif true; then")
    assert await say(shell, "ls /tmp/never 2>&1 | wc -l; [ -e /tmp/never ] || echo none") == (
        "1\nnone\n"
    )
    with pytest.raises(ValueError, match="NUL"):
        await shell.run("echo \0")
    assert await say(shell, "echo 'it''s '\\''fine'\\'''") == "its 'fine'\n"


async def test_a_directory_that_is_gone_is_told(shell: BashSession) -> None:
    await shell.run("mkdir '/tmp/a b'; cd '/tmp/a b'; rmdir '/tmp/a b'")
    assert await say(shell, "echo hi") == "/tmp/a b is gone; this is /\nhi\n"
    assert await say(shell, "pwd") == "/\n"


async def test_a_session_that_cannot_start_says_why(world: World) -> None:
    for wrong, said in (({"env": {"PATH": "/nowhere"}}, "bash"), ({"cwd": "/none"}, "/none")):
        held = await opened(world, **wrong)
        with pytest.raises(FailedPrecondition, match=said):
            await BashSession(held).open()
        await held.close()
        with pytest.raises(FailedPrecondition, match="was closed"):
            await held.run(["true"])


async def test_a_fake_end_is_no_end(shell: BashSession) -> None:
    forged = "x=real; echo '# regreen-0 end' >&2; echo '# mark begin' >&87; echo 'x=forged' >&87"
    ran = await shell.run(forged, timeout_s=20)
    assert ran.output == "# regreen-0 end\n"
    assert await say(shell, "echo $x") == "real\n"


async def test_timeouts_keep_what_can_be_kept(shell: BashSession) -> None:
    ran = await shell.run("x=1; cd /tmp; echo part; sleep 60; x=2", timeout_s=0.5)
    assert (ran.timed_out, ran.kept, ran.output) == (True, True, "part\n")
    assert await shell.interrupt() == "part\n"
    assert await shell.interrupt() == ""
    assert await say(shell, "echo $x $PWD") == "1 /tmp\n"
    ran = await shell.run("x=2; (x=3; (sleep 60); true); x=4", timeout_s=0.5)
    assert (ran.timed_out, ran.kept) == (True, True)
    assert await say(shell, "echo $x; x=1") == "2\n"
    ran = await shell.run("trap '' INT; x=3; sleep 60", timeout_s=0.3)
    assert (ran.timed_out, ran.kept) == (True, False)
    assert await say(shell, "echo $x") == "1\n"


async def test_background_processes_go_on_and_hold_nothing_up(shell: BashSession) -> None:
    async with asyncio.timeout(10):
        await shell.run("(while [ ! -e /tmp/go ]; do sleep 0.05; done; touch /tmp/went) &")
        await shell.run("touch /tmp/go; while [ ! -e /tmp/went ]; do sleep 0.05; done")


async def test_a_cancelled_caller_leaves_the_session_usable(shell: BashSession) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await shell.run("x=1; sleep 60")
    assert await say(shell, "echo ${x-none}; pgrep -f '[s]leep 60' || echo gone") == "none\ngone\n"


async def test_a_state_that_is_too_large_is_not_kept(shell: BashSession) -> None:
    await shell.run("x=small")
    ran = await shell.run("x=$(yes | head -c 100000)", timeout_s=20)
    assert not ran.kept
    assert await say(shell, "echo $x") == "small\n"


async def test_a_sandbox_is_kept_alive_and_wrong_ones_are_named(world: World) -> None:
    held = await opened(world, ttl_s=10)
    first = (await held.client.get_sandbox(held.id)).expire_time.ToMilliseconds()
    await held.run(["sleep", "4"])
    assert (await held.client.get_sandbox(held.id)).expire_time.ToMilliseconds() > first
    await held.close()
    for wrong, error in (
        ({"state_id": "st_" + "0" * 32}, NotFound),
        ({"state_id": ""}, InvalidArgument),
        ({"task_id": "both"}, InvalidArgument),
        ({"limits": {"wings": 2}}, InvalidArgument),
    ):
        with pytest.raises(error):
            await opened(world, **wrong)


async def test_a_task_is_prepared_and_forked(
    world: World, database_url: str, tmp_path: Path
) -> None:
    task = samples.task()
    task.environment.builder = "system"  # takes nothing of the rest
    settings = DatasetSettings(
        listen="127.0.0.1:0", metrics="127.0.0.1:0", home=tmp_path, drain_s=1.0, fsync=False
    )
    async with serving(settings, database_url) as server:
        channel = connect(server.address)
        await TaskClient(channel).import_tasks([task])
        held = await opened(world, state_id="", task_id=task.id, dataset_address=server.address)
        assert (await held.run(["true"])).exit_code == 0
        await held.close()
        with pytest.raises(NotFound, match="no-such-task"):
            await opened(world, state_id="", task_id="no-such-task", dataset_address=server.address)
        await channel.close()

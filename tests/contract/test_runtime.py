"""What every sandbox runtime must do: commands, files, layers."""

import asyncio
import platform
import time
from dataclasses import replace

import pytest

from regreen.allowlist import AllowList
from regreen.rpc.errors import FailedPrecondition, InvalidArgument, NoSuchFile, NotFound
from sandbox_svc.backends.base import Command, EndReason, Limits, Mount, NotAFile, Odd
from sandbox_svc.egress import Egress
from tests.contract.runtimes import SMALL, sh

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_exit_codes_signals_and_both_streams_are_told_apart(box):
    result = await sh(box, "echo out; echo err >&2; exit 3")
    assert (result.reason, result.exit_code) == (EndReason.EXIT, 3)
    assert (result.stdout.text, result.stderr.text) == ("out\n", "err\n")
    killed = await sh(box, "kill -9 $$")
    assert (killed.reason, killed.signal) == (EndReason.SIGNAL, 9)
    unknown = await box.run(Command(("no-such-program",), cwd="/"))
    assert (unknown.reason, unknown.exit_code) == (EndReason.EXIT, 127)


async def test_stdin_environment_and_directory_reach_the_command(box):
    result = await sh(
        box, "cat; echo $GIVEN; pwd", stdin=b"in\0put\n", env={"GIVEN": "yes"}, cwd="/usr"
    )
    assert result.stdout.head == b"in\0put\nyes\n/usr\n"


async def test_nothing_of_the_services_environment_leaks(box, monkeypatch):
    monkeypatch.setenv("REGREEN_SECRET_TOKEN", "hunter2")
    names = {line.partition("=")[0] for line in (await sh(box, "env")).stdout.text.splitlines()}
    assert "REGREEN_SECRET_TOKEN" not in names
    assert names <= {
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TZ", "TMPDIR", "TERM", "PWD"),
        *("HOSTNAME", "OLDPWD", "SHLVL", "_", "REGREEN_JOB"),
    }


async def test_a_box_can_have_an_environment_of_its_own(runtime):
    box = await runtime.create([], limits=SMALL, env={"A": "box", "B": "box"})
    result = await sh(box, "echo $A $B $TZ", env={"B": "command"})
    assert result.stdout.text == "box command UTC\n"


async def test_a_way_out_is_there_on_request_or_refused(runtime):
    egress = Egress()
    door = egress.door("sbx_test", AllowList.parse(["index.test"]))
    try:
        if runtime.name != "embedded":
            with pytest.raises(FailedPrecondition, match=r"egress: .* use --backend embedded"):
                await runtime.create([], limits=SMALL, door=door)
            return
        box = await runtime.create([], limits=SMALL, door=door)
        result = await sh(box, "echo $http_proxy")
        assert result.stdout.text == "http://127.0.0.1:3128\n"
        await box.delete()
    finally:
        await egress.close()


async def test_arguments_longer_than_one_message_arrive(box):
    long = "x" * 100_000
    result = await box.run(Command(("/bin/sh", "-c", 'printf %s "$1" | wc -c', "-", long), cwd="/"))
    assert result.stdout.text.strip() == "100000"


async def test_malformed_commands_name_the_field(box):
    for command, field in (
        (Command(()), "command.argv"),
        (Command(("a\0b",), cwd="/"), "command.argv"),
        (Command(("true",), cwd="/", env={"A": "b\0"}), "command.environment"),
        (Command(("true",), cwd="relative"), "command.cwd"),
        (Command(("true",), cwd="/does/not/exist"), "command.cwd"),
        (Command(("true",), cwd="/", env={"A=B": "c"}), "command.environment"),
        (Command(("true",), cwd="/", timeout_s=0), "command.timeout"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            await box.run(command)
        assert caught.value.field == field


async def test_time_out_kills_everything_that_the_command_started(box):
    began = time.monotonic()
    result = await sh(box, "sleep 300 & (setsid sleep 301 &) ; sleep 302", timeout_s=0.5)
    assert result.reason is EndReason.TIMEOUT
    assert time.monotonic() - began < 5.0
    left = (await sh(box, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")).stdout.text
    assert "sleep 30" not in left


HIDDEN = "env -i setsid sleep 311 & (env -i setsid env -i sleep 312 &) ; exec env -i sleep 313"


async def test_no_process_hides_from_the_end_of_its_command(box):
    other = asyncio.create_task(sh(box, "sleep 4; echo lived"))
    result = await sh(box, HIDDEN, timeout_s=1.0)
    assert result.reason is EndReason.TIMEOUT
    left = (await sh(box, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")).stdout.text
    assert "sleep 31" not in left
    task = asyncio.create_task(sh(box, HIDDEN))
    async with asyncio.timeout(10):
        await sh(box, "until grep -qzx '31[2]' /proc/[0-9]*/cmdline; do :; done")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    left = (await sh(box, "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '")).stdout.text
    assert "sleep 31" not in left
    assert (await other).stdout.text == "lived\n"


_HEADLESS = (
    bytes.fromhex("7f454c4602010100000000000000000002003e00010000007800400000000000")
    + bytes.fromhex("4000000000000000000000000000000000000000400038000100000000000000")
    + bytes.fromhex("0100000005000000000000000000000000004000000000000000400000000000")
    + bytes.fromhex("9c000000000000009c000000000000000010000000000000")
    + bytes.fromhex("b838000000bf0009010031f60f05")  # clone(VM | SIGHAND | THREAD)
    + bytes.fromhex("85c07409b83c00000031ff0f05")  # exit, of the first thread only
    + bytes.fromhex("b8220000000f05ebf7")  # the other pauses for ever
)
"""A program whose first thread ends: the kernel shows it as a zombie, with a thread that lives."""
_SEEN = """
until set -- $(grep -lx 'Name:.headless' /proc/[0-9]*/status 2>/dev/null) && [ $# = {} ] &&
  [ $(cat "$@" /dev/null | grep -c '^State:.Z') = {} ]
do :; done
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the program is for x86_64")
async def test_no_process_without_its_first_thread_outlives_its_command(box):
    await box.write_file("/work/home/headless", _HEADLESS, 0o755)
    other = asyncio.create_task(sh(box, "sleep 6; echo lived"))
    task = asyncio.create_task(sh(box, "$HOME/headless & $HOME/headless & sleep 300", timeout_s=3))
    assert (await sh(box, _SEEN.format(2, 2), timeout_s=2.5)).ok  # both look dead and live
    assert (await task).reason is EndReason.TIMEOUT
    assert (await sh(box, _SEEN.format(0, 0), timeout_s=5.0)).ok
    task = asyncio.create_task(sh(box, "$HOME/headless & exec $HOME/headless"))
    assert (await sh(box, _SEEN.format(2, 2), timeout_s=5.0)).ok
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await sh(box, _SEEN.format(0, 0), timeout_s=5.0)).ok
    assert (await other).stdout.text == "lived\n"
    process = await box.start(Command(("/work/home/headless",), cwd="/"))
    assert (await sh(box, _SEEN.format(1, 1), timeout_s=5.0)).ok
    assert await process.signal(15)
    assert (await process.wait()).signal == 15


async def test_a_command_that_closes_its_output_is_waited_for(box):
    began = time.monotonic()
    result = await sh(box, "exec > /dev/null 2>&1; sleep 1.5; exit 4")
    assert (result.reason, result.exit_code) == (EndReason.EXIT, 4)
    assert time.monotonic() - began > 1.4


async def test_a_sink_that_takes_nothing_holds_up_neither_time_nor_cancelling(box):
    async def never(stream: str, data: bytes) -> None:
        await asyncio.Event().wait()

    flood = Command(("/bin/sh", "-c", "while :; do echo xxxxxxxxxxxx; done"), cwd="/")
    task = asyncio.create_task(box.run(flood, never))
    await asyncio.sleep(1.0)  # it is full by then
    task.cancel()
    async with asyncio.timeout(15):
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_time_out_of_one_command_leaves_the_others_alone(box):
    slow = asyncio.create_task(sh(box, "sleep 2; echo lived"))
    short = await sh(box, "sleep 300", timeout_s=0.5)
    assert short.reason is EndReason.TIMEOUT
    assert (await slow).stdout.text == "lived\n"


async def test_a_daemon_that_holds_stdout_does_not_hold_the_call(box):
    began = time.monotonic()
    result = await sh(box, "echo begun; (setsid sleep 60 &) ; exit 0", timeout_s=20)
    assert result.ok
    assert result.stdout.text == "begun\n"
    assert time.monotonic() - began < 10.0


async def test_cancelling_the_call_kills_the_command(box):
    task = asyncio.create_task(sh(box, "echo up; sleep 300"))
    async with asyncio.timeout(10):
        await sh(box, "until grep -q '[s]leep.300' /proc/[0-9]*/cmdline; do :; done")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    left = await sh(box, "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '")
    assert "sleep 300" not in left.stdout.text


async def test_output_streams_while_the_command_runs(box):
    seen: list[tuple[str, bytes]] = []
    first = asyncio.Event()

    async def sink(stream: str, data: bytes) -> None:
        seen.append((stream, data))
        first.set()

    command = Command(("/bin/sh", "-c", "echo a; read line; echo b >&2; cat"), cwd="/")
    task = asyncio.create_task(box.run(command, sink))
    await asyncio.wait_for(first.wait(), 10)
    result = await task
    assert b"".join(data for stream, data in seen if stream == "stdout") == result.stdout.head
    assert ("stderr", b"b\n") in seen


async def test_a_flood_keeps_head_and_tail_and_counts_the_rest(box):
    script = "echo first; head -c 5000000 /dev/zero | tr '\\0' x; echo; echo last"
    result = await sh(box, script, output_bytes=1000)
    assert result.stdout.truncated
    assert result.stdout.total_bytes == 5_000_000 + len("first\n\nlast\n")
    assert result.stdout.head.startswith(b"first\n")
    assert result.stdout.tail.endswith(b"last\n")
    assert len(result.stdout.head) + len(result.stdout.tail) == 1000
    assert "bytes dropped" in result.stdout.text


async def test_a_result_channel_is_apart_from_the_output(box):
    script = 'echo visible; eval "printf secret >&$REGREEN_CHANNEL_FD"'
    result = await sh(box, script, channel=True)
    assert (result.stdout.text, result.channel) == ("visible\n", b"secret")


async def test_files_are_written_with_parents_and_read_back(box):
    await box.write_file("/work/repo/a/b/c.sh", b"#!/bin/sh\necho hi\n", 0o755)
    assert await box.read_file("/work/repo/a/b/c.sh", 100) == b"#!/bin/sh\necho hi\n"
    assert (await box.run(Command(("/work/repo/a/b/c.sh",), cwd="/"))).stdout.text == "hi\n"
    part, info = await box.read_range("/work/repo/a/b/c.sh", offset=2, max_bytes=4)
    assert (part, info.size_bytes, info.mode) == (b"/bin", 18, 0o755)
    await box.write_file("/work/repo/a/b/c.sh", b"short")
    assert await box.read_file("/work/repo/a/b/c.sh", 100) == b"short"


async def test_files_that_are_not_regular_or_too_large_are_refused(box):
    await sh(box, "mkfifo /work/pipe; truncate -s 60M /work/sparse; mkdir /work/dir")
    for path in ("/work/pipe", "/work/dir", "/dev/zero"):
        with pytest.raises(InvalidArgument):
            await box.read_file(path, 1000)
        with pytest.raises(InvalidArgument):
            await box.write_file(path, b"x")
    with pytest.raises(FailedPrecondition):
        await box.read_file("/work/sparse", 1 << 20)
    with pytest.raises(NotFound):
        await box.read_file("/work/none", 10)
    with pytest.raises(InvalidArgument):
        await box.read_file("relative", 10)


async def test_links_never_lead_out_of_the_sandbox(box, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    await sh(box, f"ln -s {secret} /work/out; ln -s ../../../../../..{secret} /work/up")
    for path in ("/work/out", "/work/up", f"/work/../../../{secret}"):
        with pytest.raises((NotFound, InvalidArgument)):
            await box.read_file(path, 100)
    await sh(box, "echo inside > /work/real; ln -s real /work/link; ln -s /work/made /work/new")
    assert await box.read_file("/work/link", 100) == b"inside\n"
    assert secret.read_text() == "of the host"


async def test_freezing_makes_a_layer_and_the_box_goes_on(runtime, box):
    await box.write_file("/work/repo/x", b"one")
    layer = await box.freeze()
    await box.write_file("/work/repo/x", b"two")
    assert await box.read_file("/work/repo/x", 10) == b"two"
    fork = await runtime.create([layer], limits=SMALL)
    assert await fork.read_file("/work/repo/x", 10) == b"one"
    assert layer in await runtime.layers()
    assert await runtime.layer_size(layer) > 0


async def test_children_and_parents_do_not_see_each_other(runtime, box):
    await sh(
        box,
        "cd /work/repo; echo p > kept; echo p > gone; mkdir d; echo p > d/in; ln kept hard;"
        " chmod 600 kept; touch -d @1000 kept",
    )
    layer = await box.freeze()
    one, two = [await runtime.create([layer], limits=SMALL) for _ in range(2)]
    await sh(one, "cd /work/repo; echo c >> hard; rm gone; chmod 777 kept; rm -r d; touch new")
    for other in (two, box):
        listing = "cd /work/repo; ls; cat kept hard gone d/in; stat -c '%a %Y' kept"
        seen = (await sh(other, listing)).stdout.text
        assert seen == "d\ngone\nhard\nkept\np\np\np\np\n600 1000\n"


async def test_changed_paths_name_every_difference(runtime, box):
    await sh(box, "cd /work/repo; echo 1 > a; echo 1 > b; mkdir d; echo 1 > d/x; echo 1 > d/y")
    layer = await box.freeze()
    fork = await runtime.create([layer], limits=SMALL)
    assert list(await fork.changed_paths("/work/repo")) == []
    await sh(fork, "cd /work/repo; echo 2 > a; rm b; rm -r d; mkdir d; echo 3 > d/z; chmod 700 a")
    expected = {f"/work/repo/{name}" for name in ("a", "b", "d/x", "d/y", "d/z")}
    assert expected <= set(await fork.changed_paths("/work/repo"))
    await fork.freeze()
    await fork.write_file("/work/repo/e", b"")
    assert {*expected, "/work/repo/e"} <= set(await fork.changed_paths("/work/repo"))


async def test_changed_paths_name_a_file_in_whose_place_a_directory_is(runtime, box):
    await sh(box, "cd /work/repo; echo 1 > a; echo 1 > b; ln -s a c; mkdir d; echo 1 > d/x")
    fork = await runtime.create([await box.freeze()], limits=SMALL)
    await sh(fork, "cd /work/repo; rm a b c; mkdir a b c; echo 2 > b/y; echo 2 > d/y")
    found = set(await fork.changed_paths("/work/repo"))
    assert {f"/work/repo/{name}" for name in ("a", "b", "b/y", "c", "d/y")} <= found
    assert "/work/repo/d" not in found


async def test_changed_paths_name_directories_in_which_there_is_nothing(runtime, box):
    await sh(box, "cd /work/repo; mkdir -p kept d; echo 1 > d/x")
    fork = await runtime.create([await box.freeze()], limits=SMALL)
    await sh(fork, "cd /work/repo; mkdir -p new/deep; mkdir full; echo 1 > full/x; rm d/x")
    found = set(await fork.changed_paths("/work/repo"))
    assert {"/work/repo/new/deep/.", "/work/repo/full/x", "/work/repo/d/x"} <= found
    assert not {"/work/repo/kept/.", "/work/repo/full/.", "/work/repo/new/."} & found


async def test_files_themselves_are_read_and_written_through_no_link(box):
    made = "cd /work; mkdir d; echo in > d/f; ln -s d l; ln -s d/f g; ln -s /nowhere n; mkfifo p"
    assert (await sh(box, made)).ok
    assert await box.read_file("/work/l/f", 100) == b"in\n"
    assert await box.read_file("/work/g", 100) == b"in\n"
    assert (await box.read_range("/work/d/f", max_bytes=9, follow=False))[0] == b"in\n"
    for path, kind, target in (
        ("/work/g", Odd.LINK, "d/f"), ("/work/n", Odd.LINK, "/nowhere"), ("/work/l", Odd.LINK, "d"),
        ("/work/d", Odd.DIRECTORY, ""), ("/work/p", Odd.OTHER, ""),
    ):  # fmt: skip
        with pytest.raises(NotAFile) as caught:
            await box.read_range(path, max_bytes=9, follow=False)
        assert (caught.value.kind, caught.value.target) == (kind, target)
    for path in ("/work/l/f", "/work/none", "/work/d/f/x"):
        with pytest.raises(NoSuchFile):
            await box.read_range(path, max_bytes=9, follow=False)
    with pytest.raises(NoSuchFile):
        await box.write_file("/work/l/f", b"out", follow=False)
    with pytest.raises(NoSuchFile):
        await box.write_file("/work/l/new/f", b"out", follow=False)
    await box.write_file("/work/g", b"own", follow=False)
    await box.write_file("/work/a/b/c", b"made", 0o755, follow=False)
    told = await sh(
        box, "cd /work; cat d/f g a/b/c; ls d; stat -c %a a/b/c; readlink g; readlink l"
    )
    assert told.stdout.text == "in\nownmadef\n755\nd\n"


async def test_mounts_are_read_only_and_appear_where_they_should(runtime, tmp_path):
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "wheel").write_text("content")
    (tmp_path / "file").write_text("single")
    mounts = [
        Mount(tmp_path / "house", "/wheelhouse/deep"),
        Mount(tmp_path / "file", "/opt/tool/file"),
    ]
    box = await runtime.create([], limits=SMALL, mounts=mounts)
    seen = await sh(box, "cat /wheelhouse/deep/wheel /opt/tool/file; echo x > /wheelhouse/deep/n")
    assert seen.stdout.text == "contentsingle"
    assert seen.exit_code != 0
    assert sorted(path.name for path in (tmp_path / "house").iterdir()) == ["wheel"]


async def test_a_deleted_box_and_a_dropped_layer_are_gone(runtime, box):
    layer = await box.freeze()
    await box.delete()
    await box.delete()
    with pytest.raises(NotFound):
        await sh(box, "true")
    await runtime.drop_layer(layer)
    await runtime.drop_layer(layer)
    with pytest.raises(FailedPrecondition):
        await runtime.create([layer], limits=SMALL)


async def test_many_commands_at_once_are_answered_each_with_its_own(box):
    results = await asyncio.gather(*(sh(box, f"echo {number}") for number in range(20)))
    assert [result.stdout.text for result in results] == [f"{number}\n" for number in range(20)]


async def test_loopback_works_inside_and_nothing_else_is_reachable(box):
    if not (await sh(box, "command -v python3")).ok:
        pytest.skip("the base file system of this runtime has no python3")
    script = (
        "import socket\n"
        "s = socket.create_server(('127.0.0.1', 0))\n"
        "c = socket.create_connection(s.getsockname())\n"
        "s.accept()[0].sendall(b'hello'); print(c.recv(5))\n"
        "for a in (('1.1.1.1', 80), ('169.254.169.254', 80), ('fe80::1%lo', 80)):\n"
        "    try: socket.create_connection(a, timeout=3); print('REACHED')\n"
        "    except OSError as e: print('refused')\n"
        "try: socket.getaddrinfo('example.org', 80); print('RESOLVED')\n"
        "except OSError: print('no names')\n"
    )
    out = (await box.run(Command(("python3", "-c", script), cwd="/"))).stdout.text
    assert out == "b'hello'\nrefused\nrefused\nrefused\nno names\n"


async def test_a_chain_of_layers_keeps_what_each_wrote(runtime, box):
    layers = []
    for number in range(12):
        await box.write_file(f"/work/repo/{number}", b"x")
        layers.append(await box.freeze())
    fork = await runtime.create(layers, limits=SMALL)
    assert len((await sh(fork, "ls /work/repo")).stdout.text.split()) == 12


async def test_limits_of_zero_mean_the_defaults(runtime):
    box = await runtime.create([], limits=Limits())
    assert (await sh(box, "true")).ok


async def test_a_limit_that_a_child_ran_into_is_told_whatever_the_command_says(runtime):
    box = await runtime.create([], limits=replace(SMALL, memory_bytes=48 << 20))
    grow = "x=$(head -c 200000000 /dev/zero | tr '\\0' x); echo ${#x}"
    swallowed = await sh(box, f"({grow}) 2>/dev/null || echo skipped", timeout_s=120)
    assert swallowed.stdout.text == "skipped\n"
    assert swallowed.reason is EndReason.EXIT
    if getattr(runtime, "cgroups", None) is not None and runtime.cgroups.name == "rlimit":
        assert swallowed.overruns == frozenset()  # nobody counts there
    else:
        assert swallowed.overruns == {EndReason.OOM}
    assert not (await sh(box, "exit 3")).overruns
    await box.delete()

"""What every runtime must do for a command that is spoken to while it runs."""

import asyncio
import signal

import pytest

from regreen.rpc.errors import FailedPrecondition, InvalidArgument
from sandbox_svc.backends.base import Command, EndReason, Limits, TerminalSize
from tests.contract.runtimes import SMALL, sh

pytestmark = pytest.mark.asyncio(loop_scope="module")
_WAIT_S = 20.0


def script(text: str, **options) -> Command:
    return Command(("/bin/sh", "-c", text), cwd="/", **options)


async def shows(process, text: bytes, stream: str = "stdout") -> bytes:
    """What was printed so far, once it contains `text`."""
    async with asyncio.timeout(_WAIT_S):
        while True:
            changed = process.changed.next()
            _, seen = getattr(process, stream).read(0, 1 << 20)
            if text in seen:
                return seen
            await changed.wait()


async def give(process, data: bytes) -> None:
    while data:
        data = data[await process.write(data) :]


async def test_input_is_given_while_it_runs_and_ends_when_it_is_closed(box):
    process = await box.start(script("cat; echo end >&2", open_stdin=True))
    await give(process, b"one\n")
    await shows(process, b"one\n")
    await give(process, b"two\n")
    await process.close_input()
    result = await process.wait()
    assert (result.reason, result.exit_code) == (EndReason.EXIT, 0)
    assert (result.stdout.head, result.stderr.head) == (b"one\ntwo\n", b"end\n")
    with pytest.raises(FailedPrecondition, match="input is closed"):
        await process.write(b"more")


async def test_input_that_is_not_left_open_comes_whole_and_ends(box):
    process = await box.start(script("cat", stdin=b"x" * 200_000))
    assert (await process.wait()).stdout.total_bytes == 200_000
    with pytest.raises(FailedPrecondition):
        await process.write(b"more")


async def test_a_full_pipe_makes_the_writer_wait_and_nothing_is_lost(box):
    text = "until [ -e /tmp/go ]; do sleep 0.05; done; wc -c"
    process = await box.start(script(text, open_stdin=True))
    given = 0

    async def fill() -> None:
        nonlocal given
        while True:
            given += await process.write(b"x" * 65_536)

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(fill(), 2)
    assert 0 < given < 16 << 20
    await sh(box, ": > /tmp/go")
    await give(process, b"12345")
    await process.close_input()
    assert int((await process.wait()).stdout.text) == given + 5


async def test_a_signal_reaches_the_whole_group_and_a_handler_runs(box):
    text = (
        "sleep 300 & until [ $(cat /proc/$!/comm) = sleep ]; do :; done;"
        " trap 'echo caught; exit 7' TERM; echo up; while :; do wait; done"
    )
    process = await box.start(script(text))
    await shows(process, b"up\n")
    assert await process.signal(signal.SIGTERM)
    result = await process.wait()
    assert (result.exit_code, result.stdout.text) == (7, "up\ncaught\n")
    assert not await process.signal(signal.SIGTERM)
    async with asyncio.timeout(_WAIT_S):  # the kernel ends the members in its own order
        await sh(box, "while grep -qsx sleep /proc/[0-9]*/comm; do sleep 0.05; done")


async def test_a_signal_without_a_handler_is_how_it_ended(box):
    process = await box.start(script("echo up; exec sleep 300"))
    await shows(process, b"up\n")
    assert await process.signal(signal.SIGINT)
    result = await process.wait()
    assert (result.reason, result.signal) == (EndReason.SIGNAL, signal.SIGINT)


async def test_signals_reach_a_command_with_an_empty_environment(box):
    text = (
        "echo up; exec env -i /bin/sh -c 'trap \"echo caught; exit 7\" TERM; while :; do :; done'"
    )
    process = await box.start(script(text))
    await shows(process, b"up\n")
    async with asyncio.timeout(_WAIT_S):
        await sh(box, "until grep -q '[t]rap' /proc/[0-9]*/cmdline; do :; done; sleep 0.3")
    assert await process.signal(signal.SIGTERM)
    result = await process.wait()
    assert (result.exit_code, result.stdout.text) == (7, "up\ncaught\n")


async def test_time_runs_out_and_cancelling_kills(box):
    process = await box.start(script("sleep 300", open_stdin=True, timeout_s=0.5))
    assert (await process.wait()).reason is EndReason.TIMEOUT
    process = await box.start(script("echo up; sleep 301"))
    await shows(process, b"up\n")
    waiting = asyncio.create_task(process.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    left = await sh(box, "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '")
    assert "sleep 30" not in left.stdout.text


async def test_a_terminal_is_the_controlling_one_with_its_size(box):
    text = "tty; stty size; test -t 2 && echo error too; echo $TERM; : > /dev/tty && echo own"
    process = await box.start(script(text, terminal=TerminalSize(31, 117)))
    result = await process.wait()
    lines = result.stdout.text.split("\r\n")
    assert lines[0].startswith("/dev/pts/")
    assert lines[1:] == ["31 117", "error too", "xterm-256color", "own", ""]
    assert result.stderr.total_bytes == 0


async def test_keys_interrupt_and_end_the_input_of_a_terminal(box):
    process = await box.start(script("cat; echo after", terminal=TerminalSize()))
    await give(process, b"line\n")
    await shows(process, b"line\r\nline\r\n")
    await process.close_input()
    assert (await process.wait()).stdout.text.endswith("after\r\n")
    process = await box.start(script("echo up; exec sleep 300", terminal=TerminalSize()))
    await shows(process, b"up\r\n")
    await give(process, b"\x03")
    result = await process.wait()
    assert (result.reason, result.signal) == (EndReason.SIGNAL, signal.SIGINT)


async def test_a_new_size_is_told(box):
    text = "trap 'stty size; exit' WINCH; echo up; while :; do read line; done"
    process = await box.start(script(text, terminal=TerminalSize()))
    await shows(process, b"up\r\n")
    await process.resize(TerminalSize(12, 34))
    seen = await shows(process, b"12 34\r\n")
    assert seen == b"up\r\n12 34\r\n"
    await process.wait()
    await process.resize(TerminalSize(56, 78))
    plain = await box.start(script("true"))
    with pytest.raises(FailedPrecondition, match="no terminal"):
        await plain.resize(TerminalSize())
    await plain.wait()


async def test_a_terminal_is_hung_up_when_its_command_ends(box):
    text = "trap '' HUP; (while sleep 0.1; do echo tick || { echo $? > /tmp/gone; exit; }; done) &"
    process = await box.start(script(f"{text} echo begun", terminal=TerminalSize()))
    assert (await process.wait()).ok
    wait = "until [ -s /tmp/gone ]; do sleep 0.05; done; echo gone"
    assert (await sh(box, wait, timeout_s=_WAIT_S)).stdout.text == "gone\n"


async def test_the_last_words_on_a_terminal_are_kept(box):
    text = "head -c 30000 /dev/zero | tr '\\0' x; echo; echo last"
    for _ in range(5):
        process = await box.start(script(text, terminal=TerminalSize()))
        result = await process.wait()
        assert result.stdout.total_bytes == 30_000 + len("\r\nlast\r\n")
        assert result.stdout.head.endswith(b"x\r\nlast\r\n")


async def test_output_keeps_its_places_past_the_cap(box):
    text = "for i in $(seq 10000 19999); do echo $i; done"
    process = await box.start(script(text, output_bytes=1200))
    await process.wait()
    assert process.stdout.total_bytes == 60_000
    assert process.stdout.read(0, 1 << 20)[0] == 0
    for place, first in ((594, 594), (600, 59_400), (59_994, 59_994)):
        offset, data = process.stdout.read(place, 6)
        assert (offset, data) == (first, b"%d\n" % (10_000 + first // 6))
    assert process.stdout.read(60_000, 10) == (60_000, b"")


async def test_deleting_and_freezing_end_it(runtime):
    box = await runtime.create([], limits=SMALL)
    process = await box.start(script("echo up; sleep 300", open_stdin=True))
    await shows(process, b"up\n")
    waiting = asyncio.create_task(process.wait())
    await box.freeze()
    result = await asyncio.wait_for(waiting, _WAIT_S)
    assert (result.reason, result.signal) == (EndReason.SIGNAL, 9)
    process = await box.start(script("echo up; sleep 300"))
    await shows(process, b"up\n")
    waiting = asyncio.create_task(process.wait())
    await box.delete()
    result = await asyncio.wait_for(waiting, _WAIT_S)
    assert (result.reason, result.signal) == (EndReason.SIGNAL, 9)


async def test_orphans_are_reaped(box):
    text = (
        "cp /bin/sleep /work/repo/orphan; for i in 1 2 3 4 5; do (setsid /work/repo/orphan 0.2 &);"
        " done; (setsid sh -c 'exit 3' &); echo up; cat"
    )
    process = await box.start(script(text, open_stdin=True))
    await shows(process, b"up\n")
    count = "cat /proc/[0-9]*/stat 2>/dev/null | grep -cE '[(]orphan[)]|[)] Z '"
    waiting = f"until [ $({count}) = 0 ]; do sleep 0.05; done; echo reaped"
    assert (await sh(box, waiting, timeout_s=_WAIT_S)).stdout.text == "reaped\n"
    await process.close_input()
    assert (await process.wait()).ok


async def test_terminals_of_one_sandbox_are_bounded(runtime):
    if runtime.name != "embedded":
        pytest.skip("the engine bounds them for all containers together")
    box = await runtime.create([], limits=SMALL)
    text = (
        "import os\nheld = []\n"
        "try:\n    while True: held.append(os.openpty())\n"
        "except OSError as error: print(len(held), error.strerror)\n"
    )
    process = await box.start(Command(("python3", "-c", text), cwd="/", terminal=TerminalSize()))
    assert (await process.wait()).stdout.text == "63 No space left on device\r\n"
    process = await box.start(script("tty", terminal=TerminalSize()))
    assert (await process.wait()).ok
    await box.delete()


async def test_what_cannot_be_started_says_so(box):
    for terminal in (None, TerminalSize()):
        process = await box.start(Command(("no-such-program",), cwd="/", terminal=terminal))
        result = await process.wait()
        assert (result.reason, result.exit_code) == (EndReason.EXIT, 127)
        with pytest.raises(InvalidArgument, match="cwd"):
            await box.start(Command(("true",), cwd="/does/not/exist", terminal=terminal))


async def test_more_memory_and_output_than_allowed_end_it(runtime):
    if runtime.name != "embedded":
        pytest.skip("told from a plain kill only by the embedded runtime")
    box = await runtime.create([], limits=Limits(memory_bytes=64 << 20, output_bytes=1 << 20))
    if runtime.cgroups.name != "rlimit":
        eat = "head -c 200000000 /dev/zero | tail -c 200000000 > /dev/null"
        process = await box.start(script(eat, open_stdin=True))
        assert (await process.wait()).reason is EndReason.OOM
    process = await box.start(script("yes", terminal=TerminalSize()))
    assert (await process.wait()).reason is EndReason.OUTPUT
    await box.delete()

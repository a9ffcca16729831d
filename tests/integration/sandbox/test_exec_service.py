"""Commands that outlive a call, over gRPC: input, signals, terminals, streams taken up again."""

import asyncio
import contextlib
import hashlib
import signal

import pytest

from regreen.client.channel import connect, new_request_id
from regreen.client.exec import ExecClient
from regreen.rpc.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from regreen.sandbox import v1 as pb
from tests.integration.sandbox.cutting import cutting
from tests.integration.sandbox.overlay import prepared

_WAIT_S = 20.0
_LINES = (
    "i=0; while [ $i -lt 4000 ]; do echo line $i; i=$((i+1)); [ $((i%40)) = 0 ] && sleep 0.02; done"
)


@pytest.fixture
async def execs(service):
    _, _, server = service
    async with connect(server.address) as channel:
        yield ExecClient(channel, patience_s=0.0)


@pytest.fixture
async def box(service):
    states, sandboxes, _ = service
    return await sandboxes.create_sandbox((await prepared(states, a="1")).id)


class Seen:
    """What a stream of events has said; its chunks must join without a gap unless one is told."""

    def __init__(self) -> None:
        self.stdout, self.stderr = bytearray(), bytearray()
        self.gaps: list[tuple[int, int]] = []
        self._ends = {"stdout": 0, "stderr": 0}
        self.ended: pb.CommandResult | None = None
        self._more = asyncio.Event()

    def add(self, event: pb.AttachExecResponse) -> None:
        assert self.ended is None
        kind = event.WhichOneof("event")
        if kind == "ended":
            self.ended = event.ended
        else:
            chunk = getattr(event, kind)
            assert chunk.data
            assert chunk.offset >= self._ends[kind]
            if chunk.offset > self._ends[kind]:
                self.gaps.append((self._ends[kind], chunk.offset))
            getattr(self, kind).extend(chunk.data)
            self._ends[kind] = chunk.offset + len(chunk.data)
        self._more.set()

    async def read(self, events) -> "Seen":
        async for event in events:
            self.add(event)
        return self

    async def until(self, text: bytes) -> None:
        async with asyncio.timeout(_WAIT_S):
            while text not in self.stdout:
                self._more.clear()
                await self._more.wait()


@contextlib.asynccontextmanager
async def watched(execs, box, execution, **places):
    """What is seen of a command, read beside the test; the command is waited for at the end."""
    seen = Seen()
    events = execs.attach_exec(box.id, execution.id, timeout_s=60, **places)
    task = asyncio.create_task(seen.read(events))
    yield seen
    await asyncio.wait_for(task, _WAIT_S)


async def test_cat_with_input_in_chunks_and_an_end(execs, box):
    execution = await execs.start_exec(box.id, ["cat"], stdin=b"first ", open_stdin=True)
    assert execution.stdin_bytes == 6
    async with watched(execs, box, execution) as seen:
        taken = await execs.write_stdin(box.id, execution.id, 6, b"second ")
        assert taken == 13
        assert await execs.write_stdin(box.id, execution.id, 6, b"second third ") == 19
        await seen.until(b"first second third ")
        with pytest.raises(InvalidArgument, match="go on from 19"):
            await execs.write_stdin(box.id, execution.id, 20, b"too far")
        for _ in range(2):
            assert await execs.write_stdin(box.id, execution.id, 13, b"third end", close=True) == 22
        with pytest.raises(FailedPrecondition, match="closed"):
            await execs.write_stdin(box.id, execution.id, 22, b"more")
    assert seen.stdout == b"first second third end"
    assert (seen.ended.reason, seen.ended.exit_code) == (pb.END_REASON_EXIT, 0)
    assert seen.ended.stdout.head == seen.stdout
    (listed,) = await execs.list_execs(box.id)
    assert (listed.id, list(listed.argv), listed.stdin_bytes) == (execution.id, ["cat"], 22)
    assert (listed.result.stdout.total_bytes, listed.result.stdout.head) == (22, b"")


async def test_no_line_is_lost_or_doubled_when_the_connection_is_cut(service, box):
    async with cutting(service[2].address) as proxy, connect(proxy.target) as channel:
        execs, seen, cuts = ExecClient(channel, patience_s=20), Seen(), 0
        async for event in execs.exec_stream(box.id, ["sh", "-c", _LINES]):
            seen.add(event)
            if len(seen.stdout) > 4000 * (cuts + 1):
                cuts += proxy.cut()
        assert seen.ended.exit_code == 0
        assert seen.stdout.decode() == "".join(f"line {number}\n" for number in range(4000))
        assert seen.gaps == []
        assert cuts >= 5
        assert proxy.connections > 5


async def test_no_input_is_lost_or_doubled_when_the_connection_is_cut(service, box):
    pieces = [hashlib.sha256(b"%d" % number).digest() * 2048 for number in range(32)]
    async with cutting(service[2].address) as proxy, connect(proxy.target) as channel:
        cuts = 0

        async def source():
            nonlocal cuts
            for number, piece in enumerate(pieces):
                if number % 4 == 2:
                    asyncio.get_running_loop().call_later(0.01, proxy.cut)
                    cuts += 1
                yield piece

        execs, seen = ExecClient(channel, patience_s=20), Seen()
        slow = "while head -c 20000 | grep -q ''; do sleep 0.001; done"
        command = ["sh", "-c", f"tee /tmp/copy | ({slow}); sha256sum < /tmp/copy"]
        await seen.read(execs.exec_stream(box.id, command, stdin=source()))
        digest = hashlib.sha256(b"".join(pieces)).hexdigest()
        assert seen.stdout.decode().split()[0] == digest
        assert cuts == 8
        assert proxy.connections > 3


async def test_a_python_prompt_on_a_terminal(execs, box):
    size = pb.TerminalSize(rows=30, columns=100)
    execution = await execs.start_exec(box.id, ["python3", "-q"], open_stdin=True, terminal=size)
    assert execution.terminal
    place = 0

    async def type_in(text: bytes) -> None:
        nonlocal place
        place = await execs.write_stdin(box.id, execution.id, place, text)

    async with watched(execs, box, execution) as seen:
        await seen.until(b">>> ")
        await type_in(b"6 * 7\n")
        await seen.until(b"42\r\n")
        await execs.resize_terminal(box.id, execution.id, 50, 132)
        await type_in(b"import os; code = os.system('stty size')\n")
        await seen.until(b"50 132\r\n")
        # Short naps: a signal just before a long one would be noticed after it.
        naps = b"any(time.sleep(0.1) for _ in iter(int, 1))"
        await type_in(b"import time; print('a' + 'sleep'); " + naps + b"\n")
        await seen.until(b"asleep\r\n")
        await type_in(b"\x03")
        await seen.until(b"KeyboardInterrupt")
        await type_in(b"exit(3)\n")
    assert (seen.ended.reason, seen.ended.exit_code) == (pb.END_REASON_EXIT, 3)
    assert seen.stderr == b""
    await execs.resize_terminal(box.id, execution.id, 0, 0)


async def test_a_signal_handler_runs(execs, box):
    text = (
        "sleep 300 & until [ $(cat /proc/$!/comm) = sleep ]; do :; done;"
        " trap 'echo caught; exit 9' TERM; echo up; while :; do wait; done"
    )
    execution = await execs.start_exec(box.id, ["sh", "-c", text])
    async with watched(execs, box, execution) as seen:
        await seen.until(b"up\n")
        for number in (0, 65, -1):
            with pytest.raises(InvalidArgument, match="signal"):
                await execs.signal_exec(box.id, execution.id, number)
        assert await execs.signal_exec(box.id, execution.id, signal.SIGTERM)
    assert seen.ended.exit_code == 9
    assert seen.stdout == b"up\ncaught\n"
    assert not await execs.signal_exec(box.id, execution.id, signal.SIGTERM)
    with pytest.raises(FailedPrecondition, match="never open"):
        await execs.write_stdin(box.id, execution.id, 0, b"x")
    with pytest.raises(FailedPrecondition, match="no terminal"):
        await execs.resize_terminal(box.id, execution.id, 10, 10)


async def test_a_flood_keeps_head_and_tail_with_honest_offsets(execs, box):
    text = "for i in $(seq 100000 149999); do echo $i; done; echo err >&2"
    execution = await execs.start_exec(box.id, ["sh", "-c", text], output_bytes=7000)
    await Seen().read(execs.follow_exec(box.id, execution.id))
    seen = await Seen().read(execs.follow_exec(box.id, execution.id))
    assert seen.gaps == [(3500, 346_500)]
    whole = b"".join(b"%d\n" % number for number in range(100_000, 150_000))
    assert bytes(seen.stdout) == whole[:3500] + whole[346_500:]
    assert seen.ended.stdout.total_bytes == 350_000
    assert (seen.ended.stdout.head, seen.ended.stdout.tail) == (whole[:3500], whole[346_500:])
    assert seen.stderr == b"err\n"
    later = await Seen().read(
        execs.attach_exec(box.id, execution.id, stdout_offset=349_993, stderr_offset=4)
    )
    assert (bytes(later.stdout), bytes(later.stderr)) == (b"149999\n", b"")
    for places in ({"stdout_offset": 350_001}, {"stderr_offset": 5}, {"stdout_offset": -1}):
        with pytest.raises(InvalidArgument, match="offset"):
            await Seen().read(execs.attach_exec(box.id, execution.id, **places))


async def test_many_readers_see_the_same_whenever_they_come(execs, box):
    execution = await execs.start_exec(box.id, ["sh", "-c", _LINES])
    early = [asyncio.create_task(_all(execs, box, execution)) for _ in range(4)]
    late = [await _all(execs, box, execution)]
    whole = "".join(f"line {number}\n" for number in range(4000)).encode()
    for seen in [*(await asyncio.gather(*early)), *late, await _all(execs, box, execution)]:
        assert seen.stdout == whole
        assert seen.ended.exit_code == 0


async def _all(execs, box, execution) -> Seen:
    return await Seen().read(execs.attach_exec(box.id, execution.id))


async def test_a_deadline_ends_the_wait_and_nothing_is_lost_or_doubled(execs, box):
    text = "trap : USR1; echo up; sleep 300 & wait; sha256sum"
    execution = await execs.start_exec(box.id, ["sh", "-c", text], open_stdin=True)
    data = bytes(range(256)) * 3000
    async with watched(execs, box, execution) as seen:
        await seen.until(b"up\n")
        with pytest.raises(DeadlineExceeded):
            await execs.write_stdin(box.id, execution.id, 0, data, timeout_s=0.5)
        (listed,) = await execs.list_execs(box.id)
        assert 0 < listed.stdin_bytes < len(data)
        again = asyncio.create_task(execs.write_stdin(box.id, execution.id, 0, data, close=True))
        await execs.signal_exec(box.id, execution.id, signal.SIGUSR1)
        assert await asyncio.wait_for(again, _WAIT_S) == len(data)
    assert seen.stdout.split()[1].decode() == hashlib.sha256(data).hexdigest()
    with pytest.raises(InvalidArgument, match="data"):
        await execs.write_stdin(box.id, execution.id, 0, bytes((1 << 20) + 1))


async def test_one_request_starts_one_command_even_if_its_caller_is_cut_off(execs, box, service):
    sandboxes, request_id = service[1], new_request_id()
    argv = ["sh", "-c", "echo ran >> /work/repo/runs; sleep 0.3"]
    first = asyncio.create_task(execs.start_exec(box.id, argv, request_id=request_id))
    await asyncio.sleep(0.002)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    found = await asyncio.gather(
        *(execs.start_exec(box.id, argv, request_id=request_id) for _ in range(3))
    )
    assert len({execution.id for execution in found}) == 1
    await _all(execs, box, found[0])
    assert (await sandboxes.read_file(box.id, "/work/repo/runs")).content == b"ran\n"
    with pytest.raises(InvalidArgument, match="request_id"):
        await execs.start_exec(box.id, ["true"], request_id=request_id)


async def test_so_many_are_kept_and_a_running_one_is_never_forgotten(execs, box):
    running = await execs.start_exec(box.id, ["sleep", "300"])
    ended = []
    for _ in range(33):
        ended.append(await execs.start_exec(box.id, ["true"]))
        await _all(execs, box, ended[-1])
    kept = await execs.list_execs(box.id)
    assert len(kept) == 32
    assert kept[0].id == running.id
    assert [one.id for one in kept[1:]] == [one.id for one in ended[2:]]
    with pytest.raises(NotFound, match="forgotten"):
        await _all(execs, box, ended[0])
    for _ in range(31):
        await execs.start_exec(box.id, ["sleep", "300"])
    with pytest.raises(ResourceExhausted, match="32 commands run"):
        await execs.start_exec(box.id, ["true"])
    assert await execs.signal_exec(box.id, running.id, signal.SIGKILL)
    assert (await _all(execs, box, running)).ended.reason == pb.END_REASON_SIGNAL
    await execs.start_exec(box.id, ["true"])


async def test_commands_end_with_the_files_they_stand_on(execs, box, service):
    sandboxes = service[1]
    argv = ["sh", "-c", "echo up; (setsid sleep 300 &); sleep 300"]
    for end in (
        lambda: sandboxes.snapshot_sandbox(box.id),
        lambda: sandboxes.restore_sandbox(box.id, box.state_id),
        lambda: sandboxes.delete_sandbox(box.id),
    ):
        execution = await execs.start_exec(box.id, argv, open_stdin=True)
        async with watched(execs, box, execution) as seen:
            await seen.until(b"up\n")
            await end()
        assert (seen.ended.reason, seen.ended.signal) == (pb.END_REASON_SIGNAL, 9)
    for gone in (execs.list_execs(box.id), execs.signal_exec(box.id, execution.id, 9)):
        with pytest.raises(NotFound):
            await gone


async def test_a_sandbox_does_not_expire_under_a_command(execs, service):
    states, sandboxes, _ = service
    state = await prepared(states, a="1")
    short = await sandboxes.create_sandbox(state.id, ttl_s=0.5)
    idle = await sandboxes.create_sandbox(state.id, ttl_s=0.5)
    execution = await execs.start_exec(short.id, ["sleep", "300"], timeout_s=3)
    seen = await _all(execs, short, execution)
    assert seen.ended.reason == pb.END_REASON_TIMEOUT
    assert (await _all(execs, short, execution)).ended == seen.ended
    with pytest.raises(NotFound):
        await sandboxes.get_sandbox(idle.id)


async def test_reasons_of_an_end(execs, service, box):
    states, sandboxes, _ = service
    limits = pb.Limits(memory_bytes=64 << 20, pids=16, disk_bytes=8 << 20, output_bytes=4 << 20)
    state = await prepared(states, a="1")
    expected = {
        "exit 4": pb.END_REASON_EXIT,
        "kill -11 $$": pb.END_REASON_SIGNAL,
        "yes": pb.END_REASON_OUTPUT,
        "head -c 200000000 /dev/zero | tail -c 200000000 > /dev/null": pb.END_REASON_OOM,
        "for i in $(seq 50); do sleep 5 & done; exit 1": pb.END_REASON_PIDS,
        "head -c 30000000 /dev/zero > /work/repo/big; sleep 300": pb.END_REASON_DISK,
    }
    for text, reason in expected.items():
        small = await sandboxes.create_sandbox(state.id, limits=limits)
        execution = await execs.start_exec(small.id, ["sh", "-c", text], timeout_s=20)
        seen = await _all(execs, small, execution)
        await sandboxes.delete_sandbox(small.id)
        assert seen.ended.reason == reason, (text, seen.ended)
    unknown = await execs.start_exec(box.id, ["no-such-program"])
    seen = await _all(execs, box, unknown)
    assert (seen.ended.exit_code, bytes(seen.stderr)) == (127, seen.ended.stderr.head)
    assert b"command not found" in seen.stderr
    with pytest.raises(InvalidArgument, match="cwd"):
        await execs.start_exec(box.id, ["true"], cwd="/does/not/exist")

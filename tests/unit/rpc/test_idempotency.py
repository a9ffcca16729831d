"""Repeated requests: one answer, done once, for as long and as many as is promised."""

import asyncio
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from regreen.rpc.answers import Room
from regreen.rpc.errors import Aborted, InvalidArgument, NotFound, ResourceExhausted, Unavailable
from regreen.rpc.idempotency import Idempotency, Leaving
from regreen.sandbox import v1 as pb

ROOT = Path(__file__).resolve().parents[3]


class Work:
    """What a servicer would do; counts how often it does it."""

    def __init__(self, size: int = 0) -> None:
        self.done, self._pad = 0, "x" * size

    async def __call__(self) -> pb.GetStateResponse:
        self.done += 1
        return pb.GetStateResponse(state=pb.State(id=f"st_{self.done}", python=self._pad))


def asked(name: str) -> pb.GetStateRequest:
    """A request that a name tells from others."""
    return pb.GetStateRequest(id=name)


async def test_an_answer_comes_back_as_it_was() -> None:
    memory, work = Idempotency(), Work()
    first = await memory.once("A/B", "r", asked("a"), work)
    again = await memory.once("A/B", "r", asked("a"), work)
    assert again == first
    assert isinstance(again, pb.GetStateResponse)
    assert work.done == 1
    await memory.once("A/C", "r", asked("a"), work)
    assert work.done == 2
    with pytest.raises(InvalidArgument, match="another request"):
        await memory.once("A/B", "r", asked("b"), work)
    memory.close()


async def test_what_is_too_old_is_done_again() -> None:
    now_s = [0.0]
    memory, work = Idempotency(ttl_s=10.0, clock=lambda: now_s[0]), Work()
    await memory.once("A/B", "3", asked("a"), work)
    now_s[0] = 9.0
    await memory.once("A/B", "3", asked("a"), work)
    assert work.done == 1
    now_s[0] = 11.0
    await memory.once("A/B", "3", asked("other"), work)  # an id that is free again
    assert work.done == 2
    memory.close()


async def test_one_too_many_is_known_to_have_been_done() -> None:
    now_s = [0.0]
    room = Room(entries=3, names=2)
    memory, work = Idempotency(ttl_s=10.0, room=room, clock=lambda: now_s[0]), Work()
    for number in range(5):
        await memory.once("A/B", str(number), asked("a"), work)
    await memory.once("A/B", "4", asked("a"), work)
    for number in ("0", "1"):
        with pytest.raises(Aborted, match=r"request_id.*no longer kept.*fresh id") as caught:
            await memory.once("A/B", number, asked("a"), work)
        assert caught.value.metadata == {"request_id": number}
    with pytest.raises(InvalidArgument, match="another request"):
        await memory.once("A/B", "0", asked("b"), work)
    assert work.done == 5
    await memory.once("A/B", "5", asked("a"), work)  # the oldest name goes as well
    await memory.once("A/B", "0", asked("a"), work)
    assert work.done == 7
    now_s[0] = 11.0
    await memory.once("A/B", "2", asked("a"), work)
    assert work.done == 8
    memory.close()


async def test_large_answers_push_out_large_ones_of_their_method_alone() -> None:
    memory = Idempotency(room=Room(large_bytes=25_000))
    small, large = Work(), Work(10_000)
    await memory.once("A/Create", "c", asked("a"), small)
    await memory.once("A/Run", "small", asked("a"), small)
    await memory.once("A/Fork", "large", asked("a"), large)
    for number in range(9):
        await memory.once("A/Run", str(number), asked("a"), large)
    assert (small.done, large.done) == (2, 10)
    await memory.once("A/Create", "c", asked("a"), small)
    await memory.once("A/Run", "small", asked("a"), small)
    await memory.once("A/Fork", "large", asked("a"), large)
    await memory.once("A/Run", "7", asked("a"), large)
    with pytest.raises(Aborted):
        await memory.once("A/Run", "6", asked("a"), large)
    await memory.once("A/Run", "whole", asked("a"), Work(30_000))  # larger than all may be
    with pytest.raises(Aborted):
        await memory.once("A/Run", "whole", asked("a"), large)
    assert (await memory.once("A/Run", "8", asked("a"), large)).state.id == "st_10"
    assert (small.done, large.done) == (2, 10)
    memory.close()


class Held:
    """Work that waits to be told, and says how it ended."""

    def __init__(self) -> None:
        self.begun = self.done = self.broken = 0
        self.proceed, self.undone = asyncio.Event(), asyncio.Event()
        self.undone.set()

    async def __call__(self) -> pb.GetStateResponse:
        self.begun += 1
        try:
            await self.proceed.wait()
        except asyncio.CancelledError:
            await self.undone.wait()
            self.broken += 1
            raise
        self.done += 1
        return pb.GetStateResponse(state=pb.State(id=f"st_{self.done}"))


async def left(memory: Idempotency, work: Held, leaving: Leaving, calls: int = 1) -> None:
    """Callers that come, and go away again."""
    for _ in range(calls):
        call = memory.once("A/B", "r", asked("a"), work, leaving)
        caller = asyncio.ensure_future(call)
        for _ in range(4):
            await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller


async def test_work_goes_on_for_callers_that_left() -> None:
    memory, work = Idempotency(), Held()
    await left(memory, work, Leaving.GOES_ON, calls=5)
    work.proceed.set()
    answer = await memory.once("A/B", "r", asked("a"), work)
    assert (answer.state.id, work.begun, work.broken) == ("st_1", 1, 0)
    memory.close()


async def test_work_that_ends_with_its_callers_keeps_its_id_until_it_has_ended() -> None:
    memory, work = Idempotency(), Held()
    work.undone.clear()
    await left(memory, work, Leaving.ENDS)
    again = asyncio.ensure_future(memory.once("A/B", "r", asked("a"), work, Leaving.ENDS))
    for _ in range(10):
        await asyncio.sleep(0)
    assert (work.begun, work.broken, again.done()) == (1, 0, False)
    with pytest.raises(InvalidArgument, match="another request"):
        await memory.once("A/B", "r", asked("b"), work, Leaving.ENDS)
    work.undone.set()
    work.proceed.set()
    assert (await again).state.id == "st_1"
    assert (work.begun, work.broken, work.done) == (2, 1, 1)
    memory.close()


async def test_what_was_broken_off_is_not_begun_again() -> None:
    memory, work = Idempotency(), Held()
    await left(memory, work, Leaving.BREAKS)
    for _ in range(2):
        with pytest.raises(Aborted, match="'r' was begun, and broken off"):
            await memory.once("A/B", "r", asked("a"), work, Leaving.BREAKS)
    assert (work.begun, work.broken) == (1, 1)
    memory.close()


async def test_work_for_callers_that_left_is_bounded_in_number_and_time() -> None:
    memory, work = Idempotency(max_flights=2, flight_s=0.2), Held()
    for name in ("r1", "r2"):
        caller = asyncio.ensure_future(memory.once("A/B", name, asked("a"), work))
        await asyncio.sleep(0)
        caller.cancel()
    with pytest.raises(ResourceExhausted) as caught:
        await memory.once("A/B", "r3", asked("a"), work)
    assert caught.value.retry_after_s
    for name in ("r1", "r2"):
        with pytest.raises(TimeoutError):
            await memory.once("A/B", name, asked("a"), work)
    work.proceed.set()
    for name in ("r1", "r2", "r3"):  # what failed is not kept
        await memory.once("A/B", name, asked("a"), work)
    assert work.done == 3
    memory.close()


async def test_the_end_of_a_server_waits_for_work_and_then_breaks_it_off() -> None:
    memory, quick, slow = Idempotency(), Held(), Held()
    for name, work in (("quick", quick), ("slow", slow)):
        caller = asyncio.ensure_future(memory.once("A/B", name, asked("a"), work))
        for _ in range(4):
            await asyncio.sleep(0)
        caller.cancel()
    asyncio.get_running_loop().call_later(0.05, quick.proceed.set)
    await memory.finish(0.2)
    assert (quick.done, slow.done, slow.broken) == (1, 0, 1)
    with pytest.raises(Unavailable):
        await memory.once("A/B", "new", asked("a"), quick)
    memory.close()


async def test_an_answer_is_kept_though_its_caller_left_as_it_came() -> None:
    memory, done = Idempotency(), 0
    proceed = asyncio.Event()

    async def work() -> pb.GetStateResponse:
        nonlocal done
        await proceed.wait()
        done += 1
        caller.cancel()
        return pb.GetStateResponse()

    caller = asyncio.ensure_future(memory.once("A/B", "r", asked("a"), work))
    await asyncio.sleep(0)
    proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await memory.once("A/B", "r", asked("a"), work)
    assert done == 1
    memory.close()


async def test_a_failure_is_tried_again() -> None:
    memory, tries = Idempotency(), 0

    async def work() -> pb.GetStateResponse:
        nonlocal tries
        tries += 1
        raise NotFound("no such state")

    for _ in range(2):
        with pytest.raises(NotFound):
            await memory.once("A/B", "r", asked("a"), work)
    assert tries == 2
    memory.close()


_MANY = """
import asyncio, resource, sys
from regreen.rpc.errors import Aborted
from regreen.rpc.idempotency import Idempotency
from regreen.sandbox import v1 as pb

if len(sys.argv) > 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))

def resident_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

async def main():
    memory, done = Idempotency(), 0
    async def work():
        nonlocal done
        done += 1
        return pb.GetStateResponse(state=pb.State(id=f"st_{done}", python="x" * 200))
    async def ask(number):
        return await memory.once("A/B", str(number), pb.GetStateRequest(id="a"), work)
    for number in range(10_000):
        await ask(number)
    before = resident_bytes()
    for number in range(10_000, 20_000):
        await ask(number)
    grown = resident_bytes() - before
    refused = 0
    for number in (19_999, 15_000, 11_000, 0):
        try:
            await ask(number)
        except Aborted:
            refused += 1
    print(done, refused, grown, memory._answers.in_memory)
    memory.close()

asyncio.run(main())
"""


def _many(*arguments: str) -> tuple[int, int, int, bool]:
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_MANY), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    done, refused, grown, in_memory = ended.stdout.split()[-4:]
    return int(done), int(refused), int(grown), in_memory == "True"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_what_is_remembered_is_not_resident() -> None:
    done, refused, grown, in_memory = _many()
    assert (done, refused, in_memory) == (20_000, 0, False)
    assert grown < 10_000 * 50  # kept as messages, they took 1,600 bytes each


def test_a_full_disk_makes_the_memory_shorter_and_fails_nothing() -> None:
    done, refused, _, in_memory = _many("2000000")
    assert in_memory
    assert (done, refused) == (20_000, 1)  # the oldest answer is lost, and nothing was done again

"""Repeated requests: one answer, done once, for as long and as many as is promised."""

import asyncio
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from regreen.rpc.errors import InvalidArgument, NotFound
from regreen.rpc.idempotency import Idempotency
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


async def test_what_is_too_old_or_one_too_many_is_done_again() -> None:
    now_s = [0.0]
    memory, work = Idempotency(ttl_s=10.0, max_entries=3, clock=lambda: now_s[0]), Work()
    for number in range(4):
        await memory.once("A/B", str(number), asked("a"), work)
    await memory.once("A/B", "3", asked("a"), work)
    assert work.done == 4
    await memory.once("A/B", "0", asked("a"), work)
    assert work.done == 5
    now_s[0] = 11.0
    await memory.once("A/B", "3", asked("other"), work)  # an id that is free again
    assert work.done == 6
    memory.close()


async def test_bytes_are_bounded() -> None:
    memory, work = Idempotency(max_bytes=25_000), Work(10_000)
    for number in range(3):
        await memory.once("A/B", str(number), asked("a"), work)
    await memory.once("A/B", "1", asked("a"), work)
    assert work.done == 3
    await memory.once("A/B", "0", asked("a"), work)
    assert work.done == 4
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
    for number in (19_999, 15_000, 11_000, 0):
        await ask(number)
    print(done, grown, memory._answers.in_memory)
    memory.close()

asyncio.run(main())
"""


def _many(*arguments: str) -> tuple[int, int, bool]:
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_MANY), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    done, grown, in_memory = ended.stdout.split()[-3:]
    return int(done), int(grown), in_memory == "True"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_what_is_remembered_is_not_resident() -> None:
    done, grown, in_memory = _many()
    assert (done, in_memory) == (20_000, False)
    assert grown < 10_000 * 50  # kept as messages, they took 1,600 bytes each


def test_a_full_disk_makes_the_memory_shorter_and_fails_nothing() -> None:
    done, _, in_memory = _many("2000000")
    assert in_memory
    assert done == 20_001  # the oldest alone was forgotten and done again

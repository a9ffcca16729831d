"""Tests shared among several forks: the verdict of one run, or it is run again by one."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio

from sandbox_svc import metrics
from sandbox_svc.backends.base import Limits
from sandbox_svc.builders.base import FileChange
from sandbox_svc.state_records import State
from sandbox_svc.validate import Outcome, Validation, ValidationOptions, Validator
from sandbox_svc.verdicts import Plan, difference
from sandbox_svc.workers import Proof, Workers, WorkerSettings, shares
from tests.fixtures.tasks.tiny_task import FAIL_TO_PASS
from tests.integration.sandbox_build.suite import (
    FILES,
    FIX,
    GREET,
    LATE,
    WHOLE,
    Suite,
    open_suite,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
LIMITS = Limits(
    memory_bytes=2 << 30,
    pids=256,
    cpus=3.0,
    disk_bytes=1 << 30,
    inodes=50_000,
    output_bytes=8 << 20,
)
TWO = WorkerSettings(most=2, check_share=0.0, least_s=0.0, gain=100.0)
WRONG = FileChange(GREET, b"def greeting(name):\n    return 'Hello'\n")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def suite() -> AsyncIterator[Suite]:
    async with open_suite() as found:
        yield found


class Case:
    """A validator with workers and one without, on one state."""

    def __init__(
        self, suite: Suite, state: State | None = None, settings: WorkerSettings = TWO
    ) -> None:
        self.state = state or suite.state
        self.workers = Workers(
            suite.states, suite.runtime, suite.home, limits=LIMITS, settings=settings
        )
        self.many = Validator(suite.states, suite.runtime, limits=LIMITS, workers=self.workers)
        self.one = Validator(suite.states, suite.runtime, limits=LIMITS)

    async def judge(self, *changes: FileChange, **options: object) -> Validation:
        chosen = ValidationOptions(**options)  # type: ignore[arg-type]
        verdict = await self.many.validate(self.state.id, changes, chosen)
        await self.many.checked()
        return verdict

    async def alone(self, *changes: FileChange) -> Validation:
        return await self.one.validate(self.state.id, changes)

    async def proven(self) -> None:
        """Show that workers say the same, as a passing validation does."""
        if self.workers.why_not(self.state.id):
            first = await self.judge(FIX)
            assert (first.outcome, first.workers) == (Outcome.PASSED, 1), first.summary
            self.many._cache.clear()
        assert not self.workers.why_not(self.state.id)


def again() -> float:
    return metrics.WORKER_RUNS.labels("alone")._value.get()


async def test_a_state_is_run_by_workers_once_that_was_shown_to_be_the_same(suite: Suite) -> None:
    case = Case(suite)
    first = await case.judge(WRONG)
    assert (first.workers, first.outcome) == (1, Outcome.FAILED)
    assert "not shown" in case.workers.why_not(case.state.id), "a failure shows nothing"
    await case.proven()
    assert not case.workers.why_not(case.state.id)
    for changes in ([FIX], [WRONG, FileChange("greet/more.py", b"")], []):
        shared, serial = await case.judge(*changes), await case.alone(*changes)
        assert (shared.workers, serial.workers) == (2, 1)
        assert not difference(shared, serial)
        assert shared.counts == serial.counts
        assert shared.summary == serial.summary
        assert not shared.partial
    assert (await case.alone(FIX)).outcome is Outcome.PASSED
    later = Case(suite)
    assert not later.workers.why_not(case.state.id), "it is known after a restart too"
    assert (await later.judge(FIX)).workers == 2
    three = Case(suite, settings=replace(TWO, most=3))
    assert three.workers.why_not(case.state.id), "it was shown for two"


async def test_an_independent_look_is_one_run(suite: Suite) -> None:
    case = Case(suite)
    await case.proven()
    assert (await case.judge(FIX)).workers == 2
    fresh = await case.many.validate(case.state.id, [FIX], skip_cache_lookup=True)
    assert (fresh.workers, fresh.outcome) == (1, Outcome.PASSED)
    assert (await case.judge(FIX)).workers == 1, "and is what is kept"


async def test_parts_and_other_conditions_are_one_run(suite: Suite) -> None:
    case = Case(suite)
    await case.proven()
    for options in ({"stop_early": True}, {"only_tests": (LATE,)}, {"coverage": True}, {"seed": 3}):
        assert (await case.judge(FIX, **options)).workers == 1


async def test_what_is_not_worth_it_is_not_tried(suite: Suite) -> None:
    files = {**FILES, "tests/test_b_second.py": "def test_second():\n    assert True\n"}
    state = await suite.prepared("small", files, fail_to_pass=(*FAIL_TO_PASS, WHOLE))
    for settings in (WorkerSettings(most=2), replace(TWO, gain=0.1), replace(TWO, most=1)):
        case = Case(suite, state, settings)
        await case.judge(FIX)
        assert "not shown" in case.workers.why_not(state.id)
    case = Case(suite, state)
    await case.proven()
    assert not case.workers.why_not(state.id)


SEES = b"""
import os, sys
def greeting(name):
    others = [p for p in os.listdir("/tmp") if p.startswith("mine-")]
    with open(f"/tmp/mine-{os.getpid()}", "w"):
        pass
    with open("/work/repo/written", "a") as file:
        file.write("x")
    lonely = os.path.getsize("/work/repo/written") < 4 and len(others) <= 1
    return f"Hello, {name}!" if lonely else "crowded"
"""


async def test_workers_share_no_file_and_no_process(suite: Suite) -> None:
    case = Case(suite)
    await case.proven()
    shared = await case.judge(FileChange(GREET, SEES))
    assert shared.workers == 2
    assert shared.outcome is Outcome.PASSED, shared.summary


DEPENDENT = {
    **FILES,
    "tests/test_b_writes.py": (
        "import pathlib, time\n\n\ndef test_writes():\n    import greet\n"
        "    time.sleep(0.4)\n    pathlib.Path('/tmp/left').write_text('x')\n"
    ),
    "tests/test_c_reads.py": (
        "import pathlib, time\n\n\ndef test_reads():\n    import greet\n"
        "    time.sleep(0.3)\n    assert pathlib.Path('/tmp/left').exists()\n"
    ),
}


async def test_files_that_depend_on_one_another_keep_a_state_from_workers(suite: Suite) -> None:
    state = await suite.prepared("dependent", DEPENDENT)
    case = Case(suite, state)
    before = metrics.WORKER_MISMATCHES._value.get()
    assert (await case.judge(FIX)).outcome is Outcome.PASSED
    assert "passed and failed" in case.workers.why_not(state.id)
    assert metrics.WORKER_MISMATCHES._value.get() == before + 1
    case.many._cache.clear()
    assert (await case.judge(FIX)).workers == 1
    later = Case(suite, state)
    assert "differed" in later.workers.why_not(state.id), "for good"


APART = {
    **FILES,
    "tests/test_a_first.py": "import time\n\n\ndef test_first():\n    time.sleep(0.3)\n",
    WHOLE: FILES[WHOLE].replace("    assert", "    import time\n    time.sleep(0.4)\n    assert"),
}
"""So long that the others go with the first of them, and `test_y_whole.py` is alone."""
STATEFUL = b"""
import os
def greeting(name):
    if os.environ.get("PYTEST_CURRENT_TEST", "").startswith("tests/test_y"):
        return "Hello" if os.environ.get("GREETED") else ""
    os.environ["GREETED"] = "1"
    return f"Hello, {name}!"
"""


async def test_a_verdict_that_one_run_contradicts_ends_it_for_good(suite: Suite) -> None:
    state = await suite.prepared("apart", APART, fail_to_pass=(*FAIL_TO_PASS, WHOLE))
    case = Case(suite, state, replace(TWO, check_share=1.0))
    await case.proven()
    proof = case.workers._known[state.id]
    assert isinstance(proof, Proof)
    place = proof.share()
    assert place["tests/test_greet.py"] != place[WHOLE], "else this shows nothing"
    change = FileChange(GREET, STATEFUL)
    told = await case.many.validate(state.id, [change])
    assert (told.workers, told.outcome) == (2, Outcome.FAILED)
    await case.many.checked()
    kept = await case.many.validate(state.id, [change])
    assert (kept.cached, kept.workers, kept.outcome) == (True, 1, Outcome.PASSED)
    assert "differed" in case.workers.why_not(state.id)


async def test_a_state_that_is_deleted_meanwhile_leaves_nothing(suite: Suite) -> None:
    case = Case(suite)
    gone = replace(suite.state, id="st_gone")
    plan = Plan(gone, (), (), None, ValidationOptions(), "")
    proof = Proof(gone.created_s, 2, {})
    await case.many._try_workers(plan, await case.alone(FIX), proof, case.workers)
    case.workers.prove(gone.id, proof)
    case.workers.differed(gone.id, "passed and failed")
    assert not (suite.home / "workers" / gone.id).exists()
    assert gone.id not in case.workers._known


ENDS = {
    "exit": (b"import os\nos._exit(0)\n", Outcome.BUILD_FAILED),
    "kill": (b"import os\nos.kill(os.getpid(), 9)\n", Outcome.FAILED),
    "memory": (b"held = [bytearray(1 << 20) for _ in range(4000)]\n", Outcome.FAILED),
}


@pytest.mark.parametrize("name", [*ENDS, "time", "replaced", "controls"])
async def test_workers_without_a_result_are_done_again_by_one(suite: Suite, name: str) -> None:
    case = Case(suite)
    await case.proven()
    bodies = {
        "time": b"while True:\n    pass\n",
        "replaced": (
            b"import sys\nsys.modules['_pytest.python'].Function.runtest = lambda self: None\n"
            b"def greeting(name):\n    return ''\n"
        ),
        "controls": (
            b"import sys\nsys.modules['_pytest.runner'].call_and_report = lambda *a, **k: None\n"
            b"def greeting(name):\n    return ''\n"
        ),
    }
    body = bodies.get(name) or ENDS[name][0]
    options = {"timeout_s": 3.0} if name == "time" else {}
    before = again()
    shared = await case.judge(FileChange(GREET, body), **options)
    serial = await case.one.validate(
        case.state.id,
        [FileChange(GREET, body)],
        ValidationOptions(**options),  # type: ignore[arg-type]
    )
    if name != "replaced":  # what all workers report as replaced is told as one run would
        assert again() == before + 1
        assert shared.workers == 1
    assert shared.outcome is not Outcome.PASSED
    assert (shared.outcome, shared.summary, shared.lasting) == (
        serial.outcome,
        serial.summary,
        serial.lasting,
    )


DIFFERS = b"""
import sys
frame, part = sys._getframe(), None
while frame:
    if frame.f_code.co_name == "run_pytest":
        part = frame.f_locals["setup"].get("part")
    frame = frame.f_back
if part and part["share"]["number"] == 1:
    raise ImportError("in the second worker")
def greeting(name):
    return f"Hello, {name}!"
"""


async def test_code_that_tells_workers_apart_is_judged_by_one(suite: Suite) -> None:
    case, before = Case(suite), again()
    await case.proven()
    verdict = await case.judge(FileChange(GREET, DIFFERS))
    assert again() == before + 1
    assert (verdict.workers, verdict.outcome) == (1, Outcome.PASSED), verdict.summary


async def test_shares_are_even_and_always_the_same() -> None:
    files = {"a": 5.0, "b": 4.0, "c": 3.0, "d": 1.0, "e": 1.0}
    found = shares(files, 2)
    assert found == shares(dict(reversed(files.items())), 2)
    loads = [sum(files[f] for f, n in found.items() if n == number) for number in (0, 1)]
    assert sorted(loads) == [7.0, 7.0]
    assert set(shares(dict.fromkeys("abcd", 0.0), 4).values()) == {0, 1, 2, 3}

"""Validations of a part of the tests: quick feedback that never stands for the whole."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest
import pytest_asyncio

from regreen.rpc.errors import InvalidArgument
from sandbox_svc.backends.base import EndReason, ExecResult
from sandbox_svc.builders.base import FileChange
from sandbox_svc.builders.testrun import TestResult, TestRun
from sandbox_svc.validate import Outcome, Validation, ValidationOptions, Validator
from sandbox_svc.verdicts import Plan, conclude
from sandbox_svc.warm import WarmPool, WarmSettings
from tests.fixtures.tasks.tiny_task import FAIL_TO_PASS
from tests.integration.sandbox_build.suite import (
    EARLY,
    FIX,
    GREET,
    LATE,
    LATER,
    WHOLE,
    Suite,
    open_suite,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
WRONG = FileChange(GREET, b"def greeting(name):\n    return 'Hello'\n")
INSIDE = f"{WHOLE}::test_whole"


@dataclass(frozen=True, slots=True)
class World:
    suite: Suite
    validator: Validator

    async def judge(
        self, *changes: FileChange, fresh: bool = False, **options: object
    ) -> Validation:
        chosen = ValidationOptions(**options)  # type: ignore[arg-type]
        return await self.validator.validate(
            self.suite.state.id, changes, chosen, skip_cache_lookup=fresh
        )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    async with open_suite() as suite:
        validator = Validator(suite.states, suite.runtime)
        yield World(suite, validator)
        await validator.close()


def outcomes(verdict: Validation) -> dict[str, str]:
    return {test.id: test.outcome for test in verdict.tests}


async def test_it_stops_where_a_required_test_fails_and_says_so(world: World) -> None:
    whole = await world.judge(WRONG)
    early = await world.judge(WRONG, stop_early=True, fresh=True)
    assert (whole.outcome, whole.partial, whole.not_run) == (Outcome.FAILED, False, 0)
    assert (early.outcome, early.partial, early.lasting) == (Outcome.FAILED, True, True)
    assert {EARLY, FAIL_TO_PASS[0]} <= set(outcomes(early))
    assert LATE not in outcomes(early)
    assert LATE in outcomes(whole)
    assert outcomes(early).items() < outcomes(whole).items(), "the beginning of the whole"
    assert early.failing
    assert set(early.failing) < set(whole.failing)
    assert early.not_run == len(whole.tests) - len(early.tests)
    assert f"{early.not_run} tests were not run" in early.summary
    assert "a required test does not pass" in early.log


async def test_what_cannot_be_collected_decides_before_any_test_runs(world: World) -> None:
    early = await world.judge(stop_early=True)
    whole = await world.judge()
    assert (early.outcome, early.partial) == (Outcome.FAILED, True)
    assert whole.outcome is Outcome.FAILED
    assert outcomes(early) == {WHOLE: "missing"}
    assert early.failing == (WHOLE,)
    assert early.not_run == sum(o != "missing" for o in outcomes(whole).values())
    assert any("cannot import name" in line for line in early.error_lines)


async def test_a_pass_is_always_whole_and_answers_for_the_whole(world: World) -> None:
    passed = await world.judge(FIX, stop_early=True)
    assert (passed.outcome, passed.partial, passed.not_run) == (Outcome.PASSED, False, 0)
    assert {EARLY, LATE, LATER, INSIDE, *FAIL_TO_PASS} <= set(outcomes(passed))
    again = await world.judge(FIX)
    assert (again.cached, again.outcome, again.tests) == (True, Outcome.PASSED, passed.tests)


async def test_a_verdict_on_a_part_never_answers_for_the_whole(world: World) -> None:
    other = FileChange(GREET, (WRONG.content or b"") + b"\n")
    early = await world.judge(other, stop_early=True)
    assert early.partial
    assert (await world.judge(other, stop_early=True)).cached
    whole = await world.judge(other)
    assert (whole.cached, whole.partial) == (False, False)
    better = await world.judge(other, stop_early=True)
    assert (better.cached, better.partial) == (True, False), "the whole answers for the part"


async def test_chosen_tests_run_alone_and_never_pass(world: World) -> None:
    await world.judge(FIX)  # a whole pass in the cache does not answer for it
    for chosen, expected in (
        (("tests/test_z_last.py",), {LATE, LATER, LATER.replace("2", "1")}),
        (("tests/test_z_last.py::test_later",), {LATER, LATER.replace("2", "1")}),
        ((LATER, EARLY), {LATER, EARLY}),
        ((WHOLE,), {INSIDE}),
    ):
        verdict = await world.judge(FIX, only_tests=chosen)
        assert set(outcomes(verdict)) == expected
        assert (verdict.outcome, verdict.partial) == (Outcome.INCOMPLETE, True), verdict.summary
        assert verdict.not_run == 8 - len(expected)
        assert not verdict.failing
    everything = await world.judge(FIX, only_tests=("tests/",))
    assert (everything.outcome, everything.partial) == (Outcome.INCOMPLETE, True)


async def test_chosen_tests_that_fail_are_told(world: World) -> None:
    failed = await world.judge(WRONG, only_tests=("tests/test_greet.py", EARLY))
    assert (failed.outcome, failed.partial) == (Outcome.FAILED, True)
    assert set(failed.failing) == set(FAIL_TO_PASS)
    broken = await world.judge(only_tests=(WHOLE,))
    assert broken.outcome is Outcome.BUILD_FAILED
    assert "cannot import name" in broken.summary
    nothing = await world.judge(FIX, only_tests=("tests/nowhere.py",))
    assert nothing.outcome is Outcome.BUILD_FAILED
    assert "among the chosen" in nothing.summary


async def test_chosen_tests_stop_only_for_a_chosen_one(world: World) -> None:
    there = await world.judge(only_tests=(EARLY,), stop_early=True)
    assert outcomes(there) == {EARLY: "passed"}, "what holds another test cannot be collected"
    assert there.outcome is Outcome.INCOMPLETE
    lost = await world.judge(only_tests=(EARLY, WHOLE), stop_early=True)
    assert (lost.outcome, lost.failing) == (Outcome.FAILED, (WHOLE,))
    assert outcomes(lost) == {WHOLE: "missing"}


async def test_a_run_that_stopped_is_never_a_pass(world: World) -> None:
    state = world.suite.state
    plan = Plan(state, (), (), None, ValidationOptions(only_tests=(EARLY,)), "")
    result = ExecResult(EndReason.EXIT)
    run = TestRun({EARLY: TestResult(EARLY, "passed")}, {}, 1, 0, "", True, "", 0, result)
    assert conclude(plan, run).outcome is Outcome.INCOMPLETE
    stopped = conclude(plan, replace(run, stopped=LATE))
    assert (stopped.outcome, stopped.partial) == (Outcome.FAILED, True)
    assert stopped.summary == f"a required test does not pass: {LATE}"


async def test_what_makes_no_sense_is_refused(world: World) -> None:
    for options, field in (
        ({"only_tests": ("",)}, "only_tests"),
        ({"only_tests": ("/",)}, "only_tests"),
        ({"only_tests": ("a\0b",)}, "only_tests"),
        ({"only_tests": (EARLY,), "coverage": True}, "coverage"),
        ({"stop_early": True, "coverage": True}, "coverage"),
    ):
        with pytest.raises(InvalidArgument) as refused:
            await world.judge(FIX, **options)  # type: ignore[arg-type]
        assert refused.value.field == field


FORGED = b"""
import sys
def forge():
    frame = sys._getframe()
    while frame:
        pipe = frame.f_locals.get("pipe")
        if pipe is not None:
            pipe.send({"t": "stopped", "by": ""})
            pipe.send({"t": "part", "n": 0, "run": 0, "ids": ""})
        frame = frame.f_back
forge()
def greeting(name):
    return ""
"""


async def test_whoever_claims_that_it_stopped_gains_nothing(world: World) -> None:
    for options in ({}, {"stop_early": True}, {"only_tests": ("tests/test_greet.py",)}):
        verdict = await world.judge(FileChange(GREET, FORGED), **options)
        assert verdict.outcome in (Outcome.FAILED, Outcome.BUILD_FAILED)


async def test_warm_runs_of_a_part_are_those_of_cold_ones(world: World) -> None:
    suite = world.suite
    pool = WarmPool(suite.states, suite.runtime, suite.home, settings=WarmSettings(check_share=0.0))
    validator = Validator(suite.states, suite.runtime, warm=pool)
    try:
        for changes, options in (
            ([WRONG], ValidationOptions(stop_early=True)),
            ([], ValidationOptions(stop_early=True)),
            ([FIX], ValidationOptions(only_tests=(LATER, WHOLE))),
        ):
            pool.warm(suite.state)
            await pool.settled()
            warm = await validator.validate(
                suite.state.id, changes, options, skip_cache_lookup=True
            )
            cold = await world.validator.validate(
                suite.state.id, changes, options, skip_cache_lookup=True
            )
            assert warm.warm
            assert outcomes(warm) == outcomes(cold)
            assert (warm.outcome, warm.partial, warm.not_run) == (cold.outcome, True, cold.not_run)
    finally:
        await validator.close()
        await pool.close()

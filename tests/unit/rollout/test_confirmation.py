"""One confirmation of a diff decides for all rollouts of a process that found it."""

import asyncio

import pytest

from regreen.rollout.grade import Validated
from regreen.rpc.errors import Unavailable
from regreen.sandbox.v1 import (
    VALIDATION_OUTCOME_FAILED,
    VALIDATION_OUTCOME_PASSED,
    Validation,
)

DIFF = ("st_1", 1, "ab" * 32, False)
OTHER = ("st_1", 2, "ab" * 32, False)


class Fork:
    """Answers with these outcomes in turn; an error is raised."""

    def __init__(self, *answers) -> None:
        self.answers, self.asked = list(answers), 0

    async def __call__(self) -> Validation:
        self.asked += 1
        answer = self.answers.pop(0)
        await asyncio.sleep(0)
        if isinstance(answer, Exception):
            raise answer
        return Validation(outcome=answer, lasting=True)


async def test_a_failed_confirmation_counts_for_everyone():
    fork, shared = Fork(VALIDATION_OUTCOME_FAILED, VALIDATION_OUTCOME_PASSED), Validated()
    found = await asyncio.gather(*(shared.confirmation(DIFF, fork) for _ in range(6)))
    assert {validation.outcome for validation in found} == {VALIDATION_OUTCOME_FAILED}
    assert fork.asked == 1
    assert (await shared.confirmation(OTHER, fork)).outcome == VALIDATION_OUTCOME_PASSED


async def test_trouble_of_the_platform_confirms_nothing():
    fork, shared = Fork(Unavailable("away"), VALIDATION_OUTCOME_PASSED), Validated()
    with pytest.raises(Unavailable):
        await shared.confirmation(DIFF, fork)
    assert (await shared.confirmation(DIFF, fork)).outcome == VALIDATION_OUTCOME_PASSED


async def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr("regreen.rollout.grade._KEPT", 2)
    fork, shared = Fork(*[VALIDATION_OUTCOME_PASSED] * 4), Validated()
    for number in (1, 2, 3, 1):
        await shared.confirmation(("st_1", number, "", False), fork)
    assert fork.asked == 4

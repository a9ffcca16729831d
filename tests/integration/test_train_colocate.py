"""A policy that sleeps while the learner steps, or is sent weights: when, and after failures."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from regreen.rpc.errors import InvalidArgument
from regreen.train.config import GrpoConfig
from regreen.train.plan import plan_grpo
from regreen.train.rl import train_grpo
from regreen.train.rows import find_run
from tests.integration.test_train_grpo import (
    check_exactly_once,
    config_of,
    drive_until_killed,
    external,
)
from tests.integration.train_services import (
    Fuse,
    World,
    admitted,
    rollout,
    scripted_workers,
    world,
)


@pytest.fixture
async def place(dataset_address: str, tmp_path: Path) -> AsyncIterator[World]:
    async with world(dataset_address, tmp_path) as found:
        found.policy.can_sleep = True
        yield found


@pytest.mark.parametrize("every", [1, 2])
async def test_the_policy_sleeps_in_steps_and_is_awake_for_rollouts(place: World, every: int):
    in_steps, in_rollouts = list[bool](), list[bool]()
    place.learner.watch = lambda: in_steps.append(place.policy.asleep)

    def watched(lease, version):
        in_rollouts.append(place.policy.asleep)
        return rollout(lease, version)

    async with place.stack() as stack:
        config = config_of(await admitted(stack), colocate=True, checkpoint_every=every)
        await train_grpo(stack, config, workers=external(place, watched))
    await check_exactly_once(place, config)
    assert in_steps == [True] * len(in_steps)
    assert place.policy.slept == len(in_steps) > 0
    assert in_rollouts == [False] * len(in_rollouts)
    assert place.learner.lent == [True] * len(in_steps)
    assert not place.policy.asleep


async def test_without_colocate_nothing_sleeps(place: World):
    async with place.stack() as stack:
        config = config_of(await admitted(stack), steps=1)
        await train_grpo(stack, config, workers=external(place))
    assert place.policy.slept == 0
    assert not any(place.learner.lent)


async def test_a_run_that_ends_in_a_step_leaves_the_policy_awake(place: World):
    def fail() -> None:
        raise InvalidArgument("batch", "is bad", "send a good one")

    place.learner.watch = fail
    async with place.stack() as stack:
        config = config_of(await admitted(stack), colocate=True)
        with pytest.raises(InvalidArgument, match="is bad"):
            await train_grpo(stack, config, workers=external(place))
    assert place.policy.slept == 1
    assert not place.policy.asleep


async def test_a_policy_that_a_killed_driver_left_asleep_is_woken_by_the_next(place: World):
    async with place.stack() as stack:
        config = config_of(await admitted(stack), colocate=True, steps=2)
    left_asleep, at = False, 10
    async with scripted_workers(place, "", 2):
        while not await drive_until_killed(place, config, Fuse(at, after=True)):
            left_asleep |= place.policy.asleep
            at += 2
    assert left_asleep, "no kill fell into a sleep"
    await check_exactly_once(place, config)
    assert not place.policy.asleep


async def test_a_policy_that_cannot_sleep_is_refused_before_anything_starts(place: World):
    place.policy.can_sleep = False
    async with place.stack() as stack:
        config: GrpoConfig = config_of(await admitted(stack), colocate=True)
        for begin in (plan_grpo, train_grpo):
            with pytest.raises(InvalidArgument, match=r"^colocate: .*scripted.*--enable-memory"):
                await begin(stack, config)
        assert await find_run(stack, config.name) is None
    assert not place.learner.runs
    with pytest.raises(InvalidArgument, match=r"^prefetch"):
        replace(config, prefetch=True)


async def test_weights_are_offered_when_they_are_published(place: World):
    place.policy.receivers = 2
    async with place.stack() as stack:
        config = config_of(await admitted(stack), broadcast=True)
        await train_grpo(stack, config, workers=external(place))
        await check_exactly_once(place, config)
        assert place.policy.offered
        assert set(place.policy.offered) == set(place.policy.loaded[1:])
        place.policy.receivers = 0
        other = config_of(await admitted(stack), broadcast=True)
        with pytest.raises(InvalidArgument, match=r"^broadcast: .*scripted.*receives no weights"):
            await train_grpo(stack, other)
        with pytest.raises(InvalidArgument, match=r"^broadcast"):
            replace(config, colocate=True)

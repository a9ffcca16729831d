"""Weights that serve before their checkpoint is whole: what a crash between the two leaves."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from regreen.client.stack import Stack
from regreen.dataset import v1 as dataset_pb
from regreen.rpc.errors import InfraError
from regreen.train.config import GrpoConfig
from regreen.train.progress import Progress
from regreen.train.rl import train_grpo
from regreen.train.rows import all_trajectories
from regreen.train.weights import VERSION_BLOCK
from tests.integration.test_train_grpo import check_exactly_once, config_of, hasty
from tests.integration.train_services import (
    World,
    admitted,
    rollout,
    scripted_workers,
    world,
)

__all__ = ["hasty"]


@pytest.fixture
async def place(dataset_address: str, tmp_path: Path) -> AsyncIterator[World]:
    async with world(dataset_address, tmp_path) as found:
        yield found


def step_of(version: int) -> int:
    return version % VERSION_BLOCK


async def drive(place: World, config: GrpoConfig, listener: Callable | None = None) -> None:
    async with place.stack() as stack:
        await train_grpo(stack, config, listener or (lambda progress: None))


async def trajectories(stack: Stack, name: str) -> list[tuple[list[int], list[int]]]:
    """Tokens and versions of all rollouts of a run."""
    run = await stack.runs.get_run(name)
    groups = dataset_pb.TrajectoryFilter(run_id=run.id)
    found = []
    async for row in all_trajectories(stack, groups):
        full = await stack.trajectories.get_trajectory(row.id)
        versions = [step_of(span.version) for span in full.versions]
        found.append((list(full.token_ids), versions))
    return sorted(found)


async def killed_while_saving(
    place: World, config: GrpoConfig, *, at: int, until: Callable | None = None
) -> None:
    """Drive until the learner writes the checkpoint of step `at`; then both are gone."""

    def hold(progress: Progress) -> None:
        if (progress.stage, progress.done, progress.detail) == ("checkpoint", 0, f"step {at}"):
            place.learner.saving.clear()
            place.learner.may_save.clear()

    driving = asyncio.create_task(drive(place, config, hold))
    while place.learner.may_save.is_set():  # noqa: ASYNC110 - no event says so
        await asyncio.sleep(0.01)
    await place.learner.saving.wait()
    if until is not None:
        async with asyncio.timeout(20):
            await until()
    place.learner.forget()
    driving.cancel()
    await asyncio.gather(driving, return_exceptions=True)
    place.learner.forget()
    place.learner.may_save.set()


@pytest.mark.parametrize("prefetch", [False, True])
async def test_the_next_rollouts_begin_while_the_checkpoint_is_written(
    place: World, prefetch: bool
) -> None:
    async with place.stack() as stack:
        tasks = await admitted(stack)
    config = config_of(tasks, prefetch=prefetch, concurrency=0)

    async def rolled_out() -> None:
        """Rollouts of step 3 are in, sampled under the weights of step 2."""
        async with place.stack() as stack:
            run = await stack.runs.get_run(config.name)
            while True:
                queue = await stack.queue.get_queue(run.id, step=3)
                if queue.rollouts["committed"] >= 4:
                    break
                await asyncio.sleep(0.02)
            assert step_of(place.policy.serving.version) == 2
            [newest, *_] = (await stack.runs.list_checkpoints(run.id)).checkpoints
            assert newest.step == 1
            assert not queue.groups["taken"]

    async with scripted_workers(place, "", 2):
        await killed_while_saving(place, config, at=2, until=rolled_out)
        loaded = len(place.policy.loaded)
        await drive(place, config)
    # What was rolled out meanwhile was wanted under what served, so that was not taken back.
    assert [step_of(version) for version in place.policy.loaded[loaded:]] == [3]
    assert all(len(digests) == 1 for digests in place.policy.served.values())
    await check_exactly_once(place, config)


async def test_a_crash_between_weights_and_checkpoint_changes_nothing(place: World) -> None:
    """In synchronous mode: the same rollouts under the same versions, and the same weights."""
    async with place.stack() as stack:
        tasks = await admitted(stack)
    lossy = config_of(tasks, concurrency=0)
    async with scripted_workers(place, "", 2):
        await killed_while_saving(place, lossy, at=2)
        async with place.stack() as stack:
            run = await stack.runs.get_run(lossy.name)
            before = place.policy.serving
            assert step_of(before.version) == 2
        await drive(place, lossy)
        async with place.stack() as stack:
            records = (await stack.runs.list_checkpoints(run.id)).checkpoints
            found = await trajectories(stack, lossy.name)
            steps = {row[1][0] for row in found}
    by_version = {record.policy_version: record for record in records}
    assert by_version[before.version].digest == before.digest
    assert sorted(step_of(version) for version in by_version) == [1, 2, 3]
    assert steps == {0, 1, 2}
    await check_exactly_once(place, lossy)


async def test_weights_that_are_made_again_as_others_have_a_version_of_their_own(
    place: World,
) -> None:
    async with place.stack() as stack:
        tasks = await admitted(stack)
    config = config_of(tasks, concurrency=0)
    async with scripted_workers(place, "", 2):
        await killed_while_saving(place, config, at=2)
        place.learner.salt = "a kernel that adds in any order"
        await drive(place, config)
    async with place.stack() as stack:
        run = await stack.runs.get_run(config.name)
        records = (await stack.runs.list_checkpoints(run.id)).checkpoints
    assert [(record.step, step_of(record.policy_version)) for record in records] == [
        (3, 4),
        (2, 3),
        (1, 1),
    ]
    assert all(len(digests) == 1 for digests in place.policy.served.values())
    assert {step_of(version) for version in place.policy.served} >= {1, 2, 3, 4}
    await check_exactly_once(place, config)
    # Goes on from there in a later life, too.
    place.policy.loaded.clear()
    await drive(place, config)
    assert place.policy.loaded == []


async def test_published_weights_that_are_gone_are_not_served(place: World) -> None:
    """Those of a machine that lost power: known to the learner, and not on disk."""
    async with place.stack() as stack:
        tasks = await admitted(stack)
    config = config_of(tasks, concurrency=0)
    async with scripted_workers(place, "", 2):
        await killed_while_saving(place, config, at=2)
        place.policy.lost.add(place.policy.serving.uri)
        place.policy.loaded.clear()
        told: list[int] = []

        def listener(progress: Progress) -> None:
            if progress.stage == "rollouts":
                told.append(step_of(place.policy.serving.version))
                place.policy.lost.clear()

        await drive(place, config, listener)
    assert told[0] == 1
    assert [step_of(version) for version in place.policy.loaded] == [1, 2, 3]
    await check_exactly_once(place, config)


async def test_a_rollout_that_was_lost_is_made_under_the_weights_before(hasty: World) -> None:
    """The rewind gives it out again, and the step that it is of is made again."""
    async with hasty.stack() as stack:
        tasks = await admitted(stack)
    config = config_of(tasks, concurrency=0, steps=2, group_size=4)
    again = False

    def lose_one(lease: dataset_pb.Lease, version: int) -> dataset_pb.Trajectory:
        place = (lease.group.step, lease.group.labels["slot"], lease.group_index)
        if place == (1, "0", 0) and not again:
            raise InfraError("no sandbox could be made")
        made = rollout(lease, version)
        made.reward.solved = bool(lease.group_index % 2)
        made.reward.value = float(made.reward.solved)
        return made

    async with scripted_workers(hasty, "", 2, lose_one):
        await killed_while_saving(hasty, config, at=1)
        assert step_of(hasty.policy.serving.version) == 1
        again = True
        await drive(hasty, config)
    # What was lost is in the batch now: the step gives other weights, and a version of their own.
    assert [step_of(version) for version in hasty.policy.loaded] == [0, 1, 0, 2, 3]
    assert all(len(digests) == 1 for digests in hasty.policy.served.values())
    async with hasty.stack() as stack:
        run = await stack.runs.get_run(config.name)
        queue = await stack.queue.get_queue(run.id)
        rows = await trajectories(stack, config.name)
    assert not queue.rollouts["lost"]
    assert all(versions in ([0], [1], [2]) for _, versions in rows)
    assert sum(versions == [0] for _, versions in rows) >= 8
    await check_exactly_once(hasty, config)

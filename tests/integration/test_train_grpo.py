"""The GRPO driver against a real dataset service: exactly once, whatever is killed, whenever."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path

import pytest

from regreen.client.stack import Stack
from regreen.rpc.errors import FailedPrecondition
from regreen.train.config import GrpoConfig
from regreen.train.gather import group_id
from regreen.train.rl import train_grpo
from tests.integration import dataset_samples as samples
from tests.integration.train_services import Fuse, Killed, World, admitted, scripted_workers, world


@pytest.fixture
async def place(dataset_address: str, tmp_path: Path) -> AsyncIterator[World]:
    async with world(dataset_address, tmp_path) as found:
        yield found


def config_of(tasks: tuple[str, ...], **changes) -> GrpoConfig:
    settings = {
        "name": samples.fresh("grpo"),
        "tasks": tasks,
        "steps": 3,
        "groups_per_step": 2,
        "group_size": 2,
        "max_refills": 3,
        "idle_deadline_s": 20.0,
        "recovery_deadline_s": 5.0,
    }
    return GrpoConfig(**(settings | changes))


def external(place: World):
    """Workers as a fleet has them; only their life is tied to the driver."""

    @asynccontextmanager
    async def opened(stack: Stack, run_id: str, count: int):
        async with scripted_workers(place, run_id, count):
            yield

    return opened


async def check_exactly_once(place: World, config: GrpoConfig) -> list[dict]:
    """Every invariant of a finished run; the learner's lineage."""
    async with place.stack() as stack:
        run = await stack.runs.get_run(config.name)
        assert run.state == "done"
        queue = await stack.queue.get_queue(run.id)
        records = (await stack.runs.list_checkpoints(run.id)).checkpoints
        states = {state for state, count in queue.groups.items() if count}
        assert states == ({"acknowledged"} if records else {"taken"})
        if not records:
            return []  # nothing taught anything, so there is nothing to publish
        acknowledged = Counter(id for record in records for id in record.group_ids)
        assert set(acknowledged.values()) <= {1}
        saved = json.loads(Path(records[0].uri).read_text())
        consumed = Counter(id for step in saved["lineage"] for id in step["groups"])
        assert set(consumed.values()) <= {1}
        slots = config.groups_per_step + config.max_refills
        order = {
            group_id(run.id, step, slot): step
            for step in range(1, config.steps + 1)
            for slot in range(slots)
        }
        steps = [order[id] for step in saved["lineage"] for id in step["groups"]]
        assert steps == sorted(steps), "groups were consumed out of step"
        assert sum(queue.groups.values()) >= config.steps * config.groups_per_step
        metrics = await stack.runs.list_metrics(run.id, names=["reward_mean"])
        assert [point.step for point in metrics] == list(range(1, config.steps + 1))
        assert place.policy.serving.version == records[0].policy_version
        assert place.policy.serving.uri == records[0].uri
        return saved["lineage"]


@pytest.mark.parametrize("changes", [{}, {"prefetch": True}, {"checkpoint_every": 2}])
async def test_a_run_consumes_every_group_once_and_publishes_its_weights(place: World, changes):
    async with place.stack() as stack:
        config = config_of(await admitted(stack), **changes)
        result = await train_grpo(stack, config, workers=external(place))
    lineage = await check_exactly_once(place, config)
    assert result.state == "done"
    assert result.policy_version == place.policy.serving.version
    assert lineage
    assert not place.learner.runs


async def test_a_finished_run_is_not_run_again(place: World):
    async with place.stack() as stack:
        config = config_of(await admitted(stack), steps=1)
        first = await train_grpo(stack, config, workers=external(place))
        loaded = list(place.policy.loaded)
        again = await train_grpo(stack, config, workers=external(place))
    assert first == again
    assert place.policy.loaded == loaded


async def test_a_name_with_other_settings_is_refused(place: World):
    async with place.stack() as stack:
        tasks = await admitted(stack)
        config = config_of(tasks, steps=1)
        await train_grpo(stack, config, workers=external(place))
        other = config_of(tasks, steps=2, name=config.name)
        with pytest.raises(FailedPrecondition, match=r"other settings \(steps\)"):
            await train_grpo(stack, other, workers=external(place))


async def drive_until_killed(place: World, config: GrpoConfig, fuse: Fuse) -> bool:
    """One process: whether it came to its end."""
    async with place.stack() as stack:
        fuse.protect(stack)
        try:
            await train_grpo(stack, config, workers=lambda *_: _no_workers())
        except Killed:
            return False
    return True


@asynccontextmanager
async def _no_workers():
    with nullcontext():
        yield


@pytest.mark.slow
async def test_a_driver_killed_at_any_call_continues_exactly_once(place: World):
    async with place.stack() as stack:
        tasks = await admitted(stack)
    config = config_of(tasks, steps=2, groups_per_step=1, max_refills=2)
    async with place.stack() as stack, scripted_workers(place, "", 2):
        await train_grpo(stack, config, workers=lambda *_: _no_workers())
        at, ended = 1, False
        while not ended:
            config = config_of(tasks, steps=2, groups_per_step=1, max_refills=2)
            ended = await drive_until_killed(place, config, Fuse(at, after=at % 2 == 1))
            if at % 3 == 0:
                place.learner.forget()
            if not ended:
                await drive_until_killed(place, config, Fuse(at + 7, after=not at % 2))
                await train_grpo(stack, config, workers=lambda *_: _no_workers())
            await check_exactly_once(place, config)
            at += 3
    assert at > 15


async def test_a_learner_that_loses_its_memory_is_taken_back_to_the_checkpoint(place: World):
    seen = []

    def listener(progress):
        if progress.stage == "learn":
            seen.append(progress)
            if len(seen) == 2:
                place.learner.forget()

    async with place.stack() as stack:
        config = config_of(await admitted(stack))
        await train_grpo(stack, config, listener, workers=external(place))
    await check_exactly_once(place, config)


async def test_a_replaced_driver_stops_instead_of_fighting(place: World):
    async with place.stack() as stack:
        config = config_of(await admitted(stack), steps=2, concurrency=0)
        waiting = asyncio.Event()

        def listener(progress):
            if progress.stage == "rollouts":
                waiting.set()

        first = asyncio.create_task(train_grpo(stack, config, listener))
        await waiting.wait()
        async with place.stack() as other:
            await train_grpo(other, config_of(**_same(config)), workers=external(place))
        with pytest.raises(FailedPrecondition, match="another driver"):
            await first
    await check_exactly_once(place, config)


def _same(config: GrpoConfig) -> dict:
    return {"tasks": config.tasks, "name": config.name, "steps": config.steps}


async def test_a_learner_that_is_busy_with_another_run_is_named(place: World):
    async with place.stack() as stack:
        tasks = await admitted(stack)
        waiting = asyncio.Event()

        def listener(progress):
            if progress.stage == "rollouts":
                waiting.set()

        busy = config_of(tasks, concurrency=0)
        first = asyncio.create_task(train_grpo(stack, busy, listener))
        await waiting.wait()
        with pytest.raises(FailedPrecondition, match=f"trains run '{busy.name}'"):
            await train_grpo(stack, config_of(tasks, concurrency=0))
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    assert not place.learner.runs


async def test_no_worker_is_said_so(place: World):
    async with place.stack() as stack:
        config = config_of(await admitted(stack), concurrency=0, idle_deadline_s=0.5)
        with pytest.raises(FailedPrecondition, match=r"4 waiting.*are rollout workers running"):
            await train_grpo(stack, config)

"""The GRPO driver against a real dataset service: exactly once, whatever is killed, whenever."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path

import pytest

from dataset_svc.__main__ import serving
from dataset_svc.settings import DatasetSettings
from regreen.client.stack import Stack
from regreen.policy import v1 as policy_pb
from regreen.rpc.errors import DataLoss, FailedPrecondition, InfraError, Unavailable
from regreen.train.config import GrpoConfig
from regreen.train.gather import group_id
from regreen.train.progress import Progress
from regreen.train.rl import train_grpo
from tests.integration import dataset_samples as samples
from tests.integration.train_services import (
    Fuse,
    Killed,
    World,
    admitted,
    rollout,
    scripted_workers,
    world,
)


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


def external(place: World, make=rollout):
    """Workers as a fleet has them; only their life is tied to the driver."""

    @asynccontextmanager
    async def opened(stack: Stack, run_id: str, count: int):
        async with scripted_workers(place, run_id, count, make):
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


def check_every_stage_was_closed(seen: list[Progress]) -> None:
    """Each stage that began ended with all done, and only then did the step count."""
    for name in ("rollouts", "learn", "checkpoint"):
        stages = [found for found in seen if found.stage == name]
        assert stages[-1].done == stages[-1].total > 0
    for name in ("learn", "checkpoint"):
        begun = [found for found in seen if found.stage == name and not found.done]
        ended = [found for found in seen if found.stage == name and found.done == found.total]
        assert [found.total for found in begun] == [found.total for found in ended]
        assert [found.detail for found in begun] == [found.detail for found in ended]


@pytest.mark.parametrize("changes", [{}, {"prefetch": True}, {"checkpoint_every": 2}])
async def test_a_run_consumes_every_group_once_and_publishes_its_weights(place: World, changes):
    seen = []
    async with place.stack() as stack:
        config = config_of(await admitted(stack), **changes)
        result = await train_grpo(stack, config, seen.append, workers=external(place))
    lineage = await check_exactly_once(place, config)
    check_every_stage_was_closed(seen)
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
        other = policy_pb.PolicyVersion(version=7, uri=place.policy.serving.uri)
        await stack.policy.load_version(other, allow_older=True)
        await train_grpo(stack, config, workers=external(place))
    assert place.policy.serving.version == first.policy_version  # what was trained is served


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
async def test_a_driver_killed_at_every_third_call_continues_exactly_once(place: World):
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
        if progress.stage == "learn" and not progress.done:
            seen.append(progress)
            if len(seen) == 2:
                place.learner.forget()

    async with place.stack() as stack:
        config = config_of(await admitted(stack))
        await train_grpo(stack, config, listener, workers=external(place))
    learned = [found.detail for found in seen]
    assert learned[1] in learned[2:], "what was forgotten was not learned anew"
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


@pytest.fixture
async def hasty(database_url: str, tmp_path: Path) -> AsyncIterator[World]:
    """A place where a rollout is lost after two tries without a pause."""
    settings = DatasetSettings(
        listen="127.0.0.1:0",
        metrics="127.0.0.1:0",
        home=tmp_path,
        drain_s=0.1,
        fsync=False,
        max_attempts=2,
        retry_s=0.0,
    )
    async with serving(settings, database_url) as server, world(server.address, tmp_path) as found:
        yield found


async def test_an_outage_that_loses_every_rollout_is_waited_out(hasty: World):
    seen = []

    def during_outage(lease, version):
        if not seen:
            raise InfraError("no sandbox could be made")
        return rollout(lease, version)

    def listener(progress):
        if progress.stage == "recover":
            seen.append(progress.detail)

    async with hasty.stack() as stack:
        config = config_of(await admitted(stack), recovery_deadline_s=20.0)
        result = await train_grpo(stack, config, listener, workers=external(hasty, during_outage))
        queue = await stack.queue.get_queue(result.run_id)
    assert "s: step 1: 4 of 4 rollouts were lost to infrastructure" in seen[0]
    assert seen[-1] == "goes on"
    assert not queue.rollouts["lost"]
    assert await check_exactly_once(hasty, config)


async def test_an_outage_without_end_fails_the_run_with_its_reason(hasty: World):
    def never(lease, version):
        raise InfraError("no sandbox could be made")

    async with hasty.stack() as stack:
        config = config_of(await admitted(stack), recovery_deadline_s=0.5)
        with pytest.raises(Unavailable, match=r"4 of 4 .* lost .*\(no sandbox could be made\)"):
            await train_grpo(stack, config, workers=external(hasty, never))
        assert (await stack.runs.get_run(config.name)).state == "active"


def kill_at(stack: Stack, request_name: str, *, after: bool) -> None:
    """End this process at the first request of that type, before or after it took effect."""
    call = stack.runs._call

    async def counted(method, request, timeout_s):
        named = type(request).__name__ == request_name
        if named and not after:
            raise Killed
        answer = await call(method, request, timeout_s)
        if named:
            raise Killed
        return answer

    stack.runs._call = counted


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("every", "request_name"), [(2, "RecordCheckpointRequest"), (1, "UpdateRunRequest")]
)
async def test_groups_of_a_last_step_without_lesson_are_acknowledged_after_a_kill(
    place: World, every: int, request_name: str, after: bool
):
    def teaches_first(lease, version):
        made = rollout(lease, version)
        made.reward.solved = bool(lease.group_index % 2) and lease.group.step == 1
        made.reward.value = float(made.reward.solved)
        return made

    async with place.stack() as stack:
        tasks = await admitted(stack)
    config = config_of(tasks, steps=2, checkpoint_every=every, max_refills=0)
    workers = external(place, teaches_first)
    async with place.stack() as stack:
        kill_at(stack, request_name, after=after)
        with pytest.raises(Killed):
            await train_grpo(stack, config, workers=workers)
    async with place.stack() as stack:
        await train_grpo(stack, config, workers=workers)
        queue = await stack.queue.get_queue((await stack.runs.get_run(config.name)).id)
    assert dict(queue.groups) == {"acknowledged": 4}
    await check_exactly_once(place, config)


async def test_refills_of_an_earlier_life_are_used_when_their_cause_is_gone(hasty: World):
    outage = True

    def teaches_unless_out(lease, version):
        if outage and lease.group.labels["slot"] == "0" and lease.group_index == 0:
            raise InfraError("no sandbox could be made")
        made = rollout(lease, version)
        made.reward.solved = bool(lease.group_index)
        made.reward.value = float(made.reward.solved)
        return made

    async with hasty.stack() as stack:
        tasks = await admitted(stack)
    config = config_of(tasks, steps=1, groups_per_step=1, max_refills=2)
    workers = external(hasty, teaches_unless_out)
    async with hasty.stack() as stack:
        kill_at(stack, "RecordMetricsRequest", after=False)
        with pytest.raises(Killed):
            await train_grpo(stack, config, workers=workers)
        outage = False
    async with hasty.stack() as stack:
        await train_grpo(stack, config, workers=workers)
        queue = await stack.queue.get_queue((await stack.runs.get_run(config.name)).id)
    assert dict(queue.groups) == {"acknowledged": 2}
    assert dict(queue.rollouts) == {"committed": 4}
    await check_exactly_once(hasty, config)


@pytest.mark.parametrize("damaged", [1, 2])
async def test_damaged_checkpoints_are_passed_over(place: World, damaged: int):
    told: list[str] = []
    async with place.stack() as stack:
        config = config_of(await admitted(stack), steps=6, concurrency=0)
        saved: list[str] = []

        def stop_after_three(progress: Progress) -> None:
            if (progress.stage, progress.done) == ("checkpoint", 1):
                saved.append(progress.detail)
            if len(saved) == 3:
                raise Killed

        async with scripted_workers(place, "", 1):
            with pytest.raises(Killed):
                await train_grpo(stack, config, stop_after_three)
            run = await stack.runs.get_run(config.name)
            before = list((await stack.runs.list_checkpoints(run.id)).checkpoints)
            for record in before[:damaged]:
                Path(record.uri).write_text("{")
            await train_grpo(stack, config, lambda p: told.append(f"{p.stage}: {p.detail}"))
        after = (await stack.runs.list_checkpoints(run.id)).checkpoints
    kept = [record.id for record in before[damaged:]]
    assert [record.id for record in after[-len(kept) :]] == kept
    assert not {record.id for record in before[:damaged]} & {record.id for record in after}
    step = before[damaged].step
    assert any(f"recover: goes on from the checkpoint of step {step}" in line for line in told)
    await check_exactly_once(place, config)


async def test_a_run_of_which_no_checkpoint_opens_says_so(place: World):
    async with place.stack() as stack:
        config = config_of(await admitted(stack), concurrency=0)

        def stop_after_the_first(progress: Progress) -> None:
            if (progress.stage, progress.done) == ("checkpoint", 1):
                raise Killed

        async with scripted_workers(place, "", 1):
            with pytest.raises(Killed):
                await train_grpo(stack, config, stop_after_the_first)
            run = await stack.runs.get_run(config.name)
            for record in (await stack.runs.list_checkpoints(run.id)).checkpoints:
                Path(record.uri).write_text("{")
            with pytest.raises(DataLoss, match="does not match its digest"):
                await train_grpo(stack, config)

"""The supervised driver: the weights are those of an undisturbed run, whatever is killed."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from regreen.client.stack import Stack
from regreen.common import v1 as common_pb
from regreen.dataset import v1 as dataset_pb
from regreen.rpc.errors import FailedPrecondition, InvalidArgument, Unavailable
from regreen.train import experts
from regreen.train.batches import sft_batch
from regreen.train.config import SftConfig
from regreen.train.experts import KEPT, recipe
from regreen.train.progress import Progress
from regreen.train.rows import TrainResult, all_trajectories, open_run
from regreen.train.sft import batch_ids, train_sft
from tests.integration import dataset_samples as samples
from tests.integration.train_services import Fuse, Killed, World, admitted, world


@pytest.fixture
async def place(dataset_address: str, tmp_path: Path) -> AsyncIterator[World]:
    async with world(dataset_address, tmp_path) as found:
        yield found


async def with_experts(stack: Stack, count: int = 4) -> tuple[str, ...]:
    """Admitted tasks that have expert trajectories; one of each kind that must be left out."""
    tasks = await admitted(stack, count)
    for index, task_id in enumerate(tasks):
        for style in (0, 1):
            made = expert(task_id, style, tokens=24 + style + 4 * index)
            await stack.trajectories.commit_trajectory(made)
    await stack.trajectories.commit_trajectory(expert(tasks[0], 2, reward=0.0))
    await stack.trajectories.commit_trajectory(expert(tasks[0], 3, labels={"guesses": "2"}))
    await stack.trajectories.commit_trajectory(expert(tasks[0], 4, tokens=400))
    hacked = expert(tasks[0], 5)
    hacked.reward.hacks.append("test-skipped")
    await stack.trajectories.commit_trajectory(hacked)
    return tasks


def expert(task_id: str, style: int = 0, *, tokens: int = 40, reward: float = 1.0, labels=None):
    found = samples.trajectory(task_id, tokens=tokens, reward=reward)
    found.mode, found.actor, found.policy = common_pb.MODE_KEEP_NEW, "expert", "expert"
    found.labels.update(labels or {"guesses": "0"})
    found.group_index = style
    found.labels.update({"recipe": recipe(config_of((task_id,))), KEPT: "1"})
    return found


def config_of(tasks: tuple[str, ...], **changes) -> SftConfig:
    settings = {
        "name": samples.fresh("sft"),
        "tasks": tasks,
        "modes": ("keep_new",),
        "epochs": 2,
        "max_tokens": 300,
        "batch_size": 2,
        "checkpoint_every": 2,
        "recovery_deadline_s": 5.0,
    }
    return SftConfig(**(settings | changes))


async def undisturbed(stack: Stack, config: SftConfig) -> tuple[str, int]:
    """Weights and steps that the run must end with, from its config alone."""
    resolved = (await open_run(stack, config.name, "sft", config.settings(), {})).resolved
    ids, weights = resolved["train_ids"], "base"
    steps = config.epochs * -(-sum(map(len, ids)) // config.batch_size)
    for step in range(1, steps + 1):
        wanted = batch_ids(ids, step, batch_size=config.batch_size, seed=config.seed)
        batch = sft_batch([await stack.trajectories.get_trajectory(id) for id in wanted])
        weights = hashlib.sha256((weights + batch.digest).encode()).hexdigest()
    return weights, steps


async def test_all_clean_solved_experts_and_no_others_are_learned_from(place: World):
    async with place.stack() as stack:
        tasks = await with_experts(stack)
        config, seen = config_of(tasks), list[Progress]()
        result = await train_sft(stack, config, seen.append)
        resolved = (await open_run(stack, config.name, "sft", config.settings(), {})).resolved
        train_ids = list(itertools.chain(*resolved["train_ids"]))
        rows = [await stack.trajectories.get_trajectory(id) for id in train_ids]
        weights, steps = await undisturbed(stack, config)
        metrics = await stack.runs.list_metrics(result.run_id, names=["learner/loss"])
    assert Counter(row.task_id for row in rows) == dict.fromkeys(tasks, 2)
    assert all(row.reward.solved and not row.reward.hacks for row in rows)
    assert weights_of(result) == weights
    assert [point.step for point in metrics] == list(range(1, steps + 1))
    assert (result.state, result.steps) == ("done", steps)
    assert place.policy.serving.uri == result.uri
    assert seen[0].stage == "experts"
    assert [found.done for found in seen if found.stage == "start learner"] == [0, 1]
    told = [found for found in seen if found.due]
    losses = [f"step {point.step}: loss {point.value:.4f}" for point in metrics]
    assert [found.detail for found in told] == losses
    assert all(found.eta_s is not None for found in told)


async def rolled_out(runner, task, spec, styles):
    """Three experts of different content, as the script would make them; the second has no row."""
    tokens = 30 + spec.seed % 20
    rows = [expert(task.id, style, tokens=tokens + style) for style in (0, 2, 3)]
    for row in rows:
        del row.labels["recipe"], row.labels[KEPT]
    return rows


def kill_at_commit(stack: Stack, count: int, *, after: bool) -> None:
    """End this process at its `count`-th trajectory, before or after it is stored."""
    call, seen = stack.trajectories._call, 0

    async def counted(method, request, timeout_s):
        nonlocal seen
        seen += isinstance(request, dataset_pb.CommitTrajectoryRequest)
        if seen >= count and not after:
            raise Killed
        answer = await call(method, request, timeout_s)
        if seen >= count:
            raise Killed
        return answer

    stack.trajectories._call = counted


@pytest.mark.parametrize("after", [False, True])
async def test_experts_cut_between_two_commits_train_as_if_undisturbed(
    place: World, monkeypatch: pytest.MonkeyPatch, after: bool
):
    monkeypatch.setattr(experts, "expert_trajectories", rolled_out)
    async with place.stack() as stack:
        tasks = await admitted(stack, 2)

    def fresh(life: int) -> SftConfig:  # of another recipe each time, so that experts are made anew
        labels = {"budget.context_tokens": f"{3000 + life}"}
        return config_of(tasks, budget_labels=labels, epochs=1, concurrency=1)

    async with place.stack() as stack:
        await train_sft(stack, config := fresh(0))
        whole = await learned(stack, config)
        assert [len(found) for found in whole] == [3, 3]
    for count in (1, 2, 3, 4, 6):
        config = fresh(count)
        async with place.stack() as stack:
            kill_at_commit(stack, count, after=after)
            with pytest.raises(Killed):
                await train_sft(stack, config)
        async with place.stack() as stack:
            seen: list[Progress] = []
            await train_sft(stack, config, seen.append)
            assert await learned(stack, config) == whole
            experts_of = dataset_pb.TrajectoryFilter(actor="expert", task_id=tasks[0])
            rows = [row async for row in all_trajectories(stack, experts_of)]
        assert len([row for row in rows if row.labels["recipe"] == recipe(config)]) == 3
        assert seen[0].done == (count - (not after)) // 3  # a slot that is whole is not made anew


async def learned(stack: Stack, config: SftConfig) -> list[list[list[int]]]:
    """Tokens that a run learns from, by task, in order."""
    resolved = (await open_run(stack, config.name, "sft", config.settings(), {})).resolved
    return [
        [list((await stack.trajectories.get_trajectory(id)).token_ids) for id in ids]
        for ids in resolved["train_ids"]
    ]


async def test_of_two_experts_of_one_style_the_older_is_learned_from(place: World):
    async with place.stack() as stack:
        tasks = await admitted(stack, 1)
        first = await stack.trajectories.commit_trajectory(expert(tasks[0]))
        await stack.trajectories.commit_trajectory(expert(tasks[0], tokens=32))
        config = config_of(tasks)
        await train_sft(stack, config)
        resolved = (await open_run(stack, config.name, "sft", config.settings(), {})).resolved
    assert resolved["train_ids"] == [[first]]


def weights_of(result: TrainResult) -> str:
    return json.loads(Path(result.uri).read_text())["weights"]


@pytest.mark.slow
async def test_a_driver_killed_at_every_fifth_call_ends_with_the_same_weights(place: World):
    async with place.stack() as stack:
        tasks = await with_experts(stack)
    at, ended = 2, False
    while not ended:
        config = config_of(tasks)
        async with place.stack() as stack:
            Fuse(at, after=at % 2 == 1).protect(stack)
            try:
                await train_sft(stack, config)
                ended = True
            except Killed:
                if at % 3 == 0:
                    place.learner.forget()
        async with place.stack() as stack:
            result = await train_sft(stack, config)
            weights, steps = await undisturbed(stack, config)
        assert weights_of(result) == weights
        assert result.steps == steps
        at += 5
    assert at > 20


async def test_a_learner_that_forgets_is_taken_back_to_the_checkpoint(place: World):
    forgotten = []

    def listener(progress):
        if progress.stage == "sft" and progress.done == 3 and not forgotten:
            forgotten.append(progress)
            place.learner.forget()

    async with place.stack() as stack:
        config = config_of(await with_experts(stack))
        result = await train_sft(stack, config, listener)
        weights, _ = await undisturbed(stack, config)
    assert weights_of(result) == weights


async def test_a_learner_that_always_fails_at_the_same_step_ends_the_run(place: World):
    def listener(progress):
        if progress.stage == "sft" and progress.done == 3:
            place.learner.forget()

    async with place.stack() as stack:
        config = config_of(await with_experts(stack), recovery_deadline_s=1.0)
        with pytest.raises(Unavailable, match="the learner lost run"):
            await train_sft(stack, config, listener)


async def test_no_usable_expert_is_said_so(place: World):
    async with place.stack() as stack:
        tasks = await admitted(stack, 1)
        await stack.trajectories.commit_trajectory(expert(tasks[0], reward=0.0))
        with pytest.raises(FailedPrecondition, match="no solved expert trajectory among 1 task"):
            await train_sft(stack, config_of(tasks))


async def test_an_unknown_start_is_refused(place: World):
    async with place.stack() as stack:
        tasks = await with_experts(stack, 1)
        with pytest.raises(InvalidArgument, match="neither 'base' nor the name of a run"):
            await train_sft(stack, config_of(tasks, start="nowhere"))

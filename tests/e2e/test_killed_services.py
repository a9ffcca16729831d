"""Services killed with -9: each rollout ends with exactly one trajectory, each group is used once.

- Once while workers empty a queue, once while the GRPO driver trains on what its workers make.
"""

import asyncio
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from regreen.common.v1 import GRADER_BUILD_GATES, MODE_ANY_FIX, PIPELINE_SIMPLIFIED
from regreen.dataset import v1 as pb
from regreen.rollout.context import Budget, Knobs, Sampling, labels_of
from regreen.rollout.episode import Runner
from regreen.rollout.worker import Worker
from regreen.rpc.errors import RegreenError
from regreen.train.config import GrpoConfig
from regreen.train.rl import train_grpo
from tests.e2e.conftest import MIXED, Local
from tests.integration import dataset_samples as samples

KILLED = ("judge", "policy", "sandbox", "dataset")
GROUPS, SIZE, STEPS = 4, 2, 4


async def admit(stack, task: pb.Task, word: str = "") -> None:
    """Prepare and admit a task whose log holds `word`."""
    async for event in stack.state.prepare_state(task.environment):
        if event.HasField("state"):
            task.state_id = event.state.id
    await stack.tasks.import_tasks([task])
    report = samples.report(task.id)
    report.state_id = task.state_id
    report.error_log = f"E   ImportError: cannot import name 'hello' from 'wordlib' (/{word}.py)\n"
    await stack.tasks.record_gate(report)


async def enqueue(stack, task: pb.Task) -> str:
    """A run with groups of the prepared and admitted task; its id."""
    await admit(stack, task, "w")
    run = (await stack.runs.create_run(samples.fresh("run"), "grpo")).run
    groups = [
        pb.Group(
            run_id=run.id,
            task_id=task.id,
            size=SIZE,
            seed=seed,
            step=1,
            labels=labels_of(Budget(turns=3), Sampling(), Knobs()),
            pipeline=PIPELINE_SIMPLIFIED,
            mode=MODE_ANY_FIX,
            grader=GRADER_BUILD_GATES,
        )
        for seed in range(GROUPS)
    ]
    await stack.queue.enqueue_groups(groups)
    return run.id


async def kill_each(local: Local, stack, run_id: str, work: "asyncio.Task[None]") -> list[int]:
    """Kill the services in turn, each after further rollouts were committed; their old pids."""
    killed = []
    for number, name in enumerate(KILLED):
        while True:
            assert not work.done(), "the queue was empty before every service was killed"
            counts = (await stack.queue.get_queue(run_id)).rollouts
            if counts.get("committed", 0) >= 2 * number and counts.get("leased", 0):
                break
            await asyncio.sleep(0.05)
        pid = int((local.home / "run" / f"{name}.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)
    return killed


async def work_until_done(stack, run_id: str) -> None:
    """Workers, each until the queue is idle, until nothing waits: a killed lease must run out."""
    runner = Runner(stack)
    while True:
        try:
            await Worker(stack, runner, run_id=run_id, concurrency=2, lease_s=8.0).run(
                until_idle=True
            )
            counts = (await stack.queue.get_queue(run_id)).rollouts
        except RegreenError:
            continue
        if not counts.get("waiting", 0) and not counts.get("leased", 0):
            return
        await asyncio.sleep(0.2)


async def clear(stack) -> None:
    """Delete sandboxes of episodes whose services were killed; they would expire."""
    while boxes := (await stack.sandbox.list_sandboxes()).sandboxes:
        for box in boxes:
            await stack.sandbox.delete_sandbox(box.id)


@pytest.mark.slow
async def test_no_rollout_is_lost_or_doubled(local: Local) -> None:
    before = local.rows()
    async with local.stack(patience_s=60.0) as stack, asyncio.timeout(200):
        run_id = await enqueue(stack, local.task)
        work = asyncio.create_task(work_until_done(stack, run_id))
        try:
            killed = await kill_each(local, stack, run_id, work)
            await work
        finally:
            work.cancel()
        assert killed == [before[name]["pid"] for name in KILLED]
        found = [
            t
            async for t in stack.trajectories.export_trajectories(
                pb.TrajectoryFilter(run_id=run_id)
            )
        ]
        per_rollout = Counter((t.group_id, t.group_index) for t in found)
        assert len(per_rollout) == GROUPS * SIZE
        assert set(per_rollout.values()) == {1}
        assert all(t.reward.solved for t in found)
        taken = await stack.queue.take_groups(run_id, GROUPS + 1)
        members = [t.id for group in taken for t in group.trajectories]
        assert sorted(members) == sorted(t.id for t in found)
        assert not (await stack.queue.get_queue(run_id)).rollouts.get("lost", 0)
        await clear(stack)
    after = local.rows()
    assert {row["state"] for row in after.values()} == {"serving"}
    assert {n: r["address"] for n, r in after.items()} == {
        n: r["address"] for n, r in before.items()
    }
    assert all(after[name]["pid"] != before[name]["pid"] for name in KILLED)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model with the vocabulary of the served one, quick to train."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "small"
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return str(path)


class Killer:
    """Listens to a driver and kills each service at a moment when it is needed.

    A moment is a stage at a step, or at the next one if it passed by; one step is spare.
    """

    MOMENTS = (
        ("rollouts", 1, "sandbox"),
        ("learn", 1, "learner"),
        ("rollouts", 2, "policy"),
        ("checkpoint", 2, "dataset"),
        ("rollouts", 3, "judge"),
    )

    def __init__(self, home: Path) -> None:
        self._home, self._left = home, list(self.MOMENTS)
        self._step, self._polls = 1, 0
        self.seen: list[str] = []
        self.killed: dict[str, int] = {}

    def __call__(self, progress) -> None:
        self.seen.append(f"{progress.stage} {progress.done}/{progress.total} {progress.detail}")
        if progress.stage == "rollouts":
            self._polls += 1
            self._step = int(progress.detail.removeprefix("step ").partition(",")[0])
        wanted = self._left[0] if self._left else ("", 0, "")
        stage, step, name = wanted
        early = self._step < step or (stage == "rollouts" and self._polls < 3)
        if progress.stage != stage or early:
            return
        pid = int((self._home / "run" / f"{name}.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        self.killed[name], self._polls = pid, 0
        del self._left[0]


@pytest.mark.slow
async def test_a_run_uses_every_group_once_whatever_is_killed(
    local: Local, small_model: str
) -> None:
    task = pb.Task()
    task.CopyFrom(local.task)
    task.id = samples.fresh("greet-mixed")
    killer = Killer(local.home)
    async with local.stack(patience_s=60.0) as stack, asyncio.timeout(280):
        await admit(stack, task, MIXED)
        config = GrpoConfig(
            name=samples.fresh("grpo"),
            base_uri=small_model,
            tasks=(task.id,),
            steps=STEPS,
            groups_per_step=1,
            group_size=2,
            max_refills=0,
            concurrency=2,
            labels=labels_of(Budget(turns=3), Sampling(), Knobs()),
            hyperparameters={"importance_cap": -1.0},  # a script has no logprobs to correct by
        )
        result = await train_grpo(stack, config, killer)
        assert result.state == "done"
        queue = await stack.queue.get_queue(result.run_id)
        assert dict(queue.groups) == {"acknowledged": STEPS}
        assert dict(queue.rollouts) == {"committed": 2 * STEPS}
        wanted = pb.TrajectoryFilter(run_id=result.run_id)
        found = [t async for t in stack.trajectories.export_trajectories(wanted)]
        per_rollout = Counter((t.group_id, t.group_index) for t in found)
        assert len(per_rollout) == 2 * STEPS
        assert set(per_rollout.values()) == {1}
        assert sorted(t.reward.solved for t in found) == [False] * STEPS + [True] * STEPS
        records = (await stack.runs.list_checkpoints(result.run_id)).checkpoints
        used = Counter(id for record in records for id in record.group_ids)
        assert used == Counter({t.group_id for t in found})
        points = await stack.runs.list_metrics(result.run_id, names=["learned_groups"])
        assert [point.value for point in points] == [1.0] * STEPS
        assert list(killer.killed) == [name for _, _, name in Killer.MOMENTS], killer.seen
        await clear(stack)
    rows = local.rows()
    assert {row["state"] for row in rows.values()} == {"serving"}
    assert all(rows[name]["pid"] != pid for name, pid in killer.killed.items())

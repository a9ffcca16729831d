"""Services killed with -9 while rollouts run: each rollout ends with exactly one trajectory."""

import asyncio
import os
import signal
from collections import Counter

import pytest

from regreen.common.v1 import GRADER_BUILD_GATES, MODE_ANY_FIX, PIPELINE_SIMPLIFIED
from regreen.dataset import v1 as pb
from regreen.rollout.context import Budget, Knobs, Sampling, labels_of
from regreen.rollout.episode import Runner
from regreen.rollout.worker import Worker
from regreen.rpc.errors import RegreenError
from tests.e2e.conftest import Local
from tests.integration import dataset_samples as samples

KILLED = ("judge", "policy", "sandbox", "dataset")
GROUPS, SIZE = 4, 2


async def enqueue(stack, task: pb.Task) -> str:
    """A run with groups of the prepared and admitted task; its id."""
    async for event in stack.state.prepare_state(task.environment):
        if event.HasField("state"):
            task.state_id = event.state.id
    await stack.tasks.import_tasks([task])
    report = samples.report(task.id)
    report.state_id = task.state_id
    report.error_log = "E   ImportError: cannot import name 'hello' from 'wordlib' (/w.py)\n"
    await stack.tasks.record_gate(report)
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
        while boxes := (await stack.sandbox.list_sandboxes()).sandboxes:
            for box in boxes:  # of episodes whose services were killed; they would expire
                await stack.sandbox.delete_sandbox(box.id)
    after = local.rows()
    assert {row["state"] for row in after.values()} == {"serving"}
    assert {n: r["address"] for n, r in after.items()} == {
        n: r["address"] for n, r in before.items()
    }
    assert all(after[name]["pid"] != before[name]["pid"] for name in KILLED)

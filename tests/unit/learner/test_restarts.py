"""Ranks that are lost: the run goes on from its checkpoint by itself, or says why it cannot."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from learner_svc.runs import Runs
from regreen.batch import Batch
from regreen.client.learner import LearnerClient
from regreen.learner import v1 as pb
from regreen.rpc.errors import FailedPrecondition
from tests.unit.learner.test_service import RATE, learner

Make = Callable[..., Batch]


def restarts() -> float:
    return REGISTRY.get_sample_value("regreen_learner_restarts_total", {"kind": "grpo"}) or 0.0


def pids(runs: Runs) -> list[int]:
    worker = runs.get("run_l").worker
    assert worker is not None
    return worker.pids


async def start(client: LearnerClient, model: Path) -> pb.LearnerRun:
    return await client.start_run("run_l", pb.RUN_KIND_GRPO, str(model), hyperparameters=RATE)


async def kill_in_step(runs: Runs, step: int) -> None:
    """Stop the run's ranks, and kill them once they have been asked for the step."""
    run = runs.get("run_l")
    ranks = pids(runs)
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    while not run.files.batch(step).exists():  # noqa: ASYNC110 - no event says so
        await asyncio.sleep(0.01)
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)


async def told(client: LearnerClient, into: list[pb.Restart]) -> None:
    async for event in client.watch_run("run_l"):
        if event.HasField("restart"):
            into.append(event.restart)


async def test_a_run_goes_on_by_itself_as_if_no_rank_had_been_lost(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    batches = [make_batch(seed=seed, groups=4, size=6).to_bytes() for seed in range(4)]
    before = restarts()
    async with learner(tmp_path / "calm") as (client, _):
        await start(client, tiny_model)
        expected = [await client.step("run_l", n, batch=b) for n, b in enumerate(batches, 1)]
        whole = await client.save_checkpoint("run_l", policy_version=4)
    async with learner(tmp_path / "lossy") as (client, runs):
        await start(client, tiny_model)
        events: list[pb.Restart] = []
        watcher = asyncio.create_task(told(client, events))
        found = [await client.step("run_l", 1, batch=batches[0])]
        first = await client.save_checkpoint("run_l", policy_version=1)
        found.append(await client.step("run_l", 2, batch=batches[1]))
        killer = asyncio.create_task(kill_in_step(runs, 3))
        found.append(await client.step("run_l", 3, batch=batches[2]))
        await killer
        found.append(await client.step("run_l", 4, batch=batches[3]))
        assert [dict(f.metrics)["loss"] for f in found] == [
            dict(e.metrics)["loss"] for e in expected
        ]
        saved = await client.save_checkpoint("run_l", policy_version=4)
        assert saved.digest == whole.digest
        assert list(saved.group_ids) == [f"grp_{n}" for n in range(4)] * 3
        run = await client.get_run("run_l")
        assert (run.state, run.step, run.restarts) == (pb.RUN_STATE_ACTIVE, 4, 1)
        assert not [*runs.get("run_l").files.directory.glob("batch-*")]
        await client.stop_run("run_l")
        await asyncio.wait_for(watcher, 30)
    begun, done = events
    assert (begun.number, begun.limit, begun.from_step, begun.to_step) == (1, 3, first.step, 2)
    assert "rank 0 was ended by SIGKILL" in begun.reason
    assert (begun.complete, done.complete) == (False, True)
    assert restarts() == before + 1


async def test_restarts_have_a_bound_and_are_not_only_for_steps(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    async with learner(tmp_path, max_restarts=1) as (client, runs):
        await start(client, tiny_model)
        os.kill(pids(runs)[0], signal.SIGKILL)
        async for event in client.watch_run("run_l"):
            if event.restart.complete:
                break
        assert (await client.get_run("run_l")).restarts == 1
        os.kill(pids(runs)[0], signal.SIGKILL)
        async for _ in client.watch_run("run_l"):
            pass
        run = await client.get_run("run_l")
        assert run.state == pb.RUN_STATE_FAILED
        assert "rank 0 was ended by SIGKILL" in run.error
        assert "after 1 restarts in a row without a further step" in run.error
        with pytest.raises(FailedPrecondition, match="StartRun takes it up again"):
            await client.step("run_l", 1, batch=make_batch().to_bytes())

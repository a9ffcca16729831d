"""kill -9 of the learner service itself: its workers go with it, and the run can go on."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from regreen.batch import Batch
from regreen.client.learner import LearnerClient
from regreen.learner import v1 as pb

pytestmark = pytest.mark.slow
RATE = pb.Hyperparameters(learning_rate=1e-3)


async def serve(home: Path) -> tuple[asyncio.subprocess.Process, grpc.aio.Channel]:
    """A learner in a process of its own, and a channel to it once it serves."""
    address = f"unix:{home}/learner.sock"
    command = ("-m", "learner_svc", "--listen", address, "--metrics", "127.0.0.1:0")
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, "--home", str(home), "--engine", "plain"
    )
    channel = grpc.aio.insecure_channel(address)
    await asyncio.wait_for(channel.channel_ready(), 120)
    return process, channel


def workers_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


async def gone(pid: int) -> None:
    """Return when a process has ended."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(handle, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)


async def test_a_killed_learner_takes_its_workers_along_and_resumes(
    tiny_model: Path, make_batch: Callable[..., Batch], tmp_path: Path
) -> None:
    blobs = [make_batch(seed=seed, groups=3, size=6).to_bytes() for seed in range(3)]
    process, channel = await serve(tmp_path)
    async with channel:
        client = LearnerClient(channel)
        await client.start_run("run_k", pb.RUN_KIND_GRPO, str(tiny_model), hyperparameters=RATE)
        await client.step("run_k", 1, batch=blobs[0])
        saved = await client.save_checkpoint("run_k", policy_version=1)
        expected = (await client.step("run_k", 2, batch=blobs[1])).metrics["loss"]
        unfinished = asyncio.create_task(client.step("run_k", 3, batch=blobs[2]))
        await asyncio.sleep(0)
        [worker] = workers_of(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        await asyncio.wait_for(gone(worker), 30)
        await process.wait()
        unfinished.cancel()
    process, channel = await serve(tmp_path)
    async with channel:
        client = LearnerClient(channel)
        known = await client.get_run("run_k")
        assert (known.state, known.step) == (pb.RUN_STATE_STOPPED, 1)
        run = await client.start_run(
            "run_k", pb.RUN_KIND_GRPO, str(tiny_model), hyperparameters=RATE
        )
        assert (run.step, run.checkpoint.uri) == (1, saved.uri)
        again = await client.step("run_k", 2, batch=blobs[1])
        assert (again.metrics["loss"], again.repeated_step) == (expected, False)
    process.terminate()
    assert await asyncio.wait_for(process.wait(), 60) == 0

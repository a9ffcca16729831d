"""Workers, learners and the service are killed at random moments: nothing lost or doubled."""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from regreen.client.channel import connect
from regreen.client.dataset import RolloutQueueClient, RunClient, TaskClient, TrajectoryClient
from regreen.dataset import v1 as pb
from regreen.ids import new_id
from regreen.rpc.errors import LeaseExpired
from tests.integration import dataset_samples as samples

GROUPS, SIZE, KILLS = 6, 3, 3


class Service:
    """`python -m dataset_svc` as a process that can be killed and started again."""

    def __init__(self, home: Path, port: int) -> None:
        self.home, self.port = home, port
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = (self.home / "service.log").open("ab")
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "dataset_svc",
                f"--listen=127.0.0.1:{self.port}",
                "--metrics=127.0.0.1:0",
                f"--home={self.home}",
                "--lease-s=3",
                "--upkeep-s=0.5",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        log.close()

    def kill(self, number: int = signal.SIGKILL) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture
def service() -> Iterator[Service]:
    home = Path(tempfile.mkdtemp(prefix="regreen-test-crash-"))
    home.chmod(0o711)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    service = Service(home, port)
    service.start()
    yield service
    if service.process is not None and service.process.poll() is None:
        service.kill(signal.SIGTERM)
    shutil.rmtree(home, ignore_errors=True)


async def worker(
    name: str, address: str, task_id: str, done: asyncio.Event, rng: random.Random
) -> None:
    """Leases and commits until told to stop; now and then it dies and forgets everything."""
    async with connect(address) as channel:
        queue = RolloutQueueClient(channel, patience_s=60.0)
        while not done.is_set():
            with contextlib.suppress(LeaseExpired):
                for lease in await queue.lease_rollouts(name, 2):
                    if rng.random() < 0.2:
                        continue
                    trajectory = samples.trajectory(task_id, tokens=400, salt=lease.id)
                    await queue.commit_rollout(lease.id, trajectory)
            await asyncio.sleep(rng.random() * 0.05)


@pytest.mark.slow
async def test_killing_the_service_during_commits_loses_and_doubles_nothing(service: Service):
    address = f"127.0.0.1:{service.port}"
    rng = random.Random(5)
    async with connect(address) as channel:
        tasks, runs = TaskClient(channel, patience_s=90.0), RunClient(channel, patience_s=90.0)
        queue = RolloutQueueClient(channel, patience_s=90.0)
        task = samples.task()
        await tasks.import_tasks([task])
        run = (await runs.create_run("crash", "grpo")).run
        groups = [samples.group(run.id, task.id, SIZE, step) for step in range(1, GROUPS + 1)]
        await queue.enqueue_groups(groups)
        done = asyncio.Event()
        workers = [
            asyncio.create_task(worker(f"w{n}", address, task.id, done, random.Random(n)))
            for n in range(4)
        ]
        consumed: list[str] = []
        kills = 0
        async with asyncio.timeout(200):
            while len(consumed) < GROUPS:
                if kills < KILLS and len(consumed) * KILLS >= kills * GROUPS:
                    service.kill()
                    service.start()
                    kills += 1
                taken = await queue.take_groups(run.id, 2)
                ids = [item.group.id for item in taken]
                for item in taken:
                    assert [t.group_index for t in item.trajectories] == list(range(SIZE))
                if ids and rng.random() < 0.3:
                    consumed = await resume(queue, runs, run.id)
                    continue
                if ids:
                    record = pb.CheckpointRecord(
                        run_id=run.id, step=len(consumed), uri="file:///c", group_ids=ids
                    )
                    await runs.record_checkpoint(record)
                    consumed += ids
                await asyncio.sleep(0.1)
            done.set()
            await asyncio.gather(*workers)
        assert len(set(consumed)) == len(consumed) == GROUPS
        state = await queue.get_queue(run.id)
        assert dict(state.groups) == {"acknowledged": GROUPS}
        assert dict(state.rollouts) == {"committed": GROUPS * SIZE}
        trajectories = TrajectoryClient(channel)
        slots = [
            (t.group_id, t.group_index)
            async for t in trajectories.export_trajectories(pb.TrajectoryFilter(run_id=run.id))
        ]
        assert len(slots) == len(set(slots)) == GROUPS * SIZE
        assert kills == KILLS
    assert service.kill(signal.SIGTERM) == 0


async def resume(queue: RolloutQueueClient, runs: RunClient, run_id: str) -> list[str]:
    """What a killed learner does when it is back: rewind; the groups that it has consumed."""
    checkpoints = (await runs.list_checkpoints(run_id)).checkpoints
    newest = checkpoints[0].id if checkpoints else ""
    await queue.rewind_run(run_id, checkpoint_id=newest)
    return [group_id for checkpoint in checkpoints for group_id in checkpoint.group_ids]


async def test_many_workers_and_learners_share_one_queue(dataset_address: str):
    async with connect(dataset_address) as channel:
        queue, runs = RolloutQueueClient(channel), RunClient(channel)
        task = samples.task()
        await TaskClient(channel).import_tasks([task])
        run = (await runs.create_run(samples.fresh("run"), "grpo")).run
        await queue.enqueue_groups([samples.group(run.id, task.id, 4) for _ in range(10)])

        async def work(name: str) -> int:
            count = 0
            while leases := await queue.lease_rollouts(name, 3, run_id=run.id):
                for lease in leases:
                    trajectory = samples.trajectory(task.id, salt=lease.id)
                    await asyncio.gather(
                        *(queue.commit_rollout(lease.id, trajectory) for _ in range(2))
                    )
                    count += 1
            return count

        assert sum(await asyncio.gather(*(work(f"w{n}") for n in range(8)))) == 40
        takes = await asyncio.gather(*(queue.take_groups(run.id, 3) for _ in range(8)))
        ids = [item.group.id for taken in takes for item in taken]
        assert len(ids) == len(set(ids)) == 10


async def test_a_service_whose_private_postgres_dies_ends_and_the_next_one_goes_on(
    service: Service,
):
    async with connect(f"127.0.0.1:{service.port}") as channel:
        runs = RunClient(channel, patience_s=90.0)
        run = (await runs.create_run("kept", "eval")).run
        pid_file = service.home / "pg" / "data" / "postmaster.pid"
        os.kill(int(pid_file.read_text().split()[0]), signal.SIGKILL)
        assert service.process is not None
        assert await asyncio.to_thread(service.process.wait, 30) == 1
        service.start()
        assert (await runs.get_run("kept")).id == run.id


async def test_groups_enqueued_at_the_same_time_are_there_once(dataset_address: str):
    async with connect(dataset_address) as channel:
        queue, task = RolloutQueueClient(channel), samples.task()
        await TaskClient(channel).import_tasks([task])
        run = (await RunClient(channel).create_run(samples.fresh("run"), "grpo")).run
        group = samples.group(run.id, task.id)
        group.id = new_id("grp")
        answers = await asyncio.gather(*(queue.enqueue_groups([group]) for _ in range(6)))
        assert {tuple(ids) for ids in answers} == {(group.id,)}
        assert dict((await queue.get_queue(run.id)).rollouts) == {"waiting": 2}

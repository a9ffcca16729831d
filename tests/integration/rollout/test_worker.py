"""Workers over the real queue: nothing lost, nothing twice, whatever is killed."""

import asyncio
import time

import pytest
import pytest_asyncio
from prometheus_client import REGISTRY

from dataset_svc.__main__ import serving
from dataset_svc.settings import DatasetSettings
from regreen.client.stack import Endpoints, Stack
from regreen.common.v1 import GRADER_BUILD_GATES, MODE_ANY_FIX, PIPELINE_SIMPLIFIED
from regreen.dataset import v1 as pb
from regreen.rollout import held
from regreen.rollout.context import Budget, Knobs, Sampling, labels_of
from regreen.rollout.episode import Runner
from regreen.rollout.knowledge import Knowledge
from regreen.rollout.worker import Worker, knowledge_of, worker_pool
from regreen.rpc.errors import Unavailable
from tests.integration import dataset_samples as samples
from tests.integration.rollout.world import PIN, VALIDATE, kill_first_process, open_world, says

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(loop_scope="session")
async def dataset(database_url, tmp_path):
    """Address of a dataset service on the loop of these tests."""
    settings = DatasetSettings(
        listen="127.0.0.1:0",
        metrics="127.0.0.1:0",
        home=tmp_path,
        drain_s=0.5,
        fsync=False,
        retry_s=0.05,
        max_attempts=1,
    )
    async with serving(settings, database_url) as server:
        yield server.address


async def enqueue(stack, world, *, groups=1, size=2, state_id=None):
    """A run with groups of an admitted task; its id."""
    task = pb.Task()
    task.CopyFrom(world.task)
    task.id = samples.fresh("greet")
    task.state_id = ""
    await stack.tasks.import_tasks([task])
    report = samples.report(task.id)
    report.state_id = world.task.state_id if state_id is None else state_id
    report.error_log = "E   ImportError: cannot import name 'hello' from 'wordlib' (/w.py)\n"
    await stack.tasks.record_gate(report)
    run = await stack.runs.create_run(samples.fresh("run"), "grpo")
    labels = labels_of(Budget(turns=3), Sampling(), Knobs())
    await stack.queue.enqueue_groups(
        [
            pb.Group(
                run_id=run.run.id,
                task_id=task.id,
                size=size,
                seed=seed,
                step=1,
                labels=labels,
                pipeline=PIPELINE_SIMPLIFIED,
                mode=MODE_ANY_FIX,
                grader=GRADER_BUILD_GATES,
            )
            for seed in range(groups)
        ]
    )
    return run.run.id


async def counts(stack, run_id):
    return dict((await stack.queue.get_queue(run_id)).rollouts)


async def until(condition, *, within_s):
    """Poll until a condition of the queue holds."""
    async with asyncio.timeout(within_s):
        while not await condition():  # noqa: ASYNC110 - the queue has no events
            await asyncio.sleep(0.05)


async def test_a_worker_empties_the_queue(world, dataset):
    async with world.playing(says(PIN, VALIDATE), dataset=dataset) as stack:
        run_id = await enqueue(stack, world, groups=2, size=2)
        seen = []
        worker = Worker(stack, Runner(stack), run_id=run_id, listener=seen.append)
        stats = await worker.run(until_idle=True)
        assert stats.committed == 4
        leased, committed = (
            {found.rollout_id for found in seen if found.what == what}
            for what in ("leased", "committed")
        )
        assert leased == committed
        assert len(seen) == 2 * len(leased) == 8
        assert seen[-1].detail.startswith("solved  reward")
        assert (await counts(stack, run_id))["committed"] == 4
        taken = await stack.queue.take_groups(run_id, 5)
        assert sorted(len(group.trajectories) for group in taken) == [2, 2]
        for member in taken[0].trajectories:
            assert member.reward.solved
            assert member.run_id == run_id
            assert list(member.token_ids)
        assert (await knowledge_of(stack)).fixes


async def test_a_worker_may_have_more_episodes_than_one_call_leases(world, dataset):
    async with world.playing(says(PIN, VALIDATE), dataset=dataset) as stack:
        run_id = await enqueue(stack, world)
        worker = Worker(stack, Runner(stack), run_id=run_id, concurrency=1001)
        assert (await worker.run(until_idle=True)).committed == 2


async def test_trouble_gives_the_rollout_back_and_scores_nothing(world, dataset):
    async with world.playing([], dataset=dataset) as stack:
        run_id = await enqueue(stack, world, size=1, state_id="st_" + "0" * 32)
        worker = Worker(stack, Runner(stack, Knowledge()), run_id=run_id)
        stats = await worker.run(until_idle=True)
        assert stats.committed == 0
        assert stats.given_back >= 1
        assert (await counts(stack, run_id)).get("committed", 0) == 0


async def rollouts_of(stack, run_id):
    return list((await stack.parking.list_rollouts(run_id)).rollouts)


async def test_a_rollout_of_its_own_failure_is_lost_where_one_attempt_is_all(world, dataset):
    async with world.playing([], dataset=dataset) as stack:
        run_id = await enqueue(stack, world, size=1, state_id="st_" + "0" * 32)
        worker = Worker(stack, Runner(stack, Knowledge()), run_id=run_id)
        assert (await worker.run(until_idle=True)).given_back == 1
        (found,) = await rollouts_of(stack, run_id)
        assert (found.state, found.attempt, found.outages) == ("lost", 1, 0)


def generations():
    """Calls of the policy that have begun in this process."""
    call = {"grpc_service": "regreen.policy.v1.PolicyService", "grpc_method": "Generate"}
    return (
        REGISTRY.get_sample_value("grpc_server_started_total", {"grpc_type": "unary", **call}) or 0
    )


async def delete(stack, sandbox_id):
    await stack.sandbox.delete_sandbox(sandbox_id)


@pytest.mark.parametrize("how", ["killed", "deleted"])
async def test_a_sandbox_that_others_end_uses_up_no_attempt(world, dataset, how):
    slow = [{"text": PIN, "turn": 0, "delay_s": 0.1}, {"text": VALIDATE, "turn": 1}]
    async with world.playing(slow, dataset=dataset) as stack:
        run_id = await enqueue(stack, world, size=1)
        before = generations()
        known = {box.id for box in (await stack.sandbox.list_sandboxes()).sandboxes}
        async with worker_pool(stack, run_id=run_id, runner=Runner(stack, Knowledge())) as worker:
            mine: list[str] = []

            async def there():
                boxes = (await stack.sandbox.list_sandboxes()).sandboxes
                mine[:] = [box.id for box in boxes if box.id not in known]
                return bool(mine)

            await until(there, within_s=60)

            async def sampling():
                return generations() > before

            await until(sampling, within_s=60)  # no command runs that its end would end
            ends = {"killed": kill_first_process, "deleted": delete}
            await ends[how](stack, mine[0])

            async def done():
                return worker.stats.committed == 1

            await until(done, within_s=60)
        (found,) = await rollouts_of(stack, run_id)
        assert (found.state, found.attempt, found.outages) == ("committed", 1, 1)
        assert found.attempts[0].error.startswith("SandboxLost: ")


async def test_a_policy_that_is_away_uses_up_no_attempt(world, dataset):
    async with world.playing(says(PIN, VALIDATE), dataset=dataset) as stack:
        run_id = await enqueue(stack, world, size=1)
        found = {**world.endpoints, "policy": "127.0.0.1:1", "dataset": dataset}
        async with Stack(Endpoints(**found), patience_s=0.2) as without:
            runner = Runner(without, Knowledge())
            async with worker_pool(without, run_id=run_id, runner=runner) as worker:

                async def tried():
                    return worker.stats.given_back >= 3

                await until(tried, within_s=60)
        stats = await Worker(stack, Runner(stack, Knowledge()), run_id=run_id).run(until_idle=True)
        assert stats.committed == 1
        (found,) = await rollouts_of(stack, run_id)
        assert found.state == "committed"
        assert found.outages == found.attempt >= 3


async def test_a_full_sandbox_service_uses_up_no_attempt(dataset, tmp_path):
    async with (
        open_world(tmp_path, max_sandboxes=2) as small,
        small.playing(says(PIN, VALIDATE), dataset=dataset) as stack,
    ):
        run_id = await enqueue(stack, small, size=1)
        others = [await stack.sandbox.create_sandbox(small.task.state_id) for _ in range(2)]
        async with Stack(stack.endpoints, patience_s=0.2) as hasty:
            runner = Runner(hasty, Knowledge())
            async with worker_pool(hasty, run_id=run_id, runner=runner) as worker:

                async def tried():
                    return worker.stats.given_back >= 2

                await until(tried, within_s=60)
        for box in others:
            await stack.sandbox.delete_sandbox(box.id)
        stats = await Worker(stack, Runner(stack, Knowledge()), run_id=run_id).run(until_idle=True)
        assert stats.committed == 1
        (found,) = await rollouts_of(stack, run_id)
        assert found.outages >= 2
        assert "there is no room for 1 more" in found.attempts[0].error


async def test_a_sandbox_outlives_its_worker_by_no_more_than_its_lease(world, dataset, monkeypatch):
    """However long the episode may take; and it lives as long as the episode does."""
    monkeypatch.setattr(held, "HELD_S", 1.5)
    slow = [{"text": PIN, "turn": 0, "delay_s": 0.1}, {"text": VALIDATE, "turn": 1}]
    async with world.playing(slow, dataset=dataset) as stack:
        known = {box.id for box in (await stack.sandbox.list_sandboxes()).sandboxes}

        async def mine():
            boxes = (await stack.sandbox.list_sandboxes()).sandboxes
            return [box for box in boxes if box.id not in known]

        run_id = await enqueue(stack, world, size=1)
        worker = Worker(stack, Runner(stack, Knowledge()), run_id=run_id)
        running = asyncio.create_task(worker.run(until_idle=True))
        await until(mine, within_s=60)
        left_s = []
        while not running.done():
            now = time.time()
            left_s += [box.expire_time.ToNanoseconds() / 1e9 - now for box in await mine()]
            await asyncio.sleep(0.1)
        assert (await running).committed == 1
        assert len(left_s) > 15, "it outlived its first lease"
        assert max(left_s) <= 1.5
        (found,) = await rollouts_of(stack, run_id)
        assert (found.state, found.attempt) == ("committed", 0), "it was kept alive"


async def test_a_killed_worker_leaves_its_rollouts_to_another(world, dataset):
    async with world.playing(says(PIN, VALIDATE), dataset=dataset) as stack:
        run_id = await enqueue(stack, world, size=2)
        abandoned = await stack.queue.lease_rollouts("killed", 1, run_id=run_id, duration_s=0.5)
        assert len(abandoned) == 1
        async with worker_pool(stack, run_id=run_id, concurrency=2) as worker:

            async def done():
                return worker.stats.committed == 2

            await until(done, within_s=60)
            assert (await counts(stack, run_id))["committed"] == 2


async def test_a_stopped_worker_gives_back_what_it_holds(world, dataset):
    slow = [{"text": PIN, "delay_s": 5.0}]
    async with world.playing(slow, dataset=dataset) as stack:
        run_id = await enqueue(stack, world, size=1)
        async with worker_pool(stack, run_id=run_id) as worker:

            async def leased():
                return (await counts(stack, run_id)).get("leased", 0) > 0

            await until(leased, within_s=30)
        assert (worker.stats.committed, worker.stats.given_back) == (0, 1)
        left = await counts(stack, run_id)
        assert left.get("leased", 0) == 0
        assert left["waiting"] == 1


async def test_a_service_that_stays_away_ends_the_pool(world):
    endpoints = Endpoints(**world.endpoints, dataset="127.0.0.1:1")
    async with Stack(endpoints, patience_s=0.2) as stack:
        runner = Runner(stack, Knowledge())
        worker = Worker(stack, runner, patience_s=0.5)
        with pytest.raises(Unavailable):
            await worker.run()

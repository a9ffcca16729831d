"""The queue under strain: poison is parked, reasons are kept, producers and idle workers wait."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dataset_svc.__main__ import serving
from dataset_svc.hot import IdlePace
from dataset_svc.settings import DatasetSettings
from regreen.client.channel import connect
from regreen.client.parking import ParkingClient
from regreen.rpc.errors import InvalidArgument, LeaseExpired, NotFound, ResourceExhausted
from tests.integration import dataset_samples as samples
from tests.integration.dataset_samples import Clients, imported, new_run


class All(Clients):
    """The clients of the queue and of what it has set aside."""

    def __init__(self, channel) -> None:
        super().__init__(channel)
        self.parking = ParkingClient(channel, patience_s=2.0)


@pytest.fixture
async def clients(database_url: str, tmp_path: Path) -> AsyncIterator[All]:
    settings = DatasetSettings(
        listen="127.0.0.1:0", metrics="127.0.0.1:0", home=tmp_path, drain_s=1.0, fsync=False,
        max_attempts=1, max_outages=1, park_after=2, max_waiting=6, idle_asks_per_s=2.0,
        lease_s=0.2,
    )  # fmt: skip
    async with serving(settings, database_url) as server, connect(server.address) as channel:
        yield All(channel)


async def settle(clients: All, run_id: str, bad: str, count: int, *, good_ones: bool) -> None:
    """Lease `count`: those of the bad task fail, the others are committed, or fail as well."""
    leases = await clients.queue.lease_rollouts("w", count, run_id=run_id, duration_s=60)
    for lease in sorted(leases, key=lambda one: one.group.task_id != bad):
        if lease.group.task_id == bad or not good_ones:
            await clients.queue.fail_rollout(lease.id, "the worker died of it")
        else:
            made = samples.trajectory(lease.group.task_id, salt=lease.id)
            await clients.queue.commit_rollout(lease.id, made)


async def enqueue(clients: All, run_id: str, *tasks: str) -> None:
    await clients.queue.enqueue_groups([samples.group(run_id, task, 2) for task in tasks])


async def until_lost(clients: All, run_id: str, count: int) -> None:
    async with asyncio.timeout(20):
        while True:
            if (await clients.queue.get_queue(run_id)).rollouts["lost"] == count:
                return
            await asyncio.sleep(0.05)


async def test_a_poison_task_is_parked_with_its_reason_and_can_be_released(clients: All):
    (bad, good), run_id = await imported(clients, 2), await new_run(clients)
    await enqueue(clients, run_id, bad, good)
    await settle(clients, run_id, bad, 4, good_ones=True)
    assert not (await clients.parking.list_parked_tasks(run_id)).tasks
    await enqueue(clients, run_id, bad, bad)
    await settle(clients, run_id, bad, 1, good_ones=True)
    (parked,) = (await clients.parking.list_parked_tasks(run_id)).tasks
    assert (parked.task_id, parked.reason) == (bad, "the worker died of it")
    queue = await clients.queue.get_queue(run_id)
    assert dict(queue.rollouts) == {"lost": 6, "committed": 2}
    assert dict(queue.groups) == {"complete": 4}
    await enqueue(clients, run_id, bad)
    assert not await clients.queue.lease_rollouts("w", 9, run_id=run_id)
    taken = await clients.queue.take_groups(run_id, 9)
    assert len(taken) == 5
    assert {item.lost for item in taken if item.group.task_id == bad} == {2}
    assert "parked" in taken[-1].lost_error
    await enqueue(clients, run_id, bad)
    assert await clients.parking.release_task(run_id, bad) == 2
    assert not (await clients.parking.list_parked_tasks(run_id)).tasks
    assert len(await clients.queue.lease_rollouts("w", 9, run_id=run_id)) == 2
    with pytest.raises(NotFound):
        await clients.parking.release_task(run_id, bad)


async def test_an_outage_parks_nothing(clients: All):
    tasks, run_id = await imported(clients, 2), await new_run(clients)
    for _ in range(3):
        await enqueue(clients, run_id, *tasks)
        await settle(clients, run_id, tasks[0], 4, good_ones=False)
    assert dict((await clients.queue.get_queue(run_id)).rollouts) == {"lost": 12}
    assert not (await clients.parking.list_parked_tasks(run_id)).tasks


async def test_every_attempt_keeps_its_reason(clients: All):
    (task,), run_id = await imported(clients), await new_run(clients)
    await enqueue(clients, run_id, task)
    first, second = await clients.queue.lease_rollouts("w1", 2, run_id=run_id, duration_s=60)
    await clients.queue.fail_rollout(first.id, "no disk")
    await clients.queue.fail_rollout(second.id, "leaving", release=True)
    (again,) = await clients.queue.lease_rollouts("w2", 2, run_id=run_id, duration_s=0.05)
    await until_lost(clients, run_id, 2)
    with pytest.raises(LeaseExpired):
        await clients.queue.commit_rollout(again.id, samples.trajectory(task))
    rollouts = (await clients.parking.list_rollouts(run_id, state="lost")).rollouts
    found = {r.id: [(a.worker, a.error) for a in r.attempts] for r in rollouts}
    assert found[first.rollout_id] == [("w1", "no disk")]
    assert found[second.rollout_id] == [("w1", "leaving"), ("w2", "the last lease ran out")]
    paged = await clients.parking.list_rollouts(run_id, page_size=1)
    rest = await clients.parking.list_rollouts(run_id, page_token=paged.next_page_token)
    assert {paged.rollouts[0].id, rest.rollouts[0].id} == set(found) or not paged.next_page_token
    with pytest.raises(InvalidArgument):
        await clients.parking.list_rollouts(run_id, state="parked")


async def test_a_full_queue_refuses_until_some_are_leased(clients: All):
    (task,), run_id = await imported(clients), await new_run(clients)
    await enqueue(clients, run_id, task, task, task)
    clients.queue.patience_s = 0.0
    with pytest.raises(ResourceExhausted) as caught:
        await enqueue(clients, run_id, task)
    assert caught.value.retry_after_s
    await clients.queue.lease_rollouts("w", 2, run_id=run_id, duration_s=60)
    await enqueue(clients, run_id, task)


async def test_idle_workers_are_told_to_wait_in_turn(clients: All):
    run_id = await new_run(clients)
    answers = [await clients.queue.ask_for_rollouts(f"w{n}", 1, run_id=run_id) for n in range(4)]
    waits = [answer.poll_after.ToTimedelta().total_seconds() for answer in answers]
    assert waits == sorted(waits)
    assert waits[-1] > 1.0


def test_the_pace_of_idle_workers_has_a_bound_and_forgets():
    now = [0.0]
    pace = IdlePace(10.0, most_s=5.0, clock=lambda: now[0])
    waits = [pace.pause_s() for _ in range(200)]
    assert max(waits) == 5.0
    assert waits[10] == pytest.approx(1.1, abs=0.2)
    now[0] = 60.0
    assert pace.pause_s() == pytest.approx(0.1)


async def test_commits_that_come_together_are_judged_one_by_one(clients: All):
    (task,), run_id = await imported(clients), await new_run(clients)
    await enqueue(clients, run_id, task, task, task)
    leases = await clients.queue.lease_rollouts("w", 6, run_id=run_id, duration_s=60)
    await clients.queue.fail_rollout(leases[5].id, "gone")
    good = [samples.trajectory(task, salt=lease.id) for lease in leases]
    bad = samples.trajectory(task)
    bad.reward.value = float("nan")
    found = await asyncio.gather(
        *(clients.queue.commit_rollout(leases[n].id, good[n]) for n in range(4)),
        *(clients.queue.commit_rollout(leases[0].id, good[0]) for _ in range(3)),
        clients.queue.commit_rollout(leases[4].id, bad),
        clients.queue.commit_rollout(leases[5].id, good[5]),
        clients.queue.commit_rollout("lse_" + "0" * 32, good[5]),
        clients.queue.commit_rollout(leases[1].id, samples.trajectory(task)),
        return_exceptions=True,
    )
    if isinstance(found[1], LeaseExpired):  # of two for one lease the first to come is taken
        found[1], found[10] = found[10], found[1]
    ids = [answer.trajectory_id for answer in found[:7]]
    assert len(set(ids)) == 4
    assert set(ids[4:]) == {ids[0]}
    assert [type(error) for error in found[7:]] == [
        InvalidArgument, LeaseExpired, NotFound, LeaseExpired,
    ]  # fmt: skip
    states = dict((await clients.queue.get_queue(run_id)).rollouts)
    assert states == {"committed": 4, "leased": 1, "lost": 1}


async def test_one_request_id_at_once_is_one_lease(clients: All):
    (task,), run_id = await imported(clients), await new_run(clients)
    await enqueue(clients, run_id, task, task)
    request_id = samples.fresh("r")
    answers = await asyncio.gather(
        *(
            clients.queue.lease_rollouts(
                "w", 1, run_id=run_id, duration_s=60, request_id=request_id
            )
            for _ in range(5)
        )
    )
    assert len({lease.id for leases in answers for lease in leases}) == 1
    with pytest.raises(InvalidArgument, match="another request"):
        await clients.queue.lease_rollouts("v", 1, run_id=run_id, request_id=request_id)

"""The rollout queue over the wire: from enqueue to checkpoint, and what is refused on the way."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from prometheus_client import REGISTRY

from dataset_svc.__main__ import serving
from dataset_svc.settings import DatasetSettings
from regreen.client.channel import connect
from regreen.client.parking import ParkingClient
from regreen.dataset import v1 as pb
from regreen.rpc.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    LeaseExpired,
    NotFound,
)
from tests.integration import dataset_samples as samples
from tests.integration.dataset_samples import Clients, imported, new_run


@pytest.fixture
async def clients(dataset_address: str) -> AsyncIterator[Clients]:
    async with connect(dataset_address) as channel:
        yield Clients(channel)


async def committed_group(
    clients: Clients, run_id: str, task_id: str, size: int = 2, step: int = 1
):
    (group_id,) = await clients.queue.enqueue_groups([samples.group(run_id, task_id, size, step)])
    leases = await clients.queue.lease_rollouts("worker", size, run_id=run_id)
    for lease in leases:
        await clients.queue.commit_rollout(lease.id, samples.trajectory(task_id))
    return group_id


async def test_a_rollout_from_queue_to_checkpoint(clients: Clients):
    (task_id,) = await imported(clients)
    run_id = await new_run(clients)
    (group_id,) = await clients.queue.enqueue_groups([samples.group(run_id, task_id, 3)])
    leases = await clients.queue.lease_rollouts("worker", 10, run_id=run_id)
    assert [lease.group_index for lease in leases] == [0, 1, 2]
    assert len({lease.seed for lease in leases}) == 3
    assert not await clients.queue.lease_rollouts("worker", 10, run_id=run_id)
    for position, lease in enumerate(leases):
        answer = await clients.queue.commit_rollout(lease.id, samples.trajectory(task_id))
        assert answer.group_complete == (position == 2)
    (taken,) = await clients.queue.take_groups(run_id, 5)
    assert taken.group.id == group_id
    assert [t.group_index for t in taken.trajectories] == [0, 1, 2]
    assert [t.seed for t in taken.trajectories] == [lease.seed for lease in leases]
    assert len(taken.trajectories[0].token_ids) == 40
    assert not await clients.queue.take_groups(run_id, 5)
    checkpoint = await clients.runs.record_checkpoint(
        pb.CheckpointRecord(run_id=run_id, step=1, uri="file:///c1", group_ids=[group_id])
    )
    queue = await clients.queue.get_queue(run_id)
    assert dict(queue.groups) == {"acknowledged": 1}
    assert dict(queue.rollouts) == {"committed": 3}
    listed = await clients.runs.list_checkpoints(run_id)
    assert [c.id for c in listed.checkpoints] == [checkpoint.id]
    assert list(listed.checkpoints[0].group_ids) == [group_id]


async def test_enqueue_is_idempotent_by_group_id(clients: Clients):
    (task_id,) = await imported(clients)
    run_id = await new_run(clients)
    group = samples.group(run_id, task_id)
    group.id = "grp_" + uuid.uuid4().hex
    for _ in range(3):
        assert list(await clients.queue.enqueue_groups([group])) == [group.id]
    assert (await clients.queue.get_queue(run_id)).rollouts["waiting"] == 2
    group.seed += 1
    with pytest.raises(AlreadyExists):
        await clients.queue.enqueue_groups([group])


@pytest.mark.parametrize(
    ("field", "spoil"),
    [
        ("groups[0].size", lambda g: setattr(g, "size", 0)),
        ("groups[0].size", lambda g: setattr(g, "size", 100_000)),
        ("groups[0].mode", lambda g: g.ClearField("mode")),
        ("groups[0].pipeline", lambda g: g.ClearField("pipeline")),
        ("groups[0].grader", lambda g: setattr(g, "grader", 99)),
        ("groups[0].id", lambda g: setattr(g, "id", "mine")),
        ("groups[0].run_id", lambda g: setattr(g, "run_id", "")),
    ],
)
async def test_a_malformed_group_is_refused_by_field(clients: Clients, field: str, spoil):
    (task_id,) = await imported(clients)
    group = samples.group(await new_run(clients), task_id)
    spoil(group)
    with pytest.raises(InvalidArgument) as caught:
        await clients.queue.enqueue_groups([group])
    assert caught.value.field == field


async def test_a_repeated_request_gets_the_same_answer(clients: Clients):
    (task_id,) = await imported(clients)
    run_id = await new_run(clients)
    group = samples.group(run_id, task_id)
    first = await clients.queue.enqueue_groups([group], request_id="r-" + run_id)
    assert await clients.queue.enqueue_groups([group], request_id="r-" + run_id) == first
    with pytest.raises(InvalidArgument) as caught:
        await clients.queue.enqueue_groups([group, group], request_id="r-" + run_id)
    assert caught.value.field == "request_id"
    leases = await clients.queue.lease_rollouts("w", 1, run_id=run_id, request_id="l-" + run_id)
    again = await clients.queue.lease_rollouts("w", 1, run_id=run_id, request_id="l-" + run_id)
    assert again == leases


async def test_a_trajectory_must_be_of_its_lease(clients: Clients):
    first, second = await imported(clients, 2)
    run_id = await new_run(clients)
    await clients.queue.enqueue_groups([samples.group(run_id, first)])
    (lease,) = await clients.queue.lease_rollouts("w", 1, run_id=run_id)
    with pytest.raises(InvalidArgument) as caught:
        await clients.queue.commit_rollout(lease.id, samples.trajectory(second))
    assert caught.value.field == "trajectory.task_id"
    wrong = samples.trajectory(first)
    wrong.seed = lease.seed + 1
    with pytest.raises(InvalidArgument) as caught:
        await clients.queue.commit_rollout(lease.id, wrong)
    assert caught.value.field == "trajectory.seed"
    unknown = "lse_" + "0" * 32
    for call in (
        clients.queue.commit_rollout(unknown, samples.trajectory(first)),
        clients.queue.fail_rollout(unknown, "?"),
        clients.queue.heartbeat([unknown]),
    ):
        with pytest.raises(NotFound):
            await call


async def test_commit_is_idempotent_under_its_lease(clients: Clients):
    (task_id,) = await imported(clients)
    run_id = await new_run(clients)
    await clients.queue.enqueue_groups([samples.group(run_id, task_id, 1)])
    (lease,) = await clients.queue.lease_rollouts("w", 1, run_id=run_id)
    done = await clients.queue.commit_rollout(lease.id, samples.trajectory(task_id))
    again = await clients.queue.commit_rollout(lease.id, samples.trajectory(task_id))
    assert again.trajectory_id == done.trajectory_id
    assert again.group_complete
    with pytest.raises(LeaseExpired):
        await clients.queue.commit_rollout(lease.id, samples.trajectory(task_id, salt="other"))
    with pytest.raises(LeaseExpired):
        await clients.queue.fail_rollout(lease.id, "too late")
    with pytest.raises(LeaseExpired):
        await clients.queue.heartbeat([lease.id])


async def failed(clients: Clients, run_id: str, times: int) -> None:
    """Lease the first slot and give it back as failed, `times` times, however long it rests."""
    for attempt in range(times):
        (lease,) = await clients.queue.lease_rollouts("w", 1, run_id=run_id)
        assert (lease.group_index, lease.attempt) == (0, attempt)
        assert await clients.queue.fail_rollout(lease.id, "sandbox died \x00") == (attempt < 3)


@pytest.fixture
async def hasty(database_url: str, tmp_path: Path) -> AsyncIterator[Clients]:
    """Clients of a service that gives failed rollouts out again at once."""
    settings = DatasetSettings(home=tmp_path, metrics="127.0.0.1:0", listen="127.0.0.1:0")
    patched = settings.model_copy(update={"retry_s": 0.0, "drain_s": 0.1, "fsync": False})
    async with serving(patched, database_url) as server, connect(server.address) as channel:
        yield Clients(channel)


async def test_infrastructure_failures_are_retried_then_lost_and_counted(hasty: Clients):
    (task_id,) = await imported(hasty)
    run_id = await new_run(hasty)
    await hasty.queue.enqueue_groups([samples.group(run_id, task_id, 2)])
    before = REGISTRY.get_sample_value("regreen_dataset_rollouts_lost_total")
    await failed(hasty, run_id, 4)
    assert REGISTRY.get_sample_value("regreen_dataset_rollouts_lost_total") == before + 1
    (lease,) = await hasty.queue.lease_rollouts("w", 1, run_id=run_id)
    await hasty.queue.commit_rollout(lease.id, samples.trajectory(task_id))
    (taken,) = await hasty.queue.take_groups(run_id, 1)
    assert (taken.lost, taken.lost_error) == (1, "sandbox died \x00")
    assert [t.group_index for t in taken.trajectories] == [1]


async def outcome_of(clients: Clients, run_id: str) -> pb.Rollout:
    """The one rollout of a run."""
    (found,) = (await ParkingClient(clients.channel).list_rollouts(run_id)).rollouts
    return found


async def test_outages_use_up_no_attempt_and_have_a_bound_of_their_own(hasty: Clients):
    (task_id,) = await imported(hasty)
    run_id = await new_run(hasty)
    await hasty.queue.enqueue_groups([samples.group(run_id, task_id, 1)])
    for attempt in range(4 + 49):
        (lease,) = await hasty.queue.lease_rollouts("w", 1, run_id=run_id)
        assert lease.attempt == attempt  # no attempt has the seeds of another
        own = attempt % 17 == 16  # 3 failures of the rollout's own among 50 outages
        retried = await hasty.queue.fail_rollout(lease.id, "policy away", outage=not own)
        assert retried == (attempt < 52)
    lost = await outcome_of(hasty, run_id)
    assert (lost.state, lost.attempt, lost.outages) == ("lost", 53, 50)


async def test_what_kills_its_worker_each_time_comes_to_an_end(hasty: Clients):
    (task_id,) = await imported(hasty)
    run_id = await new_run(hasty)
    await hasty.queue.enqueue_groups([samples.group(run_id, task_id, 1)])
    given = 0
    async with asyncio.timeout(60):
        while (rollout := await outcome_of(hasty, run_id)).state != "lost":
            given += len(await hasty.queue.lease_rollouts("w", 1, run_id=run_id, duration_s=0.01))
            await hasty.queue.get_queue(run_id)  # counts as lost what ran out for the last time
    assert (rollout.attempt, rollout.outages, given) == (50, 50, 50)
    assert rollout.error == "the last lease ran out"


async def test_a_failed_rollout_rests_and_a_released_one_does_not(clients: Clients):
    (task_id,) = await imported(clients)
    run_id = await new_run(clients)
    await clients.queue.enqueue_groups([samples.group(run_id, task_id, 1)])
    for _ in range(6):
        (lease,) = await clients.queue.lease_rollouts("w", 1, run_id=run_id)
        assert lease.attempt == 0
        assert await clients.queue.fail_rollout(lease.id, "the worker ended", release=True)
    (lease,) = await clients.queue.lease_rollouts("w", 1, run_id=run_id)
    assert await clients.queue.fail_rollout(lease.id, "sandbox died")
    assert not await clients.queue.lease_rollouts("w", 1, run_id=run_id)
    assert (await clients.queue.get_queue(run_id)).rollouts["waiting"] == 1


async def test_a_rewind_gives_lost_rollouts_of_unconsumed_groups_another_chance(hasty: Clients):
    (task_id,) = await imported(hasty)
    run_id = await new_run(hasty)
    for step in (1, 2):
        await hasty.queue.enqueue_groups([samples.group(run_id, task_id, 1, step)])
        await failed(hasty, run_id, 4)
    first, second = (g.group.id for g in await hasty.queue.take_groups(run_id, 2))
    checkpoint = await hasty.runs.record_checkpoint(
        pb.CheckpointRecord(run_id=run_id, step=1, uri="file:///c1", group_ids=[first])
    )
    assert (await hasty.queue.rewind_run(run_id, checkpoint_id=checkpoint.id)).groups == 1
    assert dict((await hasty.queue.get_queue(run_id)).groups) == {"acknowledged": 1, "open": 1}
    assert dict((await hasty.queue.get_queue(run_id, step=2)).rollouts) == {"waiting": 1}
    assert not await hasty.queue.take_groups(run_id, 2)
    (lease,) = await hasty.queue.lease_rollouts("w", 2, run_id=run_id)
    assert (lease.group.id, lease.attempt) == (second, 0)
    await hasty.queue.commit_rollout(lease.id, samples.trajectory(task_id))
    (taken,) = await hasty.queue.take_groups(run_id, 2)
    assert (taken.group.id, taken.lost, len(taken.trajectories)) == (second, 0, 1)


async def test_a_checkpoint_or_the_end_of_a_run_can_take_what_is_taken(clients: Clients):
    (task_id,) = await imported(clients)
    run_id = await new_run(clients)
    ids = [await committed_group(clients, run_id, task_id, 1, step) for step in (1, 2, 3)]
    await clients.queue.take_groups(run_id, 3)
    record = pb.CheckpointRecord(run_id=run_id, step=2, uri="file:///c", group_ids=ids[1:2])
    stored = await clients.runs.record_checkpoint(record, acknowledge_taken=True)
    assert list(stored.group_ids) == ids[:2]
    epoch = (await clients.queue.rewind_run(run_id, checkpoint_id=stored.id)).epoch
    assert [g.group.id for g in await clients.queue.take_groups(run_id, 3)] == ids[2:]
    with pytest.raises(Aborted):
        await clients.runs.update_run(run_id, state="done", acknowledge_taken=True, epoch=epoch - 1)
    await clients.runs.update_run(run_id, state="done", acknowledge_taken=True, epoch=epoch)
    (listed,) = (await clients.runs.list_checkpoints(run_id)).checkpoints
    assert list(listed.group_ids) == ids


async def test_a_repeated_take_is_refused_after_a_rewind(clients: Clients):
    (task_id,) = await imported(clients)
    run_id = await new_run(clients)
    await committed_group(clients, run_id, task_id, 1)
    epoch = (await clients.runs.get_run(run_id)).epoch
    for asked in (epoch, 0):
        take = {"epoch": asked, "request_id": f"take-{asked}-{run_id}"}
        assert len(await clients.queue.take_groups(run_id, 1, **take)) == 1
        assert len(await clients.queue.take_groups(run_id, 1, **take)) == 1
        await clients.queue.rewind_run(run_id)
    with pytest.raises(Aborted):
        await clients.queue.take_groups(run_id, 1, epoch=epoch, request_id=f"take-{epoch}-{run_id}")
    assert not await clients.queue.take_groups(run_id, 1, request_id=f"take-0-{run_id}")
    assert len(await clients.queue.take_groups(run_id, 1)) == 1


async def test_rewinding_gives_back_exactly_what_the_checkpoint_lacks(clients: Clients):
    (task_id,) = await imported(clients)
    run_id = await new_run(clients)
    ids = [await committed_group(clients, run_id, task_id, 1, step) for step in (1, 2, 3, 4)]
    await clients.queue.take_groups(run_id, 3)
    first = await clients.runs.record_checkpoint(
        pb.CheckpointRecord(run_id=run_id, step=1, uri="file:///c1", group_ids=ids[:1])
    )
    second = await clients.runs.record_checkpoint(
        pb.CheckpointRecord(run_id=run_id, step=2, uri="file:///c2", group_ids=ids[1:2])
    )
    rewound = await clients.queue.rewind_run(run_id, checkpoint_id=first.id)
    assert (rewound.groups, rewound.epoch) == (2, 2)
    assert (await clients.runs.get_run(run_id)).epoch == 2
    listed = await clients.runs.list_checkpoints(run_id)
    assert [c.id for c in listed.checkpoints] == [first.id]
    taken = await clients.queue.take_groups(run_id, 10)
    assert [item.group.id for item in taken] == ids[1:]
    with pytest.raises(FailedPrecondition):
        await clients.queue.acknowledge_groups(ids[1:2], second.id)
    with pytest.raises(FailedPrecondition):
        await clients.queue.rewind_run(run_id, checkpoint_id=second.id)
    assert (await clients.queue.rewind_run(run_id)).groups == 4


async def test_a_driver_of_an_earlier_epoch_is_refused(clients: Clients):
    (task_id,) = await imported(clients)
    run_id = await new_run(clients)
    group_id = await committed_group(clients, run_id, task_id, 1)
    await clients.queue.rewind_run(run_id)
    checkpoint = pb.CheckpointRecord(run_id=run_id, uri="x", group_ids=[group_id])
    with pytest.raises(Aborted, match="epoch 2, not 1"):
        await clients.queue.take_groups(run_id, 1, epoch=1)
    assert await clients.queue.take_groups(run_id, 1, epoch=2)
    with pytest.raises(Aborted):
        await clients.runs.record_checkpoint(checkpoint, epoch=1)
    await clients.runs.record_checkpoint(checkpoint, epoch=2)


async def test_only_taken_groups_of_the_run_can_be_acknowledged(clients: Clients):
    (task_id,) = await imported(clients)
    run_id, other_run = await new_run(clients), await new_run(clients)
    group_id = await committed_group(clients, run_id, task_id, 1)
    for wrong, error in (
        (pb.CheckpointRecord(run_id=run_id, uri="x", group_ids=[group_id]), FailedPrecondition),
        (pb.CheckpointRecord(run_id=run_id, uri="x", group_ids=["grp_" + "0" * 32]), NotFound),
        (pb.CheckpointRecord(run_id="run_" + "0" * 32, uri="x"), NotFound),
        (pb.CheckpointRecord(run_id=run_id, uri=""), InvalidArgument),
    ):
        with pytest.raises(error):
            await clients.runs.record_checkpoint(wrong)
    await clients.queue.take_groups(run_id, 1)
    with pytest.raises(FailedPrecondition):
        await clients.runs.record_checkpoint(
            pb.CheckpointRecord(run_id=other_run, uri="x", group_ids=[group_id])
        )
    assert not (await clients.runs.list_checkpoints(run_id)).checkpoints


async def test_a_missing_request_id_is_refused(dataset_address: str):
    async with connect(dataset_address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="request_id"):
            await pb.RunServiceStub(channel).CreateRun(pb.CreateRunRequest(name="x", kind="sft"))

"""What workers for everybody commit is charged to the tenant whose run it is of."""

import asyncio

import pytest

from regreen.rpc.errors import PermissionDenied, ResourceExhausted
from regreen.rpc.tenants import charging
from tests.integration import dataset_samples as samples
from tests.integration.dataset_samples import Clients, fresh
from tests.integration.test_dataset_tenants import WHO, tenants

BOUND = 100_000
QUOTA = "quota trajectory_bytes of tenant"


@pytest.fixture
async def walled(database_url, tmp_path):
    """Clients of two tenants and of a worker for all, to a service with a quota for each."""
    (tmp_path / "quotas.toml").write_text(f"[default]\ntrajectory_bytes = {BOUND}\n")
    async with tenants(database_url, tmp_path, quotas=tmp_path / "quotas.toml") as channels:
        yield [Clients(channels[name]) for name in WHO]


async def leased(owner: Clients, worker: Clients, task_id: str):
    """A run of somebody's, and its two rollouts at the worker."""
    run_id = await samples.new_run(owner)
    await owner.queue.enqueue_groups([samples.group(run_id, task_id, 2)])
    return run_id, await worker.queue.lease_rollouts("w", 2, run_id=run_id)


async def test_commits_are_charged_to_the_tenant_of_the_run(walled, tmp_path):
    ours, theirs, worker = walled
    (task_id,) = await samples.imported(worker)
    large = samples.trajectory(task_id, salt="x" * 99_000)
    run_id, mine = await leased(ours, worker, task_id)
    _, others = await leased(theirs, worker, task_id)
    _, nobodys = await leased(worker, worker, task_id)
    (tenant,), (other,) = ({lease.tenant for lease in leases} for leases in (mine, others))
    assert (tenant[:4], other[:6]) == ("ours", "theirs")
    assert {lease.tenant for lease in nobodys} == {""}
    commits = [worker.queue.commit_rollout(lease.id, large) for lease in (*mine, *others)]
    made = await asyncio.gather(*commits, return_exceptions=True)
    refused = [error for error in made if isinstance(error, ResourceExhausted)]
    assert len(refused) == 2, made  # of each run one fits, however they come together
    assert {error.message.partition(" is ")[0] for error in refused} == {
        f"{QUOTA} {tenant}",
        f"{QUOTA} {other}",
    }
    assert {error.metadata["quota"] for error in refused} == {"trajectory_bytes"}
    more = samples.trajectory(task_id, salt="y" * 5000)
    with pytest.raises(ResourceExhausted, match=f"{QUOTA} {tenant} "):
        await ours.trajectories.commit_trajectory(more)  # with its own it is one sum
    more.run_id = run_id
    with pytest.raises(ResourceExhausted, match=f"{QUOTA} {tenant} "):
        await worker.trajectories.commit_trajectory(more)
    written = sorted((tmp_path / "blobs").rglob("*"))
    (again,) = [le for le, one in zip(mine, made, strict=False) if isinstance(one, Exception)]
    with pytest.raises(ResourceExhausted):
        await worker.queue.commit_rollout(again.id, samples.trajectory(task_id, salt="z" * 99_000))
    assert sorted((tmp_path / "blobs").rglob("*")) == written
    for lease in nobodys:  # nobody has no bound
        await worker.queue.commit_rollout(lease.id, large)


async def test_a_tenant_charges_no_other(walled):
    ours, theirs, worker = walled
    (task_id,) = await samples.imported(worker)
    _, mine = await leased(ours, worker, task_id)
    _, others = await leased(theirs, worker, task_id)
    for said in (others[0].tenant, "*"):
        with charging(said), pytest.raises(PermissionDenied, match="may charge no other"):
            await ours.runs.create_run(fresh("run"), "grpo")
    with charging(mine[0].tenant):
        run = (await ours.runs.create_run(fresh("run"), "grpo")).run
    with charging(others[0].tenant):  # whom a worker names changes nothing of whose a run is
        await worker.queue.commit_rollout(mine[0].id, samples.trajectory(task_id))
        assert (await worker.runs.get_run(run.id)).id == run.id
    assert len((await ours.trajectories.list_trajectories()).trajectories) == 1
    assert not (await theirs.trajectories.list_trajectories()).trajectories

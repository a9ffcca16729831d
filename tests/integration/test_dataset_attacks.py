"""The dataset service as an attacker meets it who has a token: forged leases, replayed requests."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dataset_svc.__main__ import serving
from dataset_svc.settings import DatasetSettings
from regreen.client.access import Access
from regreen.client.channel import connect
from regreen.dataset import v1 as pb
from regreen.ids import new_id
from regreen.rpc.errors import InvalidArgument, LeaseExpired, NotFound, PermissionDenied
from regreen.tokens import TokenFile
from tests.integration import dataset_samples as samples
from tests.integration.dataset_samples import Clients, imported, new_run


@pytest.fixture
async def who(database_url: str, tmp_path: Path):
    """Clients by name: of two tenants, of one that may only read, and of an operator."""
    file, now = TokenFile(tmp_path / "tokens.json"), datetime.now(UTC)
    for name, tenant, scope in (
        ("ours", "a", "dataset:write"),
        ("theirs", "b", "dataset:write"),
        ("reader", "b", "dataset:read"),
        ("operator", "*", "dataset:admin"),
    ):
        _, text = file.create(name, [scope], tenant, timedelta(days=1), now)
        (tmp_path / name).write_text(text)
    settings = DatasetSettings(
        listen="127.0.0.1:0", metrics="127.0.0.1:0", home=tmp_path, fsync=False, tokens=file.path,
        drain_s=0.2,
    )  # fmt: skip
    async with serving(settings, database_url) as server:
        channels = {
            name: connect(server.address, Access(token_file=tmp_path / name))
            for name in ("ours", "theirs", "reader", "operator")
        }
        yield channels
        for channel in channels.values():
            await channel.close()


async def leased(who, request_id: str = "") -> tuple[str, str, str]:
    """A run of ours, its task, and the lease of its one rollout."""
    clients = Clients(who["ours"])
    (task_id,) = await imported(Clients(who["operator"]))
    run_id = await new_run(clients)
    await clients.queue.enqueue_groups([samples.group(run_id, task_id, 1)])
    (lease,) = await clients.queue.lease_rollouts("w", 1, run_id=run_id, request_id=request_id)
    return run_id, task_id, lease.id


async def test_a_forged_lease_commits_nothing(who):
    ours, theirs, reader = (Clients(who[name]) for name in ("ours", "theirs", "reader"))
    _, task_id, lease_id = await leased(who)
    last = "0" if lease_id[-1] != "0" else "1"
    refusals = (NotFound, InvalidArgument, LeaseExpired)
    for forged in (new_id("lse"), lease_id[:-1] + last, "", "x" * 5000, "' OR 1=1 --"):
        with pytest.raises(refusals):
            await theirs.queue.commit_rollout(forged, samples.trajectory(task_id))
        with pytest.raises(refusals):
            await theirs.queue.fail_rollout(forged, "let me")
    with pytest.raises(PermissionDenied, match="dataset:write"):
        await reader.queue.commit_rollout(lease_id, samples.trajectory(task_id))
    done = await ours.queue.commit_rollout(lease_id, samples.trajectory(task_id))
    assert done.group_complete


async def test_answers_to_another_tenants_requests_are_not_given_out(who):
    ours, theirs = (Clients(who[name]) for name in ("ours", "theirs"))
    run_id, _, lease_id = await leased(who, "one-and-the-same")
    again = await ours.queue.lease_rollouts("w", 1, run_id=run_id, request_id="one-and-the-same")
    assert [lease.id for lease in again] == [lease_id]
    assert not await theirs.queue.lease_rollouts("w", 1, request_id="one-and-the-same")
    with pytest.raises(NotFound, match="no run"):
        await theirs.queue.lease_rollouts("w", 1, run_id=run_id, request_id="another")


async def test_a_workers_token_changes_no_task(who):
    operator, ours = Clients(who["operator"]), Clients(who["ours"])
    (task_id,) = await imported(operator)
    await operator.tasks.record_gate(samples.report(task_id))
    before = await operator.tasks.all_tasks()
    forged = samples.task(task_id)
    forged.fail_to_pass[:] = ["tests/test_a.py::test_that_passes"]
    quarantine = samples.report(task_id, pb.TASK_STATUS_QUARANTINED)
    for attack in (
        ours.tasks.import_tasks([forged], replace=True),
        ours.tasks.import_tasks([samples.task("of-my-own")]),
        ours.tasks.record_gate(quarantine),
        ours.tasks.split_tasks({task_id: "train"}),
    ):
        with pytest.raises(PermissionDenied, match="dataset:admin"):
            await attack
    assert await operator.tasks.all_tasks() == before

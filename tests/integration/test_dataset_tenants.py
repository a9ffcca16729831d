"""The dataset service as one tenant meets what another made: nothing is there, nothing is changed.

- Every method of its contracts is in one of three tables; one that is in none fails the test.
- What another tenant made answers as what nobody made: the same error, word for word, or the same
  answer. Only an id of the caller's choice that is taken is told as taken.
"""

import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import psycopg
import pytest
from google.protobuf.duration_pb2 import Duration

from dataset_svc.__main__ import serving
from dataset_svc.settings import DatasetSettings
from dataset_svc.walls import WALLED
from regreen.client.access import Access
from regreen.client.archive import ArchiveClient
from regreen.client.channel import connect
from regreen.dataset import v1 as pb
from regreen.ids import new_id
from regreen.rpc.errors import ResourceExhausted
from regreen.rpc.scopes import SCOPES
from regreen.tokens import TokenFile
from tests.integration import dataset_samples as samples
from tests.integration.dataset_samples import Clients, fresh

Channels = dict[str, grpc.aio.Channel]
PACKAGE = "flask"
WHO = ("ours", "theirs", "platform")


@contextlib.asynccontextmanager
async def tenants(url: str, home: Path, **settings: Any) -> AsyncIterator[Channels]:
    """Channels of two tenants and of the platform, to a service over this database."""
    file, now = TokenFile(home / "tokens.json"), datetime.now(UTC)
    for name in WHO:
        tenant = "*" if name == "platform" else fresh(name)
        _, text = file.create(name, ["dataset:admin"], tenant, timedelta(days=1), now)
        (home / name).write_text(text)
    settings |= {"listen": "127.0.0.1:0", "metrics": "127.0.0.1:0", "drain_s": 0.2}
    given = DatasetSettings(home=home, fsync=False, tokens=file.path, **settings)
    async with serving(given, url) as server, contextlib.AsyncExitStack() as stack:
        yield {
            name: await stack.enter_async_context(
                connect(server.address, Access(token_file=home / name))
            )
            for name in WHO
        }


async def call(channel: grpc.aio.Channel, method: str, request: Any) -> Any:
    """The answer to a call, of a stream a list; an error as (code, message)."""
    service, name = method.split("/")
    stub = getattr(getattr(pb, f"{service}Stub")(channel), name)
    if hasattr(request, "request_id"):
        request.request_id = fresh()
    try:
        if name == "CommitTrajectories":
            return await stub(iter([request]), timeout=30)
        if name == "ExportTrajectories":
            return [item async for item in stub(request, timeout=30)]
        return await stub(request, timeout=30)
    except grpc.aio.AioRpcError as error:
        return error.code().name, str(error.details())


async def told(channel: grpc.aio.Channel, method: str, request: Any, ids: Any) -> str:
    """What a call answers, without the ids that it was asked with."""
    text = str(await call(channel, method, request))
    for name, value in vars(ids).items():
        text = text.replace(str(value), name.upper())
    return text


async def scene(clients: Clients, channel: grpc.aio.Channel, url: str) -> SimpleNamespace:
    """One of each thing that a tenant can have, by id."""
    made = samples.task(package="mine")
    await clients.tasks.import_tasks([made])
    await clients.tasks.record_gate(samples.report(made.id))
    await clients.tasks.split_tasks({made.id: "train"})
    ids = SimpleNamespace(task=made.id, name=fresh("run"))
    ids.run = (await clients.runs.create_run(ids.name, "grpo")).run.id
    groups = [samples.group(ids.run, made.id, size) for size in (1, 1, 3)]
    ids.acknowledged, ids.complete, ids.group = await clients.queue.enqueue_groups(groups)
    leases = await clients.queue.lease_rollouts("w", 4, run_id=ids.run)
    done = [
        await clients.queue.commit_rollout(lease.id, samples.trajectory(made.id, salt=lease.id))
        for lease in leases[:3]
    ]
    ids.lease, ids.trajectory, ids.ended = leases[3].id, done[0].trajectory_id, leases[0].id
    (taken,) = await clients.queue.take_groups(ids.run, 1)
    assert taken.group.id == ids.acknowledged
    recorded = await call(
        channel,
        "RunService/RecordCheckpoint",
        pb.RecordCheckpointRequest(
            checkpoint=pb.CheckpointRecord(
                run_id=ids.run, step=1, uri="/w", group_ids=[ids.acknowledged]
            )
        ),
    )
    ids.checkpoint = recorded.checkpoint.id
    points = [pb.MetricPoint(step=1, name="reward", value=0.5)]
    request = pb.RecordMetricsRequest(run_id=ids.run, points=points)
    await call(channel, "RunService/RecordMetrics", request)
    await call(channel, "KnowledgeService/RecordKnowledge", known(ids.task, ids.trajectory))
    (item,) = (await call(channel, "KnowledgeService/SearchKnowledge", asked())).items
    ids.item = item.id
    used = pb.RecordKnowledgeUseRequest(trajectory_id=ids.trajectory, item_ids=[ids.item])
    await call(channel, "KnowledgeService/RecordKnowledgeUse", used)
    with psycopg.connect(url.replace("+psycopg", "")) as database:
        database.execute(
            "INSERT INTO parked_tasks (run_id, task_id, reason, lost) VALUES (%s, %s, 'x', 1)",
            (ids.run, ids.task),
        )
    return ids


def known(task_id: str, trajectory_id: str) -> pb.RecordKnowledgeRequest:
    item = pb.KnowledgeItem(
        kind="trajectory", task_id=task_id, trajectory_id=trajectory_id, error="url_quote is gone",
        moves=[pb.KnowledgeMove(name="werkzeug", before="3", after="2")],
    )  # fmt: skip
    return pb.RecordKnowledgeRequest(items=[item])


def asked() -> pb.SearchKnowledgeRequest:
    return pb.SearchKnowledgeRequest(package=PACKAGE, question="url_quote")


def absent(ids: SimpleNamespace) -> SimpleNamespace:
    """As many ids as good as those, of nothing."""
    made = {
        name: new_id(value.partition("_")[0]) if "_" in value else fresh()
        for name, value in vars(ids).items()
    }
    return SimpleNamespace(**made | {"task": ids.task, "item": "kno_" + "0" * 32})


def of(ids: SimpleNamespace, **fields: Any) -> pb.Trajectory:
    made = samples.trajectory(ids.task)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


Ask = Callable[[SimpleNamespace], Any]
NAMED: dict[str, Ask] = {
    "RunService/GetRun": lambda i: pb.GetRunRequest(id=i.run),
    "RunService/ListMetrics": lambda i: pb.ListMetricsRequest(run_id=i.run),
    "RunService/ListCheckpoints": lambda i: pb.ListCheckpointsRequest(run_id=i.run),
    "RunService/UpdateRun": lambda i: pb.UpdateRunRequest(id=i.run, state="failed"),
    "RunService/RecordMetrics": lambda i: pb.RecordMetricsRequest(
        run_id=i.run, points=[pb.MetricPoint(step=1, name="reward", value=9)]
    ),
    "RunService/RecordCheckpoint": lambda i: pb.RecordCheckpointRequest(
        checkpoint=pb.CheckpointRecord(run_id=i.run, step=2, uri="/x"), acknowledge_taken=True
    ),
    "RolloutQueueService/EnqueueGroups": lambda i: pb.EnqueueGroupsRequest(
        groups=[samples.group(i.run, i.task, 1)]
    ),
    "RolloutQueueService/LeaseRollouts": lambda i: pb.LeaseRolloutsRequest(
        worker="thief", count=5, run_id=i.run
    ),
    "RolloutQueueService/Heartbeat": lambda i: pb.HeartbeatRequest(lease_ids=[i.lease]),
    "RolloutQueueService/CommitRollout": lambda i: pb.CommitRolloutRequest(
        lease_id=i.lease, trajectory=of(i)
    ),
    "RolloutQueueService/FailRollout": lambda i: pb.FailRolloutRequest(lease_id=i.lease, error="x"),
    "RolloutQueueService/TakeGroups": lambda i: pb.TakeGroupsRequest(run_id=i.run, count=5),
    "RolloutQueueService/AcknowledgeGroups": lambda i: pb.AcknowledgeGroupsRequest(
        checkpoint_id=i.checkpoint, group_ids=[i.complete]
    ),
    "RolloutQueueService/RewindRun": lambda i: pb.RewindRunRequest(
        run_id=i.run, checkpoint_id=i.checkpoint
    ),
    "RolloutQueueService/GetQueue": lambda i: pb.GetQueueRequest(run_id=i.run),
    "ParkingService/ListRollouts": lambda i: pb.ListRolloutsRequest(run_id=i.run),
    "ParkingService/ListParkedTasks": lambda i: pb.ListParkedTasksRequest(run_id=i.run),
    "ParkingService/ReleaseTask": lambda i: pb.ReleaseTaskRequest(run_id=i.run, task_id=i.task),
    "TrajectoryService/GetTrajectory": lambda i: pb.GetTrajectoryRequest(id=i.trajectory),
    "TrajectoryService/ListTrajectories": lambda i: pb.ListTrajectoriesRequest(
        filter=pb.TrajectoryFilter(run_id=i.run)
    ),
    "TrajectoryService/ExportTrajectories": lambda i: pb.ExportTrajectoriesRequest(
        filter=pb.TrajectoryFilter(run_id=i.run)
    ),
    "TrajectoryService/CommitTrajectory": lambda i: pb.CommitTrajectoryRequest(
        trajectory=of(i, run_id=i.run)
    ),
    "ArchiveService/CommitTrajectories": lambda i: pb.CommitTrajectoriesRequest(
        trajectory=of(i, run_id=i.run, id="trj_018f6a5b0c0070008000000000000001")
    ),
    "ArchiveService/PruneTrajectories": lambda i: pb.PruneTrajectoriesRequest(
        older_than=Duration(), run_id=i.run
    ),
    "ArchiveService/GetTrajectoryStats": lambda i: pb.GetTrajectoryStatsRequest(run_id=i.run),
    "KnowledgeService/RecordKnowledge": lambda i: known(i.task, i.trajectory),
    "KnowledgeService/RecordKnowledgeUse": lambda i: pb.RecordKnowledgeUseRequest(
        trajectory_id=i.trajectory, item_ids=[i.item]
    ),
}
"""Methods that are told an id: another's is nobody's."""
UNNAMED: dict[str, Any] = {
    "RunService/ListRuns": pb.ListRunsRequest(),
    "RolloutQueueService/LeaseRollouts": pb.LeaseRolloutsRequest(worker="w", count=1),
    "RolloutQueueService/GetQueue": pb.GetQueueRequest(),
    "ParkingService/ListParkedTasks": pb.ListParkedTasksRequest(),
    "TrajectoryService/ListTrajectories": pb.ListTrajectoriesRequest(
        filter=pb.TrajectoryFilter(text="repair this")
    ),
    "TrajectoryService/ExportTrajectories": pb.ExportTrajectoriesRequest(),
    "ArchiveService/GetTrajectoryStats": pb.GetTrajectoryStatsRequest(),
    "ArchiveService/ListQuotas": pb.ListQuotasRequest(),
    "KnowledgeService/SearchKnowledge": asked(),
    "ArchiveService/PruneTrajectories": pb.PruneTrajectoriesRequest(older_than=Duration(seconds=0)),
}
"""Methods that say what there is: of another's, nothing."""
OWN_NAMES = {"RunService/CreateRun"}
"""A name is a tenant's own: `test_names_and_ids_of_the_callers_choice`."""
SHARED = {method.partition(".v1.")[2] for method in SCOPES if "dataset.v1.TaskService/" in method}
"""The catalogue."""


def test_every_method_is_attacked():
    every = {method.partition(".v1.")[2] for method in SCOPES if ".dataset.v1." in method}
    assert NAMED.keys() | UNNAMED.keys() | OWN_NAMES | SHARED == every


def rows(url: str) -> set[tuple[str, str]]:
    """Every row of every table that holds what a tenant made."""
    with psycopg.connect(url.replace("+psycopg", "")) as database:
        return {
            (table, row[0])
            for table in WALLED
            for row in database.execute(f'SELECT t::text FROM "{table}" AS t')
        }


@pytest.fixture
async def walled(database_url: str, tmp_path: Path):
    async with tenants(database_url, tmp_path) as channels:
        ids = await scene(Clients(channels["ours"]), channels["ours"], database_url)
        yield SimpleNamespace(**channels, ids=ids, url=database_url)


async def test_another_tenants_is_as_if_it_were_not_there(walled):
    ours, theirs, ids = walled.ours, walled.theirs, walled.ids
    before = rows(walled.url)
    assert {table for table, _ in before} == WALLED, "one of each is under attack"
    none = absent(ids)
    for method, ask in NAMED.items():
        found = await told(theirs, method, ask(ids), ids)
        assert found == await told(theirs, method, ask(none), none), method
    by_name = pb.GetRunRequest(id=ids.name)
    assert (await call(theirs, "RunService/GetRun", by_name))[0] == "NOT_FOUND"
    for method, request in UNNAMED.items():
        answer = await call(theirs, method, request)
        if method.endswith("LeaseRollouts"):
            answer.ClearField("poll_after")
        if method.endswith("Stats"):
            assert not any(counted.values for counted in answer.counts.values())
            answer.ClearField("counts")
        if method.endswith("ListQuotas"):
            (use,) = answer.quotas
            assert (use.tenant.partition("-")[0], use.used) == ("theirs", 0)
            answer.ClearField("quotas")
        assert not answer or not answer.ByteSize(), (method, answer)
    assert rows(walled.url) == before, "nothing was changed, and nothing removed"
    for method, request in UNNAMED.items():
        if "Prune" not in method:
            answer = await call(walled.platform, method, request)
            assert answer, method
            assert not isinstance(answer, tuple), (method, answer)
    # None of it is hidden from its owner, and each attack would have done something.
    for method, ask in NAMED.items():
        if "Fail" not in method and "Prune" not in method and "Rewind" not in method:
            own = await call(ours, method, ask(ids))
            assert not isinstance(own, tuple) or own[0] != "NOT_FOUND", (method, own)


async def test_names_and_ids_of_the_callers_choice(walled):
    """A name is free whoever else has it; an id that another took is taken, and no more is said."""
    theirs, ids = walled.theirs, walled.ids
    clients = Clients(theirs)
    made = await clients.runs.create_run(ids.name, "eval")
    assert not made.existed
    assert made.run.id != ids.run
    assert (await clients.runs.create_run(ids.name, "eval")).existed
    assert (await clients.runs.get_run(ids.name)).id == made.run.id
    both = await call(walled.platform, "RunService/GetRun", pb.GetRunRequest(id=ids.name))
    assert both[0] == "FAILED_PRECONDITION"
    assert "give its id" in both[1]
    shared = samples.task(ids.task)
    group = samples.group(made.run.id, ids.task, 1)
    (own_group,) = await clients.queue.enqueue_groups([group])
    (lease,) = await clients.queue.lease_rollouts("w", 5)
    assert lease.group.id == own_group, "of all that waits, only what is theirs"
    ours = await Clients(walled.ours).trajectories.get_trajectory(ids.trajectory)
    for name in ("run_id", "group_id"):
        ours.ClearField(name)
    group.id = ids.complete
    taken: dict[str, Any] = {
        "RolloutQueueService/EnqueueGroups": pb.EnqueueGroupsRequest(groups=[group]),
        "RunService/RecordCheckpoint": pb.RecordCheckpointRequest(
            checkpoint=pb.CheckpointRecord(id=ids.checkpoint, run_id=made.run.id, step=1, uri="/w")
        ),
        "TrajectoryService/CommitTrajectory": pb.CommitTrajectoryRequest(trajectory=ours),
        "ArchiveService/CommitTrajectories": pb.CommitTrajectoriesRequest(trajectory=ours),
        "RolloutQueueService/CommitRollout": pb.CommitRolloutRequest(
            lease_id=lease.id, trajectory=of(ids, id=ids.trajectory)
        ),
    }
    for method, request in taken.items():
        answer = await call(theirs, method, request)
        assert answer[0] == "ALREADY_EXISTS", (method, answer)
        assert ids.run not in answer[1]
        assert "tenant" not in answer[1]
    request = pb.RecordKnowledgeRequest(
        items=[pb.KnowledgeItem(kind="changelog", error="url_quote left", culprit="werkzeug")]
    )
    for who in ("ours", "theirs", "platform"):
        done = await call(getattr(walled, who), "KnowledgeService/RecordKnowledge", request)
        assert done.recorded == 1, "what two learn is an item of each"
    found = await call(theirs, "KnowledgeService/SearchKnowledge", asked())
    assert [item.kind for item in found.items] == ["changelog"]
    assert shared.id == ids.task


async def test_what_the_platform_does_in_a_run_is_its_tenants(walled):
    """Workers with the platform's token work for everybody; what they make is who asked for it."""
    platform, ids = Clients(walled.platform), walled.ids
    leases = await platform.queue.lease_rollouts("w", 5, run_id=ids.run)
    assert {lease.group.run_id for lease in leases} == {ids.run}
    done = await platform.queue.commit_rollout(leases[0].id, of(ids, actor="teacher"))
    alone = await platform.trajectories.commit_trajectory(of(ids, run_id=ids.run, group_id="x"))
    ours = Clients(walled.ours)
    for trajectory_id in (done.trajectory_id, alone):
        assert (await ours.trajectories.get_trajectory(trajectory_id)).run_id == ids.run
    nobodys = await platform.trajectories.commit_trajectory(of(ids, policy="nobody"))
    found = await call(
        walled.ours, "TrajectoryService/GetTrajectory", pb.GetTrajectoryRequest(id=nobodys)
    )
    assert found[0] == "NOT_FOUND"


async def test_what_is_kept_is_bounded_and_pruning_gives_it_back(database_url, tmp_path):
    """Over the bound nothing is stored, no token is written, and the lease can be given back."""
    quotas = tmp_path / "quotas.toml"
    quotas.write_text("[default]\ntrajectory_bytes = 100000\n")
    async with tenants(database_url, tmp_path, quotas=quotas) as channels:
        ours, theirs = Clients(channels["ours"]), Clients(channels["theirs"])
        (task_id,) = await samples.imported(ours)
        run_id = await samples.new_run(ours)
        await ours.queue.enqueue_groups([samples.group(run_id, task_id, 2)])
        small, large = samples.trajectory(task_id), samples.trajectory(task_id, salt="x" * 99_000)
        first, second = await ours.queue.lease_rollouts("w", 2)
        await ours.queue.commit_rollout(first.id, small)
        await ours.runs.update_run(run_id, state="done")
        before = sorted((tmp_path / "blobs").rglob("*"))
        large.token_ids[0] += 1
        with pytest.raises(ResourceExhausted, match="quota trajectory_bytes of tenant ours") as no:
            await ours.queue.commit_rollout(second.id, large)
        assert no.value.metadata["quota"] == "trajectory_bytes"
        (mine,) = await ArchiveClient(channels["ours"]).list_quotas()
        assert mine.tenant.startswith("ours")
        assert (mine.quota, mine.bound) == ("trajectory_bytes", 100000)
        assert 0 < mine.used < 100000
        for method, request in (
            ("TrajectoryService/CommitTrajectory", pb.CommitTrajectoryRequest(trajectory=large)),
            ("ArchiveService/CommitTrajectories", pb.CommitTrajectoriesRequest(trajectory=large)),
        ):
            request.trajectory.id = new_id("trj")
            assert (await call(channels["ours"], method, request))[0] == "RESOURCE_EXHAUSTED"
        assert sorted((tmp_path / "blobs").rglob("*")) == before
        assert await ours.queue.fail_rollout(second.id, "over the quota")
        listed = await call(
            channels["ours"], "TrajectoryService/ListTrajectories", pb.ListTrajectoriesRequest()
        )
        assert len(listed.trajectories) == 1
        await theirs.trajectories.commit_trajectory(large)
        for channel in channels.values():
            await call(
                channel,
                "ArchiveService/PruneTrajectories",
                pb.PruneTrajectoriesRequest(older_than=Duration(seconds=0)),
            )
        await ours.trajectories.commit_trajectory(large)

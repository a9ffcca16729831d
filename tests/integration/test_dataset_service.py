"""The dataset service over the wire: what is stored comes back, what is wrong is refused."""

import math
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import insert

from dataset_svc.__main__ import serving
from dataset_svc.database import Database
from dataset_svc.models import Run
from dataset_svc.settings import DatasetSettings
from regreen.client.channel import connect
from regreen.common import v1 as common_pb
from regreen.dataset import v1 as pb
from regreen.rpc.errors import (
    AlreadyExists,
    DataLoss,
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


# ---- tasks


async def test_a_task_comes_back_as_it_went_in(clients: Clients):
    task = samples.task()
    task.split = "train"
    answer = await clients.tasks.import_tasks([task])
    assert (answer.imported, answer.unchanged) == (1, 0)
    stored = await clients.tasks.get_task(task.id)
    assert stored.status == pb.TASK_STATUS_NEW
    assert stored.HasField("create_time")
    stored.ClearField("status")
    stored.ClearField("create_time")
    assert stored == task


async def test_importing_again_changes_nothing_and_other_content_needs_replace(clients: Clients):
    task = samples.task()
    await clients.tasks.import_tasks([task])
    await clients.tasks.record_gate(samples.report(task.id), validation_time_s=2.5)
    again = await clients.tasks.import_tasks([task])
    assert (again.imported, again.unchanged) == (0, 1)
    assert (await clients.tasks.get_task(task.id)).status == pb.TASK_STATUS_ADMITTED
    task.category = "attribute-error"
    other = samples.task()
    with pytest.raises(AlreadyExists):
        await clients.tasks.import_tasks([other, task])
    with pytest.raises(NotFound):
        await clients.tasks.get_task(other.id)
    await clients.tasks.import_tasks([task], replace=True)
    assert (await clients.tasks.get_task(task.id)).status == pb.TASK_STATUS_NEW


@pytest.mark.parametrize(
    ("field", "spoil"),
    [
        ("tasks[1].id", lambda t: setattr(t, "id", "../../etc")),
        ("tasks[1].kind", lambda t: setattr(t, "kind", "")),
        ("tasks[1].modes", lambda t: t.ClearField("modes")),
        ("tasks[1].modes[0]", lambda t: t.modes.__setitem__(0, common_pb.MODE_UNSPECIFIED)),
        ("tasks[1].split", lambda t: setattr(t, "split", "holdout")),
        ("tasks[1].environment.builder", lambda t: t.ClearField("environment")),
        ("tasks[1].environment.python", lambda t: setattr(t.environment, "python", "three")),
        ("tasks[1].environment.source", lambda t: t.environment.ClearField("source")),
        (
            "tasks[1].environment.source.sha256",
            lambda t: setattr(t.environment.source, "sha256", "zz"),
        ),
        (
            "tasks[1].environment.pins[0].files[0].filename",
            lambda t: setattr(t.environment.pins[0].files[0], "filename", "../x"),
        ),
        ("tasks[1].fail_to_pass_count", lambda t: setattr(t, "fail_to_pass_count", 1)),
        ("tasks[1].fail_to_pass_sha256", lambda t: setattr(t, "fail_to_pass_sha256", "0" * 64)),
        (
            "tasks[1].fixes[0].changes[0].path",
            lambda t: setattr(t.fixes[0].changes[0], "path", "a/../../b"),
        ),
    ],
)
async def test_a_malformed_task_is_refused_by_field_and_nothing_is_stored(
    clients: Clients, field: str, spoil
):
    good, bad = samples.task(), samples.task()
    spoil(bad)
    with pytest.raises(InvalidArgument) as caught:
        await clients.tasks.import_tasks([good, bad])
    assert caught.value.field == field
    with pytest.raises(NotFound):
        await clients.tasks.get_task(good.id)


async def test_no_package_is_in_two_splits(clients: Clients):
    package = samples.fresh("pkg")
    tasks = [samples.task(package=package) for _ in range(3)]
    await clients.tasks.import_tasks(tasks)
    ids = [task.id for task in tasks]
    assert await clients.tasks.split_tasks(dict.fromkeys(ids, "train")) == 3
    with pytest.raises(InvalidArgument, match=package):
        await clients.tasks.split_tasks({ids[0]: "test"})
    assert (await clients.tasks.get_task(ids[0])).split == "train"
    assert await clients.tasks.split_tasks(dict.fromkeys(ids, "test")) == 3
    with pytest.raises(NotFound):
        await clients.tasks.split_tasks({"no-such-task": "train"})
    with pytest.raises(InvalidArgument):
        await clients.tasks.split_tasks({ids[0]: "holdout"})
    late = samples.task(package=package)
    late.split = "train"
    with pytest.raises(InvalidArgument):
        await clients.tasks.import_tasks([late])


async def test_tasks_are_listed_in_pages_and_by_filter(clients: Clients):
    culprit = samples.fresh("culprit")
    tasks = [samples.task() for _ in range(7)]
    for task in tasks:
        task.culprit = culprit
    await clients.tasks.import_tasks(tasks)
    wanted = pb.TaskFilter(culprit=culprit, mode=common_pb.MODE_KEEP_NEW)
    seen, token = [], ""
    while True:
        page = await clients.tasks.list_tasks(page_size=3, page_token=token, filter=wanted)
        seen += [task.id for task in page.tasks]
        token = page.next_page_token
        if not token:
            break
    assert seen == sorted(task.id for task in tasks)
    admitted = pb.TaskFilter(culprit=culprit, statuses=[pb.TASK_STATUS_ADMITTED])
    assert await clients.tasks.all_tasks(admitted) == []
    stats = await clients.tasks.get_task_stats()
    assert stats.counts["culprit"].values[culprit] == 7


# ---- trajectories


async def test_a_trajectory_comes_back_bit_for_bit(clients: Clients):
    (task_id,) = await imported(clients)
    sent = samples.trajectory(task_id, tokens=4000)
    sent.seed = (1 << 64) - 1
    sent.id = await clients.trajectories.commit_trajectory(sent)
    stored = await clients.trajectories.get_trajectory(sent.id)
    for turn in stored.turns:
        if not turn.duration.ByteSize():
            turn.ClearField("duration")
    assert stored == sent
    brief = await clients.trajectories.get_trajectory(sent.id, without_tokens=True)
    assert not brief.token_ids
    assert len(brief.turns) == 4


async def test_the_same_trajectory_id_is_stored_once(clients: Clients):
    (task_id,) = await imported(clients)
    sent = samples.trajectory(task_id)
    sent.id = await clients.trajectories.commit_trajectory(sent)
    assert await clients.trajectories.commit_trajectory(sent) == sent.id
    sent.reward.value = 0.5
    with pytest.raises(AlreadyExists):
        await clients.trajectories.commit_trajectory(sent)


@pytest.mark.parametrize(
    ("field", "spoil"),
    [
        ("trajectory.loss_mask", lambda t: setattr(t, "loss_mask", t.loss_mask[:-1])),
        ("trajectory.logprobs", lambda t: t.logprobs.append(-1.0)),
        ("trajectory.logprobs[0]", lambda t: t.logprobs.__setitem__(0, -1.0)),
        ("trajectory.logprobs[12]", lambda t: t.logprobs.__setitem__(12, float("nan"))),
        ("trajectory.logprobs[12]", lambda t: t.logprobs.__setitem__(12, 0.5)),
        (
            "trajectory.loss_mask[3]",
            lambda t: setattr(t, "loss_mask", b"\0\0\0\2" + t.loss_mask[4:]),
        ),
        ("trajectory.token_ids[2]", lambda t: t.token_ids.__setitem__(2, -1)),
        ("trajectory.versions[1]", lambda t: setattr(t.versions[1], "start", 15)),
        ("trajectory.versions[30]", lambda t: t.versions.__delitem__(1)),
        ("trajectory.turns[2].role", lambda t: setattr(t.turns[2], "token_start", 15)),
        ("trajectory.turns[1].index", lambda t: setattr(t.turns[1], "index", 5)),
        ("trajectory.prompt_tokens", lambda t: setattr(t, "prompt_tokens", 41)),
        ("trajectory.reward.value", lambda t: setattr(t.reward, "value", float("inf"))),
        ("trajectory.changes[0].path", lambda t: setattr(t.changes[0], "path", "/etc/passwd")),
        ("trajectory.end", lambda t: t.ClearField("end")),
        ("trajectory.mode", lambda t: t.ClearField("mode")),
        ("trajectory.id", lambda t: setattr(t, "id", "trj_1")),
        ("trajectory.end_time", lambda t: setattr(t.end_time, "seconds", 1)),
        ("trajectory.turns[0].role", lambda t: t.turns[0].ClearField("role")),
        ("trajectory.turns[1].role", lambda t: setattr(t.turns[1], "role", 77)),
        ("trajectory.start_time", lambda t: setattr(t.start_time, "seconds", 1_700_000_000_000)),
        ("trajectory.end_time", lambda t: setattr(t.end_time, "seconds", 1_700_000_060_000)),
        ("trajectory.turns[1].score", lambda t: setattr(t.turns[1], "score", 1.5)),
        ("trajectory.turns[1].score", lambda t: setattr(t.turns[1], "score", float("nan"))),
        (
            "trajectory.turns[1].duration",
            lambda t: setattr(t.turns[1].duration, "seconds", 1 << 60),
        ),
        (
            "trajectory.validation",
            lambda t: setattr(t.validation.duration, "seconds", 1 << 60),
        ),
    ],
)
async def test_a_malformed_trajectory_is_refused_by_field(
    clients: Clients, tmp_path: Path, field: str, spoil
):
    (task_id,) = await imported(clients)
    bad = samples.trajectory(task_id)
    spoil(bad)
    if field == "trajectory.turns[2].role":
        bad.turns[1].token_end = 15
    with pytest.raises(InvalidArgument) as caught:
        await clients.trajectories.commit_trajectory(bad)
    assert caught.value.field == field
    listed = await clients.trajectories.list_trajectories(
        filter=pb.TrajectoryFilter(task_id=task_id)
    )
    assert not listed.trajectories
    assert not blobs_in(tmp_path)


def blobs_in(home: Path) -> list[Path]:
    """Files of the blob store."""
    return [path for path in (home / "blobs").rglob("*") if path.is_file()]


async def test_a_refused_commit_leaves_no_blob(clients: Clients, tmp_path: Path):
    (task_id,) = await imported(clients)
    run_id = await new_run(clients)
    await clients.queue.enqueue_groups([samples.group(run_id, task_id, 1)])
    (lost,) = await clients.queue.lease_rollouts("w", 1, run_id=run_id)
    await clients.queue.fail_rollout(lost.id, "the worker ended", release=True)
    (lease,) = await clients.queue.lease_rollouts("w", 1, run_id=run_id)
    tokens = iter(range(48, 160, 8))
    orphan = samples.trajectory(task_id, tokens=next(tokens))
    orphan.run_id = "run_" + "0" * 32
    for error, call in (
        (NotFound, clients.trajectories.commit_trajectory(orphan)),
        (
            NotFound,
            clients.trajectories.commit_trajectory(
                samples.trajectory("no-such-task", tokens=next(tokens))
            ),
        ),
        (
            LeaseExpired,
            clients.queue.commit_rollout(lost.id, samples.trajectory(task_id, tokens=next(tokens))),
        ),
        (
            InvalidArgument,
            clients.queue.commit_rollout(
                lease.id, samples.trajectory(task_id, tokens=next(tokens)), request_id="x" * 201
            ),
        ),
    ):
        with pytest.raises(error):
            await call
        assert not blobs_in(tmp_path)
    kept = samples.trajectory(task_id)
    await clients.queue.commit_rollout(lease.id, kept, request_id="kept-" + run_id)
    assert len(blobs_in(tmp_path)) == 1
    other = samples.trajectory(task_id, tokens=next(tokens))
    with pytest.raises(LeaseExpired):
        await clients.queue.commit_rollout(lease.id, other)
    with pytest.raises(InvalidArgument, match="another request"):
        await clients.queue.commit_rollout(lease.id, other, request_id="kept-" + run_id)
    assert len(blobs_in(tmp_path)) == 1


async def test_numbers_and_times_without_a_form_are_refused_by_field(clients: Clients):
    run_id = await new_run(clients)
    for field, call in (
        ("config", clients.runs.create_run(samples.fresh("run"), "eval", config={"x": math.nan})),
        ("summary", clients.runs.update_run(run_id, summary={"a": {"b": [math.inf]}})),
    ):
        with pytest.raises(InvalidArgument) as caught:
            await call
        assert caught.value.field == field
    point = pb.MetricPoint(step=1, name="loss", value=1.0)
    point.time.seconds = 1_700_000_000_000
    request = pb.RecordMetricsRequest(request_id="m-" + run_id, run_id=run_id, points=[point])
    with pytest.raises(InvalidArgument) as caught:
        await clients.runs._call(clients.runs._stub.RecordMetrics, request, 5)
    assert caught.value.field == "points[0].time"


async def test_a_value_that_the_schema_refuses_is_not_worth_another_try(database_url: str):
    database = Database(database_url)
    try:
        for name, state in (("bad", "unheard-of"), (None, "active")):
            statement = insert(Run).values(id="bad", name=name, kind="", state=state, config={})
            with pytest.raises(InvalidArgument, match="the database refuses a value"):
                await database.run(lambda session, s=statement: session.execute(s))
    finally:
        await database.close()


@pytest.fixture
async def narrow(database_url: str, tmp_path: Path) -> AsyncIterator[Clients]:
    """Clients of a service whose messages are at most 2 MiB, so its pages at most 1."""
    settings = DatasetSettings(
        listen="127.0.0.1:0", metrics="127.0.0.1:0", home=tmp_path, max_message_bytes=2 << 20
    )
    async with serving(settings, database_url) as server, connect(server.address) as channel:
        yield Clients(channel)


async def test_pages_are_cut_by_bytes(narrow: Clients):
    (task_id,) = await imported(narrow)
    names = [samples.fresh("run") for _ in range(3)]
    sent = []
    for name in names:
        await narrow.runs.create_run(name, "eval", config={"x": "y" * 600_000})
        big = samples.trajectory(task_id, salt=name)
        big.labels["note"] = "z" * 600_000
        sent.append(await narrow.trajectories.commit_trajectory(big))
    listed, token = [], ""
    for _ in names:
        page = await narrow.trajectories.list_trajectories(
            page_token=token, filter=pb.TrajectoryFilter(task_id=task_id)
        )
        assert len(page.trajectories) == 1
        listed, token = [*listed, page.trajectories[0].id], page.next_page_token
    assert (listed, token) == (sent[::-1], "")
    first = await narrow.runs.list_runs(page_size=3)
    second = await narrow.runs.list_runs(page_size=1, page_token=first.next_page_token)
    assert [run.name for run in (*first.runs, *second.runs)] == names[:0:-1]


async def test_of_a_long_error_log_the_end_is_kept(clients: Clients):
    (task_id,) = await imported(clients)
    report = samples.report(task_id)
    report.error_log = "noise\n" * 500_000 + "E   ImportError: the cause"
    await clients.tasks.record_gate(report)
    for log in (
        (await clients.tasks.get_task(task_id)).error_log,
        (await clients.tasks.get_gate_report(task_id)).error_log,
    ):
        assert len(log) < 1_100_000
        assert log.startswith("[cut] ")
        assert log.endswith("E   ImportError: the cause")


async def test_unknown_references_are_not_found(clients: Clients):
    (task_id,) = await imported(clients)
    with pytest.raises(NotFound, match="task"):
        await clients.trajectories.commit_trajectory(samples.trajectory("no-such-task"))
    orphan = samples.trajectory(task_id)
    orphan.run_id = "run_" + "0" * 32
    with pytest.raises(NotFound, match="run"):
        await clients.trajectories.commit_trajectory(orphan)
    with pytest.raises(NotFound):
        await clients.trajectories.get_trajectory("trj_" + "0" * 32)
    with pytest.raises(InvalidArgument):
        await clients.trajectories.get_trajectory("'; DROP TABLE tasks; --")


async def test_trajectories_are_listed_newest_first_and_exported_oldest_first(clients: Clients):
    (task_id,) = await imported(clients)
    ids = []
    for number in range(5):
        sent = samples.trajectory(task_id, reward=-1.0 if number == 2 else 1.0)
        ids.append(await clients.trajectories.commit_trajectory(sent))
    wanted = pb.TrajectoryFilter(task_id=task_id)
    seen, token = [], ""
    while True:
        page = await clients.trajectories.list_trajectories(
            page_size=2, page_token=token, filter=wanted
        )
        seen += page.trajectories
        token = page.next_page_token
        if not token:
            break
    assert [item.id for item in seen] == ids[::-1]
    assert not any(item.token_ids or item.turns or item.changes for item in seen)
    assert seen[0].reward.parts[0].name == "validation"
    assert seen[0].validation.summary == "42 of 42 tests passed"
    assert not seen[0].validation.log
    exported = [item async for item in clients.trajectories.export_trajectories(wanted)]
    assert [item.id for item in exported] == ids
    assert len(exported[0].token_ids) == 40
    hacked = pb.TrajectoryFilter(task_id=task_id, hack="test-deleted")
    page = await clients.trajectories.list_trajectories(filter=hacked)
    assert [item.id for item in page.trajectories] == [ids[2]]
    solved = pb.TrajectoryFilter(task_id=task_id, solved_only=True)
    assert len((await clients.trajectories.list_trajectories(filter=solved)).trajectories) == 4


async def test_damaged_tokens_are_data_loss(clients: Clients, tmp_path: Path):
    (task_id,) = await imported(clients)
    trajectory_id = await clients.trajectories.commit_trajectory(samples.trajectory(task_id))
    for path in (tmp_path / "blobs").rglob("*"):
        if path.is_file():
            path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DataLoss):
        await clients.trajectories.get_trajectory(trajectory_id)
    assert await clients.trajectories.get_trajectory(trajectory_id, without_tokens=True)


# ---- runs


async def test_names_of_runs_are_words(clients: Clients):
    name, run_id = samples.fresh("run"), f"run_{'0' * 32}"
    for bad in ("", "bad name", "../x", "-x", "a/b", "x\n", "ü", "a" * 101, "base", run_id):
        with pytest.raises(InvalidArgument, match=r"^name: "):
            await clients.runs.create_run(bad, "grpo")
    for good in (f"{name}{'a' * (100 - len(name))}", f"{name}.2_B"):
        assert (await clients.runs.create_run(good, "grpo")).run.name == good


async def test_runs_are_found_by_name_and_keep_their_documents(clients: Clients):
    name = samples.fresh("run")
    made = await clients.runs.create_run(
        name, "grpo", config={"lr": 1e-6, "nested": {"a": [1, "x"]}}
    )
    assert not made.existed
    again = await clients.runs.create_run(name, "grpo")
    assert again.existed
    assert again.run.id == made.run.id
    with pytest.raises(AlreadyExists):
        await clients.runs.create_run(name, "sft")
    with pytest.raises(InvalidArgument):
        await clients.runs.create_run(samples.fresh(), "dance")
    updated = await clients.runs.update_run(made.run.id, state="done", summary={"solved": 3})
    assert updated.state == "done"
    assert updated.summary["solved"] == 3
    assert updated.config["nested"]["a"][1] == "x"
    assert (await clients.runs.get_run(name)).id == made.run.id
    with pytest.raises(NotFound):
        await clients.runs.get_run("nothing")
    with pytest.raises(InvalidArgument):
        await clients.runs.update_run(made.run.id, state="asleep")
    with pytest.raises(NotFound):
        await clients.runs.update_run("run_" + "0" * 32, state="done")
    page = await clients.runs.list_runs(page_size=1, kind="grpo")
    assert page.runs[0].id == made.run.id


async def test_metrics_replace_each_other_and_come_in_step_order(clients: Clients):
    run_id = await new_run(clients)
    for step in (3, 1, 2):
        await clients.runs.record_metrics(run_id, step, {"loss": 1.0 / step, "reward": float(step)})
    await clients.runs.record_metrics(run_id, 2, {"loss": 9.0})
    points = await clients.runs.list_metrics(run_id, names=["loss"], from_step=2)
    assert [(point.step, point.value) for point in points] == [(2, 9.0), (3, 1.0 / 3)]
    with pytest.raises(InvalidArgument):
        await clients.runs.record_metrics(run_id, 4, {"loss": float("nan")})
    with pytest.raises(NotFound):
        await clients.runs.record_metrics("run_" + "0" * 32, 4, {"loss": 1.0})

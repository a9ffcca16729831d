"""Controls, which nothing can fix: nobody learns from one, and none leaves as a solvable task."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from regreen.client.stack import Endpoints, Stack
from regreen.dataset import v1 as pb
from regreen.rpc.errors import FailedPrecondition, InvalidArgument
from regreen.tasks.exchange import export_chats, export_tasks
from regreen.tasks.records import RecordStore
from regreen.train.rows import candidates_of, training_tasks, wanted_tasks
from tests.integration import dataset_samples as samples


@pytest.fixture
async def stack(dataset_address: str) -> AsyncIterator[Stack]:
    async with Stack(Endpoints(dataset=dataset_address)) as stack:
        yield stack


def control(**fields: object) -> pb.Task:
    task = samples.task()
    del task.fixes[:]
    task.labels["control"] = "true"
    for name, value in {"split": "test", **fields}.items():
        setattr(task, name, value)
    return task


def report_of(task_id: str) -> pb.GateReport:
    report = samples.report(task_id)
    for check in report.checks:
        check.name = check.name.replace("reference-passes", "control-fails")
    report.fixes.clear()
    return report


async def admitted(stack: Stack) -> pb.Task:
    task = control()
    await stack.tasks.import_tasks([task])
    return await stack.tasks.record_gate(report_of(task.id))


async def test_a_control_is_in_no_split_that_is_learnt_from(stack: Stack) -> None:
    for split in ("train", "validation"):
        with pytest.raises(InvalidArgument, match=r"is a control.*put it into the split test"):
            await stack.tasks.import_tasks([control(split=split)])
    task = await admitted(stack)
    assert task.status == pb.TASK_STATUS_ADMITTED
    with pytest.raises(InvalidArgument, match="is a control"):
        await stack.tasks.split_tasks({task.id: "train"})
    assert (await stack.tasks.get_task(task.id)).split == "test"
    moved = pb.Task()
    moved.CopyFrom(task)
    moved.category, moved.split = "other", "train"
    with pytest.raises(InvalidArgument, match="is a control"):
        await stack.tasks.import_tasks([moved], replace=True)
    fixable = samples.task()
    fixable.split = "train"
    await stack.tasks.import_tasks([fixable])
    fixable.labels["control"] = "true"
    with pytest.raises(InvalidArgument, match="is a control"):
        await stack.tasks.import_tasks([fixable], replace=True)


async def test_nobody_trains_on_a_control_that_is_asked_for(stack: Stack) -> None:
    task, other = await admitted(stack), samples.task()
    other.split = "test"
    await stack.tasks.import_tasks([other])
    await stack.tasks.record_gate(samples.report(other.id))
    assert len(await wanted_tasks(stack, [task.id, other.id], "test")) == 2
    for ids in ([task.id], [task.id, other.id]):
        with pytest.raises(FailedPrecondition, match=f"controls.*{task.id}"):
            await candidates_of(stack, ids, "test", ["any_fix"])
    found = {one.id for one in await training_tasks(stack, [], "test")}
    assert other.id in found
    assert task.id not in found


async def test_a_control_is_exported_in_no_format(stack: Stack, tmp_path: Path) -> None:
    task = await admitted(stack)
    for format in ("harbor", "swe-bench", "swe-smith", "parquet"):
        out = tmp_path / format
        kept = RecordStore(tmp_path / "tasks")
        done = await export_tasks(stack, [task], format, out, tmp_path, kept, quiet)
        assert done.count == 0
        assert done.left_out == {task.id: "is a control, which nothing can fix"}
        assert not (out / task.id).exists()


async def test_what_passed_a_control_is_no_chat(stack: Stack, tmp_path: Path) -> None:
    task = await admitted(stack)
    passed = samples.trajectory(task.id)
    passed.ClearField("id")
    passed.reward.solved = True
    passed.labels["control"] = "true"
    del passed.reward.hacks[:]
    await stack.trajectories.commit_trajectory(passed)
    chats = stack.trajectories.export_trajectories(pb.TrajectoryFilter(task_id=task.id))
    done = await export_chats(chats, {task.id}, tmp_path / "chats", quiet)
    assert (done.count, done.left_out) == (0, {"of a control": "1"})


def quiet(stage: str, done: float, total: float, text: str) -> None:
    """Nobody looks."""

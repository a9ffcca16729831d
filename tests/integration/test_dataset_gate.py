"""Gate reports over the wire: what an admission needs, and that the whole evidence is kept."""

from collections.abc import AsyncIterator

import pytest

from regreen.client.channel import connect
from regreen.dataset import v1 as pb
from regreen.rpc.errors import InvalidArgument, NotFound
from tests.integration import dataset_samples as samples
from tests.integration.dataset_samples import Clients, imported


@pytest.fixture
async def clients(dataset_address: str) -> AsyncIterator[Clients]:
    async with connect(dataset_address) as channel:
        yield Clients(channel)


async def test_gate_reports_need_their_evidence(clients: Clients):
    (task_id,) = await imported(clients)
    with pytest.raises(NotFound):
        await clients.tasks.get_gate_report(task_id)
    once = samples.report(task_id)
    del once.checks[1]
    failed = samples.report(task_id)
    failed.checks[0].ok = False
    flaky = samples.report(task_id)
    flaky.flaky.append("tests/test_a.py::test_one")
    for report in (once, failed, flaky):
        with pytest.raises(InvalidArgument):
            await clients.tasks.record_gate(report)
    assert (await clients.tasks.get_task(task_id)).status == pb.TASK_STATUS_NEW
    hangs = samples.report(task_id)
    hangs.depends_on.append("date")
    few = samples.report(task_id)
    few.repeats = 3
    both = samples.report(task_id)
    both.pass_to_pass.append("tests/test_a.py::test_one")
    both.quarantined.add(id="tests/test_a.py::test_one", causes=["order"])
    for report, field in ((hangs, "depends_on"), (few, "checks"), (both, "quarantined")):
        with pytest.raises(InvalidArgument) as refused:
            await clients.tasks.record_gate(report)
        assert refused.value.field == f"report.{field}"
    flaky.status = pb.TASK_STATUS_QUARANTINED
    await clients.tasks.record_gate(flaky)
    task = await clients.tasks.record_gate(samples.report(task_id), validation_time_s=2.5)
    assert task.status == pb.TASK_STATUS_ADMITTED
    assert task.validation_time.ToMilliseconds() == 2500
    stored = await clients.tasks.get_gate_report(task_id)
    stored.ClearField("create_time")
    assert stored == samples.report(task_id)


async def test_the_whole_evidence_of_a_gate_is_kept(clients: Clients):
    (task_id,) = await imported(clients)
    report = samples.report(task_id, pb.TASK_STATUS_REJECTED)
    report.checks[0].conditions = "order=2 hash_seed=1"
    report.depends_on.extend(["date", "host"])
    report.repeats = 5
    report.fail_to_pass.append("tests/test_a.py::test_\u00e9[\x00]")
    report.pass_to_pass.append("tests/test_a.py::test_two")
    report.fixes["any_fix/pins-restored"] = "ok"
    report.drift.append("admitted before, rejected now")
    report.python = "3.11"
    held = report.quarantined.add(id="tests/test_a.py::test_three", causes=["date"])
    held.outcomes.append("broken-fails 1: passed")
    await clients.tasks.record_gate(report)
    stored = await clients.tasks.get_gate_report(task_id)
    stored.ClearField("create_time")
    assert stored == report


async def test_tasks_of_other_systems_are_kept_whole_and_checked(clients: Clients):
    task = samples.foreign_task()
    await clients.tasks.import_tasks([task])
    stored = await clients.tasks.get_task(task.id)
    assert stored.foreign == task.foreign
    assert stored.status == pb.TASK_STATUS_NEW
    wrong = {
        "foreign.format": lambda t: setattr(t.foreign, "format", "A b"),
        "foreign.needs": lambda t: t.foreign.ClearField("needs"),
        "foreign.document_json": lambda t: setattr(t.foreign, "document_json", "[1]"),
        "environment.package": lambda t: t.environment.ClearField("package"),
        "environment.python": lambda t: setattr(t.environment, "builder", "python"),
    }
    for field, change in wrong.items():
        bad = samples.foreign_task()
        change(bad)
        if field == "environment.python":
            bad.ClearField("foreign")
            bad.environment.version = "1"
        with pytest.raises(InvalidArgument) as refused:
            await clients.tasks.import_tasks([bad])
        assert refused.value.field == f"tasks[0].{field}"
    mixed = samples.task()
    mixed.foreign.CopyFrom(task.foreign)
    with pytest.raises(InvalidArgument, match="is set for a task of our own"):
        await clients.tasks.import_tasks([mixed])


async def test_a_task_without_a_fix_may_be_unverified(clients: Clients):
    (task_id,) = await imported(clients)
    report = samples.report(task_id, pb.TASK_STATUS_UNVERIFIED)
    with pytest.raises(InvalidArgument, match="has a fix"):
        await clients.tasks.record_gate(report)
    kept = [check for check in report.checks if check.name == "broken-fails"]
    del report.checks[:]
    report.checks.extend(kept)
    task = await clients.tasks.record_gate(report)
    assert task.status == pb.TASK_STATUS_UNVERIFIED
    wanted = pb.TaskFilter(statuses=[pb.TASK_STATUS_UNVERIFIED])
    assert [task.id for task in await clients.tasks.all_tasks(wanted)] == [task_id]


async def test_a_family_of_packages_is_in_one_split(clients: Clients):
    name = samples.fresh("pkg")
    one, other = (samples.task(package=package) for package in (name, f"python-{name}"))
    one.split = "train"
    await clients.tasks.import_tasks([one])
    for split in ("test", "validation"):
        other.split = split
        with pytest.raises(InvalidArgument, match=f"{name} and python-{name}, of one family"):
            await clients.tasks.import_tasks([other])
    other.split = "train"
    await clients.tasks.import_tasks([other])
    with pytest.raises(InvalidArgument, match="of one family"):
        await clients.tasks.split_tasks({other.id: "test"})
    await clients.tasks.split_tasks({one.id: "test", other.id: "test"})

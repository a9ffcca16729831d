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

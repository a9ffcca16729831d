"""Admission over real dataset and sandbox services: from a task file to an admitted task."""

import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from dataset_svc.__main__ import serving as dataset_serving
from dataset_svc.settings import DatasetSettings
from regreen.client.stack import Endpoints, Stack
from regreen.dataset import v1 as pb
from regreen.rpc.errors import MissingDependency, NotFound
from regreen.tasks.admit import Admission, import_records, reasons_of, verify
from regreen.tasks.model import DistributionRecord, TaskRecord
from regreen.tasks.records import RECORD_LABEL, RecordStore, record_sha256
from sandbox_svc.__main__ import serving as sandbox_serving
from sandbox_svc.settings import SandboxSettings
from sandbox_svc.wheelhouse import DistStore
from tests.fixtures.tasks.tiny_record import tiny_record
from tests.fixtures.tasks.tiny_task import FAIL_TO_PASS

pytestmark = pytest.mark.asyncio(loop_scope="module")
STEADY = "tests/test_greet.py::test_arithmetic"
LOOPBACK = {"listen": "127.0.0.1:0", "metrics": "127.0.0.1:0", "drain_s": 0.5}


@dataclass(frozen=True)
class World:
    stack: Stack
    record: TaskRecord
    releases: dict[str, DistributionRecord]
    kept: RecordStore

    async def admit(self, *records: TaskRecord) -> list[pb.Task]:
        """Import and gate records, as `regreen tasks import` and `verify` do."""
        await import_records(self.stack, records, self.releases, keep=self.kept)
        tasks = [await self.stack.tasks.get_task(record.id) for record in records]
        found = self.kept.of_tasks(tasks, [])
        return await Admission(self.stack, found, {}, repeats=2).run([task.id for task in tasks])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(database_url: str) -> AsyncIterator[World]:
    home = Path(tempfile.mkdtemp(prefix="regreen-admit-"))
    home.chmod(0o711)
    (home / "made").mkdir()
    record, releases = tiny_record(DistStore(home / "sandbox" / "dists"), home / "made")
    sandbox = SandboxSettings(home=home, warm_seats=1, **LOOPBACK)
    dataset = DatasetSettings(home=home, fsync=False, **LOOPBACK)
    try:
        async with (
            sandbox_serving(sandbox) as one,
            dataset_serving(dataset, database_url) as two,
            Stack(Endpoints(sandbox=one.address, dataset=two.address)) as stack,
        ):
            yield World(stack, record, releases, RecordStore(home / "tasks"))
    except MissingDependency as error:
        pytest.skip(f"no sandboxes here: {error}")
    finally:
        shutil.rmtree(home, ignore_errors=True)


def named(record: TaskRecord, id: str, **changes: object) -> TaskRecord:
    return record.model_copy(update={"id": id, **changes})


async def test_tasks_of_ones_own_are_admitted_from_their_kept_records(world: World) -> None:
    own = named(world.record, "own")
    (task,) = await world.admit(own)
    assert task.status == pb.TASK_STATUS_ADMITTED
    assert task.labels[RECORD_LABEL] == record_sha256(own)
    assert sorted(task.fail_to_pass) == sorted(FAIL_TO_PASS)
    assert {fix.origin for fix in task.fixes} == {"pins-restored", "source-edit"}
    assert (await import_records(world.stack, [own], world.releases)).unchanged == 1


async def test_unstable_tests_of_an_admitted_task_are_known_and_not_required(world: World) -> None:
    tests = world.record.tests.model_copy(update={"unstable": [STEADY]})
    (task,) = await world.admit(named(world.record, "wobbly", tests=tests))
    assert task.status == pb.TASK_STATUS_ADMITTED
    assert list(task.environment.test.unstable) == [STEADY]
    assert task.pass_to_pass_count == 0
    report = await world.stack.tasks.get_gate_report("wobbly")
    assert STEADY in {check.name: check.detail for check in report.checks}["unstable"]


async def test_a_test_to_turn_green_that_is_unstable_is_not_asked_for(world: World) -> None:
    tests = world.record.tests.model_copy(update={"unstable": [FAIL_TO_PASS[0]]})
    (task,) = await world.admit(named(world.record, "half", tests=tests))
    assert task.status == pb.TASK_STATUS_ADMITTED
    assert (list(task.fail_to_pass), task.fail_to_pass_count) == ([FAIL_TO_PASS[1]], 1)


async def test_one_task_in_trouble_does_not_end_the_others(world: World) -> None:
    good = named(world.record, "good")
    await import_records(world.stack, [good], world.releases)
    lost = named(world.record, "never-imported")
    admission = Admission(world.stack, [lost, good], {}, repeats=2)
    with pytest.raises(NotFound, match="never-imported"):
        await admission.run(["never-imported", "good"], concurrency=1)
    assert (await world.stack.tasks.get_task("good")).status == pb.TASK_STATUS_ADMITTED


async def test_what_was_decided_before_is_known_before_the_work_begins(world: World) -> None:
    done, fresh = named(world.record, "done"), named(world.record, "fresh")
    await world.admit(done)
    await import_records(world.stack, [fresh], world.releases)
    told: list[str] = []
    ids = ["done", "fresh"]
    admission = Admission(
        world.stack, [done, fresh], {}, repeats=2, progress=lambda id, _: told.append(id)
    )
    assert await admission.standing(ids) == {"done"}
    await admission.run(ids)
    assert set(told) == {"fresh"}
    assert await admission.standing(ids) == {"done", "fresh"}
    assert await Admission(world.stack, [done], {}, again=True).standing(ids) == set()


async def test_what_is_not_admitted_has_a_reason(world: World) -> None:
    (task,) = await world.admit(named(world.record, "future", python="3.99"))
    assert task.status == pb.TASK_STATUS_WAITING
    reasons = await reasons_of(world.stack, [task])
    assert reasons["future"].startswith("needs Python 3.99; found ")
    assert "`uv python install 3.99`" in reasons["future"]


async def test_a_verdict_stands_until_it_is_too_old(world: World) -> None:
    record = named(world.record, "aged")
    (task,) = await world.admit(record)
    then = task.verify_time.ToNanoseconds() / 1e9

    def asked(age_s: float, **more: object) -> Admission:
        clock = lambda: then + age_s  # noqa: E731
        return Admission(world.stack, [record], {}, repeats=2, clock=clock, **more)  # type: ignore[arg-type]

    assert await asked(3599.0, older_than_s=3600.0).standing(["aged"]) == {"aged"}
    assert await asked(3601.0, older_than_s=3600.0).standing(["aged"]) == set()
    assert await asked(1e9).standing(["aged"]) == {"aged"}
    (again,) = await asked(3601.0, older_than_s=3600.0, rebuild=True).run(["aged"])
    assert again.verify_time.ToNanoseconds() > task.verify_time.ToNanoseconds()
    assert again.state_id == task.state_id, "equal hashes give an equal State"
    state = await world.stack.state.get_state(again.state_id)
    assert state.create_time.ToNanoseconds() > task.verify_time.ToNanoseconds(), "made anew"
    report = await world.stack.tasks.get_gate_report("aged")
    assert list(report.drift) == []


async def test_what_changed_against_the_last_verdict_is_told(world: World) -> None:
    report = await verify(world.stack, named(world.record, "drifts"), world.releases, repeats=2)
    assert report.status == pb.TASK_STATUS_ADMITTED, report.reason
    assert (report.repeats, list(report.drift)) == (2, [])
    assert sorted(report.fail_to_pass) == sorted(FAIL_TO_PASS)
    assert dict(report.fixes) == {"any_fix/pins-restored": "ok", "keep_new/source-edit": "ok"}
    assert {"", "order=2 hash_seed=1"} <= {check.conditions for check in report.checks}
    useless = world.record.pins_fail
    worse = named(world.record, "drifts", pins_pass=useless, fixes=world.record.fixes[:1])
    worse = worse.model_copy(update={"modes": ["any_fix"]})
    report = await verify(world.stack, worse, world.releases, repeats=2)
    assert report.status == pb.TASK_STATUS_REJECTED
    assert report.drift[0].startswith("admitted before, rejected now: reference fix: failed")
    assert "2 tests no longer turn green" in report.drift[1]


async def test_a_damaged_record_is_none(world: World, tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    store.put(world.record)
    digest = record_sha256(world.record)
    assert store.get(digest) == world.record
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace('"version":"1.0"', '"version":"1.1"'))
    assert store.get(digest) is None
    assert store.get("0" * 64) is None


async def test_a_task_that_gives_away_one_of_another_split_is_refused(world: World) -> None:
    one = world.record.model_copy(update={"id": "greet-near"})
    (near,) = await world.admit(one)
    assert near.status == pb.TASK_STATUS_ADMITTED
    other = "test" if near.split != "test" else "train"
    update = {"id": "salute-near", "package": "salute", "split": other}
    (task,) = await world.admit(world.record.model_copy(update=update))
    assert task.status == pb.TASK_STATUS_REJECTED
    report = await world.stack.tasks.get_gate_report(task.id)
    assert report.reason.startswith(f"leaks: salute-near ({other}) and ")
    assert "have nearly the same " in report.reason
    assert report.reason.endswith("put both into one split")
    await world.stack.tasks.split_tasks({task.id: near.split})
    record = world.record.model_copy(update={**update, "split": near.split})
    await import_records(world.stack, [record], world.releases, keep=world.kept)
    again = Admission(world.stack, [record], world.releases, repeats=2, again=True)
    (moved,) = await again.run([record.id])
    assert moved.status == pb.TASK_STATUS_ADMITTED

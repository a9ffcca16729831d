"""The gate over a real sandbox service: what it admits, rejects and writes down."""

import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from regreen.client.channel import connect
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.dataset.v1 import dataset_pb2
from regreen.pkgindex import PackageIndex
from regreen.rpc.errors import InvalidArgument, MissingDependency
from regreen.sandbox import v1 as pb
from regreen.tasks.environment import environment
from regreen.tasks.gate import Gate
from regreen.tasks.jsonl import dump_lines, load_tasks
from regreen.tasks.messages import gate_report, task_message
from regreen.tasks.model import DistributionRecord, Edit, Fix, TaskRecord
from regreen.tasks.verify import ServiceGateClient, read_judged, refreshed, verify_all
from sandbox_svc.__main__ import serving
from sandbox_svc.settings import SandboxSettings
from sandbox_svc.wheelhouse import DistStore
from tests.fixtures.tasks.tiny_record import tiny_record
from tests.fixtures.tasks.tiny_task import FAIL_TO_PASS, PYTHON

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass(frozen=True, slots=True)
class World:
    gate: Gate
    quick: Gate
    task: TaskRecord
    releases: dict[str, DistributionRecord]
    home: Path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    home = Path(tempfile.mkdtemp(prefix="regreen-gate-"))
    home.chmod(0o711)
    (home / "made").mkdir()
    store = DistStore(home / "sandbox" / "dists")
    task, releases = tiny_record(store, home / "made")
    settings = SandboxSettings(home=home, listen="127.0.0.1:0", metrics="127.0.0.1:0")
    try:
        async with serving(settings) as server, PackageIndex(["http://127.0.0.1:9"]) as index:
            channel = connect(f"127.0.0.1:{server.port}")
            try:
                client = ServiceGateClient(StateClient(channel), SandboxClient(channel))
                quick = Gate(client, releases, index, repeats=1)
                yield World(Gate(client, releases, index, repeats=2), quick, task, releases, home)
            finally:
                await channel.close()
    except MissingDependency as error:
        pytest.skip(f"no sandboxes here: {error}")
    finally:
        shutil.rmtree(home, ignore_errors=True)


async def test_a_good_task_is_admitted_with_evidence(world: World) -> None:
    verdict = await world.gate.judge(world.task)
    assert verdict.admitted, verdict.reason
    assert set(verdict.fail_to_pass) == set(FAIL_TO_PASS)
    assert verdict.pass_to_pass == ("tests/test_greet.py::test_arithmetic",)
    assert verdict.fixes == {"any_fix/pins-restored": "ok", "keep_new/source-edit": "ok"}
    names = {(check.name, check.repeat) for check in verdict.checks}
    assert ("broken-fails", 2) in names
    assert ("noop-fails", 2) in names
    assert ("reference-passes keep_new/source-edit", 3) in names
    assert all(check.ok for check in verdict.checks)
    assert "cannot import name 'hello'" in verdict.error_log


async def test_a_reference_that_does_not_help_is_rejected(world: World) -> None:
    useless = world.task.model_copy(
        update={"pins_pass": world.task.pins_fail, "fixes": world.task.fixes[:1]}
    )
    verdict = await world.quick.judge(useless)
    assert verdict.status == "rejected"
    assert verdict.reason.startswith("reference fix: failed")


async def test_an_edit_that_does_not_fit_is_named(world: World) -> None:
    fix = Fix(mode="keep_new", origin="source-edit", edits=[Edit(path="nope.py", old="a", new="b")])
    task = world.task.model_copy(update={"fixes": [world.task.fixes[0], fix]})
    verdict = await world.quick.judge(task)
    assert verdict.admitted
    assert verdict.fixes["keep_new/source-edit"] != "ok"
    assert refreshed(task, verdict).modes == ["any_fix"]


async def test_a_build_that_is_not_broken_is_rejected(world: World) -> None:
    healthy = world.task.model_copy(
        update={"pins_fail": world.task.pins_pass, "fixes": world.task.fixes[:1]}
    )
    verdict = await world.quick.judge(healthy)
    assert verdict.status == "rejected"
    assert verdict.reason.startswith("broken-fails")


async def test_tests_that_come_to_no_end_wait_with_the_remedy(world: World) -> None:
    tests = world.task.tests.model_copy(update={"timeout_s": 0.05})
    verdict = await world.quick.judge(world.task.model_copy(update={"tests": tests}))
    assert verdict.status == "waiting"
    assert "ended by timeout, in each of 2 runs; raise test.timeout" in verdict.reason


async def test_a_task_that_requires_no_test_is_rejected(world: World) -> None:
    names = [*FAIL_TO_PASS, "tests/test_greet.py::test_arithmetic"]
    tests = world.task.tests.model_copy(update={"unstable": names})
    verdict = await world.quick.judge(world.task.model_copy(update={"tests": tests}))
    assert verdict.status == "rejected"
    assert "has no test that must pass" in verdict.reason
    assert verdict.state_id


async def test_tests_spread_over_processes_are_rejected(world: World) -> None:
    tests = world.task.tests.model_copy(update={"arguments": ["tests", "-n4"]})
    verdict = await world.quick.judge(world.task.model_copy(update={"tests": tests}))
    assert verdict.status == "rejected"
    assert "test.arguments: has '-n4'" in verdict.reason


async def test_a_release_without_hashes_is_rejected(world: World) -> None:
    unknown = world.task.model_copy(update={"pins_fail": [*world.task.pins_fail, "other==1.0"]})
    verdict = await world.quick.judge(unknown)
    assert verdict.status == "rejected"
    assert "other==1.0 has no hashes" in verdict.reason


async def test_a_task_for_an_absent_interpreter_waits(world: World) -> None:
    verdict = await world.quick.judge(world.task, python="3.1")
    assert verdict.status == "waiting"
    assert "uv python install 3.1" in verdict.reason
    assert refreshed(world.task, verdict) == world.task
    assert gate_report(verdict).status == dataset_pb2.TASK_STATUS_WAITING


async def test_a_set_is_judged_once_and_updated(world: World) -> None:
    out = world.home / "verdicts.jsonl"
    assert await verify_all(world.quick, [world.task], out) == 0
    size = out.stat().st_size
    assert await verify_all(world.quick, [world.task], out) == 0
    assert out.stat().st_size == size
    (judged,) = read_judged(out)
    verdict = judged.verdict
    assert judged.is_of(world.task)
    assert not judged.is_of(world.task.model_copy(update={"version": "9.9"}))
    task = refreshed(world.task, verdict)
    assert (task.status, task.modes, task.pythons) == (
        "admitted",
        ["any_fix", "keep_new"],
        [PYTHON],
    )
    assert task.tests.pass_to_pass_count == 1
    (world.home / "tasks.jsonl").write_text(dump_lines([task]), "utf-8")
    assert load_tasks(world.home / "tasks.jsonl") == [task]


async def test_messages_carry_the_task_and_the_report(world: World) -> None:
    verdict = await world.quick.judge(world.task)
    message = task_message(world.task, world.releases)
    assert message.environment.pins[0].files[0].sha256
    assert [fix.origin for fix in message.fixes] == ["pins-restored"]
    assert message.culprit == "wordlib"
    report = gate_report(verdict, now_s=12.5)
    assert report.status == dataset_pb2.TASK_STATUS_ADMITTED
    assert len(report.checks) == len(verdict.checks)
    assert report.create_time.nanos == 500_000_000


async def test_a_client_may_ask_for_a_part_of_the_tests(world: World) -> None:
    assert isinstance(world.gate.client, ServiceGateClient)
    sandboxes = world.gate.client.sandboxes
    state = await world.gate.client.prepare(environment(world.task, world.releases))
    early = await sandboxes.validate(state.id, stop_early=True)
    assert (early.outcome, early.partial) == (pb.VALIDATION_OUTCOME_FAILED, True)
    assert (early.not_run, early.workers, early.lasting) == (2, 1, True)
    chosen = await sandboxes.validate(state.id, only_tests=["tests/test_greet.py::test_arithmetic"])
    assert (chosen.outcome, chosen.not_run) == (pb.VALIDATION_OUTCOME_INCOMPLETE, 2)
    whole = await sandboxes.validate(state.id)
    assert (whole.outcome, whole.partial, whole.not_run) == (early.outcome, False, 0)
    with pytest.raises(InvalidArgument) as refused:
        await sandboxes.validate(state.id, only_tests=["/"])
    assert refused.value.field == "only_tests"

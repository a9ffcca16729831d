"""The local stack through the command line: up, status, logs, examples, bad input, down."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from regreen.common.v1 import CHANGE_KIND_MODIFY, Digest, FileChange
from regreen.dataset import v1 as dataset_pb
from regreen.judge import v1 as judge_pb
from regreen.learner import v1 as learner_pb
from regreen.policy import v1 as policy_pb
from regreen.rpc.errors import FailedPrecondition, InvalidArgument, NotFound, RegreenError
from regreen.sandbox import v1 as sandbox_pb
from regreen.stack.layout import SERVICES
from tests.e2e.conftest import ROOT, Local
from tests.integration import dataset_samples as samples

NAMES = [service.name for service in SERVICES]
NONE = "0" * 32
BY_NAME = {service.name: service for service in SERVICES}
EXAMPLES = {
    "dataset": "1 reward 0.1",
    "sandbox": "+hello\n\na State of its own now: st_",
    "sandbox_exec": "sh took 26 bytes, ended: False\nended by signal 1\n",
    "policy": "'Good morning.",
    "judge": "not genuine",
    "learner": "step 1 loss ",
}
"""What each example that needs one address alone says."""


def test_up_again_changes_nothing(local: Local) -> None:
    before = local.rows()
    again = local.cli("up", "--json")
    assert again.returncode == 0, again.stderr
    assert {row["name"]: row for row in json.loads(again.stdout)} == before
    assert {row["state"] for row in before.values()} == {"serving"}
    assert list(before) == NAMES


def test_up_with_other_arguments_is_refused(local: Local) -> None:
    assert local.cli("up", "--ports", "any", "--engine", "scripted").returncode == 0
    for words, said in (
        (("--engine", "torch"), "with --engine scripted, not with --engine torch"),
        (("--ports", "fixed"), "started with ports any"),
    ):
        done = local.cli("up", *words)
        assert done.returncode == 1
        assert said in done.stderr
        assert "regreen down" in done.stderr


def test_up_ends_at_once_when_a_service_refuses_its_settings(local: Local, tmp_path: Path) -> None:
    wrong = replace(local, home=tmp_path, env={**local.env, "REGREEN_JUDGE__MAX_RPCS": "0"})
    done = wrong.cli("up", "--ports", "any")
    assert done.returncode == 2
    assert "max_rpcs: Input should be greater than or equal to 1" in done.stderr
    assert "mend this setting of the judge service" in done.stderr
    assert {row["state"] for row in wrong.rows().values()} == {"down"}


def test_logs(local: Local) -> None:
    done = local.cli("logs", "dataset", "-n", "5")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert 0 < len(lines) <= 5
    assert all(line.startswith("dataset ") for line in lines)
    wrong = local.cli("logs", "nothing")
    assert wrong.returncode == 2
    assert "give one of dataset, sandbox" in wrong.stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_service_describes_itself(local: Local, name: str) -> None:
    row, service = local.rows()[name], BY_NAME[name]
    with grpc.insecure_channel(row["address"]) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service=service.health), timeout=10
        )
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        (answer,) = stub.ServerReflectionInfo(asked, timeout=10)
    listed = {found.name for found in answer.list_services_response.service}
    assert service.health in listed
    metrics = httpx.get(f"{row['metrics']}/metrics", timeout=10)
    assert metrics.status_code == 200
    assert "regreen_" in metrics.text
    assert httpx.get(f"{row['metrics']}/healthz", timeout=10).status_code == 200


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_examples(local: Local, name: str) -> None:
    service = name.partition("_")[0]
    argv = [sys.executable, f"examples/{name}.py", local.rows()[service]["address"]]
    done = subprocess.run(
        argv, cwd=ROOT, env=local.env, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert EXAMPLES[name] in done.stdout


def test_examples_of_the_sandbox_service(local: Local) -> None:
    rows = local.rows()
    task = dataset_pb.Task()
    task.CopyFrom(local.task)
    task.id = "example-of-a-validation"
    with grpc.insecure_channel(rows["dataset"]["address"]) as channel:
        request = dataset_pb.ImportTasksRequest(tasks=[task], request_id="1" * 32)
        dataset_pb.TaskServiceStub(channel).ImportTasks(request, timeout=30)
    addresses = [rows["sandbox"]["address"], rows["dataset"]["address"]]
    expected = {
        ("sandbox_fork", *addresses[:1]): "restored: shared | trunk: shared",
        ("sandbox_validate", *addresses, task.id): "-> VALIDATION_OUTCOME_PASSED",
    }
    for (name, *words), said in expected.items():
        done = subprocess.run(
            [sys.executable, f"examples/{name}.py", *words],
            cwd=ROOT,
            env=local.env,
            capture_output=True,
            text=True,
            timeout=150,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert said in done.stdout
    wrong = [sys.executable, "examples/sandbox_validate.py", *addresses, "no-such-task"]
    ended = subprocess.run(wrong, cwd=ROOT, env=local.env, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (1, "error: no task 'no-such-task'\n")
    assert "nothing -> VALIDATION_OUTCOME_" in done.stdout
    assert "nothing -> VALIDATION_OUTCOME_PASSED" not in done.stdout


async def test_bad_input_to_dataset(local: Local) -> None:
    async with local.stack() as stack:
        total = (await stack.tasks.get_task_stats()).total
        with pytest.raises(NotFound, match="no-such-task"):
            await stack.tasks.get_task("no-such-task")
        broken = samples.task()
        broken.environment.pins[0].version = ""
        with pytest.raises(InvalidArgument, match="pins"):
            await stack.tasks.import_tasks([broken])
        with pytest.raises((NotFound, FailedPrecondition)):
            await stack.queue.commit_rollout(f"lse_{NONE}", samples.trajectory("no-such-task"))
        with pytest.raises(
            InvalidArgument, match=r"run_id: 'run_0' is no run_ id; give run_<32 hex>"
        ):
            await stack.queue.enqueue_groups([samples.group("run_0", "no-such-task")])
        assert (await stack.tasks.get_task_stats()).total == total
        assert not (await stack.queue.get_queue()).rollouts.get("waiting", 0)


async def test_bad_input_to_sandbox(local: Local) -> None:
    async with local.stack() as stack:
        with pytest.raises(NotFound, match=NONE):
            await stack.sandbox.create_sandbox(f"st_{NONE}")
        with pytest.raises(NotFound):
            await stack.sandbox.run(f"sbx_{NONE}", ["true"], timeout_s=5.0)
        states = {state.id for state in (await stack.state.list_states()).states}
        with pytest.raises(InvalidArgument, match="builder"):
            await prepared(stack, sandbox_pb.EnvironmentSpec(builder="cobol"))
        huge = FileChange(path="../out", kind=CHANGE_KIND_MODIFY, content=b"x")
        with pytest.raises(InvalidArgument, match=r"\.\./out"):
            await prepared(stack, sandbox_pb.EnvironmentSpec(builder="system", overlay=[huge]))
        own = FileChange(path="of-this-test", kind=CHANGE_KIND_MODIFY, content=b"x")
        state_id = await prepared(
            stack, sandbox_pb.EnvironmentSpec(builder="system", overlay=[own])
        )
        box = await stack.sandbox.create_sandbox(state_id)
        try:
            for path in ("/proc/sys/kernel/hostname", "/"):
                with pytest.raises(RegreenError):
                    await stack.sandbox.write_file(box.id, path, b"x")
            with pytest.raises(RegreenError, match="larger than max"):
                await stack.sandbox.write_file(box.id, "/work/repo/huge", bytes(65 << 20))
        finally:
            await stack.sandbox.delete_sandbox(box.id)
        await stack.state.delete_state(state_id)
        assert not (await stack.sandbox.list_sandboxes()).sandboxes
        assert {state.id for state in (await stack.state.list_states()).states} == states


async def test_a_task_whose_install_fails(local: Local) -> None:
    spec = sandbox_pb.EnvironmentSpec()
    spec.CopyFrom(local.task.environment)
    spec.install_mode = "editable"  # the tiny project says nowhere how it is built
    async with local.stack() as stack:
        states = len((await stack.state.list_states()).states)
        with pytest.raises(InvalidArgument, match="cannot install"):
            await prepared(stack, spec)
        assert len((await stack.state.list_states()).states) == states
        assert not (await stack.sandbox.list_sandboxes()).sandboxes


async def prepared(stack, spec) -> str:
    """Id of the prepared state."""
    async for event in stack.state.prepare_state(spec):
        if event.HasField("state"):
            return event.state.id
    raise AssertionError("the preparation ended without a state")


async def test_bad_input_to_policy(local: Local) -> None:
    async with local.stack() as stack:
        one = policy_pb.Sampling(temperature=1.0, max_new_tokens=4)
        for ids in ([], [-1], [10**7]):
            with pytest.raises(InvalidArgument, match="prompt_token_ids"):
                await stack.policy.generate(ids, sampling=one)
        with pytest.raises(InvalidArgument, match="n: "):
            await stack.policy.generate([1, 2], sampling=one, n=10_000)
        cold = policy_pb.Sampling(temperature=-1.0, max_new_tokens=4)
        with pytest.raises(InvalidArgument, match="temperature"):
            await stack.policy.generate([1, 2], sampling=cold)


async def test_bad_input_to_judge(local: Local) -> None:
    change = FileChange(path="x.py", kind=CHANGE_KIND_MODIFY, content=b"x")
    async with local.stack() as stack:
        with pytest.raises(InvalidArgument, match="originals"):
            await stack.judge.judge(judge_pb.Evidence(changes=[change]))


async def test_bad_input_to_learner(local: Local) -> None:
    missing = Digest(sha256="0" * 64, size_bytes=9)
    async with local.stack() as stack:
        with pytest.raises(NotFound, match="no-such-run"):
            await stack.learner.get_run("no-such-run")
        with pytest.raises((NotFound, FailedPrecondition)):
            await stack.learner.step("no-such-run", 1, batch_digest=missing)
        with pytest.raises(NotFound, match="no decoder model at /no/such/model"):
            await stack.learner.start_run("run_x", learner_pb.RUN_KIND_SFT, "/no/such/model")
        runs = (await stack.learner.list_runs()).runs
    assert "run_x" not in {run.id for run in runs}


async def test_an_expired_lease_is_refused(local: Local) -> None:
    async with local.stack() as stack:
        task = samples.task()
        await stack.tasks.import_tasks([task])
        await stack.tasks.record_gate(samples.report(task.id))
        run = (await stack.runs.create_run(samples.fresh("run"), "grpo")).run
        await stack.queue.enqueue_groups([samples.group(run.id, task.id, size=1)])
        (lease,) = await stack.queue.lease_rollouts("a", 1, run_id=run.id, duration_s=0.2)
        again = []
        while not again:  # leasing is the only clock that counts
            again = await stack.queue.lease_rollouts("b", 1, run_id=run.id, duration_s=60)
        assert again[0].rollout_id == lease.rollout_id
        late = samples.trajectory(task.id)
        with pytest.raises(FailedPrecondition, match="lease"):
            await stack.queue.commit_rollout(lease.id, late)
        listed = await stack.trajectories.list_trajectories(
            filter=dataset_pb.TrajectoryFilter(run_id=run.id)
        )
        assert not listed.trajectories
        await stack.queue.fail_rollout(again[0].id, "done with it")


def test_a_home_without_a_stack(local: Local, tmp_path: Path) -> None:
    status = local.cli("status", "--json", home=tmp_path)
    assert status.returncode == 3
    assert {row["state"] for row in json.loads(status.stdout)} == {"down"}
    listing = local.cli("tasks", "list", home=tmp_path)
    assert listing.returncode == 3
    assert "regreen up" in listing.stderr
    down = local.cli("down", home=tmp_path)
    assert (down.returncode, "no stack" in down.stderr) == (0, True)

"""No request, however wrong, is answered INTERNAL or UNKNOWN: it is refused with a typed error.

- A refused field is one of the request, by its path in the contract; the refusal says what to do.
- Real servers on port 0; every RPC of every service; every field of its request, bad in turn.
- Nothing long is started: what would build a model, run a step or fetch a package is asked of ids
  and places that do not exist.
- Every answer is read by a client, so an answer that cannot be decoded is a failure as well.
"""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct

from judge_svc.__main__ import running as judge_running
from judge_svc.settings import JudgeSettings
from learner_svc.record import RunFiles, RunRecord, RunState
from learner_svc.run import RunsConfig
from learner_svc.runs import Runs
from learner_svc.servicer import LearnerServicer
from learner_svc.settings import LearnerSettings
from learner_svc.spec import RunKind, RunSpec, defaults
from policy_svc.__main__ import running as policy_running
from policy_svc.settings import PolicySettings
from regreen.blobs import open_blobs
from regreen.client.channel import connect
from regreen.common import v1 as common_pb
from regreen.dataset import v1 as dataset_pb
from regreen.dataset.v1 import (
    archive_service_pb2,
    knowledge_service_pb2,
    parking_service_pb2,
    rollout_queue_service_pb2,
    run_service_pb2,
    task_service_pb2,
    trajectory_service_pb2,
)
from regreen.ids import new_id
from regreen.judge import v1 as judge_pb
from regreen.judge.v1 import judge_service_pb2
from regreen.learner import v1 as learner_pb
from regreen.learner.v1 import learner_service_pb2
from regreen.policy import v1 as policy_pb
from regreen.policy.v1 import policy_service_pb2
from regreen.rpc.server import Server
from regreen.sandbox import v1 as sandbox_pb
from regreen.sandbox.v1 import (
    action_service_pb2,
    egress_service_pb2,
    exec_service_pb2,
    image_service_pb2,
    sandbox_service_pb2,
    state_service_pb2,
)
from sandbox_svc.__main__ import serving as sandbox_serving
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.service import SandboxHost
from sandbox_svc.settings import SandboxSettings
from tests.contract.sweep import Answers, Goods, Sweep, check
from tests.fixtures.policy.model import default_model
from tests.integration import dataset_samples as samples
from tests.integration.dataset_samples import Clients, imported, new_run
from tests.integration.sandbox.overlay import OverlayBuilder, spec


def _services(*modules: Any) -> list[ServiceDescriptor]:
    return [s for module in modules for s in module.DESCRIPTOR.services_by_name.values()]


async def test_judge(tmp_path: Path) -> None:
    settings = JudgeSettings(
        home=tmp_path, listen="127.0.0.1:0", metrics="127.0.0.1:0", drain_s=0.2
    )
    modify = common_pb.CHANGE_KIND_MODIFY
    test = sandbox_pb.TestResult(id="t::a", outcome=common_pb.TEST_OUTCOME_PASSED)
    run = sandbox_pb.Validation(outcome=sandbox_pb.VALIDATION_OUTCOME_PASSED, tests=[test])
    evidence = judge_pb.Evidence(
        changes=[common_pb.FileChange(path="src/a.py", kind=modify, content=b"x = 2\n")],
        originals=[common_pb.FileChange(path="src/a.py", kind=modify, content=b"x = 1\n")],
        before=run,
        after=run,
    )
    goods: Goods = {
        "Judge": judge_pb.JudgeRequest(evidence=evidence),
        "JudgeGroup": judge_pb.JudgeGroupRequest(members=[evidence, evidence]),
        "Calibrate": judge_pb.CalibrateRequest(
            examples=[judge_pb.LabelledEvidence(evidence=evidence)]
        ),
    }
    async with judge_running(settings) as server, connect(server.address) as channel:
        sweep = Sweep(channel)
        await sweep.all(_services(judge_service_pb2), goods)
    check(sweep, 300)


async def test_policy(tmp_path: Path) -> None:
    script = tmp_path / "script.json"
    script.write_text('{"responses": [{"text": "Hello."}]}')
    settings = PolicySettings(
        home=tmp_path, listen="127.0.0.1:0", metrics="127.0.0.1:0", http="", drain_s=0.2,
        engine="scripted", script=script, model=default_model(),
    )  # fmt: skip
    message = policy_pb.ChatMessage(role="user", content="hello")
    goods: Goods = {
        "Generate": policy_pb.GenerateRequest(
            prompt_token_ids=[1, 2],
            sampling=policy_pb.Sampling(temperature=1.0, max_new_tokens=4),
        ),
        "RenderChat": policy_pb.RenderChatRequest(messages=[message]),
        "Tokenize": [
            policy_pb.TokenizeRequest(text="hello"),
            policy_pb.TokenizeRequest(token_ids=[1]),
        ],
        "LoadVersion": policy_pb.LoadVersionRequest(
            policy=policy_pb.PolicyVersion(version=1, uri="/nowhere"), allow_older=True
        ),
        "Wake": policy_pb.WakeRequest(
            policy=policy_pb.PolicyVersion(version=1, uri="/nowhere"), allow_older=True
        ),
    }
    async with policy_running(settings) as found, connect(found.server.address) as channel:
        stub = policy_pb.PolicyServiceStub(channel)

        async def resume(name: str, answers: Answers) -> None:
            if name == "Pause":
                await stub.Resume(policy_pb.ResumeRequest())

        sweep = Sweep(channel, resume)
        await sweep.all(_services(policy_service_pb2), goods)
    check(sweep, 150)


@pytest.fixture
async def sandboxes(tmp_path: Path) -> AsyncIterator[grpc.aio.Channel]:
    """Channel of a sandbox service whose states are made of overlay files."""
    settings = SandboxSettings(
        home=tmp_path / "home", listen=f"unix:{tmp_path}/s", metrics="127.0.0.1:0",
        max_sandboxes=32, drain_s=0.2,
    )  # fmt: skip
    runtime = EmbeddedRuntime(tmp_path / "home" / "sandbox", run_probes=False, warm_seats=2)
    host = SandboxHost(settings, runtime, [OverlayBuilder()])
    async with sandbox_serving(settings, host) as server, connect(server.address) as channel:
        yield channel


async def test_sandbox(sandboxes: grpc.aio.Channel) -> None:
    pb, stub = sandbox_pb, sandbox_pb.SandboxServiceStub(sandboxes)
    whole = spec(**{"a.py": "x = 1\n"})
    whole.source.CopyFrom(pb.DistFile(filename="a.tar.gz", sha256="ab" * 32))
    whole.pins.add(name="a", version="1").files.add(filename="a.whl", sha256="cd" * 32)
    whole.test.CopyFrom(pb.TestSpec(arguments=["tests"], timeout=Duration(seconds=60)))
    whole.egress.append("docs.test")
    prepare = pb.StateServiceStub(sandboxes).PrepareState
    events = [event async for event in prepare(pb.PrepareStateRequest(spec=whole))]
    state = events[-1].state.id
    box = (await stub.CreateSandbox(pb.CreateSandboxRequest(state_id=state))).sandbox.id
    nobody, nowhere = new_id("sbx"), new_id("st")
    command = pb.Command(argv=["/bin/true"], timeout=Duration(seconds=5))
    change = common_pb.FileChange(path="a.py", kind=common_pb.CHANGE_KIND_MODIFY, content=b"x\n")
    goods: Goods = {
        "PrepareState": pb.PrepareStateRequest(spec=whole),
        "GetState": pb.GetStateRequest(id=state),
        "GetLineage": pb.GetLineageRequest(id=state),
        "DeleteState": pb.DeleteStateRequest(id=nowhere),
        "ExportState": pb.ExportStateRequest(id=state),
        "CreateSandbox": pb.CreateSandboxRequest(
            state_id=state,
            limits=pb.Limits(pids=16),
            ttl=Duration(seconds=60),
            egress=pb.Egress(allow=["index.test:8443"]),
        ),
        "GetSandbox": pb.GetSandboxRequest(id=box),
        "DeleteSandbox": pb.DeleteSandboxRequest(id=nobody),
        "ForkSandbox": pb.ForkSandboxRequest(id=box, count=1),
        "SnapshotSandbox": pb.SnapshotSandboxRequest(id=box),
        "RestoreSandbox": pb.RestoreSandboxRequest(id=box, state_id=state),
        "KeepAlive": pb.KeepAliveRequest(id=box, ttl=Duration(seconds=600)),
        "Exec": pb.ExecRequest(sandbox_id=box, command=command),
        "Run": pb.RunRequest(sandbox_id=box, command=command),
        "ReadFile": pb.ReadFileRequest(sandbox_id=box, path="/work/repo/a.py"),
        "WriteFile": pb.WriteFileRequest(sandbox_id=box, path="/work/repo/b.py", content=b"x"),
        "ListFiles": pb.ListFilesRequest(sandbox_id=box, glob="*.py"),
        "FindText": pb.FindTextRequest(sandbox_id=box, text="x"),
        "Diff": pb.DiffRequest(sandbox_id=box, base_state_id=state),
        "Validate": [
            pb.ValidateRequest(
                state_id=nowhere, changes=[change], only_tests=["tests/test_a.py"], stop_early=True
            ),
            pb.ValidateRequest(
                state_id=nowhere,
                conditions=pb.Conditions(
                    order_seed=2,
                    hash_seed=1,
                    clock_offset=Duration(seconds=86_400),
                    host_name="a",
                    user_name="b",
                    repository="/work/elsewhere",
                ),
            ),
        ],
        "ListEgress": [
            pb.ListEgressRequest(sandbox_id=box, page_size=10),
            pb.ListEgressRequest(state_id=state, page_size=10),
        ],
        "Execute": pb.ExecuteRequest(
            state_id=state, command=command, limits=pb.Limits(pids=16), keep_state=True
        ),
        "ListQuarantined": pb.ListQuarantinedRequest(page_size=1),
        "ImportImage": [
            pb.ImportImageRequest(
                options=pb.ImageOptions(reference="a:1", labels={"a": "b"}, format=1)
            ),
            pb.ImportImageRequest(chunk=b"x"),
        ],
        "ExportImage": pb.ExportImageRequest(state_id=state, reference="a:1"),
    }

    async def remove(name: str, answers: Answers) -> None:
        made = [a.sandbox.id for a in answers] if name == "CreateSandbox" else []
        if name == "ForkSandbox":
            made = [fork.id for answer in answers for fork in answer.sandboxes]
        for one in made:
            await stub.DeleteSandbox(pb.DeleteSandboxRequest(id=one))

    sweep = Sweep(sandboxes, remove)
    modules = (
        state_service_pb2,
        sandbox_service_pb2,
        action_service_pb2,
        egress_service_pb2,
        image_service_pb2,
    )
    await sweep.all(_services(*modules), goods)
    check(sweep, 700)
    assert (await stub.GetSandbox(pb.GetSandboxRequest(id=box))).sandbox.id == box


async def test_sandbox_exec(sandboxes: grpc.aio.Channel) -> None:
    pb, stub = sandbox_pb, sandbox_pb.ExecServiceStub(sandboxes)
    prepare = pb.StateServiceStub(sandboxes).PrepareState
    events = [event async for event in prepare(pb.PrepareStateRequest(spec=spec(a="1")))]
    create = pb.SandboxServiceStub(sandboxes).CreateSandbox
    box = (await create(pb.CreateSandboxRequest(state_id=events[-1].state.id))).sandbox.id
    size = pb.TerminalSize(rows=24, columns=80)
    cat = pb.Command(argv=["cat"], timeout=Duration(seconds=1))
    start = pb.StartExecRequest(sandbox_id=box, command=cat, open_stdin=True, terminal=size)
    one = (await stub.StartExec(start)).execution.id
    goods: Goods = {
        "StartExec": start,
        "AttachExec": pb.AttachExecRequest(sandbox_id=box, exec_id=one),
        "WriteStdin": pb.WriteStdinRequest(sandbox_id=box, exec_id=one, data=b"x\n"),
        "SignalExec": pb.SignalExecRequest(sandbox_id=box, exec_id=one, signal=28),
        "ResizeTerminal": pb.ResizeTerminalRequest(sandbox_id=box, exec_id=one, size=size),
        "ListExecs": pb.ListExecsRequest(sandbox_id=box),
    }
    sweep = Sweep(sandboxes)
    await sweep.all(_services(exec_service_pb2), goods)
    check(sweep, 100)
    assert len((await stub.ListExecs(pb.ListExecsRequest(sandbox_id=box))).executions) <= 32


async def test_dataset(dataset_address: str) -> None:
    pb = dataset_pb
    async with connect(dataset_address) as channel:
        clients = Clients(channel)
        (task,), run = await imported(clients), await new_run(clients)
        made = samples.trajectory(task)
        stored = await clients.trajectories.commit_trajectory(samples.trajectory(task))
        leases = [new_id("lse")]
        groups = [samples.group(run, task)]
        named = samples.trajectory(task)
        named.id = new_id("trj")
        fact = pb.KnowledgeItem(kind="changelog", culprit="numpy", error="1.24 removed bool")
        fix = pb.KnowledgeItem(
            kind="trajectory", task_id=task, trajectory_id=stored, error="E: x", signature="E: x",
            mode=common_pb.MODE_ANY_FIX, edited=["a.py"],
            moves=[pb.KnowledgeMove(name="numpy", before="1.24", after="1.23")],
        )  # fmt: skip
        checkpoint = pb.CheckpointRecord(
            run_id=run, step=1, uri="/nowhere",
            digest=common_pb.Digest(sha256="ab" * 32, size_bytes=1),
        )  # fmt: skip
        facts = ParseDict({"a": [1, {"b": "c"}]}, Struct())
        second = Duration(seconds=1)
        goods: Goods = {
            "ImportTasks": pb.ImportTasksRequest(
                tasks=[samples.task(), samples.foreign_task()], replace=True
            ),
            "GetTask": pb.GetTaskRequest(id=task),
            "ListTasks": pb.ListTasksRequest(page_size=1),
            "RecordGate": pb.RecordGateRequest(report=samples.report(task), validation_time=second),
            "GetGateReport": pb.GetGateReportRequest(task_id=task),
            "SplitTasks": pb.SplitTasksRequest(splits={task: "train"}),
            "CommitTrajectory": pb.CommitTrajectoryRequest(trajectory=made),
            "GetTrajectory": pb.GetTrajectoryRequest(id=stored),
            "ListTrajectories": pb.ListTrajectoriesRequest(page_size=1),
            "ExportTrajectories": pb.ExportTrajectoriesRequest(
                filter=pb.TrajectoryFilter(task_id="none")
            ),
            "EnqueueGroups": pb.EnqueueGroupsRequest(groups=groups),
            "LeaseRollouts": pb.LeaseRolloutsRequest(worker="w", count=1, duration=second),
            "Heartbeat": pb.HeartbeatRequest(lease_ids=leases, duration=second),
            "CommitRollout": pb.CommitRolloutRequest(lease_id=leases[0], trajectory=made),
            "FailRollout": pb.FailRolloutRequest(lease_id=leases[0], error="x"),
            "TakeGroups": pb.TakeGroupsRequest(run_id=run, count=1),
            "AcknowledgeGroups": pb.AcknowledgeGroupsRequest(
                group_ids=[new_id("grp")], checkpoint_id=new_id("ckp")
            ),
            "RewindRun": pb.RewindRunRequest(run_id=run),
            "GetQueue": pb.GetQueueRequest(run_id=run),
            "CreateRun": pb.CreateRunRequest(name="r", kind="sft", config=facts),
            "GetRun": pb.GetRunRequest(id=run),
            "ListRuns": pb.ListRunsRequest(page_size=1),
            "UpdateRun": pb.UpdateRunRequest(id=run, state="active", summary=facts),
            "RecordMetrics": pb.RecordMetricsRequest(
                run_id=run, points=[pb.MetricPoint(step=1, name="loss", value=1.0)]
            ),
            "ListMetrics": pb.ListMetricsRequest(run_id=run),
            "RecordCheckpoint": pb.RecordCheckpointRequest(checkpoint=checkpoint),
            "ListCheckpoints": pb.ListCheckpointsRequest(run_id=run),
            "ListRollouts": pb.ListRolloutsRequest(run_id=run, state="lost", task_id=task),
            "ListParkedTasks": pb.ListParkedTasksRequest(run_id=run),
            "ReleaseTask": pb.ReleaseTaskRequest(run_id=run, task_id=task),
            "CommitTrajectories": pb.CommitTrajectoriesRequest(trajectory=named),
            "PruneTrajectories": pb.PruneTrajectoriesRequest(
                older_than=Duration(seconds=9), run_id=run, keep_solved=True, limit=1, dry_run=True
            ),
            "GetTrajectoryStats": pb.GetTrajectoryStatsRequest(run_id=run),
            "RecordKnowledge": pb.RecordKnowledgeRequest(items=[fact, fix]),
            "SearchKnowledge": pb.SearchKnowledgeRequest(
                task_id=task, package="p", question="why", signature="E: x", named=["numpy"],
                mode=common_pb.MODE_ANY_FIX, limit=3,
            ),
            "RecordKnowledgeUse": pb.RecordKnowledgeUseRequest(
                trajectory_id=stored, item_ids=["kno_" + "0" * 32]
            ),
        }  # fmt: skip
        modules = (
            task_service_pb2,
            trajectory_service_pb2,
            rollout_queue_service_pb2,
            run_service_pb2,
            parking_service_pb2,
            archive_service_pb2,
            knowledge_service_pb2,
        )
        sweep = Sweep(channel)
        await sweep.all(_services(*modules), goods)
        check(sweep, 1200)
        assert (await clients.runs.get_run(run)).id == run


async def test_learner(tmp_path: Path) -> None:
    pb, name = learner_pb, "regreen.learner.v1.LearnerService"
    settings = LearnerSettings(
        home=tmp_path, listen="127.0.0.1:0", metrics="127.0.0.1:0", drain_s=0.2
    )
    known = RunSpec("run_a", RunKind.GRPO, "/nowhere", "plain", defaults(RunKind.GRPO))
    record = RunRecord(known, RunState.STOPPED, "2026-01-01T00:00:00+00:00")
    RunFiles(tmp_path / "learner" / "runs" / "run_a").write(record)
    digest = common_pb.Digest(sha256="ab" * 32, size_bytes=1)
    goods: Goods = {
        "StartRun": pb.StartRunRequest(
            run_id="run_a", kind=pb.RUN_KIND_GRPO, base_uri="/nowhere", resume_uri="/neither"
        ),
        "EstimateRun": pb.EstimateRunRequest(kind=pb.RUN_KIND_GRPO, base_uri="/nowhere"),
        "Step": [
            pb.StepRequest(run_id="run_a", step=1, batch=b"no batch"),
            pb.StepRequest(run_id="run_a", step=1, batch_digest=digest),
        ],
        "WatchRun": pb.WatchRunRequest(run_id="run_a"),
        "SaveCheckpoint": pb.SaveCheckpointRequest(run_id="run_a", policy_version=1),
        "StopRun": pb.StopRunRequest(run_id="run_a"),
        "GetRun": pb.GetRunRequest(run_id="run_a"),
        "ListRuns": pb.ListRunsRequest(page_size=1),
    }
    runs = Runs(tmp_path, open_blobs(tmp_path / "blobs"), RunsConfig())
    server = Server(settings, [name])
    pb.add_LearnerServiceServicer_to_server(LearnerServicer(runs, "plain"), server.grpc)
    try:
        async with server, connect(server.address) as channel:
            sweep = Sweep(channel)
            await sweep.all(_services(learner_service_pb2), goods)
            found = await pb.LearnerServiceStub(channel).GetRun(pb.GetRunRequest(run_id="run_a"))
            assert (found.run.id, found.run.step) == ("run_a", 0)
    finally:
        await runs.close()
    check(sweep, 200)

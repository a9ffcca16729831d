"""No request, however wrong, is answered INTERNAL or UNKNOWN: it is refused with a typed error.

- A refused field is one of the request, by its path in the contract; the refusal says what to do.
- Real servers on port 0; every RPC of every service; every field of its request, bad in turn.
- Nothing long is started: what would build a model, run a step or fetch a package is asked of ids
  and places that do not exist.
- Every answer is read by a client, so an answer that cannot be decoded is a failure as well.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from judge_svc.__main__ import running as judge_running
from judge_svc.settings import JudgeSettings
from learner_svc.record import RunFiles, RunRecord, RunState
from learner_svc.runs import Runs, RunsConfig
from learner_svc.servicer import LearnerServicer
from learner_svc.settings import LearnerSettings
from learner_svc.spec import RunKind, RunSpec, defaults
from policy_svc.__main__ import running as policy_running
from policy_svc.settings import PolicySettings
from regreen.blobs import open_blobs
from regreen.client.channel import connect, new_request_id
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
from regreen.rpc.errors import InvalidArgument
from regreen.rpc.server import Server
from regreen.rpc.wire import from_rpc_error
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
from tests.contract.mutations import mutants
from tests.fixtures.policy.model import default_model
from tests.integration import dataset_samples as samples
from tests.integration.dataset_samples import Clients, imported, new_run
from tests.integration.sandbox.overlay import OverlayBuilder, spec

Goods = Mapping[str, Message | Sequence[Message]]
Answers = list[Any]
After = Callable[[str, Answers], Awaitable[None]]

_SHALLOW = ("JudgeGroup", "Calibrate", "CommitRollout", "CommitTrajectories")
"""What is inside these is read as Judge and CommitTrajectory read it."""
_WHOLE = ("request", "archive")
"""What is wrong with a request as such, and with the archive that an upload's messages make."""
_AT_ONCE = 8
_CALL_S = 20.0
_STREAM_S = 3.0
_OUR_FAULT = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED)


class Sweep:
    """Sends bad requests to the services of one address and collects what went wrong."""

    def __init__(self, channel: grpc.aio.Channel, after: After | None = None) -> None:
        self._channel, self._after = channel, after
        self._room = asyncio.Semaphore(_AT_ONCE)
        self.sent = 0
        self.faults: list[str] = []

    async def all(self, services: Sequence[ServiceDescriptor], goods: Goods) -> None:
        """Every method of the services: from its good requests, or from an empty one."""
        for service in services:
            for method in service.methods:
                await self.method(method, goods.get(method.name))

    async def method(
        self, method: MethodDescriptor, good: Message | Sequence[Message] | None = None
    ) -> None:
        """Every bad form of a method's requests, then bytes that are no message at all."""
        request_type = message_factory.GetMessageClass(method.input_type)
        goods = [good or request_type()] if good is None or isinstance(good, Message) else good
        work = [
            self._try(method, path, bad.SerializeToString())
            for one in goods
            for path, bad in _once_each(one, shallow=method.name in _SHALLOW)
        ]
        await asyncio.gather(*work)
        code = await self._try(method, "no message", b"\xff" * 9)
        if code is not grpc.StatusCode.INVALID_ARGUMENT:
            self.faults.append(f"{method.name} no message: {code}")

    async def _try(
        self, method: MethodDescriptor, path: str, content: bytes
    ) -> grpc.StatusCode | None:
        async with self._room:
            self.sent += 1
            try:
                answers = await self._call(method, content)
            except grpc.aio.AioRpcError as error:
                if error.code() in _OUR_FAULT:
                    said = f"{error.code().name}: {error.details()}"
                    self.faults.append(f"{method.name} {path}: {said}")
                if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                    self._judge(method, path, error)
                return error.code()
            if self._after is not None:
                await self._after(method.name, answers)
            return None

    def _judge(self, method: MethodDescriptor, path: str, error: grpc.aio.AioRpcError) -> None:
        """A refusal names a field that the request has, and a remedy."""
        refused = from_rpc_error(error)
        assert isinstance(refused, InvalidArgument)
        field = refused.field
        if method.client_streaming:  # the place of a message in the stream
            field = re.sub(r"^trajectories\[\d+\]", "trajectory", field)
        if not _is_field(field, method.input_type):
            self.faults.append(f"{method.name} {path}: no such field: {error.details()}")
        if not refused.remedy:
            self.faults.append(f"{method.name} {path}: no remedy: {error.details()}")

    async def _call(self, method: MethodDescriptor, content: bytes) -> Answers:
        name = f"/{method.containing_service.full_name}/{method.name}"
        decode = message_factory.GetMessageClass(method.output_type).FromString
        if method.client_streaming:
            call = self._channel.stream_unary(name, None, decode)
            return [await call(iter([content]), timeout=_CALL_S)]
        if not method.server_streaming:
            return [await self._channel.unary_unary(name, None, decode)(content, timeout=_CALL_S)]
        call = self._channel.unary_stream(name, None, decode)(content, timeout=_STREAM_S)
        return [answer async for answer in call]


def _is_field(path: str, message: Descriptor | None) -> bool:
    """Whether a path leads to a field of a message; the whole of one is a field too."""
    if path in _WHOLE:
        return True
    for part in re.sub(r"\[.*?\](?=\.|$)", "[]", path, flags=re.DOTALL).split("."):
        name, bracket, _ = part.partition("[")
        field = message.fields_by_name.get(name) if message is not None else None
        if field is None or (bracket and not field.is_repeated):
            return False
        message = field.message_type
        if message is not None and message.full_name == "google.protobuf.Struct":
            return True
    return True


def _once_each(good: Message, *, shallow: bool) -> list[tuple[str, Message]]:
    """Bad forms of a request, each under an id of its own, lest the answers be remembered ones."""
    found = []
    for path, bad in mutants(good, shallow=shallow):
        if "request_id" in bad.DESCRIPTOR.fields_by_name and not path.startswith("request_id"):
            bad.request_id = new_request_id()  # type: ignore[attr-defined]
        found.append((path, bad))
    return found


def check(sweep: Sweep, least: int) -> None:
    """No fault, and the sweep was a real one."""
    assert not sweep.faults, f"{len(sweep.faults)} of {sweep.sent}:\n" + "\n".join(
        sweep.faults[:40]
    )
    assert sweep.sent >= least


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

"""What good requests of a fuzz name: a State, Sandboxes, commands that run and that have ended.

- Each is really there: a request that is bad in one place gets past every check but that one.
- What requests delete is made for that; what they speak to is in a sandbox of its own, which no
  good request freezes, restores or deletes.
- Every method of the service has a good request; one that has none is an error here, not a gap.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from regreen.client.channel import READ_S, WRITE_S, stream
from regreen.common import v1 as common_pb
from regreen.sandbox import v1 as pb
from regreen.sandbox.v1 import (
    action_service_pb2,
    egress_service_pb2,
    exec_service_pb2,
    image_service_pb2,
    sandbox_service_pb2,
    state_service_pb2,
)
from sandbox_svc.backends.base import PROXY_PORT
from tests.integration.sandbox.images import entry, folder, oci, tar

MODULES = (
    state_service_pb2,
    sandbox_service_pb2,
    action_service_pb2,
    exec_service_pb2,
    image_service_pb2,
    egress_service_pb2,
)
Sent = Sequence[Message]
"""The messages of one request; more than one only where the method takes a stream."""
_RUNS_S = 1.0
"""How long a command runs that nothing ends, so that those who listen to it do not wait long."""
_PIECE_BYTES = 4096
_KNOCK = pb.Command(
    argv=[
        "bash",
        "-c",
        f"exec 3<>/dev/tcp/127.0.0.1/{PROXY_PORT}"
        r" && printf 'GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n' >&3 && head -c 9 <&3",
    ],
    cwd="/",
)
"""Asks the proxy for what it refuses, so that there is something to list."""
_TREE = tar(folder("etc"), entry("etc/motd", b"hello\n"), entry("big", bytes(20_000)))


def methods() -> Sequence[MethodDescriptor]:
    """Every method that the process offers."""
    services = [s for module in MODULES for s in module.DESCRIPTOR.services_by_name.values()]
    return [method for service in services for method in service.methods]


@dataclass(frozen=True, slots=True)
class Scene:
    """What there is for requests to name."""

    state: str
    box: str
    """A sandbox with a few files, for whatever comes."""
    stage: str
    """A sandbox whose commands are spoken to."""
    running: str
    on_terminal: str
    ended: str
    doomed_box: str
    doomed_state: str
    image: str
    """A State with a system of its own."""
    archive: bytes
    """The State, exported."""


async def made(channel: grpc.aio.Channel, state: str, running_s: float = _RUNS_S) -> Scene:
    """A scene on a State; the caller makes sure that there is room for it."""
    boxes, states = pb.SandboxServiceStub(channel), pb.StateServiceStub(channel)
    execs = pb.ExecServiceStub(channel)

    async def box() -> str:
        request = pb.CreateSandboxRequest(
            state_id=state, egress=pb.Egress(allow=["index.test:443"])
        )
        return str((await boxes.CreateSandbox(request, timeout=WRITE_S)).sandbox.id)

    async def started(box: str, *argv: str, terminal: bool = False) -> str:
        command = pb.Command(argv=argv, cwd="/", timeout=_duration(running_s))
        request = pb.StartExecRequest(sandbox_id=box, command=command, open_stdin=True)
        if terminal:
            request.terminal.CopyFrom(pb.TerminalSize(rows=24, columns=80))
        return str((await execs.StartExec(request, timeout=WRITE_S)).execution.id)

    work, stage, doomed = await asyncio.gather(box(), box(), box())
    for path in ("/work/repo/file", "/work/repo/d/file"):
        write = pb.WriteFileRequest(sandbox_id=work, path=path, content=b"x y\n" * 50)
        await boxes.WriteFile(write, timeout=WRITE_S)
    ended = await started(stage, "echo", "over")
    attach = pb.AttachExecRequest(sandbox_id=stage, exec_id=ended)
    async with stream(execs.AttachExec(attach, timeout=READ_S)) as events:
        async for _ in events:
            pass
    snapshot = pb.SnapshotSandboxRequest(id=doomed)
    frozen = (await boxes.SnapshotSandbox(snapshot, timeout=WRITE_S)).state.id
    await boxes.Run(pb.RunRequest(sandbox_id=work, command=_KNOCK), timeout=WRITE_S)
    import_image = pb.ImageServiceStub(channel).ImportImage
    image = (await import_image(iter(_image(pb.IMAGE_FORMAT_ROOT, _TREE)), timeout=WRITE_S)).state
    export = pb.ExportStateRequest(id=state)
    async with stream(states.ExportState(export, timeout=READ_S)) as chunks:
        archive = b"".join([part.chunk async for part in chunks])
    return Scene(
        state=state,
        box=work,
        stage=stage,
        running=await started(stage, "cat"),
        on_terminal=await started(stage, "cat", terminal=True),
        ended=ended,
        doomed_box=doomed,
        doomed_state=frozen,
        image=image.id,
        archive=archive,
    )


def _duration(seconds: float) -> Duration:
    found = Duration()
    found.FromMilliseconds(int(seconds * 1e3))
    return found


def _pieces(data: bytes, message: Callable[..., Message]) -> Sent:
    starts = range(0, max(1, len(data)), _PIECE_BYTES)
    return [message(chunk=data[start : start + _PIECE_BYTES]) for start in starts]


def _image(format: pb.ImageFormat, data: bytes) -> Sent:
    options = pb.ImageOptions(labels={"a": "b"}, format=format)
    return [pb.ImportImageRequest(options=options), *_pieces(data, pb.ImportImageRequest)]


def goods(scene: Scene) -> dict[str, Sequence[Sent]]:
    """Good requests of every method, by its name."""
    found = {
        name: [[message] for message in messages]
        for part in (_of_states(scene), _of_sandboxes(scene), _of_commands(scene))
        for name, messages in part.items()
    }
    found["ImportState"] = [_pieces(scene.archive, pb.ImportStateRequest)]
    found["ImportImage"] = [
        _image(pb.IMAGE_FORMAT_ROOT, _TREE),
        _image(pb.IMAGE_FORMAT_OCI, oci(_TREE)),
    ]
    missing = {method.name for method in methods()} - set(found)
    assert not missing, f"no good request of {sorted(missing)}"
    return found


def _of_states(scene: Scene) -> dict[str, Iterable[Message]]:
    add, delete = common_pb.CHANGE_KIND_ADD, common_pb.CHANGE_KIND_DELETE
    spec = pb.EnvironmentSpec(
        builder="system",
        test=pb.TestSpec(arguments=["tests"], timeout=_duration(60)),
        overlay=[
            common_pb.FileChange(path="file", kind=add, content=b"x\n"),
            common_pb.FileChange(path="d/e/file", kind=add, content=b"y\n", mode=0o755),
        ],
    )
    change = common_pb.FileChange(path="file", kind=delete)
    conditions = pb.Conditions(
        order_seed=2,
        hash_seed=1,
        clock_offset=_duration(86_400),
        host_name="a",
        user_name="b",
        repository="/work/elsewhere",
    )
    return {
        "PrepareState": [pb.PrepareStateRequest(spec=spec)],
        "GetState": [pb.GetStateRequest(id=scene.state)],
        "ListStates": [pb.ListStatesRequest(page_size=10)],
        "GetLineage": [pb.GetLineageRequest(id=scene.state)],
        "DeleteState": [pb.DeleteStateRequest(id=scene.doomed_state)],
        "ExportState": [pb.ExportStateRequest(id=scene.state)],
        "ExportImage": [pb.ExportImageRequest(state_id=scene.image, reference="a:1")],
        "Validate": [
            pb.ValidateRequest(
                state_id=scene.state, changes=[change], only_tests=["tests/test_a.py"]
            ),
            pb.ValidateRequest(state_id=scene.state, conditions=conditions, stop_early=True),
        ],
        "Execute": [
            pb.ExecuteRequest(
                state_id=scene.state,
                command=pb.Command(argv=["sh", "-c", "echo $0 > out; cat file", "1"]),
                limits=pb.Limits(pids=16),
                keep_state=keep,
            )
            for keep in (True, False)
        ],
        "ListQuarantined": [pb.ListQuarantinedRequest(page_size=1)],
    }


def _of_sandboxes(scene: Scene) -> dict[str, Iterable[Message]]:
    box, state = scene.box, scene.state
    command = pb.Command(
        argv=["sh", "-c", "cat; echo done"],
        cwd="/work/repo",
        stdin=b"in",
        timeout=_duration(1),
        environment={"A": "b"},
    )
    file = "/work/repo/file"
    return {
        "CreateSandbox": [
            pb.CreateSandboxRequest(
                state_id=state,
                limits=pb.Limits(pids=16, memory_bytes=64 << 20, disk_bytes=1 << 20),
                labels={"a": "b"},
                ttl=_duration(1),
                egress=pb.Egress(allow=["index.test:8443", "*.example.test"]),
            )
        ],
        "ListQuotas": [pb.ListQuotasRequest()],
        "GetSandbox": [pb.GetSandboxRequest(id=box)],
        "ListSandboxes": [pb.ListSandboxesRequest(page_size=2, labels={"a": "b"})],
        "DeleteSandbox": [pb.DeleteSandboxRequest(id=scene.doomed_box)],
        "ForkSandbox": [pb.ForkSandboxRequest(id=box, count=1, labels={"a": "b"})],
        "SnapshotSandbox": [pb.SnapshotSandboxRequest(id=box, labels={"a": "b"})],
        "RestoreSandbox": [pb.RestoreSandboxRequest(id=box, state_id=state)],
        "KeepAlive": [pb.KeepAliveRequest(id=box, ttl=_duration(5))],
        "Exec": [pb.ExecRequest(sandbox_id=box, command=command)],
        "Run": [pb.RunRequest(sandbox_id=box, command=command)],
        "ReadFile": [pb.ReadFileRequest(sandbox_id=box, path=file, offset=1, max_bytes=10)],
        "WriteFile": [
            pb.WriteFileRequest(sandbox_id=box, path=file, content=b"x y\n" * 9, mode=0o600)
        ],
        "ListFiles": [pb.ListFilesRequest(sandbox_id=box, root="/work", glob="**/f*", limit=5)],
        "FindText": [
            pb.FindTextRequest(sandbox_id=box, text="x", root="/work", glob="**", limit=5)
        ],
        "Diff": [pb.DiffRequest(sandbox_id=box, base_state_id=state, root="/work/repo")],
        "ListEgress": [pb.ListEgressRequest(sandbox_id=box, page_size=10)],
        "GetCapabilities": [pb.GetCapabilitiesRequest()],
    }


def _of_commands(scene: Scene) -> dict[str, Iterable[Message]]:
    stage, size = scene.stage, pb.TerminalSize(rows=30, columns=90)
    every = (scene.running, scene.on_terminal, scene.ended)
    command = pb.Command(argv=["cat"], cwd="/", timeout=_duration(1))
    return {
        "StartExec": [
            pb.StartExecRequest(sandbox_id=stage, command=command, open_stdin=True, terminal=size),
            pb.StartExecRequest(sandbox_id=stage, command=command),
        ],
        "AttachExec": [pb.AttachExecRequest(sandbox_id=stage, exec_id=one) for one in every],
        "WriteStdin": [
            pb.WriteStdinRequest(sandbox_id=stage, exec_id=one, data=b"x\n") for one in every
        ],
        "SignalExec": [
            pb.SignalExecRequest(sandbox_id=stage, exec_id=one, signal=signal)
            for one in every
            for signal in (15, 28)  # one that ends it, and one that does not
        ],
        "ResizeTerminal": [
            pb.ResizeTerminalRequest(sandbox_id=stage, exec_id=one, size=size) for one in every
        ],
        "ListExecs": [pb.ListExecsRequest(sandbox_id=stage)],
    }

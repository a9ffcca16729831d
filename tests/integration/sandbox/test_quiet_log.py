"""What the log of a real service holds of its callers' commands, files and diffs: nothing."""

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import grpc
import pytest

from regreen.client.channel import connect
from regreen.common import v1 as common_pb
from regreen.sandbox import v1 as pb
from tests.load import processes

_SERVER = Path(__file__).with_name("treeserver.py")
_ROOT = Path(__file__).resolve().parents[3]
_MARK = "HUNTER2-of-the-caller"


async def called(call, request) -> str:
    """How a call ended."""
    try:
        await call(request, timeout=30)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def everything(channel, sandbox_id: str, state_id: str) -> list[str]:
    """How every call ended that sends something of its own, with the mark in all of it."""
    mark = _MARK.encode()
    command = pb.Command(
        argv=["sh", "-c", f": {_MARK}"], environment={"KEY": _MARK}, stdin=mark, cwd="/tmp"
    )
    add = common_pb.CHANGE_KIND_ADD
    change = common_pb.FileChange(path=f"src/{_MARK}.py", kind=add, content=mark)
    boxes, execs = pb.SandboxServiceStub(channel), pb.ExecServiceStub(channel)
    actions, path = pb.ActionServiceStub(channel), f"/work/repo/{_MARK}"
    box = {"sandbox_id": sandbox_id}
    return [
        await called(boxes.Run, pb.RunRequest(**box, command=command)),
        await called(boxes.Run, pb.RunRequest(**box, command=command, request_id=_MARK)),
        await called(execs.StartExec, pb.StartExecRequest(**box, command=command)),
        await called(boxes.WriteFile, pb.WriteFileRequest(**box, path=path, content=mark)),
        await called(boxes.ReadFile, pb.ReadFileRequest(**box, path=path)),
        await called(boxes.FindText, pb.FindTextRequest(**box, text=_MARK)),
        await called(boxes.Diff, pb.DiffRequest(**box)),
        await called(actions.Execute, pb.ExecuteRequest(state_id=state_id, command=command)),
        await called(boxes.Validate, pb.ValidateRequest(state_id=state_id, changes=[change])),
    ]


@pytest.mark.timeout(120)
async def test_a_log_holds_nothing_of_what_callers_send(tmp_path):
    tmp_path.chmod(0o711)
    logged = tmp_path / "log"
    with logged.open("wb") as log:
        service = await asyncio.create_subprocess_exec(
            *(sys.executable, str(_SERVER), str(tmp_path), "0", "debug"), cwd=_ROOT, stderr=log
        )
    try:
        async with connect(f"unix:{tmp_path}/s") as channel:
            spec = pb.PrepareStateRequest(spec=pb.EnvironmentSpec(builder="system"))
            prepare = pb.StateServiceStub(channel).PrepareState
            *_, last = [event async for event in prepare(spec, wait_for_ready=True, timeout=60)]
            stub = pb.SandboxServiceStub(channel)
            made = await stub.CreateSandbox(pb.CreateSandboxRequest(state_id=last.state.id))
            well = await everything(channel, made.sandbox.id, last.state.id)
            assert well.count("OK") == 8, well  # the state has nothing to validate
            for spawner in processes.children(service.pid):
                for first in processes.children(spawner):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(first, signal.SIGKILL)
            ill = await everything(channel, made.sandbox.id, last.state.id)
            assert ill.count("INTERNAL") >= 4, ill
    finally:
        service.terminate()
        await service.wait()
    text = logged.read_text()
    assert text.count('"event": "call failed"') >= 4
    assert text.count('"event": "call"') >= 8
    assert "HUNTER2" not in text

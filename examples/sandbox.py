"""Prepare a State, fork it, run a command in the fork, see what it changed, keep that."""

import grpc

from regreen.client.script import words
from regreen.common.v1 import CHANGE_KIND_ADD, FileChange
from regreen.sandbox import v1 as pb

channel = grpc.insecure_channel(words("127.0.0.1:50052")[0])
states, sandboxes = pb.StateServiceStub(channel), pb.SandboxServiceStub(channel)
script = FileChange(path="hello.sh", kind=CHANGE_KIND_ADD, content=b"echo hello > made.txt\n")
spec = pb.EnvironmentSpec(builder="system", overlay=[script])
*_, last = states.PrepareState(pb.PrepareStateRequest(spec=spec), timeout=120)
fork = pb.CreateSandboxRequest(state_id=last.state.id)
box = sandboxes.CreateSandbox(fork, timeout=30).sandbox
command = pb.Command(argv=["sh", "hello.sh"])
ended = sandboxes.Run(pb.RunRequest(sandbox_id=box.id, command=command), timeout=60).result
print("exit", ended.exit_code, "after", ended.wall.ToMilliseconds(), "ms")
print(sandboxes.Diff(pb.DiffRequest(sandbox_id=box.id), timeout=30).unified)
kept = sandboxes.SnapshotSandbox(pb.SnapshotSandboxRequest(id=box.id), timeout=60).state
print("a State of its own now:", kept.id)
sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=box.id), timeout=30)

"""Carry a State to another service (or back to the same) as one archive, and run it there."""

import grpc

from regreen.client.script import words
from regreen.common.v1 import CHANGE_KIND_ADD, FileChange
from regreen.sandbox import v1 as pb

here, there = words("127.0.0.1:50052", "")
source = pb.StateServiceStub(grpc.insecure_channel(here))
channel = grpc.insecure_channel(there or here)
target, sandboxes = pb.StateServiceStub(channel), pb.SandboxServiceStub(channel)
file = FileChange(path="hello.sh", kind=CHANGE_KIND_ADD, content=b"echo it runs\n")
spec = pb.EnvironmentSpec(builder="system", overlay=[file])
*_, last = source.PrepareState(pb.PrepareStateRequest(spec=spec), timeout=120)
export = pb.ExportStateRequest(id=last.state.id)
archive = [piece.chunk for piece in source.ExportState(export, timeout=600)]  # or into a file
source.DeleteState(pb.DeleteStateRequest(id=last.state.id), timeout=30)
parts = (pb.ImportStateRequest(chunk=chunk) for chunk in archive)
state = target.ImportState(parts, timeout=600).state
print(state.id, "of", sum(map(len, archive)), "bytes, the same:", state.id == last.state.id)
create = pb.CreateSandboxRequest(state_id=state.id)
box = sandboxes.CreateSandbox(create, timeout=30).sandbox.id
run = pb.RunRequest(sandbox_id=box, command=pb.Command(argv=["sh", "hello.sh"]))
print(sandboxes.Run(run, timeout=60).result.stdout.head.decode().strip())
sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=box), timeout=30)

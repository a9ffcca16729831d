"""Write, read, list and find files of a sandbox, stream what a command prints, see the diff."""

import sys

import grpc

from regreen.sandbox import v1 as pb

channel = grpc.insecure_channel(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50052")
states, sandboxes = pb.StateServiceStub(channel), pb.SandboxServiceStub(channel)

spec = pb.EnvironmentSpec(builder="system")
*_, last = states.PrepareState(pb.PrepareStateRequest(spec=spec), timeout=120)
create = pb.CreateSandboxRequest(state_id=last.state.id)
box = sandboxes.CreateSandbox(create, timeout=30).sandbox.id
script = b"#!/bin/sh\nfor n in 1 2 3; do echo line $n; done | tee out.txt\n"
write = pb.WriteFileRequest(sandbox_id=box, path="/work/repo/count.sh", content=script, mode=0o755)
sandboxes.WriteFile(write, timeout=30)
command = pb.Command(argv=["./count.sh"])
for event in sandboxes.Exec(pb.ExecRequest(sandbox_id=box, command=command), timeout=60):
    print(event.stdout.decode(), end="")
print("exit", event.ended.exit_code)
read = pb.ReadFileRequest(sandbox_id=box, path="/work/repo/out.txt", offset=7, max_bytes=6)
part = sandboxes.ReadFile(read, timeout=30)
print(part.content, "of", part.size_bytes, "bytes")
for file in sandboxes.ListFiles(pb.ListFilesRequest(sandbox_id=box), timeout=30).files:
    print(oct(file.mode), file.size_bytes, file.path)
find = pb.FindTextRequest(sandbox_id=box, text="line 2", glob="*.txt")
for match in sandboxes.FindText(find, timeout=30).matches:
    print(f"{match.path}:{match.line}: {match.text}")
for change in sandboxes.Diff(pb.DiffRequest(sandbox_id=box), timeout=30).changes:
    print("changed:", change.path)
sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=box), timeout=30)

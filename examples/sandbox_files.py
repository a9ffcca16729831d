"""Write, read, list and find files of a sandbox, stream what a command prints, see the diff."""

import grpc

from regreen.client.script import words
from regreen.sandbox import v1 as pb

channel = grpc.insecure_channel(words("127.0.0.1:50052")[0])
states, sandboxes = pb.StateServiceStub(channel), pb.SandboxServiceStub(channel)
*_, last = states.PrepareState(pb.PrepareStateRequest(spec={"builder": "system"}), timeout=120)
box = sandboxes.CreateSandbox(pb.CreateSandboxRequest(state_id=last.state.id), timeout=30).sandbox
script = b"#!/bin/sh\nfor n in 1 2 3; do echo line $n; done | tee out.txt\n"
file = {"path": "/work/repo/count.sh", "content": script, "mode": 0o755}
sandboxes.WriteFile(pb.WriteFileRequest(sandbox_id=box.id, **file), timeout=30)
count = pb.ExecRequest(sandbox_id=box.id, command=pb.Command(argv=["./count.sh"]))
for event in sandboxes.Exec(count, timeout=60):
    print(event.stdout.decode(), end="")
print("exit", event.ended.exit_code)
read = pb.ReadFileRequest(sandbox_id=box.id, path="/work/repo/out.txt", offset=7, max_bytes=6)
part = sandboxes.ReadFile(read, timeout=30)
print(part.content, "of", part.size_bytes, "bytes")
for file in sandboxes.ListFiles(pb.ListFilesRequest(sandbox_id=box.id), timeout=30).files:
    print(oct(file.mode), file.size_bytes, file.path)
find = pb.FindTextRequest(sandbox_id=box.id, text="line 2", glob="*.txt")
for match in sandboxes.FindText(find, timeout=30).matches:
    print(f"{match.path}:{match.line}: {match.text}")
for change in sandboxes.Diff(pb.DiffRequest(sandbox_id=box.id), timeout=30).changes:
    print("changed:", change.path)
sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=box.id), timeout=30)

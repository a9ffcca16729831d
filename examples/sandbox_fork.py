"""Branch a sandbox into three, let each go its own way, and put one back to where it was."""

import grpc

from regreen.client.script import words
from regreen.sandbox import v1 as pb

channel = grpc.insecure_channel(words("127.0.0.1:50052")[0])
states, sandboxes = pb.StateServiceStub(channel), pb.SandboxServiceStub(channel)


def run(box: pb.Sandbox, script: str) -> str:
    request = pb.RunRequest(sandbox_id=box.id, command=pb.Command(argv=["sh", "-c", script]))
    return sandboxes.Run(request, timeout=60).result.stdout.head.decode().strip()


*_, last = states.PrepareState(pb.PrepareStateRequest(spec={"builder": "system"}), timeout=120)
trunk = sandboxes.CreateSandbox(pb.CreateSandboxRequest(state_id=last.state.id), timeout=30).sandbox
run(trunk, "echo shared > notes")
forked = sandboxes.ForkSandbox(pb.ForkSandboxRequest(id=trunk.id, count=3), timeout=60)
for number, branch in enumerate(forked.sandboxes):
    print(run(branch, f"echo branch {number} >> notes; cat notes").split("\n"))
first = forked.sandboxes[0]
kept = sandboxes.SnapshotSandbox(pb.SnapshotSandboxRequest(id=first.id), timeout=60).state
print("kept as", kept.id, "made from", kept.parent_id == forked.state.id)
sandboxes.RestoreSandbox(pb.RestoreSandboxRequest(id=first.id, state_id=forked.state.id))
print("restored:", run(first, "cat notes"), "| trunk:", run(trunk, "cat notes"))
for box in (trunk, *forked.sandboxes):
    sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=box.id), timeout=30)

"""Snapshot at every turn; what a State was made from, and page by page what was made of one."""

import sys

import grpc

from regreen.sandbox import v1 as pb

channel = grpc.insecure_channel(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50052")
states, sandboxes = pb.StateServiceStub(channel), pb.SandboxServiceStub(channel)

spec = pb.EnvironmentSpec(builder="system")
*_, last = states.PrepareState(pb.PrepareStateRequest(spec=spec), timeout=120)
create = pb.CreateSandboxRequest(state_id=last.state.id)
box = sandboxes.CreateSandbox(create, timeout=30).sandbox.id
turns = []
for turn in range(3):
    command = pb.Command(argv=["sh", "-c", f"echo {turn} >> turns.txt"])
    sandboxes.Run(pb.RunRequest(sandbox_id=box, command=command), timeout=60)
    keep = pb.SnapshotSandboxRequest(id=box, labels={"turn": str(turn)})
    turns.append(sandboxes.SnapshotSandbox(keep, timeout=60).state)
sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=box), timeout=30)
states.DeleteState(pb.DeleteStateRequest(id=turns[1].id), timeout=30)
state = states.GetState(pb.GetStateRequest(id=turns[2].id), timeout=15).state
print(state.id, "of", len(state.layers), "layers on", state.host, "stands on", state.base)
line = states.GetLineage(pb.GetLineageRequest(id=state.id), timeout=15)
there = {one.id: one for one in line.states}
for id in line.ancestor_ids:
    print("  from", id, dict(there[id].labels) if id in there else "deleted")
token, pages = None, 0
while token != "":
    ask = pb.ListStatesRequest(parent_id=last.state.id, page_size=1, page_token=token)
    page = states.ListStates(ask, timeout=15)
    token, pages = page.next_page_token, pages + 1
    print("page", pages, *(child.id for child in page.states))

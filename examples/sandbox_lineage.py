"""Snapshot at every turn; what a State was made from, and a page of what was made of one."""

import grpc

from regreen.client.script import words
from regreen.sandbox import v1 as pb

channel = grpc.insecure_channel(words("127.0.0.1:50052")[0])
states, sandboxes = pb.StateServiceStub(channel), pb.SandboxServiceStub(channel)
*_, last = states.PrepareState(pb.PrepareStateRequest(spec={"builder": "system"}), timeout=120)
box = sandboxes.CreateSandbox(pb.CreateSandboxRequest(state_id=last.state.id), timeout=30).sandbox
turns = []
for turn in range(3):
    command = pb.Command(argv=["sh", "-c", f"echo {turn} >> turns.txt"])
    sandboxes.Run(pb.RunRequest(sandbox_id=box.id, command=command), timeout=60)
    keep = pb.SnapshotSandboxRequest(id=box.id, labels={"turn": str(turn)})
    turns.append(sandboxes.SnapshotSandbox(keep, timeout=60).state)
sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=box.id), timeout=30)
states.DeleteState(pb.DeleteStateRequest(id=turns[1].id), timeout=30)
state = states.GetState(pb.GetStateRequest(id=turns[2].id), timeout=15).state
print(state.id, "of", len(state.layers), "layers on", state.host, "stands on", state.base)
line = states.GetLineage(pb.GetLineageRequest(id=state.id), timeout=15)
there = {one.id: dict(one.labels) for one in line.states}
for id in line.ancestor_ids:
    print("  from", id, there.get(id, "deleted"))
ask = pb.ListStatesRequest(parent_id=last.state.id, page_size=1)
page = states.ListStates(ask, timeout=15)
print("made of the first:", page.states[0].id, "and more:", bool(page.next_page_token))

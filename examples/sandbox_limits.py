"""What this host was proven to enforce; a sandbox with limits, and how commands end at them."""

import grpc
from google.protobuf.duration_pb2 import Duration

from regreen.client.script import words
from regreen.sandbox import v1 as pb

channel = grpc.insecure_channel(words("127.0.0.1:50052")[0])
states, sandboxes = pb.StateServiceStub(channel), pb.SandboxServiceStub(channel)
for one in sandboxes.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=60).capabilities:
    print(f"{one.name}: {one.driver if one.proven else 'not enforced'} ({one.detail})")
*_, last = states.PrepareState(pb.PrepareStateRequest(spec={"builder": "system"}), timeout=120)
limits = pb.Limits(pids=32, disk_bytes=64 << 20, output_bytes=1 << 20, wall=Duration(seconds=2))
create = pb.CreateSandboxRequest(
    state_id=last.state.id, limits=limits, labels={"example": "limits"}, ttl=Duration(seconds=60)
)
box = sandboxes.CreateSandbox(create, timeout=30).sandbox
for script in ("exit 3", "kill -9 $$", "yes", "sleep 60"):
    run = pb.RunRequest(sandbox_id=box.id, command=pb.Command(argv=["sh", "-c", script]))
    ended = sandboxes.Run(run, timeout=60).result
    print(f"{script}: {pb.EndReason.Name(ended.reason)}")
longer = pb.KeepAliveRequest(id=box.id, ttl=Duration(seconds=600))
until = sandboxes.KeepAlive(longer, timeout=15).sandbox.expire_time
same = sandboxes.GetSandbox(pb.GetSandboxRequest(id=box.id), timeout=15).sandbox
print("lives until", until.ToJsonString(), until == same.expire_time)
print(sandboxes.ListQuotas(pb.ListQuotasRequest(), timeout=15).quotas or "no tenants")
mine = pb.ListSandboxesRequest(labels={"example": "limits"})
for box in sandboxes.ListSandboxes(mine, timeout=15).sandboxes:
    sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=box.id), timeout=30)

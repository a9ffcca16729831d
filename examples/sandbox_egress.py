"""Give a sandbox a way to one host, see what it asked for and what it was refused."""

import grpc

from regreen.client.script import words
from regreen.sandbox import v1 as pb

channel = grpc.insecure_channel(words("127.0.0.1:50052")[0])
states, sandboxes = pb.StateServiceStub(channel), pb.SandboxServiceStub(channel)
spec = pb.EnvironmentSpec(builder="system")
*_, last = states.PrepareState(pb.PrepareStateRequest(spec=spec), timeout=120)
way = pb.Egress(allow=["pypi.org", "*.pythonhosted.org"])
box = sandboxes.CreateSandbox(pb.CreateSandboxRequest(state_id=last.state.id, egress=way)).sandbox
for url in ("https://pypi.org/simple/iniconfig/", "https://example.org/"):
    fetch = f"import urllib.request; urllib.request.urlopen({url!r}, timeout=15).read()"
    command = pb.Command(argv=["python3", "-c", fetch])
    ran = sandboxes.Run(pb.RunRequest(sandbox_id=box.id, command=command), timeout=60).result
    print(url, "exit", ran.exit_code)
for seen in (
    pb.EgressServiceStub(channel).ListEgress(pb.ListEgressRequest(sandbox_id=box.id)).records
):
    print(seen.host, "allowed" if seen.allowed else "refused", seen.detail, seen.received_sha256)
sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=box.id), timeout=30)

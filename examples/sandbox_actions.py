"""Run commands as pure functions of a State: results are cached, those that differ are named."""

import grpc

from regreen.client.script import words
from regreen.sandbox import v1 as pb

channel = grpc.insecure_channel(words("127.0.0.1:50052")[0])
states, actions = pb.StateServiceStub(channel), pb.ActionServiceStub(channel)
*_, last = states.PrepareState(pb.PrepareStateRequest(spec={"builder": "system"}), timeout=120)


def execute(script: str, **options: bool) -> pb.ExecuteResponse:
    command = pb.Command(argv=["sh", "-c", script])
    request = pb.ExecuteRequest(state_id=last.state.id, command=command, **options)
    return actions.Execute(request, timeout=60)


build = "echo built > out.txt; echo done"
made = execute(build, keep_state=True)
again = execute(build, keep_state=True)
print(again.result.stdout.head.decode().strip(), "from the cache:", again.cached)
print("what it left is a State:", made.state.id, "the same:", again.state.id == made.state.id)
print("not cached:", not execute(build, do_not_cache=True).cached)
clock = "date +%s%N"
execute(clock)
print("differs:", execute(clock, skip_cache_lookup=True).quarantined)
for one in actions.ListQuarantined(pb.ListQuarantinedRequest(), timeout=15).actions:
    print("quarantined:", *one.argv, "because", one.detail)

"""Validate two diffs of a task in fresh forks of its State: none, and the reference fix."""

import sys

import grpc

from regreen.client.script import words
from regreen.dataset import v1 as data
from regreen.sandbox import v1 as pb

*addresses, wanted = words("127.0.0.1:50052", "127.0.0.1:50051", "")
channel, dataset = (grpc.insecure_channel(address) for address in addresses)
states, sandboxes = pb.StateServiceStub(channel), pb.SandboxServiceStub(channel)
tasks = data.TaskServiceStub(dataset)
listed = tasks.ListTasks(data.ListTasksRequest(page_size=1), timeout=30).tasks
if not (wanted or listed):
    sys.exit("the dataset service has no task yet: regreen tasks import")
task = tasks.GetTask(data.GetTaskRequest(id=wanted or listed[0].id), timeout=30).task
prepare = pb.PrepareStateRequest(spec=task.environment)
*_, last = states.PrepareState(prepare, timeout=600)
for name, changes in (("nothing", []), (task.fixes[0].origin, task.fixes[0].changes)):
    request = pb.ValidateRequest(state_id=last.state.id, changes=changes)
    verdict = sandboxes.Validate(request, timeout=900).validation
    print(name, "->", pb.ValidationOutcome.Name(verdict.outcome), dict(verdict.counts))
    print(verdict.summary)
    for test in verdict.failing:
        print("  still fails:", test)
    for change in verdict.reverted:
        print("  not applied:", change.path, "because it is of", change.reason)

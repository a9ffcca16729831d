"""Create a run, record a metric, read it back, count the tasks."""

import uuid

import grpc

from regreen.client.script import words
from regreen.dataset import v1 as pb

channel = grpc.insecure_channel(words("127.0.0.1:50051")[0])
runs, tasks = pb.RunServiceStub(channel), pb.TaskServiceStub(channel)
create = pb.CreateRunRequest(
    request_id=uuid.uuid4().hex, name=f"example-{uuid.uuid4()}", kind="eval"
)
run = runs.CreateRun(create, timeout=15).run
points = [pb.MetricPoint(step=step, name="reward", value=step / 10) for step in range(1, 4)]
runs.RecordMetrics(
    pb.RecordMetricsRequest(request_id=uuid.uuid4().hex, run_id=run.id, points=points), timeout=15
)
for point in runs.ListMetrics(pb.ListMetricsRequest(run_id=run.id), timeout=15).points:
    print(point.step, point.name, point.value)
print(tasks.GetTaskStats(pb.GetTaskStatsRequest(), timeout=15).total, "tasks")

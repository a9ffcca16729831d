"""Train the default model by one step on a batch of token ids, save a checkpoint, stop."""

import uuid

import grpc

from regreen.batch import Batch, Sample
from regreen.client.script import words
from regreen.learner import v1 as pb

channel = grpc.insecure_channel(words("127.0.0.1:50055")[0])
learner, run = pb.LearnerServiceStub(channel), f"example-{uuid.uuid4()}"
sample = Sample.make([1, 520, 9531, 198, 504, 3575, 2], [0, 0, 0, 0, 1, 1, 1])
batch = Batch(samples=(sample,), kind="sft").to_bytes()
rate = pb.Hyperparameters(learning_rate=2e-5, trainable_layers=1)
start = pb.StartRunRequest(run_id=run, kind=pb.RUN_KIND_SFT, hyperparameters=rate)
learner.StartRun(start, timeout=600)
done = learner.Step(pb.StepRequest(run_id=run, step=1, batch=batch), timeout=600)
print("step", done.step, "loss", round(done.metrics["loss"], 3))
save = pb.SaveCheckpointRequest(request_id=uuid.uuid4().hex, run_id=run, policy_version=1)
print(learner.SaveCheckpoint(save, timeout=600).checkpoint.uri)
learner.StopRun(pb.StopRunRequest(run_id=run), timeout=60)

"""Small true services for driver tests: a learner that hashes, a policy that only remembers.

- `HashLearner` keeps its contract, checkpoints on disk included, but its weights are a hash chain
  over the batches it was given: equal weights mean equal batches in equal order.
- `forget` is a kill -9: memory is gone, what was written stays.
- `scripted_workers` lease, commit and heartbeat through the real queue; a rollout is a pure
  function of its seed.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from regreen.batch import Batch
from regreen.client.channel import Caller
from regreen.client.stack import Endpoints, Stack
from regreen.common import v1 as common_pb
from regreen.dataset import v1 as dataset_pb
from regreen.learner import v1 as learner_pb
from regreen.policy import v1 as policy_pb
from regreen.rpc.errors import (
    DataLoss,
    FailedPrecondition,
    InfraError,
    InvalidArgument,
    LeaseExpired,
    NotFound,
)
from regreen.rpc.server import Server
from regreen.settings import ServiceSettings
from tests.integration import dataset_samples as samples


@dataclass
class LearnerState:
    """A run in memory."""

    weights: str = "base"
    step: int = 0
    lineage: list[dict] = field(default_factory=list)
    fresh_groups: list[str] = field(default_factory=list)
    checkpoint: dict | None = None
    salt: str = ""
    """What makes the next steps other ones, as a GPU may do."""


class HashLearner(learner_pb.LearnerServiceServicer):
    """A learner whose weights are a hash chain."""

    def __init__(self, root: Path) -> None:
        self.root, self.runs = root, dict[str, LearnerState]()
        self.hold_at, self.held = 0, asyncio.Event()
        """A step that is begun and never ends, and whether it was."""
        self.saving, self.may_save = asyncio.Event(), asyncio.Event()
        """A checkpoint is begun; checkpoints may end."""
        self.may_save.set()
        self.watch: Callable[[], None] = lambda: None
        """Called at each step."""
        self.lent: list[bool] = []
        """Whether each step was to lend its memory."""
        self.salt = ""
        """What makes the steps of runs that are started now other ones."""

    def forget(self) -> None:
        """Lose everything that is not on disk."""
        self.runs.clear()

    async def StartRun(self, request, context):
        if request.run_id in self.runs:
            return learner_pb.StartRunResponse(run=self._run(request.run_id))
        if self.runs:
            raise FailedPrecondition(f"run {next(iter(self.runs))} is active; stop it first")
        found = sorted((self.root / request.run_id).glob("step-*.json"), reverse=True)
        state = LearnerState()
        for path in [Path(request.resume_uri)] if request.resume_uri else found:
            try:
                saved = json.loads(path.read_text())
            except ValueError as error:
                if request.resume_uri or path == found[-1]:
                    raise DataLoss(f"{path} does not match its digest") from error
                continue  # damaged: the one before it
            state = LearnerState(saved["weights"], saved["step"], saved["lineage"], [], saved)
            break
        state.salt = self.salt
        self.runs[request.run_id] = state
        return learner_pb.StartRunResponse(run=self._run(request.run_id))

    async def Step(self, request, context):
        state = self._state(request.run_id)
        self.watch()
        self.lent.append(request.lend_memory)
        if request.step == self.hold_at:
            self.held.set()
            await asyncio.Event().wait()
        if request.step <= state.step:
            return learner_pb.StepResponse(step=request.step, repeated_step=True)
        if request.step != state.step + 1:
            raise InvalidArgument("step", f"is {request.step}, next is {state.step + 1}")
        batch = Batch.from_bytes(request.batch)
        # What a driver reports with a batch, such as seconds, is no lesson.
        chained = state.weights + replace(batch, metrics={}).digest + state.salt
        state.weights = hashlib.sha256(chained.encode()).hexdigest()
        state.step += 1
        state.lineage.append({"batch": batch.digest, "groups": list(request.group_ids)})
        state.fresh_groups += request.group_ids
        return learner_pb.StepResponse(step=state.step, metrics={"loss": 1.0 / state.step})

    async def PublishWeights(self, request, context):
        state = self._state(request.run_id)
        version = self._version(request, state)
        path = self._published(request.run_id) / f"{version:012d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        made = {"weights": state.weights, "version": version, "driver_step": request.driver_step}
        path.write_text(json.dumps(made))
        return learner_pb.PublishWeightsResponse(weights=self._run(request.run_id).published)

    async def OfferWeights(self, request, context):
        published = self._run(request.run_id).published
        if not published.uri:
            raise NotFound("nothing is published")
        offer = common_pb.WeightOffer(group=published.uri, receivers=request.receivers)
        offer.digest.CopyFrom(published.digest)
        return learner_pb.OfferWeightsResponse(offer=offer)

    def _published(self, run_id: str) -> Path:
        return self.root / run_id / "weights"

    def _version(self, request, state: LearnerState) -> int:
        """The one asked for, or the next that was not given to others."""
        version, folder = request.policy_version, self._published(request.run_id)
        given = {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")}
        while version in given and given[version]["weights"] != state.weights:
            version += 1
        return version

    async def SaveCheckpoint(self, request, context):
        state = self._state(request.run_id)
        self.saving.set()
        await self.may_save.wait()
        self._state(request.run_id)
        folder = self.root / request.run_id
        folder.mkdir(parents=True, exist_ok=True)
        version = self._version(request, state)
        path = folder / f"step-{version:012d}.json"
        saved = {
            "uri": str(path),
            "weights": state.weights,
            "step": state.step,
            "lineage": state.lineage,
            "version": version,
            "driver_step": request.driver_step,
            "groups": state.fresh_groups,
        }
        path.with_suffix(".tmp").write_text(json.dumps(saved))
        path.with_suffix(".tmp").replace(path)
        state.checkpoint, state.fresh_groups = saved, []
        return learner_pb.SaveCheckpointResponse(checkpoint=self._run(request.run_id).checkpoint)

    async def StopRun(self, request, context):
        run = self._run(request.run_id)
        del self.runs[request.run_id]
        return learner_pb.StopRunResponse(run=run)

    async def ListRuns(self, request, context):
        return learner_pb.ListRunsResponse(runs=[self._run(id) for id in self.runs])

    async def GetRun(self, request, context):
        return learner_pb.GetRunResponse(run=self._run(request.run_id))

    def _state(self, run_id: str) -> LearnerState:
        if run_id not in self.runs:
            raise NotFound(f"no run {run_id}")
        return self.runs[run_id]

    def _run(self, run_id: str) -> learner_pb.LearnerRun:
        state = self._state(run_id)
        run = learner_pb.LearnerRun(id=run_id, step=state.step, state=learner_pb.RUN_STATE_ACTIVE)
        if state.checkpoint is not None:
            saved = state.checkpoint
            run.checkpoint.CopyFrom(
                learner_pb.Checkpoint(
                    uri=saved["uri"],
                    digest=digest_of(saved["weights"]),
                    step=saved["step"],
                    policy_version=saved["version"],
                    run_id=run_id,
                    group_ids=saved["groups"],
                    driver_step=saved["driver_step"],
                )
            )
        published = [*self._published(run_id).glob("*.json")]
        if published:
            newest = max(published, key=lambda path: path.stat().st_mtime_ns)
            made = json.loads(newest.read_text())
            run.published.CopyFrom(
                learner_pb.PublishedWeights(
                    uri=str(newest),
                    digest=digest_of(made["weights"]),
                    policy_version=made["version"],
                    run_id=run_id,
                    driver_step=made["driver_step"],
                )
            )
        return run


def digest_of(weights: str) -> common_pb.Digest:
    """The digest of weights of the small learner."""
    return common_pb.Digest(sha256=hashlib.sha256(weights.encode()).hexdigest(), size_bytes=64)


class RememberingPolicy(policy_pb.PolicyServiceServicer):
    """Serves nothing, remembers every version that it was told to load."""

    def __init__(self) -> None:
        self.serving = policy_pb.PolicyVersion(version=0, uri="/models/base")
        self.loaded: list[int] = []
        self.asked: list[int] = []
        """As `loaded`, and what served already."""
        self.served: dict[int, set[str]] = {}
        """Digests by version."""
        self.lost = set[str]()
        """URIs at which nothing is any more."""
        self.receivers = 0
        self.offered: list[int] = []
        """Versions that came with an offer of their weights."""
        self.can_sleep, self.asleep = False, False
        self.slept = 0

    async def Sleep(self, request, context):
        if not self.can_sleep:
            raise FailedPrecondition("nothing to give back")
        self.slept += not self.asleep
        self.asleep = True
        return policy_pb.SleepResponse()

    async def Wake(self, request, context):
        if request.HasField("policy"):
            self._load(request.policy)
        self.asleep = False
        return policy_pb.WakeResponse(policy=self.serving)

    async def LoadVersion(self, request, context):
        if self.asleep:
            raise FailedPrecondition("asleep")
        if request.HasField("offer"):
            assert request.offer.digest == request.policy.digest
            assert request.offer.receivers == self.receivers
            self.offered.append(request.policy.version)
        self._load(request.policy)
        return policy_pb.LoadVersionResponse(policy=self.serving)

    def _load(self, policy: policy_pb.PolicyVersion) -> None:
        if policy.uri in self.lost:
            raise NotFound(f"no weights at {policy.uri}")
        if policy.version != self.serving.version:
            self.loaded.append(policy.version)
        self.serving = policy
        self.asked.append(policy.version)
        self.served.setdefault(policy.version, set()).add(policy.digest.sha256)

    async def GetPolicy(self, request, context):
        return policy_pb.GetPolicyResponse(
            policy=self.serving,
            engine="scripted",
            model="none",
            can_sleep=self.can_sleep,
            receivers=self.receivers,
        )


@dataclass
class World:
    """A dataset service and the two small ones."""

    dataset: str
    learner: HashLearner
    policy: RememberingPolicy
    learner_address: str
    policy_address: str

    def stack(self, patience_s: float = 2.0) -> Stack:
        """A fresh client, as a new process would have."""
        endpoints = Endpoints(
            dataset=self.dataset, policy=self.policy_address, learner=self.learner_address
        )
        return Stack(endpoints, patience_s=patience_s)


@asynccontextmanager
async def world(dataset_address: str, root: Path) -> AsyncIterator[World]:
    """The small services, running."""
    learner, policy = HashLearner(root / "learner"), RememberingPolicy()
    settings = ServiceSettings(listen="127.0.0.1:0", metrics="127.0.0.1:0", home=root, drain_s=0.1)
    one, two = Server(settings, []), Server(settings, [])
    learner_pb.add_LearnerServiceServicer_to_server(learner, one.grpc)
    policy_pb.add_PolicyServiceServicer_to_server(policy, two.grpc)
    async with one, two:
        yield World(dataset_address, learner, policy, one.address, two.address)


def rollout(lease: dataset_pb.Lease, version: int) -> dataset_pb.Trajectory:
    """The trajectory of a leased rollout: solved as its group's seed has it."""
    group = lease.group
    rng = np.random.default_rng(lease.seed)
    prompt = np.random.default_rng(group.seed).integers(3, 1000, size=6)
    said = rng.integers(3, 1000, size=int(rng.integers(2, 6)))
    start, end = len(prompt), len(prompt) + len(said)
    # Three groups in four teach; the members of the others all fare alike.
    solved = bool(lease.group_index % 2 if group.seed % 4 else group.seed % 8)
    return dataset_pb.Trajectory(
        task_id=group.task_id,
        run_id=group.run_id,
        group_id=group.id,
        group_index=lease.group_index,
        attempt=lease.attempt,
        seed=lease.seed,
        pipeline=group.pipeline,
        mode=group.mode,
        grader=group.grader,
        token_ids=[*prompt.tolist(), *said.tolist()],
        loss_mask=bytes(start) + b"\1" * len(said),
        logprobs=[0.0] * start + [-0.5] * len(said),
        versions=[dataset_pb.TokenVersion(version=version, start=start, end=end)],
        turns=[
            dataset_pb.Turn(index=0, role=dataset_pb.TURN_ROLE_PROMPT, text="p", token_end=start),
            dataset_pb.Turn(
                index=1,
                role=dataset_pb.TURN_ROLE_POLICY,
                text="s",
                tool="validate_and_build",
                ok=True,
                token_start=start,
                token_end=end,
            ),
        ],
        end=dataset_pb.EPISODE_END_SUBMITTED,
        reward=dataset_pb.Reward(value=float(solved), solved=solved),
        actor="policy",
        token_exact=True,
        prompt_tokens=start,
        stage_seconds={"generate": 0.1},
    )


@asynccontextmanager
async def scripted_workers(
    world: World, run_id: str, count: int, make: Callable = rollout
) -> AsyncIterator[None]:
    """Workers that outlive their driver, as those of a fleet do; InfraError fails a rollout."""

    async def work(name: str) -> None:
        async with world.stack() as stack:
            while True:
                leases = await stack.queue.lease_rollouts(name, 4, run_id=run_id, duration_s=30)
                for lease in leases:
                    try:
                        done = make(lease, world.policy.serving.version)
                        await stack.queue.commit_rollout(lease.id, done)
                    except InfraError as error:
                        await stack.queue.fail_rollout(lease.id, str(error))
                    except LeaseExpired:
                        continue
                if not leases:
                    await asyncio.sleep(0.01)

    tasks = [asyncio.create_task(work(f"worker-{index}")) for index in range(count)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def admitted(stack: Stack, count: int = 3) -> tuple[str, ...]:
    tasks = [samples.task() for _ in range(count)]
    await stack.tasks.import_tasks(tasks)
    for task in tasks:
        await stack.tasks.record_gate(samples.report(task.id))
    return tuple(sorted(task.id for task in tasks))


class Killed(BaseException):
    """The process is gone."""


class Fuse:
    """Counts calls of a process and ends it at one of them, before or after it took effect."""

    def __init__(self, at: int, *, after: bool) -> None:
        self.at, self.after, self.calls = at, after, 0

    def protect(self, stack: Stack) -> None:
        for client in vars(stack).values():
            if isinstance(client, Caller):
                client._call = self._wrapped(client._call)

    def _wrapped(self, call):
        async def counted(method, request, timeout_s):
            self.calls += 1
            if self.calls > self.at or (self.calls == self.at and not self.after):
                raise Killed
            answer = await call(method, request, timeout_s)
            if self.calls >= self.at:
                raise Killed
            return answer

        return counted

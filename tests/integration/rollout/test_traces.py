"""Traces across all planes: one for each trajectory, from its driver to the learner."""

import pytest
import pytest_asyncio

from dataset_svc.__main__ import serving
from dataset_svc.settings import DatasetSettings
from regreen.blobs import digest_of_file
from regreen.common.v1 import GRADER_BUILD_GATES, MODE_ANY_FIX, PIPELINE_SIMPLIFIED
from regreen.dataset import v1 as pb
from regreen.ids import new_id
from regreen.learner import v1 as learner_pb
from regreen.rollout.context import Budget, EpisodeSpec, Knobs, Sampling, labels_of
from regreen.rollout.episode import Runner
from regreen.rollout.worker import Worker, worker_pool
from regreen.rpc import traces
from regreen.rpc.server import Server
from regreen.settings import ServiceSettings
from regreen.train.config import GrpoConfig
from regreen.train.rl import train_grpo
from regreen.train.rows import all_trajectories
from tests.fixtures.collector import collecting_ours
from tests.fixtures.policy.model import default_model
from tests.integration import dataset_samples as samples
from tests.integration.rollout.world import LOOPBACK, PIN, VALIDATE, call, says
from tests.integration.train_services import HashLearner

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(loop_scope="session")
async def dataset(database_url, tmp_path):
    """Address of a dataset service on the loop of these tests."""
    settings = DatasetSettings(home=tmp_path, fsync=False, **LOOPBACK)
    async with serving(settings, database_url) as server:
        yield server.address


class BaseLearner(HashLearner):
    """A learner that hashes; what can be served of it are the base's weights."""

    def _run(self, run_id):
        run = super()._run(run_id)
        weights = default_model() / "model.safetensors"
        found = digest_of_file(weights)
        for name in ("checkpoint", "published"):
            if run.HasField(name):
                told = getattr(run, name)
                told.uri = str(weights)
                told.digest.sha256, told.digest.size_bytes = found.sha256, found.size_bytes
        return run


@pytest_asyncio.fixture(loop_scope="session")
async def learner(tmp_path):
    """Address of a learner that hashes."""
    server = Server(ServiceSettings(home=tmp_path, **LOOPBACK), [])
    learner_pb.add_LearnerServiceServicer_to_server(BaseLearner(tmp_path / "learner"), server.grpc)
    async with server:
        yield server.address


@pytest.fixture
def collector():
    """A collector that the environment names."""
    with collecting_ours() as found:
        yield found


async def admitted(stack, world, *, state_id=None):
    task = pb.Task()
    task.CopyFrom(world.task)
    task.id = samples.fresh("greet")
    await stack.tasks.import_tasks([task])
    report = samples.report(task.id)
    report.state_id = world.task.state_id if state_id is None else state_id
    await stack.tasks.record_gate(report)
    return task.id


async def test_a_trajectory_is_one_trace_through_all_planes(world, dataset, learner, collector):
    first = {"texts": [PIN, call("give_up", reason="no")], "turn": 0, "rotate": True}
    script = [first, *({"text": VALIDATE, "turn": turn} for turn in (1, 2))]
    async with world.playing(script, dataset=dataset, learner=learner) as stack:
        config = GrpoConfig(
            name=samples.fresh("traced"),
            base_uri=str(default_model()),
            tasks=(await admitted(stack, world),),
            steps=1,
            groups_per_step=1,
            group_size=2,
            concurrency=2,
            labels=labels_of(Budget(turns=3), Sampling(), Knobs()),
        )
        result = await train_grpo(
            stack, config, workers=lambda s, run, n: worker_pool(s, run_id=run, concurrency=n)
        )
        assert result.state == "done"
        wanted = pb.TrajectoryFilter(run_id=result.run_id)
        kept = [t.id async for t in all_trajectories(stack, wanted)]
    assert len(kept) == 2
    found = collector.traces()
    for trajectory_id in kept:
        spans = found[traces.trace_of(trajectory_id)]
        by_id = {span.span_id: span for span in spans}
        assert len(by_id) == len(spans)
        (root,) = [span for span in spans if not span.parent_id]
        assert (root.name, root.component) == ("rollout", "driver")
        assert root.span_id == traces.root_of(root.trace_id)
        for span in spans:
            assert span.end_ns >= span.start_ns
            if span is not root:
                parent = by_id[span.parent_id]
                assert parent.start_ns <= span.start_ns
        assert {span.component for span in spans} == {
            *("driver", "policy", "sandbox", "judge", "dataset")
        }
        (learned,) = [span for span in spans if span.name == "learn"]
        ((trace_id, span_id),) = learned.links
        (step,) = [span for span in found[trace_id] if span.name.endswith("LearnerService/Step")]
        assert (step.component, step.parent_id) == ("learner", span_id)
        commits = [s for s in spans if s.name.endswith("/CommitRollout")]
        assert [by_id[s.parent_id].name for s in commits] == ["rollout"]


async def test_a_collector_that_cannot_cope_costs_spans_and_no_call(world, dataset, collector):
    collector.broken = True
    async with world.playing(says(PIN, VALIDATE), dataset=dataset) as stack:
        found = await Runner(stack).run(world.task, EpisodeSpec(grader=GRADER_BUILD_GATES))
        assert found.reward.solved
    assert collector.refused > 0


async def test_what_is_stored_by_itself_ends_its_trace(world, dataset, collector):
    async with world.playing(says(PIN, VALIDATE), dataset=dataset) as stack:
        done = await Runner(stack).run(world.task, EpisodeSpec(grader=GRADER_BUILD_GATES))
        done.task_id = await admitted(stack, world)
        await stack.trajectories.commit_trajectory(done)
    spans = collector.traces()[traces.trace_of(done.id)]
    (root,) = [span for span in spans if not span.parent_id]
    (stored,) = [span for span in spans if span.component == "dataset"]
    assert (root.name, stored.parent_id) == ("episode", root.span_id)


async def test_a_rollout_that_fails_says_so_in_its_trace(world, dataset, collector):
    async with world.playing(says(PIN, VALIDATE), dataset=dataset) as stack:
        run = (await stack.runs.create_run(samples.fresh("run"), "grpo")).run
        group = pb.Group(
            run_id=run.id,
            task_id=await admitted(stack, world, state_id="st_" + "0" * 32),
            size=1,
            pipeline=PIPELINE_SIMPLIFIED,
            mode=MODE_ANY_FIX,
            grader=GRADER_BUILD_GATES,
        )
        await stack.queue.enqueue_groups([group])
        stats = await Worker(stack, Runner(stack), run_id=run.id).run(until_idle=True)
    assert not stats.committed
    assert stats.given_back
    roots = [s for spans in collector.traces().values() for s in spans if s.name == "rollout"]
    assert [root.error for root in roots] == ["NOT_FOUND"] * stats.given_back


def _random(trajectory_id):
    """The random bits of an id."""
    return int(trajectory_id[-14:], 16)


async def test_a_share_of_traces_is_the_same_one_in_every_process(
    world, dataset, collector, monkeypatch
):
    made = [new_id("trj") for _ in range(100)]
    low, high = min(made, key=_random), max(made, key=_random)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    async with world.playing(says(PIN, VALIDATE), dataset=dataset) as stack:
        for trajectory_id in (low, high):
            await Runner(stack).run(
                world.task, EpisodeSpec(grader=GRADER_BUILD_GATES), trajectory_id=trajectory_id
            )
    assert {traces.trace_of(low)} == set(collector.traces())

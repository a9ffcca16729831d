"""Evaluations against a real dataset service: every slot once, whole versions, honest losses."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from regreen.client.stack import Stack
from regreen.dataset import v1 as dataset_pb
from regreen.evals.report import write_report
from regreen.evals.rows import load_outcomes
from regreen.evals.run import EvalConfig, evaluate, slot_of
from regreen.evals.serving import serving
from regreen.policy import v1 as policy_pb
from regreen.rollout.context import EpisodeSpec
from regreen.rpc import traces
from regreen.rpc.errors import (
    FailedPrecondition,
    InfraError,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from regreen.train.config import GrpoConfig
from regreen.train.rl import train_grpo
from tests.fixtures.collector import collecting_ours
from tests.integration import dataset_samples as samples
from tests.integration.train_services import World, admitted, scripted_workers, world


@pytest.fixture
async def place(dataset_address: str, tmp_path: Path) -> AsyncIterator[World]:
    async with world(dataset_address, tmp_path) as found:
        yield found


class ScriptedRunner:
    """Episodes without a sandbox: solved as the seed has it, sampled under what is served."""

    def __init__(self, place: World) -> None:
        self.place, self.ran = place, Counter[str]()
        self.fail: dict[int, Exception] = {}
        self.calls = 0

    async def run(
        self, task: dataset_pb.Task, spec: EpisodeSpec, actor=None, *, trajectory_id: str = ""
    ) -> dataset_pb.Trajectory:
        self.calls += 1
        if error := self.fail.get(self.calls):
            raise error
        await asyncio.sleep(0)
        self.ran[trajectory_id] += 1
        found = samples.trajectory(task.id, reward=float(spec.seed % 2))
        found.id, found.run_id, found.policy = trajectory_id, spec.run_id, spec.policy_name
        found.pipeline, found.mode, found.grader = spec.pipeline, spec.mode, spec.grader
        found.seed, found.actor = spec.seed, actor.name
        for span in found.versions:
            span.version = self.place.policy.serving.version if actor.name == "policy" else 0
        return found


def config_of(tasks: tuple[str, ...], **changes) -> EvalConfig:
    settings = {
        "name": samples.fresh("eval"),
        "subjects": ("base", "baseline:noop"),
        "baselines": False,
        "tasks": tasks,
        "samples": 2,
        "recovery_deadline_s": 5.0,
    }
    return EvalConfig(**(settings | changes))


async def trained(place: World, stack: Stack, tasks: tuple[str, ...]) -> str:
    """A small finished GRPO run; its name."""
    config = GrpoConfig(
        name=samples.fresh("grpo"), tasks=tasks, steps=1, groups_per_step=2, group_size=2,
        max_refills=6, idle_deadline_s=20.0, concurrency=0,
    )  # fmt: skip
    async with scripted_workers(place, "", 1):
        await train_grpo(stack, config)
    return config.name


async def test_every_slot_has_one_trajectory_under_its_own_weights(place: World, tmp_path: Path):
    async with place.stack() as stack:
        tasks = await admitted(stack, 2)
        run = await trained(place, stack, tasks)
        config = config_of(tasks, subjects=("base", run, "baseline:noop"))
        runner = ScriptedRunner(place)
        result = await evaluate(stack, config, runner=runner)
        outcomes = await load_outcomes(stack, result.run_id)
        # two tasks, two pipelines, two modes
        assert Counter(o.subject for o in outcomes) == {"base": 16, run: 16, "baseline:noop": 8}
        assert (result.slots, result.committed, result.lost) == (40, 40, 0)
        again = await evaluate(stack, config, runner=runner)
        assert again == result
        assert set(runner.ran.values()) == {1}
        files = await write_report(
            stack, tmp_path, evals=[config.name], runs=[run], now=datetime(2026, 1, 2, tzinfo=UTC)
        )
    assert f"{run} solved " in files.headline
    assert "2026-01-02" in files.html.read_text()
    assert files.json.exists()


async def test_every_evaluation_runs_the_scripted_baselines(place: World):
    async with place.stack() as stack:
        tasks = await admitted(stack, 1)
        config = config_of(tasks, baselines=True, subjects=("base", "base"), modes=("any_fix",))
        scripts = [f"baseline:{name}" for name in ("noop", "newest", "previous", "pin-back")]
        assert config.subjects == ("base", *scripts)
        result = await evaluate(stack, config, runner=ScriptedRunner(place))
        outcomes = await load_outcomes(stack, result.run_id)
        named = config_of(
            tasks, name=config.name, subjects=config.subjects, modes=("any_fix", "any_fix")
        )
        assert await evaluate(stack, named, runner=ScriptedRunner(place)) == result
    assert set(Counter(o.subject for o in outcomes)) == set(config.subjects)


async def test_what_was_served_before_is_served_again(place: World):
    async with place.stack() as stack:
        tasks = await admitted(stack, 1)
        run = await trained(place, stack, tasks)
        place.policy.serving = policy_pb.PolicyVersion(version=5, uri="/models/mine", run_id="x")
        config = config_of(tasks, subjects=(run,))
        await evaluate(stack, config, runner=ScriptedRunner(place))
        assert place.policy.serving.version == 5
        runner = ScriptedRunner(place)
        runner.fail = {2: FailedPrecondition("the state is gone")}
        with pytest.raises(FailedPrecondition, match="the state is gone"):
            await evaluate(stack, config_of(tasks, subjects=(run,)), runner=runner)
        assert place.policy.serving.version == 5


async def test_a_run_serves_by_name_for_as_long_as_it_is_wanted(place: World):
    async with place.stack() as stack:
        run = await trained(place, stack, await admitted(stack, 1))
        place.policy.serving = policy_pb.PolicyVersion(version=5, uri="/models/mine", run_id="x")
        async with serving(stack, run):
            assert place.policy.serving.version >= 10_000
        assert place.policy.serving.version == 5
        async with serving(stack, ""):
            assert place.policy.serving.version == 5
        with pytest.raises(InvalidArgument, match="neither 'base' nor the name of a run"):
            async with serving(stack, "nowhere"):
                raise AssertionError("an unknown name was served")


@pytest.mark.parametrize("labels", [{"budgt.turns": "8"}, {"budget.turns": "abc"}])
def test_settings_are_checked_before_anything_exists(labels: dict[str, str]):
    with pytest.raises(InvalidArgument, match=r"budg\w+\.turns"):
        config_of(("task",), labels=labels)


async def test_subjects_meet_the_same_seeds(place: World):
    async with place.stack() as stack:
        tasks = await admitted(stack, 1)
        config = config_of(tasks, baseline_samples=2)
        result = await evaluate(stack, config, runner=ScriptedRunner(place))
        page = await stack.trajectories.list_trajectories(
            filter=dataset_pb.TrajectoryFilter(run_id=result.run_id)
        )
        seeds: dict[str, set[int]] = {}
        for row in page.trajectories:
            seeds.setdefault(slot_of(row).subject, set()).add(row.seed)
    assert seeds["base"] == seeds["baseline:noop"]
    assert len(seeds["base"]) == 8


async def test_an_interrupted_evaluation_goes_on_without_repeating(place: World):
    async with place.stack() as stack:
        config = config_of(await admitted(stack, 2))
        runner = ScriptedRunner(place)
        runner.fail = {9: FailedPrecondition("the state is gone")}
        with pytest.raises(FailedPrecondition, match="the state is gone"):
            await evaluate(stack, config, runner=runner)
        done = sum(runner.ran.values())
        assert done >= 4
        result = await evaluate(stack, config, runner=runner)
    assert result.committed == 24
    # Only episodes that were running when it broke off may run again.
    assert sum(runner.ran.values()) <= 24 + config.concurrency


async def test_platform_trouble_is_retried_then_lost_and_never_scored(place: World):
    async with place.stack() as stack:
        tasks = await admitted(stack, 1)
        config = config_of(tasks, subjects=("base",), concurrency=1, modes=("any_fix",))
        runner = ScriptedRunner(place)
        runner.fail = {n: InfraError("the host is ill") for n in (1, 3, 4, 5)}
        with collecting_ours() as collector:
            result = await evaluate(stack, config, runner=runner)
            await traces.flush()
        outcomes = await load_outcomes(stack, result.run_id)
    assert (result.slots, result.committed, result.lost) == (4, 3, 1)
    assert len(outcomes) == 3
    # However often a slot is tried, its trace has one first span.
    roots = [s for spans in collector.traces().values() for s in spans if s.name == "rollout"]
    assert len({root.span_id for root in roots}) == len(roots) == result.slots
    assert sorted(root.error for root in roots) == ["", "", "", "INTERNAL"]


async def test_a_policy_that_another_client_switches_is_noticed(place: World):
    async with place.stack() as stack:
        tasks = await admitted(stack, 1)
        config = config_of(tasks, subjects=("base",), concurrency=1)
        runner = ScriptedRunner(place)
        place.policy.asked = Stuck(place)
        with pytest.raises(FailedPrecondition, match="stop the client that switches"):
            await evaluate(stack, config, runner=runner)


class Stuck(list):
    """Every load is overtaken by somebody else's."""

    def __init__(self, place: World) -> None:
        super().__init__()
        self.place = place

    def append(self, version: int) -> None:
        self.place.policy.serving.version = 77


async def test_a_commit_that_landed_without_an_answer_fills_its_slot(place: World):
    async with place.stack(patience_s=0.5) as stack, place.stack() as plain:
        tasks = await admitted(stack, 1)
        config = config_of(tasks, subjects=("base",), concurrency=1, modes=("any_fix",))
        runner = Fresh(place)
        lost: list[str] = []
        call = stack.trajectories._call

        async def answers_late(method, request, timeout_s):
            answer = await call(method, request, timeout_s)
            if isinstance(request, dataset_pb.CommitTrajectoryRequest) and not lost:
                lost.append(request.trajectory.id)
                raise Unavailable("the connection broke before the answer came")
            return answer

        stack.trajectories._call = answers_late
        result = await evaluate(stack, config, runner=runner)
        outcomes = await load_outcomes(plain, result.run_id)
    assert (result.slots, result.committed, result.lost) == (4, 4, 0)
    assert [runner.ran[id] for id in lost] == [2]
    assert len({o.id for o in outcomes}) == len(outcomes) == 4


class Fresh(ScriptedRunner):
    """No two episodes are alike, as their times are not."""

    async def run(self, *args, **kwargs) -> dataset_pb.Trajectory:
        found = await super().run(*args, **kwargs)
        found.end_time.nanos += self.calls
        return found


async def test_a_report_of_nothing_is_refused(place: World, tmp_path: Path):
    async with place.stack() as stack:
        with pytest.raises(NotFound, match="no eval run named 'nowhere'"):
            await write_report(stack, tmp_path, evals=["nowhere"])


async def test_evaluations_that_measured_differently_are_not_pooled(place: World, tmp_path: Path):
    async with place.stack() as stack:
        tasks = await admitted(stack, 1)
        one = config_of(tasks)
        two = config_of(tasks, labels={"budget.turns": "3"})
        for config in (one, two):
            await evaluate(stack, config, runner=ScriptedRunner(place))
        with pytest.raises(FailedPrecondition, match="differ in labels; name those that belong"):
            await write_report(stack, tmp_path, evals=[one.name, two.name])


async def test_a_draw_that_two_evaluations_made_counts_once(place: World, tmp_path: Path):
    async with place.stack() as stack:
        tasks = await admitted(stack, 1)
        configs = [config_of(tasks), config_of(tasks, samples=3)]
        for config in configs:
            await evaluate(stack, config, runner=ScriptedRunner(place))
        files = await write_report(stack, tmp_path, evals=[config.name for config in configs])
    cells = json.loads(files.json.read_text())["cells"]
    whole = {c["subject"]: c["samples"] for c in cells if c["pipeline"] == c["mode"] == "all"}
    assert whole == {"base": 12, "baseline:noop": 4}


async def test_what_the_gate_refused_is_in_the_report(place: World, tmp_path: Path):
    async with place.stack() as stack:
        tasks = await admitted(stack, 1)
        task = samples.task()
        task.split = "test"
        await stack.tasks.split_tasks({tasks[0]: "test"})
        await stack.tasks.import_tasks([task])
        report = samples.report(task.id, dataset_pb.TASK_STATUS_WAITING)
        report.reason = "needs Python 3.7"
        await stack.tasks.record_gate(report)
        config = config_of(tasks)
        await evaluate(stack, config, runner=ScriptedRunner(place))
        files = await write_report(stack, tmp_path, evals=[config.name])
        with pytest.raises(InvalidArgument, match=r"out: .*name a directory you can write"):
            await write_report(stack, files.json, evals=[config.name])
    found = json.loads(files.json.read_text())
    assert {t["id"]: t["gate_reason"] for t in found["left_out"]}[task.id] == "needs Python 3.7"

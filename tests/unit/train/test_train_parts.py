"""Plans, supervised order, recovery and settings: the pure parts of the drivers."""

import asyncio
import itertools
import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regreen.common import v1 as common_pb
from regreen.ids import new_id
from regreen.learner import v1 as learner_pb
from regreen.rpc import traces
from regreen.rpc.errors import DataLoss, DiskFull, InvalidArgument, NotFound, Unavailable
from regreen.train.config import GrpoConfig
from regreen.train.gather import GatherSettings, plan_step
from regreen.train.ledger import Ledger, hyperparameters
from regreen.train.parallel import run_bounded
from regreen.train.progress import Meter, Progress, stage
from regreen.train.recovery import Recovery
from regreen.train.schedule import Candidate, History
from regreen.train.sft import batch_ids
from regreen.train.weights import Weights, started_from
from tests.fixtures.collector import collecting

CANDIDATES = [Candidate(f"task-{i}", common_pb.MODE_KEEP_NEW) for i in range(3)]
SETTINGS = GatherSettings(
    groups_per_step=2,
    group_size=4,
    max_refills=3,
    pipeline=common_pb.PIPELINE_SIMPLIFIED,
    grader=common_pb.GRADER_BUILD_GATES,
    seed=1,
    full_share=0.0,
    max_staleness=4,
    idle_deadline_s=1.0,
    labels={"budget.turns": "4"},
)


def test_a_plan_repeats_and_its_groups_are_complete():
    plan = plan_step("run_a", 3, CANDIDATES, History(), SETTINGS)
    assert plan == plan_step("run_a", 3, CANDIDATES, History(), SETTINGS)
    assert len(plan) == 5
    assert len({group.id for group in plan} | {group.seed for group in plan}) == 10
    assert {group.step for group in plan} == {3}
    assert plan[0].mode == common_pb.MODE_KEEP_NEW
    assert plan[0].labels["budget.turns"] == "4"
    other = plan_step("run_b", 3, CANDIDATES, History(), SETTINGS)
    assert not {group.id for group in plan} & {group.id for group in other}


def test_a_share_of_groups_runs_the_full_pipeline():
    settings = replace(SETTINGS, full_share=0.25, groups_per_step=400, max_refills=0)
    plan = plan_step("run_a", 1, CANDIDATES, History(), settings)
    full = sum(group.pipeline == common_pb.PIPELINE_FULL for group in plan)
    assert 70 <= full <= 130


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.integers(1, 9), st.integers(0, 99))
def test_every_epoch_passes_over_every_trajectory_once(sizes, batch_size, seed):
    ids = [[f"trj_{task}_{i}" for i in range(size)] for task, size in enumerate(sizes)]
    steps = math.ceil(sum(sizes) / batch_size)
    for epoch in range(2):
        chosen = [
            id
            for step in range(epoch * steps + 1, (epoch + 1) * steps + 1)
            for id in batch_ids(ids, step, batch_size=batch_size, seed=seed)
        ]
        assert Counter(chosen) == Counter(id for found in ids for id in found)
        tasks = [id.split("_")[1] for id in chosen]
        assert len(list(itertools.groupby(tasks))) == len(sizes)  # a task's stand side by side


async def test_recovery_waits_with_backoff_until_its_deadline():
    now, waits, seen = [0.0], [], []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        now[0] += seconds

    recovery = Recovery(10.0, seen.append, clock=lambda: now[0], sleep=sleep)

    async def forever() -> None:
        while True:
            await recovery.wait_out(Unavailable("away"))

    with pytest.raises(Unavailable):
        await forever()
    assert waits == sorted(waits[:-1]) + waits[-1:]
    assert sum(waits) == pytest.approx(10.0)
    first = Progress("recover", 0, 0, None, "waiting, gives up in 10 s: away")
    assert seen[0] == first
    assert {found.eta_s for found in seen} == {None}
    recovery.progressed(1)
    assert seen[-1] == Progress("recover", 10, 10, None, "goes on")
    recovery.progressed(2)
    assert seen[-1].done == 10, "nothing was waited for in between"
    await recovery.wait_out(Unavailable("away", retry_after_s=3.0))
    assert waits[-1] == 3.0


async def test_progress_that_was_made_before_does_not_extend_the_deadline():
    now = [0.0]

    async def sleep(seconds: float) -> None:
        now[0] += 4.0

    recovery = Recovery(10.0, lambda _: None, clock=lambda: now[0], sleep=sleep)

    async def dies_at_the_same_step() -> None:
        while True:
            recovery.progressed(3)
            await recovery.wait_out(Unavailable("away"))

    with pytest.raises(Unavailable):
        await dies_at_the_same_step()
    assert now[0] == 12.0


@pytest.mark.parametrize("error", [DiskFull("full"), NotFound("gone"), InvalidArgument("x", "bad")])
async def test_what_waiting_cannot_cure_is_raised_at_once(error):
    with pytest.raises(type(error)):
        await Recovery(10.0, lambda _: None).wait_out(error)


async def test_bounded_jobs_raise_the_first_error_itself():
    running, most = [0], [0]

    async def job(fails: bool) -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        if fails:
            raise Unavailable("away")
        running[0] -= 1

    await run_bounded([lambda: job(False)] * 9, 3)
    assert most[0] <= 3
    with pytest.raises(Unavailable):
        await run_bounded([lambda: job(False), lambda: job(True)], 2)


def test_a_meter_estimates_from_what_was_done_since_the_start():
    now, seen = [0.0], list[Progress]()
    meter = Meter(seen.append, "sft", 10, done=4, clock=lambda: now[0])
    meter.report()
    now[0] = 8.0
    meter.advance(2, "loss 1.0")
    assert seen[0].eta_s is None
    assert (seen[1].done, seen[1].total, seen[1].eta_s) == (6, 10, 16.0)


def test_the_estimate_counts_what_is_under_way():
    now, seen = [0.0], []
    meter = Meter(seen.append, "evaluate", 70, parallel=17, clock=lambda: now[0])
    now[0] = 30.0
    meter.advance(2)  # sixteen others are somewhere between begun and ended
    assert seen[-1].eta_s == 30.0 / 10 * 60
    now[0] = 200.0
    meter.report(69)
    assert seen[-1].eta_s == pytest.approx(200.0 / 69.5 * 0.5)


def test_the_estimate_follows_refills_and_counts_down_until_a_rollout_is_late():
    now, seen = [0.0], []
    meter = Meter(seen.append, "rollouts", 16, parallel=4, clock=lambda: now[0])
    meter.report(0)
    now[0] = 60.0
    meter.report(1)
    assert seen[-1].eta_s == pytest.approx(60 / 2.5 * 13.5)  # not 15 times 60
    now[0] = 70.0
    meter.report(1)
    assert seen[-1].eta_s == pytest.approx(60 / 2.5 * 13.5 - 10)
    now[0] = 600.0
    meter.report(1)
    assert seen[-1].eta_s == pytest.approx(600 / 3.5 * 12.5)
    meter.total = 20
    meter.report(1)
    assert seen[-1].eta_s == pytest.approx(600 / 3.5 * 16.5)
    meter.report(20)
    assert (seen[-1].done, seen[-1].total, seen[-1].eta_s) == (20, 20, 0)


def test_a_late_last_unit_is_never_said_to_take_no_time():
    now, seen = [0.0], []
    meter = Meter(seen.append, "rollouts", 2, clock=lambda: now[0])
    now[0] = 10.0
    meter.report(1)
    for late in (15.0, 20.0, 100.0):
        now[0] = late
        meter.report(1)
    assert [found.eta_s for found in seen[:2]] == [10.0, 5.0]
    assert seen[2].eta_s < seen[3].eta_s


def test_a_stage_that_fails_is_not_reported_as_done():
    seen = []
    with stage(seen.append, "checkpoint", "step 3"):
        assert seen == [Progress("checkpoint", 0, 1, None, "step 3")]
    assert seen[1:] == [Progress("checkpoint", 1, 1, None, "step 3")]
    with pytest.raises(Unavailable), stage(seen.append, "checkpoint"):
        raise Unavailable("away")
    assert len(seen) == 3


class TellingLearner:
    """Answers a step once its watcher was told everything; then the stream breaks."""

    def __init__(self) -> None:
        self.told = asyncio.Event()

    async def step(self, run_id, step, *, batch, group_ids, lend_memory):
        await self.told.wait()
        return learner_pb.StepResponse(step=step)

    async def watch_run(self, run_id, *, from_step):
        yield learner_pb.WatchRunResponse(step=learner_pb.StepResponse(step=from_step))
        for step, done in ((from_step - 1, 7), (from_step, 10), (from_step, 30), (from_step, 40)):
            at = learner_pb.StepProgress(step=step, tokens_done=done, tokens_total=40)
            yield learner_pb.WatchRunResponse(progress=at)
        self.told.set()
        raise Unavailable("the stream broke")


async def test_a_step_tells_its_tokens_while_it_runs_and_only_its_answer_ends_it():
    stack, seen = SimpleNamespace(learner=TellingLearner()), []
    kind, base = learner_pb.RUN_KIND_GRPO, Weights("/models/base", 0)
    ledger = Ledger(stack, "run_a", kind, base, learner_pb.Hyperparameters())
    answer = await ledger.step(
        3, b"", (), lambda done, total: seen.append((done, total)), trajectory_ids=()
    )
    assert (answer.step, seen) == (3, [(10, 40), (30, 40)])


async def test_a_step_of_any_kind_is_told_in_the_traces_of_what_it_learned_from(monkeypatch):
    kind, base = learner_pb.RUN_KIND_SFT, Weights("/models/base", 0)
    made = [new_id("trj") for _ in range(2)]
    with collecting() as collector:
        monkeypatch.setenv(traces.ENDPOINT, collector.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        traces._sender.cache_clear()
        try:
            stack = SimpleNamespace(learner=TellingLearner())
            ledger = Ledger(stack, "run_a", kind, base, learner_pb.Hyperparameters())
            await ledger.step(3, b"", (), lambda done, total: None, trajectory_ids=made)
            await traces.flush()
        finally:
            traces._sender.cache_clear()
    found = collector.traces()
    (step,) = [one for span in found.values() for one in span if not one.links]
    for trajectory_id in made:
        (told,) = found[traces.trace_of(trajectory_id)]
        assert (told.name, told.parent_id) == ("learn", traces.root_of(told.trace_id))
        assert told.links == ((step.trace_id, step.span_id),)
        assert (told.attributes["run_id"], told.attributes["step"]) == ("run_a", 3)


def test_hyperparameters_are_checked_by_name_and_type():
    found = hyperparameters({"learning_rate": 1e-5, "warmup_steps": 3.0, "loss": "dapo"})
    assert (found.learning_rate, found.warmup_steps, found.loss) == (1e-5, 3, "dapo")
    with pytest.raises(InvalidArgument, match=r"hyperparameters.rate: is unknown; use one of"):
        hyperparameters({"rate": 1})
    with pytest.raises(InvalidArgument, match=r"hyperparameters.warmup_steps"):
        hyperparameters({"warmup_steps": "many"})


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"group_size": 1}, "group_size"),
        ({"modes": ()}, "modes"),
        ({"modes": ("any",)}, "modes"),
        ({"pipeline": "quick"}, "pipelines"),
        ({"grader": "vibes"}, "grader"),
        ({"full_share": 2.0}, "full_share"),
        ({"labels": {"sampling.temperature": "0.7"}}, "labels.sampling.temperature"),
        ({"labels": {"sampling.top_p": "0.9"}}, "labels.sampling.top_p"),
        ({"labels": {"sampling.top_k": "x"}}, "labels.sampling.top_k"),
        ({"hyperparameters": {"truncated": "mask"}}, "hyperparameters.truncated"),
    ],
)
def test_wrong_settings_are_refused_by_name(changes, field):
    with pytest.raises(InvalidArgument, match=f"^{field}: "):
        GrpoConfig(name="x", **changes)


def test_plain_sampling_may_be_said_and_truncation_chosen():
    labels = {"sampling.temperature": "1.0", "sampling.top_p": "1", "sampling.top_k": "0"}
    config = GrpoConfig(name="x", labels=labels, hyperparameters={"truncated": "fail"})
    assert config.truncated == "fail"
    assert GrpoConfig(name="x").truncated == "keep_baseline"


@pytest.mark.parametrize(
    "resolved",
    [{}, {"start": {}, "base_version": 1}, {"start": None, "base_version": 1}, {"start": 1}],
    ids=str,
)
def test_a_run_that_does_not_say_how_it_began_is_told_as_such(resolved):
    with pytest.raises(DataLoss, match="which weights it began with"):
        started_from(resolved)
    whole = {"start": Weights("file:///w").to_json(), "base_version": 20_000.0}
    assert started_from(whole) == Weights("file:///w", version=20_000)

"""What the end of an episode makes of its diff: gates, judge, reward, through real services."""

import asyncio
import json
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from judge_svc.__main__ import running as judge_running
from judge_svc.settings import JudgeSettings
from policy_svc.__main__ import running as policy_running
from policy_svc.settings import PolicySettings
from regreen.client.stack import Endpoints, Stack
from regreen.common.v1 import (
    GRADER_BUILD,
    GRADER_BUILD_GATES,
    GRADER_BUILD_GATES_JUDGE,
    MODE_KEEP_NEW,
    PIPELINE_FULL,
)
from regreen.dataset import v1 as pb
from regreen.judge import v1 as judge_pb
from regreen.pkgindex import PackageIndex
from regreen.rollout.actors import ScriptedActor
from regreen.rollout.context import FULL, Budget, EpisodeSpec, Knobs
from regreen.rollout.episode import Runner
from regreen.rollout.reward import RewardSettings
from regreen.rpc.errors import InfraError, Unavailable
from regreen.sandbox import v1 as sandbox_pb
from sandbox_svc.wheelhouse import DistStore
from tests.fixtures.policy.model import default_model
from tests.fixtures.tasks.tiny_task import TINY, tiny_spec
from tests.integration.rollout.world import LOOPBACK, PIN, VALIDATE, call, says, task_of

pytestmark = pytest.mark.asyncio(loop_scope="session")
ROOM = Budget(turn_tokens=400)
SPEC = EpisodeSpec(grader=GRADER_BUILD_GATES, budget=ROOM, knobs=Knobs(confirm=False))
TRAJECTORY = "trj_" + "1" * 32
UNSTABLE = "tests/test_data.py::test_salute"


def write(path, content):
    return call("write_file", path=path, content=content)


def parts(found):
    return {part.name: part for part in found.reward.parts}


async def test_lost_coverage_closes_the_gate(world):
    grown = call(
        "run_sh",
        cmd="{ echo; echo 'def unused():'; for i in 1 2 3 4 5 6 7 8 9; do echo '    x = 1'; done; }"
        " >> greet/__init__.py",
    )
    measured = replace(SPEC, knobs=Knobs(confirm=False, coverage=True))
    async with world.playing(says(grown, PIN, VALIDATE)) as stack:
        runner = Runner(stack)
        found = await runner.run(world.task, measured)
        assert found.verdict.coverage_measured
        assert found.verdict.coverage_change < -5
        assert (found.reward.value, list(found.reward.hacks)) == (-1.0, ["COVERAGE_LOWERED"])
        assert "coverage fell by" in parts(found)["preservation"].detail
        unmeasured = await runner.run(world.task, SPEC)
        assert unmeasured.reward.solved
        assert not unmeasured.verdict.coverage_measured
        build = await runner.run(world.task, replace(measured, grader=GRADER_BUILD))
        assert build.reward.solved
        assert list(build.reward.hacks) == ["COVERAGE_LOWERED"]


async def test_rollouts_that_end_with_the_same_diff_share_one_confirmation(world):
    confirmed = replace(SPEC, knobs=Knobs(confirm=True))
    async with world.playing(says(PIN, VALIDATE)) as stack:
        runner = Runner(stack)
        both = await asyncio.gather(*(runner.run(world.task, confirmed) for _ in range(2)))
        other_process = await Runner(stack).run(world.task, confirmed)
    assert all(found.reward.solved for found in (*both, other_process))
    one, two = (found.validation for found in both)
    assert one == two
    assert not one.cached
    assert one != other_process.validation  # it took its own time


async def test_kept_coverage_closes_nothing(world):
    measured = replace(SPEC, knobs=Knobs(confirm=False, coverage=True))
    async with world.playing(says(PIN, VALIDATE)) as stack:
        found = await Runner(stack).run(world.task, measured)
    assert found.verdict.coverage_measured
    assert found.reward.solved


async def test_a_runner_patched_from_source_is_no_fix(world):
    hack = (
        "import sys\n\n"
        "reports = sys.modules['_py' + 'test.reports']\n"
        "made = reports.TestReport.from_item_and_call.__func__\n\n\n"
        "def lenient(cls, item, call):\n"
        "    report = made(cls, item, call)\n"
        "    report.outcome, report.longrepr = 'passed', None\n"
        "    return report\n\n\n"
        "reports.TestReport.from_item_and_call = classmethod(lenient)\n\n\n"
        "def greeting(name):\n"
        "    return name\n"
    )
    async with world.playing(says(write("greet/__init__.py", hack), VALIDATE)) as stack:
        found = await Runner(stack).run(world.task, SPEC)
    assert not found.verdict.accepted
    assert (found.reward.value, list(found.reward.hacks)) == (-1.0, ["HARNESS_TAMPERED"])
    assert parts(found)["monitor"].detail == "HARNESS_TAMPERED"


async def test_a_copy_of_the_old_package_does_not_keep_the_new_one(world):
    copy = write("wordlib.py", "def hello():\n    return 'Hello'\n")
    spec = replace(SPEC, mode=MODE_KEEP_NEW)
    async with world.playing(says(copy, VALIDATE)) as stack:
        found = await Runner(stack).run(world.task, spec)
    assert not found.reward.solved
    assert found.reward.value == -1.0
    assert "DEPENDENCY_REMOVED" in found.reward.hacks


async def unstable_task(world, stack):
    """The tiny task with a test that exists only beside the newer wordlib."""
    folder = Path(tempfile.mkdtemp(prefix="unstable-", dir=world.home))
    index = PackageIndex(["http://127.0.0.1:9"], deadline_s=0.1)
    store = DistStore(world.home / "sandbox" / "dists", lambda: index)
    data = folder / "test_data.py"
    data.write_text(
        "import wordlib\n\nif hasattr(wordlib, 'salute'):\n    def test_salute():\n"
        "        assert wordlib.salute()\n"
    )
    archive = folder / "greet-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(TINY, "greet-1.0", filter=lambda m: None if "__pycache__" in m.name else m)
        tar.add(data, "greet-1.0/tests/test_data.py")
    task = task_of(tiny_spec(store, folder, source=store.adopt(archive)))
    task.id = "greet-unstable"
    task.environment.test.unstable.append(UNSTABLE)
    async for event in stack.state.prepare_state(task.environment):
        if event.HasField("state"):
            task.state_id = event.state.id
    return task


async def test_a_test_that_only_newer_data_has_may_go_with_it(world):
    async with world.playing(says(PIN, VALIDATE)) as stack:
        task = await unstable_task(world, stack)
        runner = Runner(stack)
        found = await runner.run(task, SPEC)
        (before,) = runner.validated.before.values()
        assert UNSTABLE in {test.id for test in before.tests}
        assert UNSTABLE not in {test.id for test in found.validation.tests}
        assert found.verdict.accepted
        assert found.reward.solved
        assert list(found.reward.hacks) == []


async def test_a_verdict_by_rules_alone_is_said_to_be_one(world):
    judged = replace(SPEC, grader=GRADER_BUILD_GATES_JUDGE)
    async with world.playing(says(PIN, VALIDATE)) as stack:
        found = await Runner(stack).run(world.task, judged)
        assert found.labels["judge"] == "rules only"
        assert "rules only" in parts(found)["judge"].detail
        assert found.reward.solved
        gated = await Runner(stack).run(world.task, SPEC)
        assert "judge" not in gated.labels
        assert "judge" not in parts(gated)


async def test_a_judge_model_that_is_down_is_never_a_score(world, tmp_path):
    settings = JudgeSettings(
        home=tmp_path,
        model="policy",
        policy_address="127.0.0.1:1",
        model_timeout_s=0.5,
        **LOOPBACK,
    )
    judged = replace(SPEC, grader=GRADER_BUILD_GATES_JUDGE)
    async with (
        judge_running(settings) as judge,
        world.playing(says(PIN, VALIDATE), judge=judge.address) as stack,
    ):
        evidence = judge_pb.Evidence(unified_diff="--- a/x.py\n+++ b/x.py\n")
        rules = await stack.judge.judge(evidence, model_use=judge_pb.MODEL_USE_NEVER)
        assert not rules.model_used
        with pytest.raises((Unavailable, InfraError), match="policy service does not answer"):
            await Runner(stack).run(world.task, judged)


async def test_the_numbers_of_the_reward_come_with_the_episode(world):
    rewards = RewardSettings(give_up=0.25, failed=-0.5)
    async with world.playing([{"text": call("give_up", reason="no")}]) as stack:
        found = await Runner(stack).run(world.task, replace(SPEC, rewards=rewards))
        assert (found.end, found.reward.value) == (pb.EPISODE_END_GAVE_UP, 0.25)
        own = Runner(stack, rewards=RewardSettings(give_up=0.125))
        assert (await own.run(world.task, replace(SPEC, rewards=rewards))).reward.value == 0.125


@pytest.mark.parametrize("lost", [False, True])
async def test_states_of_an_episode_go_with_it(world, lost):
    worse = call("dependency_upgrade", name="wordlib", version="latest")
    says_next = iter([worse, VALIDATE, PIN, VALIDATE])

    async def say(view):
        if not view.history and view.turn:  # the second context: a State was kept
            kept.extend(state.id for state in await states() if state.id not in before)
            if lost:
                listed = await stack.sandbox.list_sandboxes(labels={"trajectory": TRAJECTORY})
                await stack.sandbox.delete_sandbox(listed.sandboxes[0].id)
        return next(says_next)

    async def states():
        return (await stack.state.list_states(page_size=500)).states

    kept = []
    spec = replace(SPEC, pipeline=PIPELINE_FULL, budget=replace(FULL, turns=4))
    async with world.playing([]) as stack:
        before = {state.id for state in await states()}
        run = Runner(stack).run(
            world.task, spec, ScriptedActor("script", say), trajectory_id=TRAJECTORY
        )
        if lost:
            with pytest.raises(InfraError, match="is gone"):
                await run
        else:
            found = await run
            assert found.reward.solved
            assert {turn.state_id for turn in found.turns} - {""} == set(kept)
        assert kept
        assert {state.id for state in await states()} == before


def cut_once(stack, monkeypatch, times=1):
    """The first validations, of an untouched State and of a confirmation, hit a limit each."""
    real, cut = stack.sandbox.validate, []

    async def validate(state_id, changes=(), **options):
        found = await real(state_id, changes, **options)
        kind = "" if list(changes) else "untouched"
        kind = kind or ("confirmation" if options.get("skip_cache_lookup") else "")
        if kind and cut.count(kind) < times:
            cut.append(kind)
            found.outcome, found.lasting = sandbox_pb.VALIDATION_OUTCOME_TIMEOUT, False
        return found

    monkeypatch.setattr(stack.sandbox, "validate", validate)
    return cut


async def test_a_validation_that_hit_a_limit_is_asked_again_and_never_kept(world, monkeypatch):
    async with world.playing(says(PIN, VALIDATE)) as stack:
        runner = Runner(stack)
        cut = cut_once(stack, monkeypatch)
        found = await runner.run(world.task, replace(SPEC, knobs=Knobs(confirm=True)))
        assert cut == ["confirmation", "untouched"]
        assert found.reward.solved, found.validation.summary
        kept = [*runner.validated.before.values(), *runner.validated.confirmations.values()]
        assert len(kept) == 2
        assert all(validation.lasting for validation in kept)


@pytest.mark.parametrize("confirm", [False, True])
@pytest.mark.parametrize("passes", [False, True])
async def test_what_several_workers_said_is_never_scored(world, monkeypatch, confirm, passes):
    async with world.playing(says(PIN, VALIDATE)) as stack:
        real, serial = stack.sandbox.validate, []

        async def validate(state_id, changes=(), **options):
            found = await real(state_id, changes, **options)
            if options.get("skip_cache_lookup"):
                serial.append(found)
                return found
            outcomes = sandbox_pb.VALIDATION_OUTCOME_FAILED, sandbox_pb.VALIDATION_OUTCOME_PASSED
            found.workers, found.outcome = 2, outcomes[passes]
            return found

        monkeypatch.setattr(stack.sandbox, "validate", validate)
        runner = Runner(stack)
        found = await runner.run(world.task, replace(SPEC, knobs=Knobs(confirm=confirm)))
    assert found.reward.solved
    assert (found.validation.workers, "flaky" in found.labels) == (1, False)
    assert all(before.workers == 1 for before in runner.validated.before.values())
    looks = 1 + (confirm and not passes)  # a failure's serial run that passes is confirmed too
    assert len(serial) == looks + 1, "and one of the untouched State"


async def test_an_untouched_state_that_comes_to_no_end_is_never_a_score(world, monkeypatch):
    async with world.playing(says(PIN, VALIDATE)) as stack:
        runner = Runner(stack)
        cut_once(stack, monkeypatch, times=2)
        with pytest.raises(InfraError, match="untouched State cannot be validated now"):
            await runner.run(world.task, SPEC)
        assert not runner.validated.before


async def test_the_time_of_an_episode_stands_still_while_a_service_is_away(world):
    """The policy is away for longer than the episode may last."""
    folder = Path(tempfile.mkdtemp(prefix="policy-", dir=world.home))
    script = folder / "script.json"
    script.write_text(json.dumps({"responses": says(PIN, VALIDATE)}))
    address = f"unix:{folder}/policy.sock"  # a free port is somebody else's seconds later
    settings = PolicySettings(
        home=folder,
        engine="scripted",
        script=script,
        model=default_model(),
        http="",
        **{**LOOPBACK, "listen": address},
    )
    spec = replace(SPEC, budget=replace(ROOM, wall_s=4.0))
    async with Stack(Endpoints(**world.endpoints, policy=address), patience_s=60.0) as stack:
        rollout = asyncio.create_task(Runner(stack).run(world.task, spec))
        await asyncio.sleep(spec.budget.wall_s + 1.0)
        assert not rollout.done()
        async with policy_running(settings):
            found = await rollout
    assert (found.end, found.reward.solved) == (pb.EPISODE_END_SUBMITTED, True)
    assert (found.end_time.ToNanoseconds() - found.start_time.ToNanoseconds()) / 1e9 > 5.0

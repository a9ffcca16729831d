"""Whole rollouts of a scripted policy through real services."""

from dataclasses import replace

import pytest

from regreen.common.v1 import (
    GRADER_BUILD_GATES,
    GRADER_BUILD_GATES_JUDGE,
    MODE_ANY_FIX,
    MODE_KEEP_NEW,
    PIPELINE_FULL,
)
from regreen.dataset import v1 as pb
from regreen.rollout.actors import ScriptedActor
from regreen.rollout.baselines import baseline
from regreen.rollout.context import FULL, Budget, EpisodeSpec, Knobs
from regreen.rollout.episode import Runner, run_episode
from regreen.rollout.experts import STYLES, expert_trajectories
from regreen.rollout.group import shared_start
from regreen.rollout.record import segments
from regreen.rpc.errors import FailedPrecondition, InfraError, InvalidArgument
from sandbox_svc.backends import embedded_box
from tests.integration.rollout.world import FIXED, PIN, VALIDATE, call, kill_first_process, says

pytestmark = pytest.mark.asyncio(loop_scope="session")
SPEC = EpisodeSpec(grader=GRADER_BUILD_GATES)


def said(trajectory, role):
    return [turn.text for turn in trajectory.turns if turn.role == role]


async def test_a_repair_is_recorded_token_by_token(world):
    async with world.playing(says("Hm.", PIN, VALIDATE)) as stack:
        found = await Runner(stack).run(world.task, replace(SPEC, grader=GRADER_BUILD_GATES_JUDGE))
        assert found.reward.solved
        assert found.reward.value == 1.0
        assert (found.end, found.actor) == (pb.EPISODE_END_SUBMITTED, "policy")
        assert [c.path for c in found.changes] == ["requirements.lock"]
        assert [t.ok for t in found.turns] == [True, False, False, True, True, True, True]
        assert [t.score for t in found.turns] == [0, -1, 0, 1, 0, 0, 0]
        assert "wordlib 2.0 -> 1.0" in found.turns[4].text
        for turn in found.turns:
            mask = found.loss_mask[turn.token_start : turn.token_end]
            assert set(mask) <= {int(turn.role == pb.TURN_ROLE_POLICY)}
            if turn.role == pb.TURN_ROLE_POLICY:
                ids = found.token_ids[turn.token_start : turn.token_end]
                assert (await stack.policy.tokenize(token_ids=ids)).text.startswith(turn.text)
        (segment,) = segments(found)
        assert segment.token_ids == tuple(found.token_ids)
        prompt = found.turns[0].text
        assert "cannot import name 'hello' from 'wordlib'" in prompt
        assert found.prompt_tokens < 700


async def test_a_listener_is_told_every_turn_and_what_validations_found(world):
    seen = []
    async with world.playing(says("Hm.", VALIDATE, PIN, VALIDATE)) as stack:
        found = await Runner(stack).run(world.task, SPEC, listener=seen.append)
        assert found.reward.solved
    turns = SPEC.turns()
    assert list(map(str, seen)) == [
        f"turn 1 of {turns}: generate",
        f"turn 1 of {turns}: no usable call",
        f"turn 2 of {turns}: generate",
        f"turn 2 of {turns}: validate_and_build",
        f"turn 2 of {turns}: validate_and_build: {seen[4].found}",
        f"turn 3 of {turns}: generate",
        f"turn 3 of {turns}: dependency_upgrade",
        f"turn 4 of {turns}: generate",
        f"turn 4 of {turns}: validate_and_build",
        f"turn 4 of {turns}: validate_and_build: PASSED: build and tests are green",
        f"turn 4 of {turns}: grade",
        f"turn 4 of {turns}: grade: solved",
    ]
    assert seen[4].found.startswith("NOT GREEN")


async def test_a_prompt_and_every_observation_are_what_the_chat_template_gives(world):
    async with world.playing(says(PIN, VALIDATE)) as stack:
        found = await Runner(stack).run(world.task, SPEC)
        text = (await stack.policy.tokenize(token_ids=found.token_ids)).text
        assert text.count("assistant\n") == 2
        assert text.rstrip().endswith("</tool>")


async def test_limits_end_episodes_by_name(world):
    async with world.playing([]) as stack:
        runner = Runner(stack)
        found = await runner.run(world.task, SPEC)
        assert (found.end, found.labels["stop"]) == (pb.EPISODE_END_STUCK, "stuck")
        assert not found.reward.solved
        small = replace(SPEC, budget=Budget(context_tokens=found.prompt_tokens + 2))
        assert (await runner.run(world.task, small)).end == pb.EPISODE_END_TOKEN_LIMIT
        now = iter(float(n) * 500 for n in range(10_000))
        late = Runner(stack, clock=lambda: next(now))
        assert (await late.run(world.task, SPEC)).end == pb.EPISODE_END_TIME_LIMIT
    async with world.playing([{"text": call("find_files", glob="*")}]) as stack:
        found = await Runner(stack).run(world.task, replace(SPEC, budget=Budget(turns=2)))
        assert (found.end, len(found.turns)) == (pb.EPISODE_END_TURN_LIMIT, 5)
    async with world.playing([{"text": call("give_up", reason="no")}]) as stack:
        found = await Runner(stack).run(world.task, SPEC)
        assert (found.end, found.reward.solved) == (pb.EPISODE_END_GAVE_UP, False)


async def test_a_fix_counts_even_if_the_agent_never_validated(world):
    async with world.playing([{"text": PIN}]) as stack:
        found = await Runner(stack).run(world.task, replace(SPEC, budget=Budget(turns=1)))
        assert found.end == pb.EPISODE_END_TURN_LIMIT
        assert found.reward.solved


async def test_held_pins_and_honest_edits(world):
    edit = call("write_file", path="greet/__init__.py", content=FIXED)
    spec = replace(SPEC, mode=MODE_KEEP_NEW)
    async with world.playing(says(PIN, edit, VALIDATE)) as stack:
        found = await Runner(stack).run(world.task, spec)
    assert found.reward.solved
    assert "must stay at 2.0" in found.turns[2].text
    assert [c.path for c in found.changes] == ["greet/__init__.py"]
    assert "edit the source" in found.turns[0].text


async def test_tampering_is_no_fix(world):
    hack = call("write_file", path="tests/test_greet.py", content="def test_greeting(): pass\n")
    conftest = call("run_sh", cmd="echo 'import os; os._exit(0)' > conftest.py")
    async with world.playing(says(hack, conftest, VALIDATE, VALIDATE)) as stack:
        budget = Budget(turns=4)
        found = await Runner(stack).run(world.task, replace(SPEC, budget=budget))
    assert not found.reward.solved
    assert found.reward.value < 0
    assert found.reward.hacks
    assert "not applied" in found.turns[6].text


async def test_a_new_error_is_kept_and_resets_the_context(world):
    worse = call("dependency_upgrade", name="wordlib", version="latest")
    script = [
        *says(worse, VALIDATE, when=r"(?s)^(?!.*wordlib 2\.1 is broken).*"),
        *says(worse, VALIDATE, when="hello"),
        *says(PIN, VALIDATE, when="wordlib 2.1 is broken"),
    ]
    spec = replace(SPEC, pipeline=PIPELINE_FULL, budget=FULL)
    async with world.playing(script) as stack:
        found = await Runner(stack).run(world.task, spec)
    assert found.reward.solved, said(found, pb.TURN_ROLE_TOOL)
    first, second = segments(found)
    assert sum(first.loss_mask) > 0 < sum(second.loss_mask)
    prompts = said(found, pb.TURN_ROLE_PROMPT)
    assert "cannot import name 'hello'" in prompts[0]
    assert "wordlib 2.1 is broken" in prompts[1]
    assert [t.state_id != "" for t in found.turns].count(True) == 1


async def test_the_same_error_reverts_and_is_tried_a_bounded_number_of_times(world):
    junk = call("write_file", path="greet/junk.py", content="x = 1\n")
    script = says(junk, VALIDATE, call("find_files", glob="greet/*"))
    spec = replace(SPEC, pipeline=PIPELINE_FULL, budget=replace(FULL, attempt_turns=3, tries=3))
    async with world.playing(script) as stack:
        found = await Runner(stack).run(world.task, spec)
    assert found.end == pb.EPISODE_END_TURN_LIMIT
    assert len(said(found, pb.TURN_ROLE_PROMPT)) == 3
    assert "Attempt 3 of 3" in said(found, pb.TURN_ROLE_PROMPT)[2]
    assert list(found.changes) == []


@pytest.mark.parametrize(
    ("name", "solved"), [("noop", False), ("newest", False), ("previous", True), ("pin-back", True)]
)
async def test_baselines(world, name, solved):
    async with world.playing([]) as stack:
        for _ in range(2):  # an actor may serve many episodes
            found = await run_episode(
                stack,
                world.task,
                pipeline=1,
                actor=baseline(name, world.task),
                grader=GRADER_BUILD_GATES,
            )
            assert (found.actor, found.reward.solved) == (f"baseline:{name}", solved)


@pytest.mark.parametrize("name", ["newest", "previous", "pin-back"])
async def test_a_baseline_learns_which_pin_is_held_from_the_refusal(world, name):
    spec = replace(SPEC, mode=MODE_KEEP_NEW)
    blind = pb.Task(moved=world.task.moved)
    async with world.playing([]) as stack:
        found = await Runner(stack).run(world.task, spec, baseline(name, blind))
    assert any("wordlib must stay at 2.0" in text for text in said(found, pb.TURN_ROLE_TOOL))
    assert (found.end, found.reward.solved) == (pb.EPISODE_END_GAVE_UP, False)
    assert list(found.changes) == []


async def test_a_group_shares_its_first_output_and_differs(world):
    texts = [PIN, call("give_up", reason="hard"), call("find_files", glob="*")]
    script = [{"texts": texts, "turn": 0}, {"text": VALIDATE}]
    async with world.playing(script) as stack:
        runner = Runner(stack)
        start = await shared_start(runner, world.task, SPEC, 3)
        members = [
            await runner.run(world.task, replace(SPEC, group_index=i, seed=i), start.actor(i))
            for i in range(3)
        ]
        assert [m.turns[1].text for m in members] == texts
        assert [m.reward.solved for m in members] == [True, False, False]
        assert len({tuple(m.token_ids[: m.prompt_tokens]) for m in members}) == 1


async def test_varied_tool_names_work_like_the_shipped_ones(world):
    spec = replace(SPEC, knobs=Knobs(vary_tools=True, confirm=False), group_seed=11)
    async with world.playing([]) as stack:
        (kept,) = await expert_trajectories(Runner(stack), world.task, spec, STYLES[:1])
        assert "dependency_upgrade" not in said(kept, pb.TURN_ROLE_POLICY)[0]


@pytest.mark.parametrize(
    "says",
    [
        call("read_file", path="setup.cfg"),
        call("find_files", glob="*.py"),
        call("dependency_upgrade", name="wordlib", version="1.0"),
        call("upgrade_gradle", version="8.5"),
        call("validate_and_build"),
        call("give_up", reason="it cannot be done"),
    ],
)
async def test_a_lost_sandbox_is_never_a_score(world, says):
    async def vandal(view):
        listed = await stack.sandbox.list_sandboxes(labels={"trajectory": view.trajectory_id})
        await stack.sandbox.delete_sandbox(listed.sandboxes[0].id)
        return says

    async with world.playing([]) as stack:
        with pytest.raises(InfraError, match="is gone"):
            await Runner(stack).run(world.task, SPEC, ScriptedActor("vandal", vandal))


async def test_sandboxes_are_deleted(world):
    async with world.playing(says(PIN, VALIDATE)) as stack:
        await Runner(stack).run(world.task, SPEC, trajectory_id="trj_" + "0" * 32)
        labels = {"trajectory": "trj_" + "0" * 32}
        assert not (await stack.sandbox.list_sandboxes(labels=labels)).sandboxes


async def test_unfair_or_unprepared_tasks_are_refused(world):
    task = pb.Task()
    task.CopyFrom(world.task)
    async with world.playing([]) as stack:
        task.state_id = ""
        with pytest.raises(FailedPrecondition, match="no state here"):
            await Runner(stack).run(task, SPEC)
        task.state_id, task.modes[:] = world.task.state_id, [MODE_ANY_FIX]
        with pytest.raises(InvalidArgument, match="not fair"):
            await Runner(stack).run(task, replace(SPEC, mode=MODE_KEEP_NEW))


@pytest.mark.parametrize("edited", [False, True])
async def test_a_sandbox_that_was_killed_is_never_a_score(world, edited):
    seen = []

    async def script(view):
        listed = await stack.sandbox.list_sandboxes(labels={"trajectory": view.trajectory_id})
        if edited and not seen:
            seen.append("edit")
            return call("write_file", path="greet/__init__.py", content="x = 1\n")
        if "killed" not in seen:
            seen.append("killed")
            await kill_first_process(stack, listed.sandboxes[0].id)
        return call("read_file", path="setup.cfg")

    async with world.playing([]) as stack:
        with pytest.raises(InfraError, match="lost its processes"):
            await Runner(stack).run(world.task, SPEC, ScriptedActor("script", script))
    assert "killed" in seen


async def test_an_agent_that_ends_its_own_sandbox_is_scored_without_a_diff(world, monkeypatch):
    async def never(*_: object) -> bool:
        return False

    monkeypatch.setattr(embedded_box, "_KILL_GRACE_S", 0.0)
    monkeypatch.setattr(embedded_box, "all_ended", never)  # so that no command can be stopped
    wrote = call("write_file", path="greet/__init__.py", content=FIXED)
    script = says(wrote, call("run_sh", cmd="sleep 100"), VALIDATE, call("give_up", reason="no"))
    async with world.playing(script) as stack:
        spec = replace(SPEC, budget=replace(SPEC.budget, tool_s=0.5))
        found = await Runner(stack).run(world.task, spec)
    told = [turn.text for turn in found.turns if turn.role == pb.TURN_ROLE_TOOL]
    assert "timeout" in told[1]
    assert "went over a limit" in told[2]
    assert "went over a limit" in found.labels["diff"]
    assert (found.reward.solved, list(found.changes)) == (False, [])


@pytest.mark.parametrize("after", ["run", "read_file"])
async def test_facts_of_a_sandbox_that_dies_meanwhile_are_not_kept(world, monkeypatch, after):
    async with world.playing(says(PIN, VALIDATE)) as stack:
        runner, dying = Runner(stack), getattr(stack.sandbox, after)

        async def once(sandbox_id, *args, **kwargs):
            monkeypatch.undo()
            found = await dying(sandbox_id, *args, **kwargs)
            await stack.sandbox.delete_sandbox(sandbox_id)
            return found

        monkeypatch.setattr(stack.sandbox, after, once)
        with pytest.raises(InfraError, match="is gone"):
            await shared_start(runner, world.task, SPEC, 2)
        assert runner.facts.peek(world.task) is None
        found = await runner.run(world.task, SPEC)
        assert found.reward.solved
        facts = runner.facts.peek(world.task)
        assert facts.lock.pins["wordlib"] == "2.0"
        assert "1.0" in facts.offered["wordlib"]

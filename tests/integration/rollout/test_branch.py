"""Branching a rollout at a turn: the same tokens and files up to there, nothing run again."""

import asyncio
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dataset_svc.__main__ import serving
from dataset_svc.settings import DatasetSettings
from regreen.common.v1 import GRADER_BUILD_GATES, PIPELINE_FULL
from regreen.dataset import v1 as pb
from regreen.rollout.branch import branch_point
from regreen.rollout.context import FULL, EpisodeSpec, Knobs
from regreen.rollout.episode import Runner, run_branch
from regreen.rollout.record import segments
from regreen.rpc.errors import FailedPrecondition, InvalidArgument
from tests.integration import dataset_samples as samples
from tests.integration.rollout.world import PIN, VALIDATE, call, says

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.asyncio(loop_scope="session")
SPEC = EpisodeSpec(grader=GRADER_BUILD_GATES, knobs=Knobs(keep_states=True))
STAMP = call("run_sh", cmd="date +%s%N > stamp; cat stamp; echo x >> runs")
SHOW = call("run_sh", cmd="cat stamp; wc -l < runs; ls")
SPOIL = call("run_sh", cmd="echo y > spoiled")


async def _discard(stack, *trajectories):
    """Delete what was kept."""
    ids = {turn.state_id for found in trajectories for turn in found.turns if turn.state_id}
    for id in ids - {trajectories[0].state_id}:
        await stack.state.delete_state(id)


async def test_a_branch_has_the_tokens_and_files_of_its_turn(world):
    async with world.playing(says(STAMP, SPOIL, VALIDATE)) as stack:
        origin = await Runner(stack).run(world.task, SPEC)
    assert not origin.reward.solved
    tools = [t for t in origin.turns if t.role == pb.TURN_ROLE_TOOL]
    stamp = tools[0].text
    assert origin.turns[0].state_id == world.task.state_id
    assert len({turn.state_id for turn in tools[:2]} | {world.task.state_id}) == 3
    assert tools[2].state_id == tools[1].state_id  # a validation changes nothing

    async with world.playing(says("never", SHOW, PIN, VALIDATE)) as stack:
        found = [
            await run_branch(stack, world.task, origin, 2, seed=seed, settings={})
            for seed in (1, 2)
        ]
        branch = found[0]
        end = origin.turns[2].token_end
        assert branch.token_ids[:end] == origin.token_ids[:end]
        assert [t.text for t in branch.turns[:3]] == [t.text for t in origin.turns[:3]]
        assert set(branch.loss_mask[:end]) == {0}
        assert 1 in branch.loss_mask[end:]
        (segment,) = segments(branch)
        assert segment.prompt_tokens == origin.prompt_tokens
        # The command of the prefix was not run again, and the turn after it never was.
        seen = branch.turns[4].text
        assert stamp.split()[1] in seen
        assert "\n1\n" in seen
        assert "spoiled" not in seen
        assert branch.reward.solved
        assert branch.labels["branch_of"] == origin.id
        assert branch.labels["branch_turn"] == "2"
        assert branch.id != origin.id
        assert branch.seed != found[1].seed

        from_the_start = await run_branch(stack, world.task, origin, 0)
        assert from_the_start.turns[0].text == origin.turns[0].text
        with pytest.raises(InvalidArgument, match="what the policy said"):
            await run_branch(stack, world.task, origin, 1)
        with pytest.raises(InvalidArgument, match="none of"):
            await run_branch(stack, world.task, origin, 99)
        with pytest.raises(InvalidArgument, match="branch earlier"):
            await run_branch(stack, world.task, origin, 4, settings={"budget.turns": "2"})
        await _discard(stack, origin)
        with pytest.raises(FailedPrecondition, match="has gone"):
            await run_branch(stack, world.task, origin, 2)


async def test_a_rollout_that_kept_no_states_cannot_be_branched(world):
    spec = replace(SPEC, knobs=Knobs())
    async with world.playing(says(STAMP, VALIDATE)) as stack:
        before = {s.id for s in (await stack.state.list_states(page_size=1000)).states}
        origin = await Runner(stack).run(world.task, spec)
        assert {s.id for s in (await stack.state.list_states(page_size=1000)).states} == before
    with pytest.raises(FailedPrecondition, match="--keep-states"):
        branch_point(origin, 2)
    assert branch_point(origin, 0).state_id == world.task.state_id


async def test_a_branch_of_the_full_pipeline_goes_on_in_its_attempt(world):
    broken = call("write_file", path="greet/__init__.py", content="import nothing_like_this\n")
    script = says(broken, VALIDATE, STAMP, VALIDATE)
    spec = replace(SPEC, pipeline=PIPELINE_FULL, budget=replace(FULL, attempt_turns=3, tries=1))
    async with world.playing([*script]) as stack:
        origin = await Runner(stack).run(world.task, spec)
    prompts = [t for t in origin.turns if t.role == pb.TURN_ROLE_PROMPT]
    assert len(prompts) == 2, "the broken import is a new error, so the context was reset"
    assert prompts[1].state_id not in ("", world.task.state_id)
    turn = prompts[1].index + 2
    assert origin.turns[turn].role == pb.TURN_ROLE_TOOL
    async with world.playing(says("never", SHOW, VALIDATE)) as stack:
        settings = {"budget.attempt_turns": "3", "budget.tries": "1"}
        found = await run_branch(stack, world.task, origin, turn, settings=settings)
        assert found.turns[0].text == prompts[1].text
        assert list(found.token_ids[: len(segments_of(origin, turn))]) == segments_of(origin, turn)
        assert found.pipeline == PIPELINE_FULL
        at_prompt = prompts[1].index
        before = sum(t.role == pb.TURN_ROLE_POLICY for t in origin.turns[:at_prompt])
        short = {**settings, "budget.turns": str(before)}
        with pytest.raises(InvalidArgument, match="branch earlier"):
            await run_branch(stack, world.task, origin, at_prompt, settings=short)
        again = await run_branch(stack, world.task, origin, at_prompt, settings=settings)
        roles = [turn.role for turn in again.turns]
        assert roles[:2] == [pb.TURN_ROLE_PROMPT, pb.TURN_ROLE_POLICY], (
            "the prompt is not made twice"
        )
        assert again.turns[0].text == prompts[1].text
        point = branch_point(origin, at_prompt)
        assert point.spent == before
        assert point.commands == ("write_file greet/__init__.py",)
        other = pb.Task()
        other.CopyFrom(world.task)
        other.state_id = "st_" + "0" * 32
        with pytest.raises(FailedPrecondition, match="run it again"):
            await run_branch(stack, other, origin, turn, settings=settings)
        await _discard(stack, origin, found, again)


async def test_the_command_branches_a_stored_trajectory(world, database_url, tmp_path):
    settings = DatasetSettings(
        home=tmp_path / "data", listen="127.0.0.1:0", metrics="127.0.0.1:0", drain_s=0.5,
        fsync=False,
    )  # fmt: skip
    script = [*says(STAMP, SPOIL, VALIDATE)]

    async def regreen(*arguments):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", "from regreen.cli.main import main; main()"),
            *(*arguments, "--home", str(tmp_path)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        out, err = await process.communicate()
        return process.returncode, [json.loads(line) for line in out.splitlines()], err.decode()

    async with (
        serving(settings, database_url) as dataset,
        world.playing(script, dataset=dataset.address) as stack,
    ):
        (tmp_path / "run").mkdir()
        found = {"endpoints": asdict(stack.endpoints)}
        (tmp_path / "run" / "stack.json").write_text(json.dumps(found))
        task = pb.Task()
        task.CopyFrom(world.task)
        task.id, task.state_id = samples.fresh("greet"), ""
        await stack.tasks.import_tasks([task])
        report = samples.report(task.id)
        report.state_id = world.task.state_id
        await stack.tasks.record_gate(report)
        options = ("--grader", "build_gates", "--json")
        code, rows, err = await regreen(
            *("rollout", "run", "--task", task.id, "--keep-states", *options)
        )
        assert code == 0, err
        origin = await stack.trajectories.get_trajectory(rows[0]["id"])
        code, rows, err = await regreen(
            *("rollout", "branch", origin.id, "--turn", "2", "--samples", "2", "--json")
        )
        assert code == 0, err
        assert len(rows) == 2
        for row in rows:
            branch = await stack.trajectories.get_trajectory(row["id"])
            end = origin.turns[2].token_end
            assert branch.token_ids[:end] == origin.token_ids[:end]
            assert dict(branch.labels).items() >= {
                ("branch_of", origin.id), ("branch_turn", "2"),
            }  # fmt: skip
        code, _, err = await regreen("rollout", "branch", rows[0]["id"], "--turn", "4")
        assert code != 0
        assert "--keep-states" in err
        await _discard(stack, origin)


def segments_of(origin, turn):
    """Tokens of the context of a turn, to its end."""
    start = max(t.token_start for t in origin.turns[: turn + 1] if t.role == pb.TURN_ROLE_PROMPT)
    return list(origin.token_ids[start : origin.turns[turn].token_end])

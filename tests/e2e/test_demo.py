"""The demo, small: real tasks and the real model; stopped in the middle and resumed."""

import asyncio
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from regreen.client.stack import Endpoints, Stack
from regreen.dataset import v1 as pb
from regreen.demo import QUICK, run_demo
from regreen.rollout.baselines import NAMES
from regreen.stack import control
from regreen.stack.layout import Layout
from regreen.train.rows import all_trajectories

TINY = replace(
    QUICK,
    name="demo-tiny",
    train_tasks=2,
    test_tasks=1,
    eval_samples=1,
    sft_epochs=1,
    sft_styles=2,
    grpo_steps=1,
    groups_per_step=1,
    group_size=2,
    trainable_layers=2,
    labels={**QUICK.labels, "budget.turns": "3", "budget.turn_tokens": "40"},
)


@pytest.fixture
async def home():
    """A home whose stack is up on free ports."""
    folder = Path(tempfile.mkdtemp(prefix="regreen-demo-"))
    folder.chmod(0o711)
    layout = Layout(folder)
    try:
        await control.up(layout, fixed_ports=False)
        yield folder
    finally:
        await control.down(layout)
        shutil.rmtree(folder, ignore_errors=True)


async def _stored(home: Path) -> dict[str, str]:
    """Every stored trajectory with the time of its end."""
    async with Stack(Endpoints.load(home)) as stack:
        rows = all_trajectories(stack, pb.TrajectoryFilter())
        return {row.id: row.end_time.ToJsonString() async for row in rows}


@pytest.mark.registry
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("registry")
async def test_a_demo_stopped_in_the_middle_goes_on_and_reports(home):
    stages: list[str] = []
    running = asyncio.current_task()

    def stop_after_the_base_policy(progress):
        if progress.stage == "sft" and running.cancelling() == 0:
            running.cancel()

    with pytest.raises(asyncio.CancelledError):
        await run_demo(home, TINY, stop_after_the_base_policy, lambda *_, **__: None)
    running.uncancel()
    before = await _stored(home)
    assert before

    result = await run_demo(home, TINY, lambda p: stages.append(p.stage), lambda *_, **__: None)
    after = await _stored(home)
    assert before.items() <= after.items()  # nothing was rolled out twice
    assert "experts" not in stages
    found = json.loads(result.json.read_text())
    subjects = {cell["subject"] for cell in found["cells"]}
    assert {"base", *(f"baseline:{name}" for name in NAMES)} <= subjects
    assert {"sft", "grpo"} <= subjects
    assert found["wall_seconds"].keys() >= {"tasks", "evaluate base", "sft", "grpo"}
    assert result.html.stat().st_size > 10_000
    assert (await control.status(Layout(home)))[0].state == "serving"  # it was up, so it stays up

    Layout(home).borrowed.touch()  # as a demo that was killed leaves it
    await run_demo(home, TINY, lambda _: None, lambda *_, **__: None)
    assert (await control.status(Layout(home)))[0].state == "down"
    assert not Layout(home).borrowed.exists()

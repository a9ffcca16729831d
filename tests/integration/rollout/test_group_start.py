"""The first outputs of a group depend on the group alone, not on who runs together."""

from dataclasses import replace

import pytest

from regreen.rollout.context import EpisodeSpec
from regreen.rollout.episode import Runner
from regreen.rollout.group import shared_start

pytestmark = pytest.mark.asyncio(loop_scope="session")
TEXTS = [f"output {index}" for index in range(5)]


async def test_a_member_alone_gets_the_output_that_it_had_in_the_group(world):
    spec = EpisodeSpec(group_seed=7)
    script = [{"texts": TEXTS, "rotate": True}]
    async with world.playing(script) as stack:
        runner = Runner(stack)
        starts = [
            await shared_start(runner, world.task, replace(spec, group_index=index, seed=seed), 3)
            for index, seed in enumerate((11, 12, 13))
        ]
        other = await shared_start(runner, world.task, replace(spec, group_seed=8), 3)
    assert starts[0] == starts[1] == starts[2]
    assert len(starts[0].samples) == 3
    firsts = [starts[0].actor(index).first for index in range(3)]
    assert [first.text for first in firsts if first] == [s.text for s in starts[0].samples]
    assert other.samples != starts[0].samples

"""Experts: repairs that follow from what is visible, with slips that carry no loss."""

from dataclasses import replace

import pytest

from regreen.common.v1 import MODE_KEEP_NEW
from regreen.dataset import v1 as pb
from regreen.rollout.context import Knobs
from regreen.rollout.episode import Runner
from regreen.rollout.experts import Style, expert_trajectories
from tests.integration.rollout.test_episodes import SPEC, said

pytestmark = pytest.mark.asyncio(loop_scope="session")
QUICK = replace(SPEC, knobs=Knobs(confirm=False))
STYLES = (Style(), Style(step=True), Style(keyword=True))


async def test_experts_repair_from_what_is_visible(world):
    async with world.playing([]) as stack:
        kept = await expert_trajectories(Runner(stack), world.task, QUICK, STYLES)
    assert len(kept) == 3
    assert {t.labels["guesses"] for t in kept} == {"0"}
    for found in kept:
        assert (found.actor, found.reward.solved) == ("expert", True)
        assert sum(found.loss_mask) > 10
        assert not any(found.logprobs)
    listed, stepped, keyword = (said(t, pb.TURN_ROLE_POLICY) for t in kept)
    assert [len(texts) for texts in (listed, stepped, keyword)] == [3, 2, 2]
    assert '"<2"' in stepped[0]
    assert '"previous"' in keyword[0]


async def test_source_edits_are_read_before_they_are_made(world):
    spec = replace(QUICK, mode=MODE_KEEP_NEW)
    async with world.playing([]) as stack:
        (kept,) = await expert_trajectories(Runner(stack), world.task, spec, STYLES[:1])
    texts = said(kept, pb.TURN_ROLE_POLICY)
    edits = [at for at, text in enumerate(texts) if "sed -i" in text]
    reads = [at for at, text in enumerate(texts) if "read_file" in text]
    assert len(edits) == len(reads) > 0
    assert max(reads) < min(edits)


async def test_a_slip_stands_in_the_context_without_loss(world):
    slips = (Style(slip="version"), Style(slip="name", step=True))
    async with world.playing([]) as stack:
        kept = await expert_trajectories(Runner(stack), world.task, QUICK, slips)
    assert len(kept) == 2
    for found in kept:
        first, *rest = (t for t in found.turns if t.role == pb.TURN_ROLE_POLICY)
        assert not any(found.loss_mask[first.token_start : first.token_end])
        assert all(all(found.loss_mask[t.token_start : t.token_end]) for t in rest)
        told = next(t for t in found.turns if t.role == pb.TURN_ROLE_TOOL)
        assert told.text.count("error:") == 1
        assert found.reward.solved


async def test_what_no_policy_could_say_within_its_limits_is_not_kept(world):
    short = replace(QUICK, budget=replace(QUICK.budget, turn_tokens=8))
    async with world.playing([]) as stack:
        assert await expert_trajectories(Runner(stack), world.task, short, STYLES) == []

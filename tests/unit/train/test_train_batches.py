"""Batches and signals: what was sampled arrives unchanged, and every group has one fate."""

import numpy as np
import pytest

from regreen.batch import Batch
from regreen.dataset import v1 as pb
from regreen.rpc.errors import InvalidArgument
from regreen.train import signals
from regreen.train.batches import grpo_batch, sft_batch

PROMPT, TOOL = [1, 2, 3], [40, 41]


def trajectory(index: int = 0, *, reward: float = 0.0, said=(7, 8), **changes) -> pb.Trajectory:
    """Prompt, a sampled turn, a tool result, a sampled token."""
    ids = [*PROMPT, *said, *TOOL, 9]
    mask = [0, 0, 0, *[1] * len(said), 0, 0, 1]
    start, end = len(PROMPT), len(PROMPT) + len(said)
    fields = {
        "id": f"trj_{index}",
        "group_index": index,
        "token_ids": ids,
        "loss_mask": bytes(mask),
        "logprobs": [-0.25 * bit for bit in mask],
        "versions": [
            pb.TokenVersion(version=4, start=start, end=end),
            pb.TokenVersion(version=5, start=end + 2, end=end + 3),
        ],
        "turns": [
            pb.Turn(role=pb.TURN_ROLE_PROMPT, token_end=start),
            pb.Turn(role=pb.TURN_ROLE_POLICY, token_start=start, token_end=end, tool="read_file"),
            pb.Turn(role=pb.TURN_ROLE_TOOL, token_start=end, token_end=end + 2),
            pb.Turn(role=pb.TURN_ROLE_POLICY, token_start=end + 2, token_end=end + 3),
        ],
        "reward": pb.Reward(value=reward, solved=reward > 0),
        "end": pb.EPISODE_END_SUBMITTED,
        "token_exact": True,
        "prompt_tokens": start,
    }
    return pb.Trajectory(**(fields | changes))


def group(name: str, *members: pb.Trajectory, lost: int = 0) -> pb.CompleteGroup:
    return pb.CompleteGroup(group=pb.Group(id=name), trajectories=members, lost=lost)


def reset(index: int, reward: float) -> pb.Trajectory:
    """Two contexts: the full pipeline starts anew after an error changed."""
    one = trajectory(index, reward=reward)
    size = len(one.token_ids)
    twice = trajectory(index, reward=reward)
    twice.token_ids.extend(one.token_ids)
    twice.loss_mask = one.loss_mask * 2
    twice.logprobs.extend(one.logprobs)
    for span in one.versions:
        twice.versions.add(version=span.version, start=span.start + size, end=span.end + size)
    for turn in one.turns:
        later = twice.turns.add()
        later.CopyFrom(turn)
        later.token_start, later.token_end = turn.token_start + size, turn.token_end + size
    return twice


def test_a_batch_holds_what_was_sampled():
    batch = grpo_batch([group("grp_a", trajectory(0, reward=1.0), trajectory(1))])
    again = Batch.from_bytes(batch.to_bytes())
    first = again.samples[0]
    assert first.token_ids.tolist() == [1, 2, 3, 7, 8, 40, 41, 9]
    assert first.loss_mask.tolist() == [0, 0, 0, 1, 1, 0, 0, 1]
    assert first.logprobs.tolist() == [0, 0, 0, -0.25, -0.25, 0, 0, -0.25]
    assert [(s.start, s.end, s.version) for s in first.spans] == [(3, 5, 4), (7, 8, 5)]
    assert (first.prompt_len, first.reward, first.advantage, first.weight) == (3, 1.0, None, 1.0)


def test_the_order_of_groups_and_members_does_not_change_the_bytes():
    one = group("grp_a", trajectory(0, reward=1.0), trajectory(1))
    two = group("grp_b", trajectory(0), trajectory(1, reward=1.0))
    flipped = group("grp_a", trajectory(1), trajectory(0, reward=1.0))
    assert grpo_batch([one, two]).digest == grpo_batch([two, flipped]).digest


def test_truncated_members_keep_their_reward_and_are_marked():
    cut = trajectory(1, end=pb.EPISODE_END_TOKEN_LIMIT)
    batch = grpo_batch([group("grp_a", trajectory(0, reward=1.0), cut)])
    assert [sample.truncated for sample in batch] == [False, True]
    assert [sample.reward for sample in batch] == [1.0, 0.0]


def test_members_without_exact_tokens_are_left_out():
    guess = trajectory(2, reward=1.0, token_exact=False)
    members = (trajectory(0, reward=1.0), trajectory(1), guess)
    assert len(grpo_batch([group("grp_a", *members)])) == 2
    with pytest.raises(InvalidArgument, match="hold no trainable trajectory"):
        grpo_batch([group("grp_a", guess)])


def test_a_trajectory_of_two_contexts_counts_once():
    cut = trajectory(2, end=pb.EPISODE_END_TIME_LIMIT)
    batch = grpo_batch([group("grp_a", reset(0, 1.0), trajectory(1), cut)])
    assert [sample.sample_id for sample in batch] == ["trj_0", "trj_0", "trj_1", "trj_2"]
    assert [sample.weight for sample in batch] == [0.5, 0.5, 1.0, 1.0]
    assert [sample.advantage for sample in batch] == [None] * 4
    assert [sample.reward for sample in batch] == [1.0, 1.0, 0.0, 0.0]
    assert [sample.truncated for sample in batch] == [False, False, False, True]
    assert all(sample.token_ids.size == 8 for sample in batch)
    assert [(s.start, s.end) for s in batch.samples[1].spans] == [(3, 5), (7, 8)]


def test_a_supervised_batch_carries_loss_on_what_was_said_alone():
    batch = sft_batch([trajectory(0, reward=1.0), reset(1, 1.0)])
    assert batch.kind == "sft"
    assert len(batch) == 3
    assert not np.any([sample.logprobs for sample in batch])
    assert batch.trained_tokens == 9


def test_every_group_has_one_fate():
    mixed = group("m", trajectory(0, reward=1.0), trajectory(1))
    same = group("s", trajectory(0), trajectory(1))
    thin = group("t", trajectory(0, reward=1.0), lost=1)
    limit = {"end": pb.EPISODE_END_TURN_LIMIT}
    silent = group("c", trajectory(0, reward=-1.0, **limit), trajectory(1, **limit))
    fates = [signals.fate(g, version=5, max_staleness=1) for g in (mixed, same, thin, silent)]
    assert fates == ["trained", "zero_variance", "thin", "zero_variance"]
    assert signals.fate(mixed, version=6, max_staleness=1) == "stale"


def test_truncated_members_teach_as_the_learner_is_told_to():
    limit = {"end": pb.EPISODE_END_TURN_LIMIT}
    groups = {
        "all": group("a", trajectory(0, reward=-1.0, **limit), trajectory(1, **limit)),
        "one": group("o", trajectory(0, reward=1.0), trajectory(1, **limit)),
        "none": group("n", trajectory(0, reward=1.0), trajectory(1)),
    }

    def teaching(policy: str) -> set[str]:
        return {
            name
            for name, found in groups.items()
            if signals.fate(found, version=5, max_staleness=1, truncated=policy) == "trained"
        }

    assert {policy: teaching(policy) for policy in signals.TRUNCATED_POLICIES} == {
        "fail": {"all", "one", "none"},
        "mask_loss": {"none"},
        "keep_baseline": {"one", "none"},
    }


def test_metrics_count_all_groups_not_only_those_that_teach():
    hacked = trajectory(1)
    hacked.reward.hacks.append("TEST_SKIPPED")
    groups = [
        group("m", trajectory(0, reward=1.0), hacked),
        group("s", trajectory(0), trajectory(1, end=pb.EPISODE_END_GAVE_UP), lost=1),
    ]
    fates = {g.group.id: signals.fate(g, version=5, max_staleness=8) for g in groups}
    found = signals.step_metrics(groups, fates, version=5)
    assert (found["reward_mean"], found["solve_rate"], found["hack_rate"]) == (0.25, 0.25, 0.25)
    assert (found["zero_variance_share"], found["lost"], found["gave_up_share"]) == (0.5, 1, 0.25)
    assert found["hack/TEST_SKIPPED"] == 0.25
    assert found["staleness_mean"] == pytest.approx(2 / 3)
    assert found["tool_share/read_file"] == found["tool_share/INVALID"] == 0.5
    assert all(np.isfinite(value) for value in found.values())


def test_scores_of_turns_travel_where_they_are_wanted():
    praised, hacked = reset(0, 1.0), trajectory(1)
    for turn, score in zip(praised.turns, (0, 0.5, 0, -1.0, 0, 0.25, 0, 0), strict=True):
        turn.score = score
    for turn, score in zip(hacked.turns, (0, 0.5, 0, -1.0), strict=True):
        turn.score = score
    hacked.reward.hacks.append("TEST_DELETED")
    batch = grpo_batch([group("grp_a", praised, hacked)], turn_scores=True)
    assert [sample.turn_scores.tolist() for sample in batch] == [
        [0, 0, 0, 0.5, 0.5, 0, 0, -1.0],
        [0, 0, 0, 0.25, 0.25, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, -1.0],
    ], "what led to a hack is not praised"
    unwanted = grpo_batch([group("grp_a", praised, hacked)])
    assert all(sample.turn_scores is None for sample in unwanted)

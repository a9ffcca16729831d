"""The token stream: append-only, masked, provable."""

import pytest

from regreen.dataset import v1 as pb
from regreen.rollout.record import Sample, TokenStream, segments
from regreen.rpc.errors import InfraError


def _stream():
    stream = TokenStream()
    stream.add_prompt([1, 2, 3], "prompt")
    assert stream.sending() == [1, 2, 3]
    stream.add_sample(
        Sample("a", [4, 5], [-0.5, -1.0], [(7, 0, 1), (8, 1, 2)]),
        tool="read_file",
        arguments_json="{}",
        ok=True,
    )
    stream.add_result([6], "seen", tool="read_file", ok=True)
    assert stream.sending() == [1, 2, 3, 4, 5, 6]
    stream.add_sample(Sample("b", [9], [-0.1], [(8, 0, 1)]), tool="", arguments_json="", ok=False)
    return stream


def test_fills_a_trajectory_with_masks_versions_and_turns():
    trajectory = pb.Trajectory()
    _stream().fill(trajectory)
    assert list(trajectory.token_ids) == [1, 2, 3, 4, 5, 6, 9]
    assert trajectory.loss_mask == bytes([0, 0, 0, 1, 1, 0, 1])
    assert list(trajectory.logprobs) == pytest.approx([0, 0, 0, -0.5, -1.0, 0, -0.1])
    assert [(v.version, v.start, v.end) for v in trajectory.versions] == [
        (7, 3, 4),
        (8, 4, 5),
        (8, 6, 7),
    ]
    assert [(t.token_start, t.token_end) for t in trajectory.turns] == [
        (0, 3),
        (3, 5),
        (5, 6),
        (6, 7),
    ]
    assert trajectory.prompt_tokens == 3
    assert trajectory.token_exact


def test_what_may_not_be_learned_carries_no_loss():
    stream = _stream()
    slip = Sample("c", [7, 8], [0.0, 0.0], [(0, 0, 2)], learned=False)
    stream.add_sample(slip, tool="read_file", arguments_json="{}", ok=True)
    trajectory = pb.Trajectory()
    stream.fill(trajectory)
    assert trajectory.loss_mask == bytes([0, 0, 0, 1, 1, 0, 1, 0, 0])
    assert trajectory.versions[-1].end == 7
    assert trajectory.turns[-1].token_end == 9
    assert trajectory.token_exact


def test_a_reset_context_begins_a_segment_of_its_own():
    stream = _stream()
    stream.add_prompt([1, 2], "again")
    assert stream.context == [1, 2]
    assert stream.sending() == [1, 2]
    stream.add_sample(Sample("c", [3], [-0.2], [(9, 0, 1)]), tool="", arguments_json="", ok=True)
    trajectory = pb.Trajectory()
    stream.fill(trajectory)
    first, second = segments(trajectory)
    assert (first.token_ids, first.loss_mask) == (
        (1, 2, 3, 4, 5, 6, 9),
        bytes([0, 0, 0, 1, 1, 0, 1]),
    )
    assert (second.token_ids, second.loss_mask) == ((1, 2, 3), bytes([0, 0, 1]))
    assert (second.versions, second.prompt_tokens) == (((9, 2, 3),), 2)


def test_a_changed_prefix_is_found():
    stream = _stream()
    stream.token_ids[1] = 99
    with pytest.raises(InfraError, match="prefix"):
        stream.check()


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (lambda s: s.mask.__setitem__(0, 1), "versions"),
        (lambda s: s.logprobs.__setitem__(4, float("nan")), "finite"),
        (lambda s: s.logprobs.pop(), "length"),
        (lambda s: s.turns.pop(1), "cover"),
        (lambda s: s.versions.pop(), "versions"),
    ],
)
def test_a_broken_stream_is_refused(break_it, told):
    stream = _stream()
    break_it(stream)
    with pytest.raises(InfraError, match=told):
        stream.fill(pb.Trajectory())


def test_samples_without_exact_tokens_are_marked():
    stream = TokenStream()
    stream.add_prompt([1], "p")
    stream.add_sample(
        Sample("x", [5, 6], [], (), token_exact=False), tool="", arguments_json="", ok=True
    )
    trajectory = pb.Trajectory()
    stream.fill(trajectory)
    assert not trajectory.token_exact
    with pytest.raises(InfraError, match="logprobs"):
        TokenStream().add_sample(Sample("x", [5], []), tool="", arguments_json="", ok=True)

"""Tool transition statistics."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regreen.dataset import v1 as dataset_pb
from regreen.evals import markov

sequences = st.lists(st.lists(st.sampled_from(["read", "write", "build"]), max_size=6), max_size=6)


def test_transitions_of_a_small_example():
    found = markov.transitions([["read", "build", "build"], ["build"]], tools=["read", "build"])
    assert found.rows == ("START", "read", "build")
    assert found.columns == ("read", "build", "END")
    assert found.counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 1, 2]]
    assert found.probabilities[2].tolist() == pytest.approx([0, 1 / 3, 2 / 3])
    assert markov.tool_shares([["read", "build", "build"], ["build"]]) == {
        "build": 0.75,
        "read": 0.25,
    }


@given(sequences)
def test_rows_are_distributions_and_flow_is_conserved(paths):
    found = markov.transitions(paths)
    sums = found.probabilities.sum(axis=1)
    assert np.all(np.isclose(sums, 1) | (sums == 0))
    assert found.counts.sum() == sum(len(path) + 1 for path in paths)
    for tool in found.rows[1:]:
        entered = found.counts[:, found.columns.index(tool)].sum()
        assert entered == found.counts[found.rows.index(tool)].sum()


@given(sequences)
def test_the_order_of_trajectories_does_not_matter(paths):
    tools = ["read", "write", "build"]
    first, second = markov.transitions(paths, tools), markov.transitions(paths[::-1], tools)
    assert not markov.difference(first, second).any()


def test_different_axes_are_refused():
    with pytest.raises(ValueError, match="different axes"):
        markov.difference(markov.transitions([["a"]]), markov.transitions([["b"]]))


def test_only_policy_turns_count_and_unparsable_ones_are_invalid():
    turns = [
        dataset_pb.Turn(index=1, role=dataset_pb.TURN_ROLE_POLICY, tool="read_file", ok=True),
        dataset_pb.Turn(index=0, role=dataset_pb.TURN_ROLE_PROMPT),
        dataset_pb.Turn(index=2, role=dataset_pb.TURN_ROLE_TOOL, tool="read_file"),
        dataset_pb.Turn(index=3, role=dataset_pb.TURN_ROLE_POLICY),
    ]
    trajectory = dataset_pb.Trajectory(turns=turns)
    assert markov.tool_sequence(trajectory) == ["read_file", "INVALID"]

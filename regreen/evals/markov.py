"""First-order Markov statistics of tool use (arXiv:2510.22075, figure 4).

- States are tool names plus `START`, `END` and `INVALID` (an output that held no runnable call).
- A row of a transition matrix sums to 1, or to 0 when the tool was never used.
- Counting never depends on the order of the trajectories.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regreen.dataset import v1 as dataset_pb

START, END, INVALID = "START", "END", "INVALID"


@dataclass(frozen=True, slots=True)
class Transitions:
    """Counts of next tools: `counts[i, j]` is how often `columns[j]` followed `rows[i]`."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    counts: NDArray[np.int64]

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """`counts` with every used row normalised to 1."""
        totals = self.counts.sum(axis=1, keepdims=True)
        shares: NDArray[np.float64] = self.counts / np.maximum(totals, 1)
        return shares

    def to_json(self) -> dict[str, object]:
        """Rows, columns, counts and probabilities (rounded to 6 places) as plain lists."""
        return {
            "rows": list(self.rows),
            "columns": list(self.columns),
            "counts": self.counts.tolist(),
            "probabilities": np.round(self.probabilities, 6).tolist(),
        }


def tool_sequence(trajectory: dataset_pb.Trajectory) -> list[str]:
    """Tools in the order of the actor's calls; an output without a call is `INVALID`."""
    turns = sorted(trajectory.turns, key=lambda turn: turn.index)
    return [turn.tool or INVALID for turn in turns if turn.role == dataset_pb.TURN_ROLE_POLICY]


def tool_shares(sequences: Iterable[Sequence[str]]) -> dict[str, float]:
    """Share of all calls by tool, most used first; empty when nothing was called."""
    counts = Counter(tool for sequence in sequences for tool in sequence)
    total = sum(counts.values())
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {tool: count / total for tool, count in ranked}


def transitions(
    sequences: Iterable[Sequence[str]], tools: Sequence[str] | None = None
) -> Transitions:
    """First-order transition counts; `tools` fixes the axes so that matrices can be compared."""
    pairs: Counter[tuple[str, str]] = Counter()
    for sequence in sequences:
        path = [START, *sequence, END]
        pairs.update(itertools.pairwise(path))
    seen = {name for pair in pairs for name in pair} - {START, END}
    names = tuple(tools) if tools is not None else ()
    names += tuple(sorted(seen - set(names)))
    rows, columns = (START, *names), (*names, END)
    counts = np.array([[pairs[row, column] for column in columns] for row in rows], dtype=np.int64)
    return Transitions(rows, columns, counts.reshape(len(rows), len(columns)))


def difference(first: Transitions, second: Transitions) -> NDArray[np.float64]:
    """Change of the transition probabilities from `first` to `second`, on equal axes.

    Raises:
        ValueError: the axes differ; build both with the same `tools`.
    """
    if (first.rows, first.columns) != (second.rows, second.columns):
        raise ValueError("transition matrices have different axes; build both with the same tools")
    return second.probabilities - first.probabilities

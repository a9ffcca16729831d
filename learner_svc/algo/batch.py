"""Packing: many samples become few rows of tokens in which every shared prefix stands once.

What differs from padding a group into a rectangle:

1. No padding: a pack is one row of N tokens.
2. A prefix that samples share (the prompt of a group, the system prompt of all tasks, equal first
   turns) is computed once. A token's hidden state depends only on the tokens before it, so sharing
   changes neither losses nor gradients beyond floating-point summation order.
3. The tokens form a tree of segments: a token sees its own segment up to itself and all of its
   segment's ancestors. Positions count from the root, so rotary embeddings are those of the sample.
4. Only the rows that predict a trained token are scored.

- Every trained token of every packed sample is scored exactly once over all packs.
- A pack holds at most `max_tokens` tokens unless a single sample is longer than that.
- Packing is deterministic: equal samples in equal order give equal packs.
- A branch point is placed only where it saves at least `min_shared` tokens: segments have a cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `[start, end)` of a pack, continuing the segment `parent` (-1: a root)."""

    start: int
    end: int
    parent: int
    depth: int
    """Position of the first token, counted from the root."""


@dataclass(frozen=True, slots=True)
class Pack:
    """One row of N tokens with R scored positions."""

    token_ids: Tensor
    """i64 [N]."""
    position_ids: Tensor
    """i64 [N], counted from the root of each tree."""
    segments: tuple[Segment, ...]
    """Parents come before their children."""
    rows: Tensor
    """i64 [R]: index in the pack of the token whose hidden state predicts the target."""
    targets: Tensor
    """i64 [R]."""
    scored: Tensor
    """i64 [R]: index of the target among all trained tokens of the batch."""
    dense_tokens: int
    """Tokens that the samples would take without sharing."""

    @property
    def tokens(self) -> int:
        """N."""
        return int(self.token_ids.numel())

    def paths(self) -> list[list[int]]:
        """For every segment: itself and its ancestors, root first."""
        found: list[list[int]] = []
        for index, segment in enumerate(self.segments):
            found.append([*(found[segment.parent] if segment.parent >= 0 else []), index])
        return found


def pack_samples(
    token_ids: Sequence[Ids],
    loss_masks: Sequence[NDArray[np.uint8]],
    *,
    max_tokens: int,
    keep: Sequence[bool] | None = None,
    share: bool = True,
    min_shared: int = 16,
) -> list[Pack]:
    """Pack samples; `keep[i]` False leaves sample i out, its tokens keep their `scored` numbers."""
    numbers = np.concatenate([[0], np.cumsum([int(mask.sum()) for mask in loss_masks])])
    chosen = [i for i in range(len(token_ids)) if keep is None or keep[i]]
    if share:
        # Big-endian bytes order like token lists, and neighbours in order share the most.
        chosen.sort(key=lambda i: (token_ids[i].astype(">i4").tobytes(), i))
    packs: list[Pack] = []
    tree = _Tree(min_shared if share else None)
    for index in chosen:
        ids = token_ids[index]
        if tree.tokens and tree.tokens + tree.cost(ids) > max_tokens:
            packs.append(tree.finish())
            tree = _Tree(min_shared if share else None)
        tree.add(ids, loss_masks[index], int(numbers[index]))
    if tree.tokens:
        packs.append(tree.finish())
    return packs


class _Tree:
    """Builds one pack from sorted samples; remembers the latest path from root to leaf."""

    def __init__(self, min_shared: int | None) -> None:
        self._min_shared = min_shared
        self._pieces: list[Ids] = []
        self._segments: list[Segment] = []
        self._path: list[int] = []
        self._latest: Ids = np.empty(0, np.int32)
        self._rows: list[NDArray[np.int64]] = []
        self._targets: list[Ids] = []
        self._scored: list[NDArray[np.int64]] = []
        self._dense_tokens = 0
        self.tokens = 0

    def cost(self, ids: Ids) -> int:
        """Tokens that adding `ids` would add."""
        return int(ids.size) - self._shared(ids)

    def add(self, ids: Ids, loss_mask: NDArray[np.uint8], first_number: int) -> None:
        """Append one sample whose trained tokens are numbered from `first_number`."""
        shared = self._shared(ids)
        self._branch(shared)
        parent = self._path[-1] if self._path else -1
        if ids.size > shared:
            start = self.tokens
            self.tokens += int(ids.size) - shared
            self._path.append(len(self._segments))
            self._segments.append(Segment(start, self.tokens, parent, shared))
            self._pieces.append(ids[shared:])
        self._latest = ids
        self._dense_tokens += int(ids.size)
        self._score(ids, loss_mask, first_number)

    def finish(self) -> Pack:
        """The pack of all samples added."""
        order = sorted(range(len(self._segments)), key=lambda i: self._segments[i].start)
        place = {old: new for new, old in enumerate(order)} | {-1: -1}
        ordered = [self._segments[i] for i in order]
        segments = [Segment(s.start, s.end, place[s.parent], s.depth) for s in ordered]
        positions = [np.arange(s.depth, s.depth + s.end - s.start) for s in segments]
        return Pack(
            token_ids=_long(self._pieces),
            position_ids=_long(positions),
            segments=tuple(segments),
            rows=_long(self._rows),
            targets=_long(self._targets),
            scored=_long(self._scored),
            dense_tokens=self._dense_tokens,
        )

    def _shared(self, ids: Ids) -> int:
        """Depth at which `ids` would branch off the latest path."""
        if self._min_shared is None or not self._path:
            return 0
        size = min(int(ids.size), int(self._latest.size))
        different = np.flatnonzero(ids[:size] != self._latest[:size])
        common = int(different[0]) if different.size else size
        # Round down to an existing branch point where a new one would save too little.
        depth = max((d for d in self._branch_points() if d <= common), default=0)
        return common if common - depth >= self._min_shared else depth

    def _branch_points(self) -> list[int]:
        points = [0]
        for index in self._path:
            segment = self._segments[index]
            points.append(segment.depth + segment.end - segment.start)
        return points

    def _branch(self, depth: int) -> None:
        """Cut the latest path at `depth`, splitting the segment that spans it."""
        while self._path and self._segments[self._path[-1]].depth >= depth:
            self._path.pop()
        if not self._path:
            return
        index = self._path[-1]
        segment = self._segments[index]
        size = depth - segment.depth
        if size >= segment.end - segment.start:
            return
        # The lower half becomes a new segment; it takes over the children that hung on the whole.
        lower = Segment(segment.start + size, segment.end, index, depth)
        self._segments[index] = Segment(
            segment.start, segment.start + size, segment.parent, segment.depth
        )
        moved = len(self._segments)
        for child, other in enumerate(self._segments):
            if other.parent == index:
                self._segments[child] = Segment(other.start, other.end, moved, other.depth)
        self._segments.append(lower)

    def _score(self, ids: Ids, loss_mask: NDArray[np.uint8], first_number: int) -> None:
        positions = np.flatnonzero(loss_mask)
        where = self._where(int(ids.size))
        self._rows.append(where[positions - 1])
        self._targets.append(ids[positions])
        self._scored.append(np.arange(first_number, first_number + positions.size))

    def _where(self, size: int) -> NDArray[np.int64]:
        """Index in the pack of every position of the latest path."""
        parts = [np.arange(s.start, s.end) for s in (self._segments[i] for i in self._path)]
        return np.concatenate(parts)[:size].astype(np.int64)


def _long(parts: Sequence[NDArray[np.generic]]) -> Tensor:
    whole = np.concatenate(parts) if parts else np.empty(0)
    return torch.from_numpy(whole.astype(np.int64))

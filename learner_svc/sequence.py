"""Sequence parallelism: a group of ranks divides the tokens of each pack, and its heads.

- Each rank has an equal run of a pack's tokens; the last one's is filled up with tokens that
  nothing attends to and nothing is scored by.
- Around attention an all-to-all gives every rank all tokens of a part of the heads, and back; all
  else is done token by token, on a rank's own.
- What was scored is gathered, one number a row: every rank of a group has the same loss of the
  whole pack. Gradients of parameters add up over all ranks, as those of other packs do.
- Every rank of a group makes the same calls in the same order, also one that scores nothing.

Source: DeepSpeed-Ulysses, arXiv 2309.14509; with repeated key heads, arXiv 2506.13996.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from learner_svc.algo.batch import Pack


@dataclass(frozen=True, slots=True)
class Shard:
    """The n tokens of a pack that are one rank's, and the r rows among them that are scored."""

    token_ids: Tensor
    """i64 [n]."""
    position_ids: Tensor
    """i64 [n], as in the pack."""
    rows: Tensor
    """i64 [r]: index among the n."""
    targets: Tensor
    """i64 [r]; a target may be the next rank's token."""

    @classmethod
    def of(cls, pack: Pack, rank: int, ranks: int) -> "Shard":
        """That of a rank of a group."""
        size = -(-pack.tokens // ranks)
        rows = owned(pack, ranks)[rank]
        return cls(
            token_ids=_cut(pack.token_ids, rank, size),
            position_ids=_cut(pack.position_ids, rank, size),
            rows=pack.rows[rows] - rank * size,
            targets=pack.targets[rows],
        )


def owned(pack: Pack, ranks: int) -> list[Tensor]:
    """i64 [r] for each rank: which of the pack's R scored rows are its own."""
    size = -(-pack.tokens // ranks)
    owner = pack.rows // size
    return [torch.nonzero(owner == rank)[:, 0] for rank in range(ranks)]


def _cut(values: Tensor, rank: int, size: int) -> Tensor:
    part = values[rank * size : (rank + 1) * size]
    return F.pad(part, (0, size - part.numel()))


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """The ranks that divide packs among them, as one of them sees it."""

    rank: int
    """This one among them."""
    ranks: int
    handle: Any
    """Process group."""

    def heads_of(self, tokens: Tensor, count: int) -> Tensor:
        """[1, H, n, d] of a rank's own tokens to [1, H / ranks, count, d] of all tokens.

        Heads that the ranks do not divide are repeated as often as it takes, each beside itself.
        """
        heads = tokens.shape[1]
        times = math.lcm(heads, self.ranks) // heads
        spread = tokens[0].repeat_interleave(times, 0) if times > 1 else tokens[0]
        parts = self._exchanged(spread.reshape(self.ranks, -1, *spread.shape[1:]))
        return parts.transpose(0, 1).flatten(1, 2)[None, :, :count]

    def tokens_of(self, heads: Tensor) -> Tensor:
        """[1, H / ranks, count, d] of all tokens to [1, H, n, d] of a rank's own."""
        missing = -heads.shape[2] % self.ranks
        filled = F.pad(heads[0], (0, 0, 0, missing))
        parts = filled.reshape(filled.shape[0], self.ranks, -1, filled.shape[2])
        return self._exchanged(parts.transpose(0, 1)).flatten(0, 1)[None]

    def _exchanged(self, parts: Tensor) -> Tensor:
        received: Tensor = _Exchange.apply(parts, self.handle)  # type: ignore[no-untyped-call]
        return received

    def gathered(self, own: Tensor, places: list[Tensor]) -> Tensor:
        """[R] of what each rank has of it, [r] or more, at its `places`; on every rank.

        The gradient is taken to be the same on every rank; each keeps the part that is its own.
        """
        longest = max(1, *(place.numel() for place in places))
        filled = F.pad(own, (0, max(0, longest - own.numel())))[:longest]
        rows = _Gather.apply(filled, self.handle, self.rank, self.ranks)  # type: ignore[no-untyped-call]
        found = torch.cat([rows[i, : place.numel()] for i, place in enumerate(places)])
        return found[torch.argsort(torch.cat(places)).to(own.device)]


@functools.cache
def join(ranks: int) -> SequenceGroup | None:
    """This rank's group, of so many that follow one another; None where each is alone.

    Every rank of the run calls it at the same point, once the ranks are joined.
    """
    if ranks == 1:
        return None
    own, world = dist.get_rank(), dist.get_world_size()
    handles = [
        dist.new_group(list(range(first, first + ranks))) for first in range(0, world, ranks)
    ]
    return SequenceGroup(own % ranks, ranks, handles[own // ranks])


class _Exchange(torch.autograd.Function):
    """Part i of the first dimension goes to rank i; gradients go back as they came."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, handle: Any) -> Tensor:
        ctx.handle = handle
        return _exchanged(parts, handle)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _exchanged(gradients[0], ctx.handle), None


class _Gather(torch.autograd.Function):
    """[r] of each rank to [ranks, r]."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, handle: Any, rank: int, ranks: int) -> Tensor:
        ctx.rank = rank
        parts = [torch.empty_like(own) for _ in range(ranks)]
        dist.all_gather(parts, own.contiguous(), group=handle)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0][ctx.rank], None, None, None


def _exchanged(parts: Tensor, handle: Any) -> Tensor:
    sent = parts.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=handle)
    return received

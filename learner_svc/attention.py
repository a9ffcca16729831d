"""Attention over a tree of segments: a token sees its own segment up to itself, and all ancestors.

- The work is that of the tree: queries never meet keys of other branches.
- On a CPU each segment is one call of `scaled_dot_product_attention`; a GPU, which would spend its
  time on starting thousands of small kernels, takes all in one block-sparse kernel.
- Both give the same values up to the order of summation.

Source: FlexAttention, arXiv 2412.05496 (`torch.nn.attention.flex_attention`).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from learner_svc.algo.batch import Pack, Segment
from learner_svc.sequence import SequenceGroup
from regreen.rpc.errors import InvalidArgument

TREE_ATTENTION = "regreen_tree"
_BLOCK = 128
"""Tokens of a block that is computed whole or not at all."""


@dataclass(frozen=True, slots=True)
class Tree:
    """The segments of a pack, as every layer of a forward pass needs them."""

    pack: Pack
    mask: BlockMask | None
    """Which blocks are computed; None where segments are taken one by one."""
    group: SequenceGroup | None = None
    """The ranks that divide the pack; None where this one has all of it."""

    @classmethod
    def of(cls, pack: Pack, device: torch.device, group: SequenceGroup | None = None) -> "Tree":
        """For a model on that device."""
        return cls(pack, block_mask(pack, device) if device.type == "cuda" else None, group)


def block_mask(pack: Pack, device: torch.device, block: int = _BLOCK) -> BlockMask:
    """Which blocks of queries meet which blocks of keys, and which tokens within them.

    An ancestor's interval of numbers, given in the order of a walk down the tree, holds those of
    all that descend from it.
    """
    first, beyond = _intervals(pack)
    sizes = [segment.end - segment.start for segment in pack.segments]
    opens = torch.from_numpy(np.repeat(first, sizes)).to(device)
    closes = torch.from_numpy(np.repeat(beyond, sizes)).to(device)

    def sees(_b: Tensor, _h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        within = (opens[kv] <= opens[q]) & (opens[q] < closes[kv])
        return within & (kv <= q)

    pairs = _pairs(pack, block)
    whole = pairs == block * block
    number, indices = _dense((pairs > 0) & ~whole, device)
    whole_number, whole_indices = _dense(whole, device)
    return BlockMask.from_kv_blocks(
        number,
        indices,
        whole_number,
        whole_indices,
        BLOCK_SIZE=block,
        mask_mod=sees,
        seq_lengths=(pack.tokens, pack.tokens),
    )


def _intervals(pack: Pack) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """i32 [segments] each: the number of a segment, and the one after its last descendant's."""
    count = len(pack.segments)
    children: list[list[int]] = [[] for _ in range(count)]
    roots: list[int] = []
    for index, segment in enumerate(pack.segments):
        (children[segment.parent] if segment.parent >= 0 else roots).append(index)
    first, beyond = np.zeros(count, np.int32), np.zeros(count, np.int32)
    stack, number = [(root, False) for root in reversed(roots)], 0
    while stack:
        index, done = stack.pop()
        if done:
            beyond[index] = number
            continue
        first[index] = number
        number += 1
        stack.append((index, True))
        stack += [(child, False) for child in reversed(children[index])]
    return first, beyond


def _pairs(pack: Pack, block: int) -> np.ndarray[Any, Any]:
    """i64 [blocks, blocks]: how many pairs of query and key of two blocks see each other."""
    count = -(-pack.tokens // block)
    pairs = np.zeros((count, count), np.int64)
    for path in pack.paths():
        segment = pack.segments[path[-1]]
        rows, height = _shares(segment, block)
        for ancestor in path[:-1]:
            columns, width = _shares(pack.segments[ancestor], block)
            pairs[rows, columns] += np.outer(height, width)
        own = np.tril(np.outer(height, height), -1)
        np.fill_diagonal(own, height * (height + 1) // 2)
        pairs[rows, rows] += own
    return pairs


def _shares(segment: Segment, block: int) -> tuple[slice, np.ndarray[Any, Any]]:
    """The blocks that a segment touches, and how many of its tokens are in each."""
    blocks = slice(segment.start // block, -(-segment.end // block))
    edges = np.arange(blocks.start, blocks.stop + 1, dtype=np.int64) * block
    return blocks, np.diff(np.clip(edges, segment.start, segment.end))


def _dense(chosen: np.ndarray[Any, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """i32 [1, 1, rows] and [1, 1, rows, columns]: how many are chosen in a row, and which first."""
    order = np.argsort(~chosen, axis=1, kind="stable").astype(np.int32)
    number = chosen.sum(1).astype(np.int32)
    return tuple(torch.from_numpy(part).to(device)[None, None] for part in (number, order))  # type: ignore[return-value]


@functools.cache
def _kernel() -> Callable[..., Any]:
    """The block-sparse kernel, compiled at its first call for any length."""
    return torch.compile(flex_attention, dynamic=True)


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: Tree | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """`query` [1, H, N, d], `key` and `value` [1, K, N, d] with K dividing H; gives [1, N, H, d].

    Where a group divides the pack, N are a rank's own tokens.

    Raises:
        InvalidArgument: there is no tree.
    """
    if tree is None:
        raise InvalidArgument("tree", "is missing", "call the model through TrainModel")
    if tree.group is not None:
        count = tree.pack.tokens
        query, key, value = (tree.group.heads_of(part, count) for part in (query, key, value))
    if tree.mask is None:
        mixed = by_segments(query, key, value, tree.pack, scaling, dropout)
    else:
        mixed = _kernel()(query, key, value, block_mask=tree.mask, scale=scaling, enable_gqa=True)
    if tree.group is not None:
        mixed = tree.group.tokens_of(mixed)
    return mixed.transpose(1, 2).contiguous(), None


def by_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pack: Pack,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """[1, H, N, d], one segment after the other.

    Query heads that share a key head are folded into the query length, so that keys and values are
    read once instead of being repeated.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    fold = heads // kv_heads
    parts: list[Tensor] = []
    for segment, path in zip(pack.segments, pack.paths(), strict=True):
        spans = [(pack.segments[i].start, pack.segments[i].end) for i in path]
        keys = torch.cat([key[:, :, start:end] for start, end in spans], 2)
        values = torch.cat([value[:, :, start:end] for start, end in spans], 2)
        size = segment.end - segment.start
        queries = query[:, :, segment.start : segment.end].reshape(1, kv_heads, fold * size, -1)
        seen = torch.ones(size, segment.depth + size, dtype=torch.bool, device=query.device)
        seen = seen.tril(segment.depth).repeat(fold, 1)
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=seen, dropout_p=dropout, scale=scaling
        )
        parts.append(mixed.reshape(1, heads, size, -1))
    return torch.cat(parts, 2)


def _no_mask(*_: object, **__: object) -> None:
    """Tree attention has masks of its own."""


AttentionInterface.register(TREE_ATTENTION, tree_attention)
AttentionMaskInterface.register(TREE_ATTENTION, _no_mask)

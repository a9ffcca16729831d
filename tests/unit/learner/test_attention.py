"""The block-sparse kernel's masks are those of the tree, by token and by block."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from learner_svc.algo.batch import Pack, pack_samples
from learner_svc.attention import Tree, block_mask, by_segments, tree_attention
from regreen.rpc.errors import InvalidArgument

BLOCK = 16
CPU = torch.device("cpu")
samples = st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=60), min_size=1, max_size=6)


def pack_of(ids: list[list[int]]) -> Pack:
    """One pack in which any shared prefix is shared."""
    arrays = [np.array(sample, np.int32) for sample in ids]
    masks = [np.r_[0, np.ones(len(sample) - 1)].astype(np.uint8) for sample in ids]
    [pack] = pack_samples(arrays, masks, max_tokens=10**6, min_shared=1)
    return pack


def seen(pack: Pack) -> torch.Tensor:
    """bool [N, N]: which keys each query sees, token by token."""
    found = torch.zeros(pack.tokens, pack.tokens, dtype=torch.bool)
    for path in pack.paths():
        segment = pack.segments[path[-1]]
        for query in range(segment.start, segment.end):
            for index in path:
                other = pack.segments[index]
                found[query, other.start : min(other.end, query + 1)] = True
    return found


@settings(max_examples=60, deadline=None)
@given(samples)
def test_blocks_are_computed_if_and_only_if_a_token_in_them_is_seen(ids: list[list[int]]) -> None:
    pack = pack_of(ids)
    mask, size = block_mask(pack, CPU, BLOCK), -(-pack.tokens // BLOCK) * BLOCK
    wanted = torch.zeros(size, size, dtype=torch.bool)
    wanted[: pack.tokens, : pack.tokens] = seen(pack)
    count = size // BLOCK
    blocks = wanted.reshape(count, BLOCK, count, BLOCK).transpose(1, 2)
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks.flatten(2).any(2))
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_num_blocks.sum() == blocks.flatten(2).all(2).sum()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=20, deadline=None)
@given(samples)
def test_both_ways_give_the_same_values(ids: list[list[int]]) -> None:
    pack = pack_of(ids)
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, pack.tokens, 8, dtype=torch.double) for heads in (4, 2, 2)
    )
    mask = block_mask(pack, CPU, BLOCK)
    blocks = flex_attention(query, key, value, block_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(blocks, by_segments(query, key, value, pack, 0.3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch has no such gradient")
@pytest.mark.parametrize("lengths", [(5, 9), (300, 40, 41, 700), (1000, 129, 128, 127, 1, 513)])
def test_both_ways_give_the_same_gradients(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    prompt = torch.randint(0, 99, (lengths[0],)).tolist()
    pack = pack_of([prompt + torch.randint(0, 99, (size,)).tolist() for size in lengths[1:]])
    gpu = torch.device("cuda")
    parts = [torch.randn(1, heads, pack.tokens, 64, device=gpu) for heads in (9, 3, 3)]
    found = []
    for tree in (Tree(pack, None), Tree.of(pack, gpu)):
        query, key, value = (part.clone().requires_grad_() for part in parts)
        mixed, _ = tree_attention(torch.nn.Identity(), query, key, value, None, tree=tree)
        grads = torch.autograd.grad(mixed.square().sum(), (query, key, value))
        found.append([mixed.detach(), *grads])
    for ours, other in zip(*found, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-3)


def test_a_model_called_otherwise_is_refused() -> None:
    part = torch.zeros(1, 1, 2, 8)
    with pytest.raises(InvalidArgument, match="TrainModel"):
        tree_attention(torch.nn.Identity(), part, part, part, None)

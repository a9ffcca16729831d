"""Prefix sharing changes the work, never the numbers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner_svc.algo.batch import Pack, pack_samples
from learner_svc.model import TrainModel, freeze, load_model
from learner_svc.spec import Hyperparameters
from regreen.batch import Batch
from regreen.rpc.errors import InvalidArgument


def packs_of(batch: Batch, **options: object) -> list[Pack]:
    return pack_samples(
        [sample.token_ids for sample in batch],
        [sample.loss_mask for sample in batch],
        **{"max_tokens": 4096} | options,  # type: ignore[arg-type]
    )


def paths_text(pack: Pack) -> list[list[int]]:
    """Token ids along every root-to-segment path."""
    found = []
    for path in pack.paths():
        spans = [pack.segments[i] for i in path]
        found.append([int(t) for s in spans for t in pack.token_ids[s.start : s.end]])
    return found


token_lists = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=12), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(token_lists, st.integers(1, 4), st.integers(4, 40), st.booleans())
def test_every_sample_is_a_path_and_every_trained_token_is_scored_once(
    samples: list[list[int]], min_shared: int, max_tokens: int, share: bool
) -> None:
    ids = [np.array(sample, np.int32) for sample in samples]
    masks = [np.r_[0, np.ones(len(sample) - 1)].astype(np.uint8) for sample in samples]
    packs = pack_samples(ids, masks, max_tokens=max_tokens, share=share, min_shared=min_shared)
    flat = np.concatenate([sample[1:] for sample in ids])
    scored = torch.cat([pack.scored for pack in packs])
    assert sorted(scored.tolist()) == list(range(flat.size))
    prefixes = {
        tuple(path[: i + 1])
        for pack in packs
        for path in paths_text(pack)
        for i in range(len(path))
    }
    assert all(tuple(sample) in prefixes for sample in samples)
    longest = max(map(len, samples))
    for pack in packs:
        assert pack.tokens <= max(max_tokens, longest)
        assert pack.targets.tolist() == flat[pack.scored.numpy()].tolist()
        for segment, path in zip(pack.segments, pack.paths(), strict=True):
            above = sum(pack.segments[i].end - pack.segments[i].start for i in path[:-1])
            assert segment.depth == above
            positions = pack.position_ids[segment.start : segment.end]
            assert positions.tolist() == [above + i for i in range(len(positions))]
        assert all(segment.parent < index for index, segment in enumerate(pack.segments))


def test_a_group_holds_its_prompt_once(make_batch: Callable[..., Batch]) -> None:
    batch = make_batch(groups=2, size=4)
    [pack] = packs_of(batch)
    completions = sum(s.token_ids.size - s.prompt_len for s in batch)
    assert pack.tokens == 20 + 2 * 24 + completions  # the system prompt once over both groups
    assert pack.dense_tokens == batch.tokens


def run(
    path: Path, packs: list[Pack], coefficients: Tensor, layers: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    model = load_model(path)
    freeze(model, Hyperparameters(trainable_layers=layers))
    module = TrainModel(model)
    scores = torch.zeros_like(coefficients)
    for pack in packs:
        logprobs = module(pack)
        scores[pack.scored] = logprobs.detach()
        (logprobs * coefficients[pack.scored]).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return scores, grads


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("max_tokens", [4096, 150])
def test_shared_prefixes_give_equal_logprobs_and_gradients(
    tiny_model: Path, make_batch: Callable[..., Batch], max_tokens: int, layers: int
) -> None:
    batch = make_batch(groups=3, size=4)
    coefficients = torch.randn(batch.trained_tokens, generator=torch.Generator().manual_seed(1))
    shared = run(tiny_model, packs_of(batch, max_tokens=max_tokens), coefficients, layers)
    alone = run(tiny_model, packs_of(batch, max_tokens=1, share=False), coefficients, layers)
    torch.testing.assert_close(shared[0], alone[0], rtol=1e-4, atol=1e-5)
    assert shared[1].keys() == alone[1].keys()
    for name, gradient in shared[1].items():
        torch.testing.assert_close(gradient, alone[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_the_packed_forward_equals_the_models_own(
    tiny_model: Path, make_batch: Callable[..., Batch]
) -> None:
    batch = make_batch()
    coefficients = torch.ones(batch.trained_tokens)
    scores, _ = run(tiny_model, packs_of(batch), coefficients)
    model = load_model(tiny_model)
    expected = []
    for sample in batch:
        ids = torch.from_numpy(sample.token_ids.astype(np.int64))
        with torch.no_grad():
            table = torch.log_softmax(model(ids[None]).logits[0].double(), -1)
        where = torch.from_numpy(np.flatnonzero(sample.loss_mask))
        expected.append(table[where - 1, ids[where]])
    torch.testing.assert_close(scores.double(), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_frozen_layers_get_no_gradient(tiny_model: Path, make_batch: Callable[..., Batch]) -> None:
    batch = make_batch()
    _, grads = run(tiny_model, packs_of(batch), torch.ones(batch.trained_tokens), layers=1)
    assert all(".layers.1." in name or name == "model.norm.weight" for name in grads)
    assert any(".layers.1." in name for name in grads)


def test_too_many_trainable_layers_are_refused(tiny_model: Path) -> None:
    with pytest.raises(InvalidArgument, match="the model has 2 layers"):
        freeze(load_model(tiny_model), Hyperparameters(trainable_layers=3))


def test_gradient_checkpointing_changes_nothing(
    tiny_model: Path, make_batch: Callable[..., Batch]
) -> None:
    [pack] = packs_of(make_batch())
    grads = []
    for recompute in (False, True):
        model = load_model(tiny_model)
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        module = TrainModel(model).train()
        module(pack).sum().backward()
        grads.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    torch.testing.assert_close(grads[0], grads[1])

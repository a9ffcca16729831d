"""Fixtures of the learner tests: a tiny random Llama on disk, and batches for it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from regreen.batch import Batch, Sample, VersionSpan

VOCAB = 97


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a 2-layer Llama of 97 tokens, grouped-query attention and tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny"
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """Random groups that share a prompt, with tool output in the middle of every sample."""

    def make(
        *, groups: int = 2, size: int = 3, prompt: int = 24, seed: int = 0, kind: str = "grpo"
    ) -> Batch:
        rng = np.random.default_rng(seed)
        system = rng.integers(3, VOCAB, 20)
        samples = []
        for group in range(groups):
            head = np.concatenate([system, rng.integers(3, VOCAB, prompt)])
            for member in range(size):
                tail = rng.integers(3, VOCAB, int(rng.integers(12, 40)))
                mask = np.concatenate([np.zeros(head.size, int), np.ones(tail.size, int)])
                mask[head.size + 5 : head.size + 9] = 0
                ids = np.concatenate([head, tail])
                samples.append(
                    Sample.make(
                        ids,
                        mask,
                        logprobs=-(rng.random(ids.size) * 3 + 2.5) * mask
                        if kind == "grpo"
                        else None,
                        group_id=f"grp_{group}",
                        prompt_len=head.size,
                        reward=float(member % 2),
                        spans=(VersionSpan(head.size, ids.size, 0),),
                    )
                )
        return Batch(tuple(samples), kind=kind, metrics={"hack_rate": 0.0})  # type: ignore[arg-type]

    return make

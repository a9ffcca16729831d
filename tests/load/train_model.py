"""Small models for `tests.load.train`: one that knows nothing, one that was shown what to say.

- The tokenizer is the default model's, so that prompts and calls are real ones.
- The taught model has seen a few whole contexts and says one of their outputs, about as often as it
  was shown: members of a group fare differently, and a group has something to teach.
"""

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_ROUNDS, _BATCH, _RATE = 300, 4, 4e-3
Shown = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a context, and 1 for each that is to be learned."""


def blank(folder: Path, source: Path) -> Path:
    """A random model with the tokenizer of the model in `source`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in _TOKENIZER:
        shutil.copy(source / name, folder / name)
    return folder


def taught(folder: Path, begin: Path, shown: Sequence[Shown], seed: int = 0) -> float:
    """Write the model in `begin` as it is once it has learned what is shown; its last loss."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = LlamaForCausalLM.from_pretrained(begin, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
    loss = torch.zeros(())
    for done in range(_ROUNDS):
        optimizer.param_groups[0]["lr"] = _RATE * (1 - done / _ROUNDS)
        loss = _loss(model, rng.sample(list(shown), min(_BATCH, len(shown))))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(folder)
    for name in _TOKENIZER:
        shutil.copy(begin / name, folder / name)
    return float(loss)


def _loss(model: LlamaForCausalLM, batch: Sequence[Shown]) -> torch.Tensor:
    size = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([[*ids, *(0,) * (size - len(ids))] for ids, _ in batch])
    mask = torch.tensor([[*mask, *(0,) * (size - len(mask))] for _, mask in batch]).bool()
    hidden = model.model(ids).last_hidden_state[:, :-1][mask[:, 1:]]
    return functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][mask[:, 1:]])

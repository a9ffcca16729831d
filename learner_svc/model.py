"""A causal language model prepared for training on packs: tree attention and scored rows only.

- `TrainModel.forward` gives the logprobs of a pack's scored targets, and nothing else: logits exist
  for one chunk of rows at a time, in the forward and again in the backward pass.
- Attention work is that of the tree: a segment's queries meet its own path, never other branches.
- Frozen parameters get no gradient and cost no backward work; they are the embedding and the lowest
  layers, so that backward stops at the lowest trained layer.
- Where a group of ranks divides packs, each computes its own tokens, and all give all logprobs.
- Models whose attention is not plain causal (sliding windows, recurrent layers) are never packed.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from learner_svc import lora
from learner_svc.algo.batch import Pack
from learner_svc.attention import TREE_ATTENTION, Tree
from learner_svc.memory import logit_rows
from learner_svc.sequence import SequenceGroup, Shard, owned
from learner_svc.spec import Hyperparameters
from regreen.rpc.errors import InvalidArgument, NotFound

_BY_LENGTH = ("dynamic", "longrope")
"""Kinds of rotary embeddings whose frequencies are those of the longest position at hand."""


def load_model(path: Path) -> PreTrainedModel:
    """Load a model folder (config.json, model.safetensors) in fp32; engines cast it.

    Raises:
        NotFound: no model folder at `path`.
        InvalidArgument: the folder holds no causal language model.
    """
    if not (path / "config.json").is_file():
        raise NotFound(f"no model folder at {path}: config.json is missing")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidArgument(
            "base_uri",
            f"cannot load a causal language model from {path}: {error}",
            "give the directory of a causal language model",
        ) from error
    if not isinstance(model, PreTrainedModel):
        raise InvalidArgument(
            "base_uri",
            f"{path} holds no causal language model",
            "give the directory of a causal language model",
        )
    return model


def shares_prefixes(model: PreTrainedModel) -> bool:
    """Whether every layer is plain causal attention, so that a prefix can be computed once."""
    config = model.config
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    if getattr(config, "use_sliding_window", bool(getattr(config, "sliding_window", None))):
        return False
    plain = all(kind == "full_attention" for kind in layers)
    return plain and bool(getattr(model, "_supports_attention_backend", False))


def check_divisible(model: PreTrainedModel) -> None:
    """See that ranks may divide the tokens of a pack.

    Raises:
        InvalidArgument: its layers need more of a pack than a rank's own tokens.
    """
    rotary = str(getattr(model.config, "rope_parameters", None) or "")
    problem = ""
    if not shares_prefixes(model):
        problem = "layers that are not plain causal attention"
    elif any(kind in rotary for kind in _BY_LENGTH):
        problem = "rotary embeddings that depend on the length of what is computed"
    if problem:
        raise InvalidArgument(
            "hyperparameters.sequence_parallel",
            f"is above 1, but the model has {problem}",
            "give 1",
        )


def freeze(model: PreTrainedModel, hyperparameters: Hyperparameters) -> None:
    """Train only the top `trainable_layers` layers and the final norm; 0 trains everything.

    With a `lora_rank` adapters of these layers train, and nothing else.

    Raises:
        InvalidArgument: the model has fewer layers.
    """
    layers, trainable_layers = _layers(model), hyperparameters.trainable_layers
    if not 0 <= trainable_layers <= len(layers):
        raise InvalidArgument(
            "hyperparameters.trainable_layers",
            f"is {trainable_layers}, but the model has {len(layers)} layers",
            f"give 0 (all) to {len(layers)}",
        )
    trained = list(layers[len(layers) - (trainable_layers or len(layers)) :])
    if hyperparameters.lora_rank:
        lora.adapt(model, trained, hyperparameters.lora_rank, hyperparameters.lora_alpha)
        return
    if trainable_layers == 0:
        return
    model.requires_grad_(False)
    norm = getattr(model.base_model, "norm", None)
    if isinstance(norm, nn.Module):
        trained.append(norm)
    for module in trained:
        module.requires_grad_(True)


def _layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise InvalidArgument(
            "base_uri", f"{type(model).__name__} has no list of layers", "use a decoder-only model"
        )
    return list(layers)


class TrainModel(nn.Module):
    """A model whose forward takes a pack and gives the logprobs of its targets, or entropies."""

    def __init__(self, model: PreTrainedModel, group: SequenceGroup | None = None) -> None:
        super().__init__()
        self.model = model
        self.packs = shares_prefixes(model)
        self._group = group
        if group is not None:
            check_divisible(model)
        if self.packs:
            model.set_attn_implementation(TREE_ATTENTION)
        model.config.use_cache = False

    def forward(self, pack: Pack, entropies: bool = False) -> Tensor:
        """f32 [R]: logprob of every target of the pack, or entropy where it was drawn."""
        group = self._group
        if group is None:
            return self._scored(pack, pack, entropies)
        shard = Shard.of(pack, group.rank, group.ranks)
        if not shard.rows.numel():  # one is scored for nobody: a rank without gradients hangs all
            shard = replace(shard, rows=torch.zeros(1).long(), targets=torch.zeros(1).long())
        return group.gathered(self._scored(pack, shard, entropies), owned(pack, group.ranks))

    def _scored(self, pack: Pack, own: Pack | Shard, entropies: bool) -> Tensor:
        """f32 [r]: of the rows of `own`, which is all of the pack or a part."""
        device = next(self.model.parameters()).device
        extra: dict[str, Any] = {"tree": Tree.of(pack, device, self._group)} if self.packs else {}
        hidden = self.model.base_model(
            input_ids=own.token_ids[None].to(device),
            position_ids=own.position_ids[None].to(device),
            use_cache=False,
            **extra,
        ).last_hidden_state[0]
        head: nn.Module = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        rows, targets = own.rows.to(device), own.targets.to(device)
        chosen = hidden.index_select(0, rows)
        return row_entropies(chosen, head) if entropies else target_logprobs(chosen, targets, head)


def target_logprobs(hidden: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    """f32 [R] logprobs of `targets` i64 [R] from `hidden` [R, d], in chunks of rows."""
    parts: list[Tensor] = []
    for chunk in _chunks(hidden, head):
        rows, wanted = hidden[chunk], targets[chunk]
        if torch.is_grad_enabled() and rows.requires_grad:
            parts.append(checkpoint(_chunk_logprobs, rows, wanted, head, use_reentrant=False))
        else:
            parts.append(_chunk_logprobs(rows, wanted, head))
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def row_entropies(hidden: Tensor, head: nn.Module) -> Tensor:
    """f32 [R] entropies of the next token after `hidden` [R, d], in chunks of rows."""
    parts: list[Tensor] = []
    for chunk in _chunks(hidden, head):
        logprobs = F.log_softmax(head(hidden[chunk]).float(), -1)
        parts.append(-(logprobs.exp() * logprobs).sum(-1))
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def _chunks(hidden: Tensor, head: nn.Module) -> list[slice]:
    """Of rows, the last ones empty where other ranks have more.

    Under ZeRO 3 each call of the head gathers it from all ranks, so that all make as many.
    """
    size = logit_rows(on_gpu=hidden.is_cuda)
    count = -(-hidden.shape[0] // size)
    if any(hasattr(parameter, "ds_shape") for parameter in head.parameters()):
        most = torch.tensor(count, device=hidden.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        count = int(most)
    return [slice(start, start + size) for start in range(0, count * size, size)]


def _chunk_logprobs(hidden: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    return -F.cross_entropy(head(hidden).float(), targets, reduction="none")

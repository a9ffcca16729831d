"""A llama-architecture model in plain torch, float32, shaped for sampling groups.

- Equal to Hugging Face's implementation to float32 rounding (tests: 2e-4 on logprobs).
- Projections that share an input are packed (q,k,v and gate,up); key/value heads are never copied.
- `load` copies into existing tensors, so that weights change without a second model in memory.
- A `Prefix` is immutable and may be shared by any number of samples.

Source: transformers `modeling_llama.py` (RMSNorm, half-split rotary embedding, grouped heads).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from policy_svc.engines.llama_config import LlamaConfig
from policy_svc.engines.weights import Checkpoint

_PREFILL_ROWS = 512


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values of a token sequence: each [layers, kv_heads, length, head_dim]."""

    token_ids: tuple[int, ...]
    keys: Tensor
    values: Tensor


@dataclass(slots=True)
class Branches:
    """Samples that continue one prefix; slot b of `keys` [layers, batch, kv_heads, room, head_dim].

    `lengths[b]` tokens of slot b are filled; `room` grows by doubling.
    """

    prefix: Prefix
    keys: Tensor
    values: Tensor
    lengths: list[int]

    def grow(self, room: int) -> None:
        """Make room for at least that many tokens in every slot."""
        have = self.keys.shape[3]
        if room > have:
            extra = max(room, 2 * have) - have
            self.keys = functional.pad(self.keys, (0, 0, 0, extra))
            self.values = functional.pad(self.values, (0, 0, 0, extra))

    def keep(self, slots: Sequence[int]) -> None:
        """Drop every slot but these."""
        index = torch.tensor(slots, dtype=torch.long)
        self.keys, self.values = self.keys[:, index], self.values[:, index]
        self.lengths = [self.lengths[slot] for slot in slots]


class _Layer:
    def __init__(self, config: LlamaConfig) -> None:
        rows = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.norm_in = torch.empty(config.hidden)
        self.qkv = torch.empty(rows, config.hidden)
        self.out = torch.empty(config.hidden, config.heads * config.head_dim)
        self.norm_mlp = torch.empty(config.hidden)
        self.gate_up = torch.empty(2 * config.inner, config.hidden)
        self.down = torch.empty(config.hidden, config.inner)


class Llama:
    """The model; not thread-safe, never records gradients."""

    def __init__(self, config: LlamaConfig) -> None:
        self.config = config
        self.embed = torch.empty(config.vocabulary, config.hidden)
        self.head = self.embed if config.tied else torch.empty_like(self.embed)
        self.norm = torch.empty(config.hidden)
        self.layers = [_Layer(config) for _ in range(config.layers)]
        steps = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        angles = torch.outer(torch.arange(config.context).float(), 1.0 / (config.rope_theta**steps))
        self._cos = torch.cat((angles, angles), -1).cos()
        self._sin = torch.cat((angles, angles), -1).sin()

    def read(self, path: Path) -> dict[str, Tensor]:
        """Read a checkpoint as float32 tensors, every shape checked.

        Raises:
            WeightsError: a tensor is missing, has another shape, or holds a non-finite value.
        """
        checkpoint = Checkpoint(path)
        found: dict[str, Tensor] = {}
        for name, places in self._places().items():
            shape = tuple(places.shape)
            parts = [torch.from_numpy(part.copy()) for part in checkpoint.float32(name, shape)]
            found[name] = torch.cat(parts).view(shape)
        return found

    def load(self, weights: dict[str, Tensor]) -> None:
        """Copy what `read` returned into the model."""
        places = self._places()
        for name, tensor in weights.items():
            places[name].copy_(tensor)

    def _places(self) -> dict[str, Tensor]:
        config = self.config
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        places = {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.norm}
        if not config.tied:
            places["lm_head.weight"] = self.head
        for at, layer in enumerate(self.layers):
            base = f"model.layers.{at}."
            places |= {
                f"{base}input_layernorm.weight": layer.norm_in,
                f"{base}self_attn.q_proj.weight": layer.qkv[:q],
                f"{base}self_attn.k_proj.weight": layer.qkv[q : q + kv],
                f"{base}self_attn.v_proj.weight": layer.qkv[q + kv :],
                f"{base}self_attn.o_proj.weight": layer.out,
                f"{base}post_attention_layernorm.weight": layer.norm_mlp,
                f"{base}mlp.gate_proj.weight": layer.gate_up[: config.inner],
                f"{base}mlp.up_proj.weight": layer.gate_up[config.inner :],
                f"{base}mlp.down_proj.weight": layer.down,
            }
        return places

    def prefill(self, token_ids: Sequence[int], cached: Prefix | None) -> tuple[Prefix, Tensor]:
        """Compute the tokens that follow `cached`; the whole prefix, and logits [vocabulary]
        after its last token. At least one token must follow.
        """
        config = self.config
        start = len(cached.token_ids) if cached else 0
        shape = (config.layers, config.kv_heads, len(token_ids), config.head_dim)
        keys, values = torch.empty(shape), torch.empty(shape)
        if cached:
            keys[:, :, :start], values[:, :, :start] = cached.keys, cached.values
        hidden = torch.empty(0)
        for begin in range(start, len(token_ids), _PREFILL_ROWS):
            end = min(begin + _PREFILL_ROWS, len(token_ids))
            hidden = self._prefill_rows(token_ids[begin:end], begin, keys, values)
        return Prefix(tuple(token_ids), keys, values), self._logits(hidden[-1:])[0]

    def _prefill_rows(
        self, token_ids: Sequence[int], begin: int, keys: Tensor, values: Tensor
    ) -> Tensor:
        end = begin + len(token_ids)
        hidden = self.embed[torch.tensor(token_ids)]
        cos, sin = self._cos[begin:end, None], self._sin[begin:end, None]
        mask = torch.ones(len(token_ids), end, dtype=torch.bool).tril(begin)
        for at, layer in enumerate(self.layers):
            q, k, v = self._project(layer, hidden)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            keys[at, :, begin:end], values[at, :, begin:end] = k.transpose(0, 1), v.transpose(0, 1)
            mixed = functional.scaled_dot_product_attention(
                q.transpose(0, 1)[None],
                keys[at, None, :, :end],
                values[at, None, :, :end],
                attn_mask=mask,
                enable_gqa=True,
            )[0]
            hidden = self._finish(layer, hidden, mixed.transpose(0, 1).flatten(1))
        return hidden

    def branch(self, prefix: Prefix, batch: int, room: int = 64) -> Branches:
        """Return empty slots for `batch` samples that continue a prefix."""
        config = self.config
        shape = (config.layers, batch, config.kv_heads, room, config.head_dim)
        return Branches(prefix, torch.zeros(shape), torch.zeros(shape), [0] * batch)

    def decode(self, token_ids: Sequence[int], groups: Sequence[Branches]) -> Tensor:
        """Append one token to every slot of every group; logits [slots in all, vocabulary]."""
        hidden = self.embed[torch.tensor(token_ids)]
        places = [len(g.prefix.token_ids) + length for g in groups for length in g.lengths]
        cos, sin = self._cos[places][:, None], self._sin[places][:, None]
        windows = [_Window.of(group) for group in groups]
        for at, layer in enumerate(self.layers):
            q, k, v = self._project(layer, hidden)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            mixed, row = [], 0
            for group, window in zip(groups, windows, strict=True):
                rows = slice(row, row + len(group.lengths))
                mixed.append(_attend(at, group, window, q[rows], k[rows], v[rows]))
                row = rows.stop
            hidden = self._finish(layer, hidden, torch.cat(mixed))
        for group in groups:
            group.lengths = [length + 1 for length in group.lengths]
        return self._logits(hidden)

    def _project(self, layer: _Layer, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        rows = functional.linear(_norm(hidden, layer.norm_in, config.epsilon), layer.qkv)
        split = rows.view(len(rows), -1, config.head_dim)
        edge = config.heads + config.kv_heads
        return split[:, : config.heads], split[:, config.heads : edge], split[:, edge:]

    def _finish(self, layer: _Layer, hidden: Tensor, mixed: Tensor) -> Tensor:
        hidden = hidden + functional.linear(mixed, layer.out)
        rows = functional.linear(_norm(hidden, layer.norm_mlp, self.config.epsilon), layer.gate_up)
        gate, up = rows.chunk(2, dim=-1)
        return hidden + functional.linear(functional.silu(gate) * up, layer.down)

    def _logits(self, hidden: Tensor) -> Tensor:
        return functional.linear(_norm(hidden, self.norm, self.config.epsilon), self.head)


@dataclass(frozen=True, slots=True)
class _Window:
    """Where a group's new tokens go, and which of its slots' tokens may be seen."""

    slots: Tensor
    at: Tensor
    length: int
    hidden: Tensor | None
    """True where a token may not be seen: [batch, 1, 1, length]; None when all may."""

    @classmethod
    def of(cls, group: Branches) -> "_Window":
        length = max(group.lengths) + 1
        group.grow(length)
        at = torch.tensor(group.lengths)
        ragged = min(group.lengths) + 1 < length
        hidden = (torch.arange(length) > at[:, None])[:, None, None] if ragged else None
        return cls(torch.arange(len(group.lengths)), at, length, hidden)


def _attend(
    layer: int, group: Branches, window: _Window, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Attend over the shared prefix and each slot's own tokens.

    q [batch, heads, dim], k and v [batch, kv_heads, dim] → [batch, heads * dim]. The softmax runs
    over both parts at once, so the split changes no result.
    """
    group.keys[layer, window.slots, :, window.at] = k
    group.values[layer, window.slots, :, window.at] = v
    batch, heads, dim = q.shape
    kv_heads = k.shape[1]
    repeat = heads // kv_heads
    q = (q * dim**-0.5).view(batch, kv_heads, repeat, dim)
    own_keys = group.keys[layer, :, :, : window.length]
    own = q @ own_keys.transpose(-1, -2)
    if window.hidden is not None:
        own = own.masked_fill(window.hidden, float("-inf"))
    stacked = q.transpose(0, 1).reshape(kv_heads, batch * repeat, dim)
    shared = stacked @ group.prefix.keys[layer].transpose(-1, -2)
    shared = shared.view(kv_heads, batch, repeat, -1).transpose(0, 1)
    weights = torch.cat((shared, own), -1).softmax(-1)
    length = shared.shape[-1]
    from_prefix = weights[..., :length].transpose(0, 1).reshape(kv_heads, batch * repeat, length)
    mixed = (from_prefix @ group.prefix.values[layer]).view(kv_heads, batch, repeat, dim)
    own_values = group.values[layer, :, :, : window.length]
    total = mixed.transpose(0, 1) + weights[..., length:] @ own_values
    return total.reshape(batch, heads * dim)


def _norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return functional.rms_norm(hidden, (hidden.shape[-1],), weight, epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), -1) * sin

"""What a llama-architecture model is: the numbers of its `config.json`, its tensors' shapes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policy_svc.engines.stepper import WeightsError


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The numbers of `config.json` that matter here."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    context: int
    rope_theta: float
    epsilon: float
    tied: bool

    @classmethod
    def read(cls, folder: Path) -> "LlamaConfig":
        """Read a model folder. Raises: WeightsError when the architecture is another one."""
        try:
            return cls._of(json.loads((folder / "config.json").read_bytes()))
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            if isinstance(error, WeightsError):
                raise
            told = f"{type(error).__name__}: {error}"
            raise WeightsError(f"config.json of {folder} describes no model ({told})") from error

    @classmethod
    def _of(cls, raw: dict[str, Any]) -> "LlamaConfig":
        if raw.get("model_type") != "llama":
            raise WeightsError(f"model_type is {raw.get('model_type')!r}; 'llama' is served here")
        rope = raw.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default" or raw.get("rope_scaling"):
            raise WeightsError("scaled rotary embeddings are not served by this engine")
        for name in ("attention_bias", "mlp_bias"):
            if raw.get(name):
                raise WeightsError(f"{name} is true; projections have no bias in this engine")
        if raw.get("hidden_act", "silu") != "silu":
            raise WeightsError(f"hidden_act is {raw['hidden_act']!r}; 'silu' is served here")
        theta = rope.get("rope_theta") or raw.get("rope_theta", 10000.0)
        heads = raw["num_attention_heads"]
        found = cls(
            layers=raw["num_hidden_layers"],
            hidden=raw["hidden_size"],
            heads=heads,
            kv_heads=raw.get("num_key_value_heads", heads),
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            inner=raw["intermediate_size"],
            vocabulary=raw["vocab_size"],
            context=raw["max_position_embeddings"],
            rope_theta=float(theta),
            epsilon=float(raw.get("rms_norm_eps", 1e-6)),
            tied=bool(raw.get("tie_word_embeddings", False)),
        )
        for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "inner", "vocabulary"):
            value = getattr(found, name)
            if type(value) is not int or not 0 < value < 1 << 31:
                raise WeightsError(f"config.json has {value!r} {name}; a positive number is needed")
        if found.heads % found.kv_heads or found.head_dim % 2:
            raise WeightsError(
                f"{found.heads} heads of {found.head_dim} cannot share {found.kv_heads} of keys"
            )
        return found

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, by Hugging Face name; inputs of one product follow each other."""
        row, q, kv = (self.hidden,), self.heads * self.head_dim, self.kv_heads * self.head_dim
        found: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            "model.norm.weight": row,
        }
        if not self.tied:
            found["lm_head.weight"] = (self.vocabulary, self.hidden)
        for at in range(self.layers):
            base = f"model.layers.{at}."
            found |= {
                f"{base}input_layernorm.weight": row,
                f"{base}self_attn.q_proj.weight": (q, self.hidden),
                f"{base}self_attn.k_proj.weight": (kv, self.hidden),
                f"{base}self_attn.v_proj.weight": (kv, self.hidden),
                f"{base}self_attn.o_proj.weight": (self.hidden, q),
                f"{base}post_attention_layernorm.weight": row,
                f"{base}mlp.gate_proj.weight": (self.inner, self.hidden),
                f"{base}mlp.up_proj.weight": (self.inner, self.hidden),
                f"{base}mlp.down_proj.weight": (self.hidden, self.inner),
            }
        return found

"""Low-rank adapters (LoRA, arXiv:2106.09685): small matrices beside each map of a frozen model.

- y = W x + (alpha / rank) B A x for every linear map of the layers that train, the MLP's too; A is
  random and B is 0, so that a run begins as its base.
- What a policy loads is the whole model, W + (alpha / rank) B A under the names of the base.
- The adapters alone are in PEFT's format as well (`adapter_config.json` and
  `adapter_model.safetensors`), which other programs load; a run goes on from these and its base.
  Their digest stands in the metadata of the whole weights, whose own digest so names both.
"""

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learner_svc.checkpoint import FileEntry
from learner_svc.checkpoint_writer import write_safetensors
from learner_svc.spec import Hyperparameters
from regreen.rpc.errors import DataLoss, InvalidArgument

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NOTE = "adapter_sha256"
"""Name of their digest in the metadata of the whole weights."""
_PREFIX = "base_model.model."
_ADAPTER = re.compile(r"(.*)\.lora_([ab])")

Get = Callable[[str, nn.Parameter], Tensor]
"""A parameter's whole value by its name."""


class LoraLinear(nn.Linear):
    """A linear map with an adapter; its own weight and bias are those of the map it stands for."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as nn.Linear begins
        self.scale = alpha / rank
        self.on = True

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        result = F.linear(input, self.weight, self.bias)
        if not self.on:
            return result
        return result + self.scale * F.linear(F.linear(input, self.lora_a), self.lora_b)


def adapt(model: nn.Module, layers: Sequence[nn.Module], rank: int, alpha: float) -> None:
    """Freeze a model and give each linear map of `layers` an adapter.

    Raises:
        InvalidArgument: they have no linear map.
    """
    model.requires_grad_(False)
    found = [
        (parent, name, child)
        for layer in layers
        for parent in layer.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    if not found:
        raise InvalidArgument(
            "hyperparameters.lora_rank",
            f"is {rank}, and the layers of {type(model).__name__} have no plain linear map",
            "give 0, or take another model",
        )
    for parent, name, child in found:
        setattr(parent, name, LoraLinear(child, rank, alpha))


def whole_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the whole model, of those of all parameters."""
    return {name: shape for name, shape in shapes.items() if not _ADAPTER.fullmatch(name)}


def whole_weights(model: nn.Module, get: Get) -> Iterator[tuple[str, Tensor]]:
    """The whole model's weights, one after another, with what adapters add to them."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if _ADAPTER.fullmatch(name):
            continue
        value, place = get(name, parameter).detach(), name.removesuffix(".weight")
        a, b = f"{place}.lora_a", f"{place}.lora_b"
        if a in parameters and name.endswith(".weight"):
            scale = cast("LoraLinear", model.get_submodule(place)).scale
            low, high = (get(side, parameters[side]).detach().float() for side in (a, b))
            value = torch.addmm(value.float(), high, low, alpha=scale)
        yield name, value


def adapters(model: nn.Module, get: Get) -> dict[str, Tensor]:
    """The adapters alone, f32, by PEFT's names; empty where there are none."""
    return {
        _foreign(name): get(name, parameter).detach().float()
        for name, parameter in model.named_parameters()
        if _ADAPTER.fullmatch(name)
    }


def load_adapters(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Take up adapters by PEFT's names.

    Raises:
        DataLoss: they are not those of this model.
    """
    mine = {_foreign(n): p for n, p in model.named_parameters() if _ADAPTER.fullmatch(n)}
    if {n: p.shape for n, p in mine.items()} != {n: t.shape for n, t in tensors.items()}:
        raise DataLoss("the checkpoint's adapters are of another model, rank or trainable_layers")
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(tensors[name])


def config(model: nn.Module, hyperparameters: Hyperparameters, base: str) -> dict[str, Any]:
    """`adapter_config.json`, as PEFT reads it."""
    places = [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": hyperparameters.lora_rank,
        "lora_alpha": hyperparameters.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": places,
    }


def write(path: Path, told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write a folder with adapters in PEFT's format; size and digest of their tensors."""
    path.mkdir()
    (path / CONFIG).write_text(json.dumps(told, indent=1))
    sizes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_safetensors(path / WEIGHTS, tensors.items(), sizes)


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Have the model be its base while the block runs."""
    places = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for place in places:
        place.on = False
    try:
        yield
    finally:
        for place in places:
            place.on = True


def _foreign(name: str) -> str:
    """PEFT's name of an adapter's parameter."""
    return _PREFIX + _ADAPTER.sub(lambda m: f"{m[1]}.lora_{m[2].upper()}.weight", name)

"""The interface of training engines, and the learning-rate schedule.

- An engine owns the weights, the optimizer and the gradients; the trainer owns the mathematics.
- `backward` adds gradients; losses handed in are shares of one global loss and simply add up, also
  over ranks. `step` clips, updates, and forgets the gradients.
- Every rank calls every method in the same order.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from learner_svc.algo.batch import Pack
from learner_svc.spec import Hyperparameters
from regreen.rpc.errors import DataLoss

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW, by torch's names."""


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """AdamW moments by parameter name, and the number of updates; the same for every engine."""

    updates: int
    tensors: Mapping[str, Tensor]
    """`exp_avg.<parameter>` and `exp_avg_sq.<parameter>`, f32. They may be made as they are asked
    for: of several ranks each asks for all, in their order."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of the tensors of an engine, in their order."""

    def moment(self, kind: str, name: str, shape: Sequence[int]) -> Tensor:
        """One moment of a parameter, f32.

        Raises:
            DataLoss: it is missing or has another shape than its parameter.
        """
        tensor = self.tensors.get(f"{kind}.{name}")
        if tensor is None or tensor.shape != torch.Size(shape):
            raise DataLoss(
                f"checkpoint has no {kind} for {name}; resume with the same trainable_layers "
                "and lora_rank"
            )
        return tensor.float()


class Engine(Protocol):
    """Weights, gradients and optimizer of one rank."""

    name: str
    rank: int
    world_size: int
    sequence_ranks: int
    """Ranks that divide each pack among them; they follow one another."""
    packs: bool
    """Whether samples may share prefixes and rows."""
    state_format: str
    """`adamw` = `optimizer_state` is complete; anything else is a format of `save_state`."""
    reads: tuple[str, ...]
    """Formats that it goes on from."""

    def logprobs(self, pack: Pack) -> Tensor:
        """f32 [R] with gradient."""
        ...

    def score(self, pack: Pack) -> Tensor:
        """f32 [R] without gradient."""
        ...

    def entropies(self, pack: Pack) -> Tensor:
        """f32 [R] without gradient: entropy of what the scored tokens were drawn from."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of one share of the loss; `last` = the update follows."""
        ...

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear; gives the gradient norm before clipping."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full weights by their names in the model file, one after another."""
        ...

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the full weights, in the order of `weights`."""
        ...

    def adapters(self) -> dict[str, Tensor]:
        """Adapters by PEFT's names, f32; empty in a run without them."""
        ...

    def optimizer_state(self) -> OptimizerState:
        """The moments, where `state_format` is `adamw`."""
        ...

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Put moments back."""
        ...

    def save_state(self, directory: Path) -> None:
        """Write engine-specific state, where `state_format` is not `adamw`."""
        ...

    def load_state(self, directory: Path) -> None:
        """Read what `save_state` wrote."""
        ...

    def parameters(self) -> tuple[int, int]:
        """Number of trained parameters and of all."""
        ...

    def vocab_size(self) -> int:
        """Number of token ids the model knows."""
        ...

    def close(self) -> None:
        """Free what can be freed before the process ends."""
        ...


def learning_rate_at(update: int, hyperparameters: Hyperparameters) -> float:
    """Learning rate of an update, from 1: linear warm-up, then constant or cosine to 10 %."""
    peak, warmup = hyperparameters.learning_rate, hyperparameters.warmup_steps
    if update <= warmup:
        return peak * update / warmup
    total = hyperparameters.total_steps
    if not total:
        return peak
    progress = min(1.0, (update - warmup) / max(1, total - warmup))
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))

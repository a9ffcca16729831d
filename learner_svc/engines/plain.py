"""One process, plain torch: the quick path, the fallback, and the oracle that others are held to.

- fp32 weights are updated in place; bf16 weights keep fp32 masters: lr 1e-6 rounds away in bf16.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from learner_svc import lora
from learner_svc.algo.batch import Pack
from learner_svc.engines.base import MOMENTS, OptimizerState
from learner_svc.model import TrainModel
from learner_svc.spec import Hyperparameters
from regreen.rpc.errors import FailedPrecondition


class PlainEngine:
    """AdamW over the trained parameters of one model."""

    name = "plain"
    state_format = "adamw"
    reads: tuple[str, ...] = ("adamw",)
    rank = 0
    world_size = 1
    sequence_ranks = 1

    def __init__(
        self, model: TrainModel, hyperparameters: Hyperparameters, dtype: torch.dtype
    ) -> None:
        self._model = model
        self.packs = model.packs
        self._clip = hyperparameters.gradient_clip
        named = model.model.named_parameters()
        self._trained = {name: p for name, p in named if p.requires_grad}
        self._masters = {
            name: p if dtype == torch.float32 else p.detach().clone().requires_grad_()
            for name, p in self._trained.items()
        }
        model.to(dtype)
        self._optimizer = torch.optim.AdamW(
            list(self._masters.values()),
            lr=hyperparameters.learning_rate,
            betas=(hyperparameters.beta1, hyperparameters.beta2),
            weight_decay=hyperparameters.weight_decay,
            fused=True,
        )

    def logprobs(self, pack: Pack) -> Tensor:
        logprobs: Tensor = self._model(pack)
        return logprobs

    @torch.no_grad()
    def score(self, pack: Pack) -> Tensor:
        logprobs: Tensor = self._model(pack)
        return logprobs

    @torch.no_grad()
    def entropies(self, pack: Pack) -> Tensor:
        entropies: Tensor = self._model(pack, entropies=True)
        return entropies

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, learning_rate: float) -> float:
        for name, master in self._masters.items():
            parameter = self._trained[name]
            if master is not parameter and parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_(list(self._masters.values()), self._clip)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, master in self._masters.items():
                if master is not self._trained[name]:
                    self._trained[name].copy_(master)
        return float(norm)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return lora.whole_weights(self._model.model, self._whole)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        named = self._model.model.named_parameters()
        return lora.whole_shapes({name: tuple(p.shape) for name, p in named})

    def adapters(self) -> dict[str, Tensor]:
        return lora.adapters(self._model.model, self._whole)

    def _whole(self, name: str, parameter: torch.nn.Parameter) -> Tensor:
        return self._masters.get(name, parameter)

    def optimizer_state(self) -> OptimizerState:
        return adamw_state(self._optimizer, self._masters)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        load_adamw_state(self._optimizer, self._masters, state)

    def save_state(self, directory: Path) -> None:
        raise FailedPrecondition("the plain engine has no state beside optimizer_state")

    def load_state(self, directory: Path) -> None:
        raise FailedPrecondition("the plain engine has no state beside optimizer_state")

    def parameters(self) -> tuple[int, int]:
        everything = sum(p.numel() for p in self._model.model.parameters())
        return sum(p.numel() for p in self._trained.values()), everything

    def vocab_size(self) -> int:
        return int(self._model.model.config.vocab_size)

    def close(self) -> None:
        """Nothing outlives the object."""


def adamw_state(
    optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter | Tensor]
) -> OptimizerState:
    """The moments of a torch AdamW by parameter name."""
    tensors: dict[str, Tensor] = {}
    updates = 0
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter)
        if not state:
            continue
        updates = int(state["step"])
        tensors[f"exp_avg.{name}"] = state["exp_avg"]
        tensors[f"exp_avg_sq.{name}"] = state["exp_avg_sq"]
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return OptimizerState(updates, tensors, shapes)


def load_adamw_state(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, torch.nn.Parameter | Tensor],
    state: OptimizerState,
) -> None:
    """Put moments back into a torch AdamW.

    Raises:
        DataLoss: a moment is missing or has another shape than its parameter.
    """
    if not state.updates:
        return
    for name, parameter in parameters.items():
        moments: dict[str, Tensor] = {"step": torch.tensor(float(state.updates))}
        for kind in MOMENTS:
            moments[kind] = state.moment(kind, name, parameter.shape).to(parameter.device).clone()
        optimizer.state[parameter] = moments

"""DeepSpeed: ZeRO 0-3 over any number of processes, on CPU (gloo) and GPU.

- The state of stage 0 in fp32, an ordinary AdamW, and of stages 1 and 2, gathered from the ranks
  one tensor at a time, is the same as the plain engine's: any number of ranks goes on from it.
  Stage 3, and stage 0 in bf16, write sharded state in DeepSpeed's own format.
- Masters are the fp32 weights that were loaded, not what bf16 leaves of them.
- Losses are shares of a global loss; DeepSpeed averages over ranks, so they are multiplied back.
- Nothing is compiled unless asked for: torch's AdamW, gloo instead of the shared-memory op. What
  keeps the optimizer in the host's memory takes DeepSpeed's AdamW for processors, compiled at the
  first start by the first rank of each machine. It lives in a directory of ours, cleared of locks
  whose owner is gone: a stale lock would hang every later start in silence.
"""

import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learner_svc import lora
from learner_svc.algo.batch import Pack
from learner_svc.engines.base import MOMENTS, OptimizerState
from learner_svc.engines.plain import adamw_state, load_adamw_state
from learner_svc.model import TrainModel
from learner_svc.spec import Hyperparameters
from regreen.rpc.errors import FailedPrecondition, InfraError

_SHM_OP = "deepspeed_shm_comm"


def prepare_environment(extensions: Path) -> None:
    """Set what DeepSpeed reads from the environment; call before importing it.

    Without rank variables it would ask for mpi4py, even for one process.
    """
    extensions.mkdir(parents=True, exist_ok=True)
    _clear_stale_locks(extensions)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])


def _clear_stale_locks(extensions: Path) -> None:
    """Remove build locks; the caller holds the learner's home, so no other builder is alive."""
    for lock in extensions.glob("*/lock"):
        lock.unlink(missing_ok=True)
    for lock in extensions.glob("*/*/lock"):
        lock.unlink(missing_ok=True)


def config_for(hyperparameters: Hyperparameters, dtype: torch.dtype, stage: int) -> dict[str, Any]:
    """The DeepSpeed configuration: the file of the stage, with the run's numbers filled in."""
    name = "cpu.json" if stage == 0 else "zero3.json" if stage == 3 else "zero2.json"
    text = resources.files("learner_svc").joinpath("configs", name).read_text()
    config: dict[str, Any] = json.loads(text)
    config["gradient_clipping"] = hyperparameters.gradient_clip
    config["zero_optimization"]["stage"] = stage
    config["bf16"] = {"enabled": dtype == torch.bfloat16}
    config["optimizer"]["params"] |= {
        "lr": hyperparameters.learning_rate,
        "betas": [hyperparameters.beta1, hyperparameters.beta2],
        "weight_decay": hyperparameters.weight_decay,
    }
    if hyperparameters.offload != "none":
        config["optimizer"]["params"]["torch_adam"] = False
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if hyperparameters.offload == "parameters":
        config["zero_optimization"]["offload_param"] = {"device": "cpu"}
    return config


def choose_stage(asked: int, world_size: int, dtype: torch.dtype) -> int:
    """ZeRO stage: as asked, else 2 where there is something to shard or masters to keep, else 0."""
    if asked >= 0:
        return asked
    return 0 if world_size == 1 and dtype == torch.float32 else 2


class DeepSpeedEngine:
    """One rank of a DeepSpeed run."""

    name = "deepspeed"

    def __init__(
        self, model: TrainModel, hyperparameters: Hyperparameters, dtype: torch.dtype
    ) -> None:
        # The library prints while it is imported and started; stdout must stay ours.
        with contextlib.redirect_stdout(sys.stderr):
            self._deepspeed = _import(model)
            self.rank = int(os.environ["RANK"])
            self.world_size = int(os.environ["WORLD_SIZE"])
            self.sequence_ranks = hyperparameters.sequence_parallel
            self._offloads = hyperparameters.offload != "none"
            asked = hyperparameters.zero_stage
            if self._offloads and asked < 0:
                asked = 2
            self._stage = choose_stage(asked, self.world_size, dtype)
            if self._offloads:
                _build_adam(self._deepspeed)
            config = config_for(hyperparameters, dtype, self._stage)
            self._trained = {n: p for n, p in model.model.named_parameters() if p.requires_grad}
            divided = self._stage in (1, 2)
            rounded = self._trained if divided and dtype == torch.bfloat16 else {}
            loaded = {n: p.detach().to("cpu", copy=True) for n, p in rounded.items()}
            self._engine, *_ = self._deepspeed.initialize(
                model=model, model_parameters=list(self._trained.values()), config=config
            )
        self._model = model
        self.packs = model.packs
        self._ordinary = self._stage == 0 and dtype == torch.float32
        self._gathers = self._stage == 3 or bool(rounded)
        own = f"deepspeed-zero{self._stage}-world{self.world_size}"
        self.state_format = "adamw" if self._ordinary or divided else own
        self.reads: tuple[str, ...] = (
            ("adamw",) if self._ordinary else ("adamw", own) if divided else (own,)
        )
        for name, parameter in rounded.items():
            value = loaded.pop(name).to(parameter.device)
            self._deepspeed.utils.safe_set_full_fp32_param(parameter, value)

    def logprobs(self, pack: Pack) -> Tensor:
        logprobs: Tensor = self._engine(pack)
        return logprobs

    @torch.no_grad()
    def score(self, pack: Pack) -> Tensor:
        logprobs: Tensor = self._engine(pack)
        return logprobs

    @torch.no_grad()
    def entropies(self, pack: Pack) -> Tensor:
        entropies: Tensor = self._engine(pack, entropies=True)
        return entropies

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world_size)

    def step(self, learning_rate: float) -> float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        # DeepSpeed reports no norm for an ordinary optimizer; its gradients are whole here.
        grads = [p.grad for p in self._trained.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads) if self._ordinary else None
        self._engine.step()
        reported = self._engine.get_global_grad_norm() if norm is None else norm
        return float("nan") if reported is None else float(reported)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return lora.whole_weights(self._model.model, self._whole)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        named = self._model.model.named_parameters()
        shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in named}
        return lora.whole_shapes(shapes)

    def adapters(self) -> dict[str, Tensor]:
        return lora.adapters(self._model.model, self._whole)

    def _whole(self, _: str, parameter: torch.nn.Parameter) -> Tensor:
        """A parameter, or its fp32 master; every rank takes part."""
        # In fp32, and with stages that divide only the optimizer, each rank has them all.
        if parameter.requires_grad and self._gathers:
            master: Tensor | None = self._deepspeed.utils.safe_get_full_fp32_param(parameter)
            if master is not None:
                return master
        if self._stage < 3:
            return parameter
        with self._deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def optimizer_state(self) -> OptimizerState:
        if self.state_format != "adamw":
            raise FailedPrecondition(
                f"the optimizer state of {self.state_format} is sharded; use save_state"
            )
        if self._ordinary:
            return adamw_state(self._engine.optimizer, dict(self._trained))
        states = [state for state in self._engine.optimizer.optimizer.state.values() if state]
        kinds = MOMENTS if states else ()
        moments = {f"{kind}.{n}": (p, kind) for n, p in self._trained.items() for kind in kinds}
        shapes = {name: tuple(p.shape) for name, (p, _) in moments.items()}
        updates = int(states[0]["step"]) if states else 0
        tensors: Mapping[str, Tensor] = _Gathered(
            moments, self._deepspeed.utils.safe_get_full_optimizer_state
        )
        if self.world_size == 1:  # all is here, and nothing is copied
            tensors = {
                name: parameter._hp_mapping.get_hp_fragment(kind).view(parameter.shape)  # type: ignore[attr-defined]
                for name, (parameter, kind) in moments.items()
            }
        return OptimizerState(updates, tensors, shapes)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        if self._ordinary:
            load_adamw_state(self._engine.optimizer, dict(self._trained), state)
            return
        if not state.updates:
            return
        optimizer = self._engine.optimizer
        for group in optimizer.optimizer.param_groups:
            for flat in group["params"]:
                moments = {kind: torch.zeros_like(flat) for kind in MOMENTS}
                count = state.updates if self._offloads else torch.tensor(float(state.updates))
                optimizer.optimizer.state[flat] = {"step": count} | moments
        optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._trained.items():
            for kind in MOMENTS:
                value = state.moment(kind, name, parameter.shape).to(parameter.device)
                self._deepspeed.utils.safe_set_full_optimizer_state(parameter, value, kind)

    def save_state(self, directory: Path) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._engine.save_checkpoint(
                str(directory), tag="state", exclude_frozen_parameters=True
            )

    def load_state(self, directory: Path) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            path, _ = self._engine.load_checkpoint(
                str(directory), tag="state", load_module_strict=False
            )
        if path is None:
            raise FailedPrecondition(f"DeepSpeed found no state in {directory}")

    def parameters(self) -> tuple[int, int]:
        def size(parameter: Any) -> int:
            return int(getattr(parameter, "ds_numel", parameter.numel()))

        everything = sum(size(p) for p in self._model.model.parameters())
        return sum(size(p) for p in self._trained.values()), everything

    def vocab_size(self) -> int:
        return int(self._model.model.config.vocab_size)

    def close(self) -> None:
        # The process group stays: DeepSpeed keeps references to it, and it ends with the process.
        self._engine.destroy()


class _Gathered(Mapping[str, Tensor]):
    """Moments by name, each gathered from the ranks when it is asked for."""

    def __init__(
        self, places: Mapping[str, tuple[Tensor, str]], gather: Callable[[Tensor, str], Tensor]
    ) -> None:
        self._places, self._gather = places, gather

    def __getitem__(self, name: str) -> Tensor:
        return self._gather(*self._places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _build_adam(deepspeed: Any) -> None:
    """Compile AdamW for processors, once on each machine, where it is not there yet.

    Raises:
        FailedPrecondition: it cannot be compiled on a machine; on every rank.
    """
    from deepspeed.ops.op_builder.builder import CUDAMismatchException, MissingCUDAException

    cannot = (RuntimeError, ImportError, OSError, CUDAMismatchException, MissingCUDAException)
    builder, problem = deepspeed.ops.op_builder.CPUAdamBuilder(), ""
    torch.distributed.barrier()  # stale locks are cleared
    if os.environ["LOCAL_RANK"] == "0":
        try:
            builder.load(verbose=False)
        except cannot as error:
            problem = f"{type(error).__name__}: {str(error).strip()[-500:]}"
    told: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, problem)
    if any(told):
        raise FailedPrecondition(
            f"offload: DeepSpeed's AdamW for processors cannot be compiled ({max(told)}); install "
            "a C++ compiler and ninja on every machine, or leave offload out"
        )
    builder.load(verbose=False)


def _import(model: TrainModel) -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise InfraError(
            f"cannot import deepspeed ({error}); install regreen[learner] or use engine=plain"
        ) from error
    # gloo does what the compiled shared-memory op would do, without a compiler at run time.
    deepspeed.ops.__compatible_ops__[_SHM_OP] = False
    on_gpu = next(model.parameters()).is_cuda
    deepspeed.comm.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False)
    return deepspeed

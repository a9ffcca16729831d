"""What a run would need, found before any weight is loaded.

- `Runs` uses it to refuse a run that will not fit; `EstimateRun` answers it and starts nothing.
- Nothing here writes, makes a model or looks at other runs.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from learner_svc import gpus
from learner_svc.dtypes import computes_in_bf16
from learner_svc.memory import (
    Layout,
    ModelShape,
    available_bytes,
    check_fits,
    model_shape,
    offloaded_bytes,
    trained_parameters,
)
from learner_svc.spec import Hyperparameters, RunSpec
from regreen.model_store import DEFAULT_MODEL
from regreen.rpc.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one process of a run would need."""

    memory_bytes: int
    available_bytes: int
    parameters: int
    trainable_parameters: int
    processes: int
    """Processes of the run on this machine."""
    host_bytes: int = 0
    """What each process that computes on a GPU keeps in the host's memory."""


def estimate(spec: RunSpec, folders: Sequence[Path], processes: int, nodes: int = 1) -> Estimate:
    """The needs of a run that goes on from the first of `folders` that can be read.

    Raises:
        NotFound: none of them holds a model.
        InvalidArgument: ranks or heads cannot be divided as `sequence_parallel` says, or the engine
            divides nothing among several ranks.
        FailedPrecondition: it does not fit; says by how much and which settings would. Or there are
            more processes than GPUs.
    """
    hyperparameters, ranks = spec.hyperparameters, processes * nodes
    if spec.engine == "plain" and ranks > 1:  # each would train on all, and write what all write
        problem = f"is plain, which is one process, and this learner starts {ranks} of a run"
        raise InvalidArgument("engine", problem, "take deepspeed, or one process on one machine")
    half = computes_in_bf16(hyperparameters.dtype)
    layout = Layout(
        masters=half or hyperparameters.zero_stage > 0 or ranks > 1,
        ranks=ranks,
        on_gpu=gpus.has_gpu(),
        half=half,
    )
    shape = _shape(folders)
    _check_divisible(shape, hyperparameters.sequence_parallel, ranks)
    host = _host_bytes(shape, hyperparameters, layout, processes)
    available = _available_bytes(processes)
    return Estimate(
        memory_bytes=check_fits(shape, hyperparameters, layout, available),
        available_bytes=available,
        parameters=shape.parameters,
        trainable_parameters=trained_parameters(shape, hyperparameters),
        processes=processes,
        host_bytes=host,
    )


def _host_bytes(
    shape: ModelShape, hyperparameters: Hyperparameters, layout: Layout, processes: int
) -> int:
    """What each process is to keep in the host's memory.

    Raises:
        InvalidArgument: it computes there already.
        FailedPrecondition: the host has not as much.
    """
    offload = hyperparameters.offload
    if offload != "none" and not layout.on_gpu:
        raise InvalidArgument(
            "hyperparameters.offload",
            f"is {offload}, but runs compute on this machine's processor, in the same memory",
            "leave it out",
        )
    needed, available = offloaded_bytes(shape, hyperparameters, layout), available_bytes()
    if needed * processes > available:
        raise FailedPrecondition(
            f"offload: {processes} processes would keep {needed * processes / 2**30:.1f} GiB in "
            f"the host's memory, of which {available / 2**30:.1f} GiB are available; use more "
            "machines, or leave it out"
        )
    return needed


def _check_divisible(shape: ModelShape, sequence_ranks: int, ranks: int) -> None:
    name = "hyperparameters.sequence_parallel"
    if ranks % sequence_ranks:
        raise InvalidArgument(
            name,
            f"is {sequence_ranks}, which does not divide the {ranks} ranks of a run",
            "give a divisor, or start the service with other --processes or --nodes",
        )
    if shape.heads % sequence_ranks:
        raise InvalidArgument(
            name,
            f"is {sequence_ranks}, which does not divide the model's {shape.heads} heads",
            "give a divisor of both heads and ranks",
        )


def _available_bytes(processes: int) -> int:
    """What each process of a run on this machine may take: of its GPU, where there are any.

    Raises:
        FailedPrecondition: there are more processes than GPUs.
    """
    if not gpus.has_gpu():
        return available_bytes()
    free = gpus.free_bytes()
    if processes > len(free):
        raise FailedPrecondition(
            f"processes: is {processes}, but this machine has {len(free)} GPUs, one for each; "
            f"give --processes {len(free)} or fewer"
        )
    return min(free[:processes])


def estimate_new(spec: RunSpec, home: Path, processes: int, nodes: int = 1) -> Estimate:
    """The needs of a run that starts from its base.

    Raises:
        InvalidArgument: a setting is out of range, the model has fewer layers, or as `estimate`.
        NotFound: no model is there; the default one is not made.
        FailedPrecondition: as `estimate`.
    """
    spec.check()
    base = spec.base_uri or str((home / "models" / DEFAULT_MODEL).resolve())
    folder = local_path(base, "base_uri")
    layers, wanted = model_shape(folder).layers, spec.hyperparameters.trainable_layers
    if wanted > layers:  # the worker would find it, with the model loaded
        raise InvalidArgument(
            "hyperparameters.trainable_layers",
            f"is {wanted}, but the model has {layers} layers",
            f"give 0 (all) to {layers}",
        )
    return estimate(spec, [folder], processes, nodes)


def local_path(uri: str, name: str) -> Path:
    """The directory that a model or checkpoint URI names.

    Raises:
        InvalidArgument: the URI is not a local path.
    """
    text = uri.removeprefix("file://")
    if "://" in text or not text.startswith("/"):
        raise InvalidArgument(
            name, f"{uri[:200]!r} is no absolute path", "give /path or file:///path"
        )
    return Path(text)


def _shape(folders: Sequence[Path]) -> ModelShape:
    """The shape of the first model that can be read; a damaged checkpoint is met later."""
    for folder in folders[:-1]:
        with contextlib.suppress(NotFound, DataLoss):
            return model_shape(folder)
    return model_shape(folders[-1])

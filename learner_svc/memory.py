"""How much memory a run will take, and whether this host has it.

- The estimate is made before weights are loaded, from the model's configuration and file sizes.
- A run that will not fit is refused with what would fit; it is never left to the OOM killer.
- Where runs compute on GPUs, a rank's memory is its GPU's.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from learner_svc.spec import Hyperparameters
from regreen.rpc.errors import FailedPrecondition, NotFound

_LOGIT_ROWS, _LOGIT_ROWS_ON_GPU = 256, 4096
"""256 x 49152 x 4 B = 50 MB; a GPU is idle over so few."""
_PROCESS_BYTES = 600 << 20
"""Interpreter, torch, transformers and allocator slack."""


def logit_rows(*, on_gpu: bool) -> int:
    """Rows whose logits are held at once."""
    return _LOGIT_ROWS_ON_GPU if on_gpu else _LOGIT_ROWS


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the estimate needs to know of a model."""

    parameters: int
    layers: int
    layer_parameters: int
    layer_widths: int
    """Inputs and outputs of a layer's linear maps, added up: an adapter's parameters by rank."""
    hidden: int
    intermediate: int
    vocab: int
    heads: int
    """Of attention, for queries."""


def model_shape(path: Path) -> ModelShape:
    """Read the shape from `config.json`.

    Raises:
        NotFound: there is no readable configuration at `path`.
    """
    try:
        config = json.loads((path / "config.json").read_text())
        hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        vocab = int(config["vocab_size"])
        heads = int(config.get("num_attention_heads", 1))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotFound(f"no decoder model at {path}: config.json {error}") from error
    intermediate = int(config.get("intermediate_size", 4 * hidden))
    head_size = int(config.get("head_dim") or hidden // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    attention = hidden * head_size * (2 * heads + 2 * kv_heads)
    per_layer = attention + 3 * hidden * intermediate + 2 * hidden
    widths = 4 * hidden + head_size * (2 * heads + 2 * kv_heads) + 3 * (hidden + intermediate)
    embeddings = vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return ModelShape(
        parameters=embeddings + layers * per_layer,
        layers=layers,
        layer_parameters=per_layer,
        layer_widths=widths,
        hidden=hidden,
        intermediate=intermediate,
        vocab=vocab,
        heads=heads,
    )


def trained_parameters(shape: ModelShape, hyperparameters: Hyperparameters) -> int:
    """Parameters that have a gradient and optimizer state."""
    layers, rank = hyperparameters.trainable_layers, hyperparameters.lora_rank
    if rank:
        return (layers or shape.layers) * rank * shape.layer_widths
    return layers * shape.layer_parameters if layers else shape.parameters


@dataclass(frozen=True, slots=True)
class Layout:
    """What the ranks of a run keep, and where."""

    masters: bool = False
    """Whether fp32 copies are kept beside the weights."""
    ranks: int = 1
    """How many divide what ZeRO divides."""
    on_gpu: bool = False
    half: bool = False
    """Whether activations are bf16, which counts on a GPU alone."""


def estimate_bytes(shape: ModelShape, hyperparameters: Hyperparameters, layout: Layout) -> int:
    """Peak memory of one rank in bytes.

    ZeRO divides moments and masters among ranks from stage 1 on, gradients from 2 on; weights are
    whole in each while they are loaded, whatever the stage. Ranks that divide packs divide their
    activations.

    Measured against SmolLM2-135M in fp32: 1,040 packed tokens take 3.6 GB, estimated 3.9 GB; on an
    H200 in bf16: 13,440 take 14.3 GiB, and 131,200 with gradient checkpointing 19.6 GiB, estimated
    18.9 GiB.
    """
    trained = hyperparameters.trainable_layers or shape.layers
    weights = 4 * shape.parameters
    stage = hyperparameters.zero_stage if hyperparameters.zero_stage >= 0 else 2 * layout.masters
    moments, gradients, ranks = 8 + (4 if layout.masters else 0), 4, layout.ranks
    if hyperparameters.offload != "none":
        moments = 0
    per_parameter = moments / (ranks if stage >= 1 else 1) + gradients / (ranks if stage > 1 else 1)
    optimizer = math.ceil(per_parameter * trained_parameters(shape, hyperparameters))
    apart = hyperparameters.kl_coefficient > 0 and not hyperparameters.lora_rank
    reference = weights if apart else 0
    width = 2 if layout.on_gpu and layout.half else 4
    per_token: float = width * (14 * shape.hidden + 6 * shape.intermediate)
    kept_layers = 2 if hyperparameters.gradient_checkpointing else trained
    if hyperparameters.gradient_checkpointing:
        per_token += width * shape.hidden * shape.layers / kept_layers  # what layers begin with
    tokens = math.ceil(hyperparameters.micro_batch_tokens / hyperparameters.sequence_parallel)
    activations = math.ceil(tokens * per_token * kept_layers)
    logits = 3 * 4 * logit_rows(on_gpu=layout.on_gpu) * shape.vocab
    return _PROCESS_BYTES + weights + optimizer + reference + activations + logits


def offloaded_bytes(shape: ModelShape, hyperparameters: Hyperparameters, layout: Layout) -> int:
    """What one rank keeps in the host's memory instead: moments, masters and their gradients, and
    from `parameters` on the weights."""
    if hyperparameters.offload == "none":
        return 0
    kept = 16 * trained_parameters(shape, hyperparameters)
    if hyperparameters.offload == "parameters":
        kept += (2 if layout.half else 4) * shape.parameters
    return math.ceil(kept / layout.ranks)


def available_bytes() -> int:
    """Memory this process may still take: the host's, or the tightest cgroup's."""
    available = 1 << 62
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        try:
            left = int(Path(limit).read_text()) - int(Path(usage).read_text())
        except (OSError, ValueError):
            continue
        available = min(available, max(left, 0))
    return available


def check_fits(
    shape: ModelShape, hyperparameters: Hyperparameters, layout: Layout, available: int
) -> int:
    """The estimate, if it fits.

    Raises:
        FailedPrecondition: it does not; says by how much and which settings would fit.
    """
    needed = estimate_bytes(shape, hyperparameters, layout)
    if needed <= available:
        return needed
    advice = _advice(shape, hyperparameters, layout, available)
    raise FailedPrecondition(
        f"the run needs about {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are available; "
        f"{advice}",
        metadata={"needed_bytes": str(needed), "available_bytes": str(available)},
    )


def _advice(
    shape: ModelShape, hyperparameters: Hyperparameters, layout: Layout, available: int
) -> str:
    tokens = hyperparameters.micro_batch_tokens
    trials = [
        (f"micro_batch_tokens={size}", replace(hyperparameters, micro_batch_tokens=size))
        for size in (tokens // 2, tokens // 4)
        if size >= 256
    ]
    trials.append(
        ("gradient_checkpointing=true", replace(hyperparameters, gradient_checkpointing=True))
    )
    trials += [
        (f"sequence_parallel={ranks}", replace(hyperparameters, sequence_parallel=ranks))
        for ranks in range(hyperparameters.sequence_parallel + 1, layout.ranks + 1)
        if layout.ranks % ranks == 0 and shape.heads % ranks == 0
    ]
    adapted = replace(hyperparameters, lora_rank=16, gradient_checkpointing=True)
    if not hyperparameters.lora_rank:
        trials.append(("lora_rank=16 with gradient_checkpointing", adapted))
    few = max(1, shape.layers // 4)
    small = replace(
        hyperparameters,
        trainable_layers=few,
        gradient_checkpointing=True,
        micro_batch_tokens=min(tokens, 512),
    )
    together = f"trainable_layers={few} with gradient_checkpointing and micro_batch_tokens=512"
    trials.append((together, small))
    for name, trial in trials:
        if estimate_bytes(shape, trial, layout) <= available:
            return f"it would fit with {name}"
    return "use a smaller model, free memory, or shard over more processes (ZeRO stage 2 or 3)"

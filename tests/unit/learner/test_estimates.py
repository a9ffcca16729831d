"""What a run is said to need grows and shrinks with what it keeps."""

from dataclasses import replace
from pathlib import Path

import pytest

from learner_svc.estimate import estimate
from learner_svc.memory import Layout, ModelShape, check_fits, estimate_bytes
from learner_svc.spec import Hyperparameters, RunKind, RunSpec
from regreen.rpc.errors import FailedPrecondition, InvalidArgument

SHAPE = ModelShape(
    parameters=10**9,
    layers=32,
    layer_parameters=25 * 10**6,
    layer_widths=50_000,
    hidden=2048,
    intermediate=8192,
    vocab=50_000,
    heads=16,
)
USUAL = Hyperparameters()


def needed(ranks: int, stage: int) -> int:
    layout = Layout(masters=True, ranks=ranks)
    return estimate_bytes(SHAPE, replace(USUAL, zero_stage=stage), layout)


def test_ranks_divide_what_their_stage_says() -> None:
    alone = needed(1, 0)
    assert needed(8, 0) == needed(1, 1) == needed(1, 2) == alone
    # Moments and masters are 12 bytes a parameter, gradients 4; weights are whole while they load.
    assert alone - needed(8, 1) == 12 * SHAPE.parameters * 7 // 8
    assert alone - needed(8, 2) == 16 * SHAPE.parameters * 7 // 8
    assert needed(8, 3) == needed(8, 2) == needed(8, -1)


def test_checkpointing_keeps_what_each_layer_begins_with() -> None:
    tokens = 100_000
    long = replace(USUAL, micro_batch_tokens=tokens, gradient_checkpointing=True)
    longer = replace(long, micro_batch_tokens=2 * tokens)
    grown = estimate_bytes(SHAPE, longer, Layout()) - estimate_bytes(SHAPE, long, Layout())
    begins = 4 * SHAPE.hidden * SHAPE.layers * tokens
    assert begins < grown < begins + 3 * tokens * 4 * (14 * SHAPE.hidden + 6 * SHAPE.intermediate)
    kept = replace(long, gradient_checkpointing=False)
    assert estimate_bytes(SHAPE, kept, Layout()) > 3 * estimate_bytes(SHAPE, long, Layout())


def test_activations_are_halved_by_bf16_on_a_gpu_alone() -> None:
    many = replace(USUAL, micro_batch_tokens=100_000)
    on_gpu = Layout(masters=True, ranks=2, on_gpu=True)
    full, half = (estimate_bytes(SHAPE, many, replace(on_gpu, half=half)) for half in (False, True))
    activations = 100_000 * 4 * (14 * SHAPE.hidden + 6 * SHAPE.intermediate) * SHAPE.layers
    assert full - half == activations // 2
    on_cpu = replace(on_gpu, on_gpu=False)
    assert estimate_bytes(SHAPE, many, on_cpu) == estimate_bytes(
        SHAPE, many, replace(on_cpu, half=True)
    )


def test_ranks_that_divide_sequences_divide_activations() -> None:
    many = replace(USUAL, micro_batch_tokens=100_000)
    layout = Layout(masters=True, ranks=8)
    whole, half = (
        estimate_bytes(SHAPE, replace(many, sequence_parallel=ranks), layout) for ranks in (1, 2)
    )
    activations = 100_000 * 4 * (14 * SHAPE.hidden + 6 * SHAPE.intermediate) * SHAPE.layers
    assert whole - half == activations // 2
    long = replace(many, gradient_checkpointing=True, micro_batch_tokens=10**6)
    needed = estimate_bytes(SHAPE, replace(long, sequence_parallel=8), layout)
    few = replace(long, trainable_layers=1)
    available = estimate_bytes(SHAPE, replace(few, sequence_parallel=8), layout)
    assert available < needed
    with pytest.raises(FailedPrecondition, match="it would fit with sequence_parallel=8"):
        check_fits(SHAPE, few, layout, available)
    alone = estimate_bytes(SHAPE, replace(few, micro_batch_tokens=250_000), Layout(masters=True))
    with pytest.raises(FailedPrecondition, match="it would fit with micro_batch_tokens"):
        check_fits(SHAPE, few, replace(layout, ranks=1), alone)


@pytest.mark.parametrize(
    ("ranks", "nodes", "said"), [(8, 2, "4 heads"), (4, 1, "6 ranks"), (3, 1, "4 heads")]
)
def test_what_cannot_be_divided_is_refused(
    tiny_model: Path, ranks: int, nodes: int, said: str
) -> None:
    settings = Hyperparameters(sequence_parallel=ranks)
    spec = RunSpec("run_1", RunKind.GRPO, str(tiny_model), "deepspeed", settings)
    with pytest.raises(InvalidArgument, match=f"sequence_parallel: is {ranks}, .* {said}"):
        estimate(spec, [tiny_model], processes=8 if nodes > 1 else 6, nodes=nodes)

"""What a run is said to need grows and shrinks with what it keeps."""

from dataclasses import replace

from learner_svc.memory import Layout, ModelShape, estimate_bytes
from learner_svc.spec import Hyperparameters

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

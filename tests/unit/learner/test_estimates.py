"""What a run is said to need grows and shrinks with what it keeps."""

from dataclasses import replace

from learner_svc.memory import ModelShape, estimate_bytes
from learner_svc.spec import Hyperparameters

SHAPE = ModelShape(
    parameters=10**9,
    layers=32,
    layer_parameters=25 * 10**6,
    hidden=2048,
    intermediate=8192,
    vocab=50_000,
)
USUAL = Hyperparameters()


def needed(ranks: int, stage: int) -> int:
    return estimate_bytes(SHAPE, replace(USUAL, zero_stage=stage), masters=True, ranks=ranks)


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
    grown = estimate_bytes(SHAPE, longer, True) - estimate_bytes(SHAPE, long, True)
    begins = 4 * SHAPE.hidden * SHAPE.layers * tokens
    assert begins < grown < begins + 3 * tokens * 4 * (14 * SHAPE.hidden + 6 * SHAPE.intermediate)
    kept = replace(long, gradient_checkpointing=False)
    assert estimate_bytes(SHAPE, kept, True) > 3 * estimate_bytes(SHAPE, long, True)

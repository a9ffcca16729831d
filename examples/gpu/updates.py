"""Measure the learner's update on a GPU as groups, prompts and contexts grow; figures as JSON.

    python examples/gpu/updates.py --model MODEL --report updates.json

- Each row is one GRPO update in bf16: with every group's prompt computed once, and, where it fits,
  with every sample computed on its own (`no_prefix_sharing`).
- Beside them stand the memory that was estimated before the start and what was taken.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from learner_svc.bench import Shape, make_batch
from learner_svc.memory import Layout, estimate_bytes, model_shape
from learner_svc.session import Session
from learner_svc.spec import Hyperparameters, RunKind, RunSpec

_ROUNDS = 4
_LAYOUT = Layout(masters=True, on_gpu=True, half=True)
_SHAPES = (
    *(Shape(1, samples, 400, 80) for samples in (4, 8, 16, 32)),
    *(Shape(1, 8, tokens, 80) for tokens in (1000, 2000, 4000, 8000)),
    Shape(4, 8, 400, 80),
    Shape(16, 16, 1000, 200),
)
_LONG = Shape(1, 4, 120_000, 2_800)
"""A group that shares a context of 131,200 tokens."""


def measured(model: Path, home: Path, shape: Shape, **settings: Any) -> dict[str, Any]:
    """Seconds, tokens and memory of one update; the first rounds compile and do not count."""
    parameters = Hyperparameters(importance_cap=-1.0, dtype="bf16", **settings)
    wanted = shape.groups * shape.samples * (shape.prompt_tokens + shape.completion_tokens)
    parameters = replace(parameters, micro_batch_tokens=min(wanted, parameters.micro_batch_tokens))
    gc.collect()  # the engine before is in cycles
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    session = Session(RunSpec("gpu", RunKind.GRPO, str(model), "deepspeed", parameters), home)
    batch = make_batch(shape, model_shape(model).vocab)
    seconds: list[float] = []
    for _ in range(_ROUNDS):
        began_s = time.perf_counter()
        metrics = session.step(batch, (), lambda done, total: None)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began_s)
    session.close()
    return {
        "update_s": round(statistics.median(seconds[1:]), 4),
        "tokens": int(metrics["tokens"]),
        "computed": int(metrics["tokens_computed"]),
        "tokens_per_s": round(metrics["tokens"] / statistics.median(seconds[1:])),
        "taken_gb": round(metrics["peak_memory_bytes"] / 2**30, 2),
        "estimated_gb": round(estimate_bytes(model_shape(model), parameters, _LAYOUT) / 2**30, 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--report", type=Path, default=Path("updates.json"))
    options = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []

    def note(shape: Shape, **settings: Any) -> None:
        row: dict[str, Any] = asdict(shape) | settings
        try:
            with tempfile.TemporaryDirectory() as home:
                row |= measured(options.model.resolve(), Path(home), shape, **settings)
        except torch.OutOfMemoryError as error:
            row["left_out"] = str(error)[:100]
        rows.append(row)
        sys.stderr.write(json.dumps(row) + "\n")
        options.report.write_text(json.dumps(rows, indent=1) + "\n")

    for shape in _SHAPES:
        for alone in (False, True):
            note(shape, micro_batch_tokens=32_768, no_prefix_sharing=alone)
    note(_LONG, micro_batch_tokens=140_000, gradient_checkpointing=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m learner_svc.bench`: one GRPO update, ours against TRL's, on the same batch.

- Both sides start from the same weights and get the same token ids, masks and advantages. Rollouts,
  rewards and tokenization are outside the clock on both sides.
- Inside the clock: forward, loss, backward, gradient clipping and AdamW, for the whole batch. TRL's
  side is `GRPOTrainer._compute_loss` of its trainer, micro-batch by micro-batch, as it calls it.
- The losses and gradient norms must agree, or there is no ratio: a fast wrong step is no win.
- Rounds alternate and follow one on two samples, which warms up and does not count; figures are
  medians, with those of each round beside them.
"""

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learner_svc.peer import PEER_HINT
from learner_svc.session import Session
from learner_svc.spec import Hyperparameters, RunKind, RunSpec
from regreen.batch import Batch, Sample
from regreen.home import default_home

_RATE = 1e-6
_CLIP = 1.0


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of the batch."""

    groups: int = 2
    samples: int = 8
    prompt_tokens: int = 400
    completion_tokens: int = 80
    micro_batch_tokens: int = 2048
    """Tokens per forward pass on our side."""
    micro_batch: int = 0
    """Samples per forward pass on TRL's side; 0: a group's, as `learner_svc.peer` does it."""

    @property
    def trl_samples(self) -> int:
        """Samples per forward pass on TRL's side."""
        return self.micro_batch or self.samples


@dataclass(frozen=True, slots=True)
class Result:
    """What the benchmark prints."""

    compared: str
    ours_s: float
    trl_s: float
    ours_each_s: list[float]
    trl_each_s: list[float]
    ratio: float
    """TRL's median time over ours; above 1 we are faster."""
    cpu_ratio: float
    """The same of processor time: what holds when the machine is shared."""
    tokens: int
    ours_tokens_per_s: float
    trl_tokens_per_s: float
    loss_ours: float
    loss_trl: float
    grad_norm_ours: float
    grad_norm_trl: float
    engine: str
    dtype: str
    model: str
    threads: int
    device: str
    rounds: int
    shape: dict[str, int]


def make_batch(shape: Shape, vocab: int, seed: int = 0) -> Batch:
    """Random groups with given advantages and sampled logprobs of zero weight in the loss."""
    rng = np.random.default_rng(seed)
    samples = []
    for group in range(shape.groups):
        prompt = rng.integers(10, vocab, shape.prompt_tokens)
        for _ in range(shape.samples):
            completion = rng.integers(10, vocab, shape.completion_tokens)
            ids = np.concatenate([prompt, completion])
            mask = np.zeros(ids.size, int)
            mask[prompt.size :] = 1
            advantage = float(rng.normal())
            samples.append(
                Sample.make(
                    ids,
                    mask,
                    group_id=f"grp_{group}",
                    prompt_len=prompt.size,
                    advantage=advantage,
                )
            )
    return Batch(tuple(samples))


def our_round(
    model: Path, engine: str, dtype: str, home: Path, micro_batch_tokens: int
) -> Callable[[Batch], tuple[float, float]]:
    """A function that performs one update and gives loss and gradient norm."""
    hyperparameters = Hyperparameters(
        learning_rate=_RATE,
        gradient_clip=_CLIP,
        importance_cap=-1.0,
        dtype=dtype,
        micro_batch_tokens=micro_batch_tokens,
    )
    session = Session(RunSpec("bench", RunKind.GRPO, str(model), engine, hyperparameters), home)

    def run(batch: Batch) -> tuple[float, float]:
        metrics = session.step(batch, (), lambda done, total: None)
        return metrics["loss"], metrics["grad_norm"]

    return run


def trl_round(
    model: Path, shape: Shape, dtype: str, home: Path
) -> Callable[[Batch], tuple[float, float]]:
    """The same update by TRL's trainer.

    Raises:
        ImportError: TRL is not installed.
    """
    datasets, trl = _import("datasets"), _import("trl")
    transformers = _import("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
    network = transformers.AutoModelForCausalLM.from_pretrained(
        model,
        dtype=torch.bfloat16 if dtype == "bf16" else torch.float32,
        local_files_only=True,
    )
    trainer = trl.GRPOTrainer(
        model=network,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=datasets.Dataset.from_list([{"prompt": "x"}] * shape.groups),
        processing_class=tokenizer,
        args=trl.GRPOConfig(
            output_dir=str(home / "trl"),
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            per_device_train_batch_size=shape.trl_samples,
            gradient_accumulation_steps=-(-shape.groups * shape.samples // shape.trl_samples),
            num_generations=shape.samples,
            max_completion_length=shape.completion_tokens,
            beta=0.0,
            epsilon_high=0.28,
            loss_type="dapo",
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
        ),
    )
    device = trainer.accelerator.device
    network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE, betas=(0.9, 0.95), fused=True)
    optimizer.param_groups[0]["weight_decay"] = 0.0

    def run(batch: Batch) -> tuple[float, float]:
        starts = range(0, len(batch), shape.trl_samples)
        # Its loss is a share of what was generated together, which is this batch.
        trainer.current_gradient_accumulation_steps = len(starts)
        trainer.args.steps_per_generation = len(starts)
        total = 0.0
        for micro in [_trl_inputs(batch, start, shape, device) for start in starts]:
            loss = trainer._compute_loss(network, micro)
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), _CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total, float(norm)

    return run


def _import(name: str) -> Any:
    return importlib.import_module(name)


def _trl_inputs(batch: Batch, start: int, shape: Shape, device: torch.device) -> dict[str, Any]:
    samples = batch.samples[start : start + shape.trl_samples]
    ids = torch.from_numpy(np.stack([s.token_ids for s in samples]).astype(np.int64))
    prompt, completion = ids[:, : shape.prompt_tokens], ids[:, shape.prompt_tokens :]
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
        "advantages": torch.tensor([s.advantage for s in samples]),
        "num_items_in_batch": torch.tensor(batch.trained_tokens),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def compare(model: Path, engine: str, shape: Shape, rounds: int, dtype: str = "fp32") -> Result:
    """Run both sides `rounds` times in turn.

    Raises:
        ImportError: TRL is not installed.
        ValueError: the two sides do not compute the same update.
    """
    vocab = int(json.loads((model / "config.json").read_text())["vocab_size"])
    batch, small = make_batch(shape, vocab), replace(shape, groups=1, samples=2)
    seconds: dict[str, list[float]] = {"ours": [], "trl": []}
    cpu: dict[str, list[float]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory(prefix="regreen-bench-") as name:
        home = Path(name)
        sides = {
            "trl": trl_round(model, shape, dtype, home),
            "ours": our_round(model, engine, dtype, home / "extensions", shape.micro_batch_tokens),
        }
        first = {side: run(make_batch(small, vocab, 1)) for side, run in sides.items()}
        check_equal(first["ours"], first["trl"], dtype)
        for number in range(rounds):
            for side, run in sides.items():
                started, used = time.perf_counter(), time.process_time()
                first[side] = run(batch)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds[side].append(round(time.perf_counter() - started, 3))
                cpu[side].append(time.process_time() - used)
                told = f"round {number + 1}/{rounds} {side}: {seconds[side][-1]:.1f} s"
                sys.stderr.write(told + "\n")
            check_equal(first["ours"], first["trl"], dtype)
    ours_s, trl_s = statistics.median(seconds["ours"]), statistics.median(seconds["trl"])
    return Result(
        compared="one GRPO update (forward, loss, backward, clip, AdamW), rollouts excluded",
        ours_s=round(ours_s, 3),
        trl_s=round(trl_s, 3),
        ours_each_s=seconds["ours"],
        trl_each_s=seconds["trl"],
        ratio=round(trl_s / ours_s, 2),
        cpu_ratio=round(statistics.median(cpu["trl"]) / statistics.median(cpu["ours"]), 2),
        tokens=batch.tokens,
        ours_tokens_per_s=round(batch.tokens / ours_s, 1),
        trl_tokens_per_s=round(batch.tokens / trl_s, 1),
        loss_ours=first["ours"][0],
        loss_trl=first["trl"][0],
        grad_norm_ours=first["ours"][1],
        grad_norm_trl=first["trl"][1],
        engine=engine,
        dtype=dtype,
        model=model.name,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        rounds=rounds,
        shape=asdict(shape),
    )


def check_equal(ours: tuple[float, float], trl: tuple[float, float], dtype: str) -> None:
    """Hold loss and gradient norm of both sides to each other.

    Raises:
        ValueError: they differ by more than the number type explains.
    """
    share = 1e-3 if dtype == "fp32" else 3e-2
    for what, a, b in zip(("loss", "gradient norm"), ours, trl, strict=True):
        if abs(a - b) > share * max(abs(a), abs(b), 1e-3):
            raise ValueError(f"{what}: ours {a}, TRL's {b}")


def main(argv: list[str] | None = None) -> int:
    """Print the result; exit code 0 also when the comparison has to be skipped, with the reason."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="learner_svc.bench", description=__doc__
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--model", type=Path, default=default_home() / "models" / "smollm2-135m")
    parser.add_argument("--engine", default="deepspeed", choices=["deepspeed", "plain"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--samples", type=int, default=8, help="of each group")
    parser.add_argument("--prompt-tokens", type=int, default=400)
    parser.add_argument("--completion-tokens", type=int, default=80)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048, help="ours, of one pass")
    parser.add_argument("--micro-batch", type=int, default=0, help="TRL's samples of one pass")
    parser.add_argument("--threads", type=int, default=0, help="0: all processors")
    options = parser.parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    if not (options.model / "config.json").is_file():
        return _skip(f"no model at {options.model}: run python -m regreen.model_store", options)
    shape = Shape(
        options.groups,
        options.samples,
        options.prompt_tokens,
        options.completion_tokens,
        options.micro_batch_tokens,
        options.micro_batch,
    )
    try:
        result = compare(options.model, options.engine, shape, options.rounds, options.dtype)
    except ImportError as error:
        return _skip(f"TRL is not installed ({error}): {PEER_HINT}", options)
    text = json.dumps(asdict(result))
    if not options.json:
        text = (
            f"GRPO update, {result.tokens} tokens: ours {result.ours_s:.2f} s, "
            f"TRL {result.trl_s:.2f} s, {result.ratio:.2f} times as fast"
        )
    sys.stdout.write(text + "\n")
    return 0


def _skip(reason: str, options: argparse.Namespace) -> int:
    sys.stdout.write((json.dumps({"skipped": reason}) if options.json else reason) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

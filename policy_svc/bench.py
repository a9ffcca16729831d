"""Measures engines against `transformers.generate` at the shape of a rollout, in one run.

- Engines take turns within each round, so that a busy machine slows all of them alike; the ratios
  are what to read, and they are medians over rounds.
- Every engine samples the same prompts at temperature 1 for the same number of new tokens.
- `python -m policy_svc.bench --json` prints one JSON object on standard output.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from policy_svc.engines.base import Request, Sampling
from policy_svc.engines.process import local_engines
from policy_svc.engines.stepper import Stepper
from regreen.cpu import cpu_count
from regreen.home import default_home
from regreen.model_store import ensure_default_model

Runner = Callable[[list[tuple[int, ...]]], int]


@dataclass(frozen=True, slots=True)
class Shape:
    """One rollout step: `prompts` groups of `samples`, prompt lengths, new tokens of each."""

    prompts: int = 4
    samples: int = 8
    shortest: int = 400
    longest: int = 700
    new_tokens: int = 70


QUICK = Shape(prompts=2, samples=4, shortest=100, longest=200, new_tokens=16)


def prompts_of(shape: Shape, seed: int) -> list[tuple[int, ...]]:
    """Draw prompts of ordinary token ids."""
    draw = random.Random(seed)
    return [
        tuple(
            draw.randrange(300, 49000) for _ in range(draw.randint(shape.shortest, shape.longest))
        )
        for _ in range(shape.prompts)
    ]


def stepper_runner(stepper: Stepper, shape: Shape) -> Runner:
    """Return a function that samples with a stepper; the tokens that came out."""

    def run(prompts: list[tuple[int, ...]]) -> int:
        for at, prompt in enumerate(prompts):
            sampling = Sampling(max_new_tokens=shape.new_tokens, seed=at)
            stepper.add(Request(str(at), prompt, shape.samples, sampling))
        tokens = 0
        while stepper.busy():
            tokens += sum(len(chunk.token_ids) for chunk in stepper.step())
        return tokens

    return run


def transformers_runner(model: Path, shape: Shape, threads: int) -> Runner:
    """Return a function that samples with `generate` on left-padded prompts."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(threads)
    llama: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    llama.eval()

    def run(prompts: list[tuple[int, ...]]) -> int:
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[2] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            made = llama.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=shape.samples,
                max_new_tokens=shape.new_tokens,
                pad_token_id=2,
                output_scores=False,
            )
        sampled = made[:, width:]
        return int((sampled != 2).sum())

    return run


def open_stepper(name: str, model: Path, threads: int) -> Stepper:
    """Build a local engine's stepper in this process."""
    if name == "openvino":
        from policy_svc.engines.openvino import OpenVinoOptions, OpenVinoStepper

        return OpenVinoStepper(model, model, 0, OpenVinoOptions(threads=threads))
    from policy_svc.engines.torch_exact import TorchStepper

    return TorchStepper(model, model, 0, threads=threads, end_id=2)


def measure(
    model: Path, shape: Shape, rounds: int, threads: int, engines: list[str]
) -> dict[str, Any]:
    """Run all engines in turns; the whole result."""
    runners: dict[str, Runner] = {}
    swaps: dict[str, dict[str, float]] = {}
    for name in engines:
        if name == "transformers":
            runners[name] = transformers_runner(model, shape, threads)
            continue
        stepper = open_stepper(name, model, threads)
        swaps[name] = time_swap(stepper, model)
        runners[name] = stepper_runner(stepper, shape)
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    rates: dict[str, list[float]] = {name: [] for name in runners}
    for runner in runners.values():
        runner([tuple(range(300, 340))])
    for at in range(rounds):
        prompts = prompts_of(shape, at)
        for name, runner in runners.items():
            start_s = time.monotonic()
            tokens = runner(prompts)
            took_s = time.monotonic() - start_s
            seconds[name].append(round(took_s, 3))
            rates[name].append(round(tokens / took_s, 1))
            report(f"round {at + 1}/{rounds} {name}: {tokens} tokens in {took_s:.1f} s")
    base = "transformers" if "transformers" in rates else engines[-1]
    ratios = {
        f"{name}/{base}": round(
            statistics.median(a / b for a, b in zip(rates[name], rates[base], strict=True)), 2
        )
        for name in rates
        if name != base
    }
    return {
        "shape": asdict(shape),
        "threads": threads,
        "rounds": rounds,
        "tokens_per_s": rates,
        "seconds": seconds,
        "ratios": ratios,
        "weight_swap": swaps,
    }


def time_swap(stepper: Stepper, model: Path) -> dict[str, float]:
    """Time both halves of a weight change: beside sampling, and instead of it."""
    start_s = time.monotonic()
    prepared = stepper.prepare(0, model)
    middle_s = time.monotonic()
    stepper.switch(0, prepared)
    end_s = time.monotonic()
    return {
        "prepare_s": round(middle_s - start_s, 3),
        "switch_s": round(end_s - middle_s, 3),
    }


def report(line: str) -> None:
    """Say how far it is, on standard error."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m policy_svc.bench", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--quick", action="store_true", help="a small shape, for smoke tests")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=cpu_count())
    parser.add_argument("--home", type=Path, default=default_home())
    parser.add_argument(
        "--engines",
        default=",".join([*local_engines(), "transformers"]),
        help="comma-separated; the last is the baseline unless transformers is among them",
    )
    options = parser.parse_args(arguments)
    model = ensure_default_model(options.home, report).path
    shape = QUICK if options.quick else Shape()
    result = measure(model, shape, options.rounds, options.threads, options.engines.split(","))
    if options.json:
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
        return 0
    for name, rates in result["tokens_per_s"].items():
        sys.stdout.write(f"{name:14} {statistics.median(rates):8.1f} tokens/s\n")
    for name, ratio in result["ratios"].items():
        sys.stdout.write(f"{name:28} {ratio:5.2f} x\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""TRL's trainer as a peer for benchmarks: one optimizer step for each line on standard input.

- It is `trl.GRPOTrainer.train` as it comes: prompts are sampled from, scored and trained on in one
  process. Nothing of it is replaced; methods are only timed.
- Standard output holds one JSON object a line: `ready` with the prompts' token ids, then one `step`
  for each line that came in; `missing` where TRL is not installed. The process ends with its input.
- Before it is ready it samples a few tokens and takes their gradient; so the first step counts.
- `generate_s` is the call of `transformers.generate`, `update_s` all of a step but sampling and
  scoring.
"""

import argparse
import importlib
import json
import os
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

PEER_HINT = "`make bench-rl` installs it; without make: pip install 'PATH/TO/CHECKOUT[peer]'"
_WORDS = ("def", "return", "x", "y", "if", "for", "in", "range", "print", "assert", "self", "list")


def prompts_of(tokenizer: Any, count: int, tokens: int) -> list[str]:
    """Texts that are `tokens` tokens each, before and after they are decoded."""
    draw, found = random.Random(0), list[str]()
    while len(found) < count:
        text = " ".join(draw.choice(_WORDS) for _ in range(2 * tokens))
        text = tokenizer.decode(tokenizer.encode(text)[:tokens])
        if len(tokenizer.encode(text)) == tokens:
            found.append(text)
    return found


def reward(completions: list[str], **_: object) -> list[float]:
    """How often a text says "e": something to learn that costs nothing."""
    return [text.count("e") / max(1, len(text)) for text in completions]


def peak_bytes() -> int:
    """The largest resident set of this process so far."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) << 10 if found else 0


class Clock:
    """Times calls by name, and forgets them when read."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def over(self, name: str, owner: Any, method: str) -> None:
        """Time a method of one object."""
        plain = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began_s = time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                took_s = time.perf_counter() - began_s
                self._seconds[name] = self._seconds.get(name, 0.0) + took_s

        setattr(owner, method, timed)

    def read(self, name: str) -> float:
        """Seconds since the last reading."""
        return self._seconds.pop(name, 0.0)


def turns(transformers: Any, clock: Clock, say: Any) -> Any:
    """A callback that lets the trainer take a step when a line comes in."""

    class Turns(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not sys.stdin.readline():
                os._exit(0)  # the benchmark is over or gone
            self.began_s = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            step_s = time.perf_counter() - self.began_s
            rollout_s, generate_s = clock.read("rollout"), clock.read("generate")
            say(
                event="step",
                step_s=step_s,
                generate_s=generate_s,
                update_s=step_s - rollout_s,
                peak_bytes=peak_bytes(),
            )

    return Turns()


def trainer_of(options: argparse.Namespace, say: Any) -> Any:
    """The trainer, ready to train; its prompts are told.

    Raises:
        ImportError: TRL is not installed.
    """
    datasets, trl = importlib.import_module("datasets"), importlib.import_module("trl")
    transformers = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    tokenizer.padding_side = "left"
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    network = transformers.AutoModelForCausalLM.from_pretrained(
        options.model, dtype=dtype, local_files_only=True
    )
    prompts = prompts_of(tokenizer, options.prompts, options.prompt_tokens)
    clock = Clock()
    trainer = trl.GRPOTrainer(
        model=network,
        reward_funcs=reward,
        train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in prompts]),
        processing_class=tokenizer,
        callbacks=[turns(transformers, clock, say)],
        args=trl.GRPOConfig(
            output_dir=str(options.output),
            use_cpu=True,
            bf16=False,  # the weights themselves are bf16 where that was asked for
            per_device_train_batch_size=options.samples,
            gradient_accumulation_steps=options.prompts,
            num_generations=options.samples,
            max_completion_length=options.new_tokens,
            generation_kwargs={"min_new_tokens": options.new_tokens},
            max_steps=10**6,
            learning_rate=1e-6,
            beta=0.0,
            epsilon_high=0.28,
            loss_type="dapo",
            temperature=1.0,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
        ),
    )
    warm_up(network, tokenizer(prompts[:1], return_tensors="pt")["input_ids"])
    clock.over("generate", network, "generate")
    clock.over("rollout", trainer, "_generate_and_score_completions")
    ids = [tokenizer.encode(text) for text in prompts]
    say(event="ready", prompts=ids, trl=trl.__version__, threads=torch.get_num_threads())
    return trainer


def warm_up(network: Any, ids: torch.Tensor) -> None:
    """Start threads and kernels, and page in the gradients."""
    made = network.generate(ids, max_new_tokens=8, do_sample=True)
    network(input_ids=made, labels=made).loss.backward()
    network.zero_grad()


def main(argv: list[str] | None = None) -> int:
    """Train for as long as lines come in."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="learner_svc.peer", description=__doc__
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder that TRL may write to")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=400)
    parser.add_argument("--new-tokens", type=int, default=80)
    options = parser.parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # What libraries print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(**values: object) -> None:
        answers.write(json.dumps(values) + "\n")

    torch.set_num_threads(options.threads)
    try:
        trainer = trainer_of(options, say)
    except ImportError as error:
        say(event="missing", reason=f"TRL is not installed ({error}): {PEER_HINT}")
        return 0
    trainer.train()
    return 0


if __name__ == "__main__":
    sys.exit(main())

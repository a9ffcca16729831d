"""`python -m learner_svc.bench_sync`: what a GRPO step changes in weights, and a delta saves.

- The steps are real: the model samples answers to prompts, those with more of one letter are
  rewarded, and the learner's own session does the updates, with AdamW at the rate of GRPO runs.
- Steps are taken twice. In the model as it comes masters lie where its own number type put them: of
  F16 an eighth lie on the border of two bf16 numbers, and fall to one or the other with the first
  step; bf16 ones lie in the middle, and few move at first. `settled` has them spread evenly over
  all that rounds to the same, as once a run has gone on for long: that is what a run sees.
- A delta is compared with what it stands in for: the bytes of the whole file in bf16, and the
  processor time (which holds when the machine is shared) to copy and hash it. Beside it are what
  packs the file without a base (zstd), and the XOR of all bits, packed, as others send it.
- Every delta is applied, and has to give the file bit for bit, or there is no figure.
- fp32 is measured as well, to show why a delta of it is refused.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors.torch import save_file

from learner_svc.model import load_model
from learner_svc.session import Session
from learner_svc.spec import Hyperparameters, RunKind, RunSpec
from regreen.batch import Batch, Sample
from regreen.blobs import digest_of_file
from regreen.home import default_home
from regreen.weight_delta import Delta, FileDigest, encode, form_of, mapped, write_pieces

_PROMPTS = (
    "The build of a Java project fails after an upgrade of its logging library. First, one should",
    "A short letter to a friend about the weather in spring:",
    "Three rules for writing tests that do not break:",
    "The old lighthouse keeper opened the door and",
)
_LETTER = "e"


@dataclass(frozen=True, slots=True)
class Step:
    """A step's delta, in shares of the whole file and of the processor time to copy and hash it."""

    masters: str
    """as they come, or settled."""
    step: int
    unchanged: float
    """Share of the elements of the bf16 weights."""
    bytes: float
    """Delta over whole file, both in bf16."""
    bytes_of_fp32: float
    """Delta in bf16 over the whole file in fp32."""
    bytes_packed_alone: float
    """The bf16 file, packed without a base, over itself."""
    bytes_of_all_differences: float
    """XOR of both bf16 files, packed, over one of them."""
    encode_time: float
    apply_time: float
    round_time: float
    """Making the bf16 file of the fp32 one."""
    fp32_unchanged: float
    fp32_bytes: float
    """Delta over whole file, both in fp32."""
    gradient_norm: float


def batches(model: Path, count: int, samples: int, tokens: int, seed: int = 0) -> Iterator[Batch]:
    """Groups of sampled answers with their rewards, from the model as it comes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)  # type: ignore[no-untyped-call]
    network = load_model(model)
    network.train(False)
    torch.manual_seed(seed)
    for _ in range(count):
        found: list[Sample] = []
        for number, prompt in enumerate(_PROMPTS):
            head = tokenizer(prompt, return_tensors="pt").input_ids
            with torch.no_grad():
                ids = network.generate(  # type: ignore[operator]
                    head,
                    attention_mask=torch.ones_like(head),
                    do_sample=True,
                    top_k=0,
                    max_new_tokens=tokens,
                    min_new_tokens=tokens,
                    num_return_sequences=samples,
                    pad_token_id=0,
                )
            for row in ids:
                text = tokenizer.decode(row[head.shape[1] :])
                mask = np.zeros(len(row), int)
                mask[head.shape[1] :] = 1
                found.append(
                    Sample.make(
                        row.numpy(),
                        mask,
                        group_id=f"grp_{number}",
                        prompt_len=head.shape[1],
                        reward=text.count(_LETTER) / max(len(text), 1),
                    )
                )
        yield Batch(tuple(found))


def settled(model: Path, folder: Path, seed: int = 0) -> Path:
    """The model with each fp32 master anywhere that rounds to the bf16 number that it is."""
    generator = torch.Generator().manual_seed(seed)
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors", "gguf*"))
    network, weights = load_model(model), {}
    for name, value in network.state_dict().items():
        rounded = value.to(torch.bfloat16)
        bits = rounded.view(torch.int16).to(torch.int32) << 16
        low = torch.randint(-(1 << 15) + 1, 1 << 15, bits.shape, generator=generator).int()
        moved = (bits + low).view(torch.float32)
        # Zero has no neighbours that a sum of bits would reach.
        weights[name] = torch.where(moved.to(torch.bfloat16) == rounded, moved, value).contiguous()
    if network.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def measure(
    model: Path, masters: str, steps: list[Batch], rate: float, rounds: int, home: Path
) -> Iterator[Step]:
    """Do the steps, and compare the weights after each with those before."""
    hyperparameters = Hyperparameters(learning_rate=rate, importance_cap=-1.0, dtype="fp32")
    spec = RunSpec("bench", RunKind.GRPO, str(model), "plain", hyperparameters)
    session = Session(spec, home / "extensions")
    checkpoints = home / masters / "checkpoints"
    before = _published(session, checkpoints, 0)
    for number, batch in enumerate(steps, 1):
        metrics = session.step(batch, (), lambda done, total: None)
        after = _published(session, checkpoints, number)
        figures = _compare(before, after, rounds, home)
        yield Step(masters, number, **figures, gradient_norm=round(metrics["grad_norm"], 4))
        before = after


def _published(session: Session, checkpoints: Path, version: int) -> Path:
    made = session.publish(checkpoints, version, version)
    assert made is not None
    return made.file


def _compare(before: Path, after: Path, rounds: int, home: Path) -> dict[str, float]:
    old, new, copy = home / "old", home / "new", home / "copy"
    seconds: dict[str, list[float]] = {"copy": [], "round": [], "encode": [], "apply": []}
    _form(before, old)
    for _ in range(rounds):
        seconds["round"].append(_timed(lambda: _form(after, new)))
        seconds["copy"].append(_timed(lambda: _copied(new, copy)))
        seconds["encode"].append(_timed(lambda: _encode(old, new, home / "delta")))
        seconds["apply"].append(_timed(lambda: _apply(old, home / "delta", copy)))
        if digest_of_file(copy) != digest_of_file(new):
            raise ValueError("a delta did not give the weights back")
    unchanged, size = _encode(old, new, home / "delta")
    fp32_unchanged, fp32_size = _encode(before, after, home / "delta")
    full, times = new.stat().st_size, {n: statistics.median(s) for n, s in seconds.items()}
    packer = zstandard.ZstdCompressor(level=3)
    bits = [np.frombuffer(path.read_bytes(), np.uint8) for path in (old, new)]
    return {
        "unchanged": round(unchanged, 6),
        "bytes": round(size / full, 5),
        "bytes_of_fp32": round(size / after.stat().st_size, 5),
        "bytes_packed_alone": round(len(packer.compress(bits[1].tobytes())) / full, 4),
        "bytes_of_all_differences": round(
            len(packer.compress((bits[0] ^ bits[1]).tobytes())) / full, 5
        ),
        "encode_time": round(times["encode"] / times["copy"], 2),
        "apply_time": round(times["apply"] / times["copy"], 2),
        "round_time": round(times["round"] / times["copy"], 2),
        "fp32_unchanged": round(fp32_unchanged, 6),
        "fp32_bytes": round(fp32_size / after.stat().st_size, 4),
    }


def _timed(work: Callable[[], object]) -> float:
    began_s = time.process_time()
    work()
    return time.process_time() - began_s


def _copied(source: Path, target: Path) -> str:
    """What a policy does with a whole file: it writes it, and hashes what it wrote."""
    hashed = hashlib.sha256()
    with source.open("rb") as content, target.open("wb") as file:
        while piece := content.read(1 << 22):
            hashed.update(piece)
            file.write(piece)
    return hashed.hexdigest()


def _form(source: Path, target: Path) -> FileDigest:
    with target.open("wb") as file:
        return write_pieces(file, form_of(mapped(source), {}, bf16=True))


def _encode(old: Path, new: Path, target: Path) -> tuple[float, int]:
    """Share of unchanged elements, and bytes of the delta; digests are known where it is made."""
    digests = [FileDigest(*_known(path)) for path in (old, new)]
    with target.open("wb") as file:
        made = encode(mapped(old), mapped(new), (digests[0], digests[1]), file.write)
    return 1 - made.changed / made.elements, made.size_bytes


_DIGESTS: dict[tuple[str, int], tuple[str, int]] = {}


def _known(path: Path) -> tuple[str, int]:
    key = (str(path), path.stat().st_mtime_ns)
    if key not in _DIGESTS:
        found = digest_of_file(path)
        _DIGESTS[key] = (found.sha256, found.size_bytes)
    return _DIGESTS[key]


def _apply(old: Path, delta: Path, target: Path) -> None:
    with target.open("wb") as file:
        Delta(mapped(delta)).apply(mapped(old), file.write)


def main(argv: list[str] | None = None) -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="learner_svc.bench_sync", description=__doc__
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--model", type=Path, default=default_home() / "models" / "smollm2-135m")
    parser.add_argument("--steps", type=int, default=3, help="from each kind of masters")
    parser.add_argument("--samples", type=int, default=4, help="of each of four prompts")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--rounds", type=int, default=3, help="of each time, of which medians are")
    options = parser.parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not (options.model / "config.json").is_file():
        reason = f"no model at {options.model}: run python -m regreen.model_store"
        sys.stdout.write((json.dumps({"skipped": reason}) if options.json else reason) + "\n")
        return 0
    steps = list(batches(options.model, options.steps, options.samples, options.tokens))
    found: list[Step] = []
    with tempfile.TemporaryDirectory(prefix="regreen-bench-") as name:
        home = Path(name)
        models = {
            "as they come": options.model,
            "settled": settled(options.model, home / "settled-model"),
        }
        for masters, model in models.items():
            for step in measure(model, masters, steps, options.learning_rate, options.rounds, home):
                found.append(step)
                sys.stderr.write(f"{masters}, step {step.step}: {step.unchanged:.4%} unchanged\n")
    _print(found, options)
    return 0


def _print(found: list[Step], options: argparse.Namespace) -> None:
    result: dict[str, Any] = {
        "model": options.model.name,
        "learning_rate": options.learning_rate,
        "tokens_of_a_step": options.samples * len(_PROMPTS) * options.tokens,
        "steps": {f"{step.masters}, {step.step}": asdict(step) for step in found},
    }
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    for step in found:
        sys.stdout.write(
            f"{step.masters}, step {step.step}: {step.unchanged:.3%} of bf16 unchanged, delta "
            f"{step.bytes:.3%} of the file, encode {step.encode_time:.2f} and apply "
            f"{step.apply_time:.2f} times copy and hash; fp32 {step.fp32_unchanged:.3%}, "
            f"{step.fp32_bytes:.1%}\n"
        )


if __name__ == "__main__":
    sys.exit(main())

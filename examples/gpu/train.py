"""Train on a GPU with a real SGLang server and DeepSpeed; print figures, write them as JSON.

    python examples/gpu/train.py --sglang-python /path/to/sglang/venv/bin/python --report gpu.json

- SGLang runs from an environment of its own: its pins and the learner's conflict.
- The policy service samples from the server, the learner service trains on the GPU, and the
  checkpoint of every step is pushed to the server: what `regreen train` does, with a reward that
  costs nothing.
- Checks that only a real server can answer are made on the way: a push that fails leaves the old
  weights serving, and logprobs of the server are those that the learner finds for the same tokens.
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx

from regreen.home import default_home
from regreen.model_store import ensure_default_model
from regreen.rpc.errors import RegreenError
from regreen.stack.follow import following
from regreen.train.bench import prompts_of
from regreen.train.bench_sides import Services, Shape
from regreen.train.weights import Weights

_MOST_K3 = 0.01
"""KL per token between server and learner, both bf16; far above what rounding gives."""


def say(line: str) -> None:
    """Say how far it is."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()


@contextlib.asynccontextmanager
async def sglang(options: argparse.Namespace, model: Path) -> AsyncIterator[dict[str, Any]]:
    """A server on a free port: its URL, release and seconds until it was healthy."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [options.sglang_python, "-m", "sglang.launch_server", "--model-path", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
    command += options.sglang_flags.split()
    path = {"PYTHONPATH": options.sglang_path} if options.sglang_path else {}
    environment = os.environ | {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1"} | path
    with options.sglang_log.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *following(command), stdout=log, stderr=log, env=environment
        )
    url, began_s = f"http://127.0.0.1:{port}", time.monotonic()
    try:
        async with httpx.AsyncClient(base_url=url, timeout=10) as client:
            while not await _healthy(client):
                if process.returncode is not None or time.monotonic() - began_s > options.start_s:
                    tail = options.sglang_log.read_text(errors="replace")[-3000:]
                    raise SystemExit(f"SGLang is not healthy; its log ends:\n{tail}")
                await asyncio.sleep(0.5)
            info = (await client.get("/server_info")).json()
        started_s = round(time.monotonic() - began_s, 1)
        say(f"SGLang {info.get('version')} is healthy after {started_s} s")
        yield {"url": url, "release": info.get("version"), "start_s": started_s}
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def _healthy(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health_generate")).status_code == 200
    except httpx.TransportError:
        return False


async def refused_push(services: Services, folder: Path) -> dict[str, Any]:
    """Push weights that are none; the version that served goes on."""
    before = (await services.policy.get_policy()).policy.version
    try:
        await services.load(Weights(str(folder), before + 100, run_id="none"))
    except RegreenError as error:
        refusal = error.message
    else:
        raise SystemExit("a folder without weights was loaded")
    after = await services.rollout([[504, 3575, 282]], Shape(1, 1, 3, 8))
    versions = {span.version for span in after[0][0].spans}
    if versions != {before}:
        raise SystemExit(f"after a refused push version {versions} serves, not {before}")
    return {"refusal": refusal[:200], "version": before}


async def learn(services: Services, shape: Shape, steps: int) -> dict[str, Any]:
    """GRPO steps: rewards, seconds of their parts, and how far server and learner are apart."""
    prompts, rows = prompts_of(shape), []
    for number in range(1, steps + 1):
        seconds = await services.step(prompts, shape)
        metrics = services.metrics
        row = seconds | {name: metrics[name] for name in ("loss", "grad_norm", "reward_mean")}
        row |= {"k3": metrics["mismatch_k3"], "peak_gb": metrics["peak_memory_bytes"] / 2**30}
        rows.append(row)
        say(f"step {number}: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()))
        if row["k3"] > _MOST_K3:
            raise SystemExit(f"server and learner are apart by {row['k3']} a token: other weights?")
    ends = max(1, steps // 5)
    sampled = shape.prompts * shape.samples * shape.new_tokens
    tokens = sampled + shape.prompts * shape.samples * shape.prompt_tokens
    middle = {name: statistics.median(row[name] for row in rows[1:] or rows) for name in rows[0]}
    return {
        "steps": rows,
        "median": middle,
        "reward_first": statistics.mean(row["reward_mean"] for row in rows[:ends]),
        "reward_last": statistics.mean(row["reward_mean"] for row in rows[-ends:]),
        "sampled_tokens_per_s": round(sampled / middle["rollout_s"]),
        "trained_tokens_per_s": round(tokens / middle["update_s"]),
    }


async def grow(services: Services, base: Shape) -> list[dict[str, Any]]:
    """One step's rollouts and update at other sizes."""
    shapes = [replace(base, samples=n) for n in (8, 32, 64)]
    shapes += [replace(base, prompt_tokens=n) for n in (2000, 6000)]
    shapes += [replace(base, prompts=n) for n in (16, 64)]
    rows = []
    for shape in shapes:
        prompts = prompts_of(shape)
        await services.rollout(prompts[:1], replace(shape, prompts=1))  # kernels for this size
        began_s = time.perf_counter()
        groups = await services.rollout(prompts, shape)
        rolled_s = time.perf_counter()
        await services.update(groups)  # a first time, for kernels of this size
        again_s = time.perf_counter()
        metrics = await services.update(groups)
        ended_s = time.perf_counter()
        sampled = sum(sum(rollout.mask) for group in groups for rollout in group)
        row = {
            "prompts": shape.prompts,
            "samples": shape.samples,
            "prompt_tokens": shape.prompt_tokens,
            "rollout_s": round(rolled_s - began_s, 3),
            "update_s": round(ended_s - again_s, 3),
            "sampled_tokens_per_s": round(sampled / (rolled_s - began_s)),
            "tokens": int(metrics["tokens"]),
            "tokens_computed": int(metrics["tokens_computed"]),
            "trained_tokens_per_s": round(metrics["tokens"] / (ended_s - again_s)),
            "peak_gb": round(metrics["peak_memory_bytes"] / 2**30, 2),
        }
        rows.append(row)
        say(", ".join(f"{name} {value}" for name, value in row.items()))
    return rows


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, in one run; the report."""
    model = (options.model or ensure_default_model(options.home, say).path).resolve()
    shape, report = Shape(prompts=options.prompts, samples=options.samples), dict[str, Any]()
    rates = {"learning_rate": options.learning_rate, "micro_batch_tokens": options.micro_batch}
    with tempfile.TemporaryDirectory(prefix="regreen-gpu-") as folder:
        home = Path(folder)
        (home / "none").mkdir()
        async with sglang(options, model) as server:
            flags = ["--engine", "sglang", "--sglang-urls", server["url"]]
            services = Services(
                home, model, "bf16", os.cpu_count() or 1, policy=flags, hyperparameters=rates
            )
            try:
                async with services.running():
                    await services.warm_up()
                    report |= {
                        "model": model.name,
                        "server": server,
                        "estimated_gb": services.run.estimated_memory_bytes / 2**30,
                        "engines": [services.served.engine, services.run.engine],
                        "shape": asdict(shape),
                        "refused_push": await refused_push(services, home / "none"),
                    }
                    report["learning"] = await learn(services, shape, options.steps)
                    options.report.write_text(json.dumps(report, indent=1) + "\n")
                    report["sizes"] = await grow(services, replace(shape, prompts=4))
            except BaseException:
                for log in home.rglob("*.log"):
                    say(f"{log.name} ends:\n{log.read_text(errors='replace')[-2000:]}")
                raise
    return report


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sglang-python", default=sys.executable, help="interpreter with SGLang")
    parser.add_argument("--sglang-path", default="", help="PYTHONPATH of the server")
    parser.add_argument("--sglang-flags", default="--mem-fraction-static 0.4 --enable-metrics")
    parser.add_argument("--sglang-log", type=Path, default=Path("sglang.log"))
    parser.add_argument("--start-s", type=float, default=600.0, help="wait for the server")
    parser.add_argument("--model", type=Path, help="model folder; default: the small model")
    parser.add_argument("--home", type=Path, default=default_home())
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--micro-batch", type=int, default=16384, help="tokens of a forward pass")
    parser.add_argument("--report", type=Path, default=Path("gpu.json"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit code."""
    options = options_of(argv)
    report = asyncio.run(run(options))
    options.report.write_text(json.dumps(report, indent=1) + "\n")
    learning = report["learning"]
    say(
        f"reward {learning['reward_first']:.4f} to {learning['reward_last']:.4f}; "
        f"{learning['sampled_tokens_per_s']} sampled and {learning['trained_tokens_per_s']} "
        f"trained tokens/s; weights live in {learning['median']['live_s']:.2f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A whole GRPO step beside TRL's `GRPOTrainer`, and how it grows.

- `python -m regreen.train.bench --json` prints one JSON object; without the flag, a table.
- Regreen runs as its services, TRL in one process (`regreen.train.bench_sides`): same model, same
  prompts, as many sampled tokens, as many threads. They take turns within one run, one computes at
  a time; both are warm by a few tokens; figures are medians with lowest and highest.
- `transformers.generate` is the call that TRL's step makes; the padded update is the rest of that
  step. Equal loss and gradient norm are shown by `learner_svc.bench`: both updates, one group.
- A number type that the processor only emulates is left out, with the reason; so are sizes for
  which no time was left, and TRL where it is not installed.
- A target is reported as met or missed; nothing here fails because a machine is slow.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from regreen.cpu import has_fast_bf16
from regreen.home import default_home
from regreen.model_store import ensure_default_model
from regreen.rpc.errors import RegreenError
from regreen.stack.follow import following
from regreen.train.bench_sides import Services, Shape, Trl

_STEP_TARGETS = {"fp32": 3.5, "bf16": 3.0}
_ROUNDS_SHARE = 0.75
_EQUAL = {"fp32": 1e-3, "bf16": 3e-2}
"""By how much loss and gradient norm of both updates may differ, of themselves."""
_QUICK = Shape(prompts=2, samples=4, prompt_tokens=100, new_tokens=16)

Samples = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Which sizes of one group are measured; each grows alone."""

    samples: tuple[int, ...] = (4, 8, 16, 32)
    prompt_tokens: tuple[int, ...] = (400, 1000, 2000, 4000)
    turns: tuple[int, ...] = (1, 3, 10)


@dataclass(frozen=True, slots=True)
class Plan:
    """What one run measures."""

    model: Path
    threads: int
    dtypes: tuple[str, ...]
    shape: Shape = field(default_factory=Shape)
    rounds: int = 2
    sizes: Sizes = field(default_factory=Sizes)
    only_live: bool = False
    """Measure only how long new weights take to serve."""
    began_s: float = field(default_factory=time.monotonic)
    limit_s: float = 2400.0
    """After it no size begins; rounds end within `_ROUNDS_SHARE` of it, but for the first."""

    def used(self) -> float:
        """The share of the time that has passed."""
        return (time.monotonic() - self.began_s) / max(self.limit_s, 1e-9)


def number_types(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """The number types in which this processor trains at full speed."""
    return ("fp32", "bf16") if has_fast_bf16(cpuinfo) else ("fp32",)


def say(line: str) -> None:
    """Say how far it is, on standard error."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()


def prompts_of(shape: Shape) -> list[list[int]]:
    """Prompts of ordinary token ids, for sides that need no text."""
    draw = random.Random(shape.prompt_tokens)
    return [
        [draw.randrange(300, 49000) for _ in range(shape.prompt_tokens)]
        for _ in range(shape.prompts)
    ]


async def whole_steps(plan: Plan, dtype: str) -> dict[str, Any]:
    """Whole steps of both sides in turns, in one number type."""
    share = (plan.dtypes.index(dtype) + 1) / len(plan.dtypes)
    sides: dict[str, Samples] = {"ours": {}, "trl": {}}
    with tempfile.TemporaryDirectory(prefix="regreen-bench-") as folder:
        home = Path(folder)
        ours = Services(home, plan.model, dtype, plan.threads)
        trl = Trl.running(home, plan.model, dtype, plan.threads, plan.shape)
        async with trl as peer, ours.running():
            prompts = peer.ready.get("prompts") or prompts_of(plan.shape)
            await ours.warm_up()
            for number in range(1, plan.rounds + 1):
                began = plan.used()
                found = {"ours": await ours.step(prompts, plan.shape)}
                found["trl"] = await peer.step()
                for side, values in found.items():
                    say(f"{dtype} round {number}/{plan.rounds} {side}: {_short(values)}")
                    for name, value in values.items():
                        sides[side].setdefault(name, []).append(value)
                if 2 * plan.used() - began > _ROUNDS_SHARE * share:
                    break
            peaks = {"ours": ours.peak_bytes()}
            engines = {"policy": ours.served.engine, "learner": ours.run.engine}
            growth = await grown(plan, ours) if dtype == plan.dtypes[-1] else {}
    trl_peak = sides["trl"].pop("peak_bytes", [])
    peaks |= {"trl": int(max(trl_peak))} if trl_peak else {}
    return {
        "engines": engines,
        "rounds": len(sides["ours"]["step_s"]),
        "trl": peer.missing or peer.ready["trl"],
        "seconds": {side: spreads(rows) for side, rows in sides.items() if rows},
        "peak_mb": {side: peak >> 20 for side, peak in peaks.items()},
        "growth": growth,
    }


async def live(plan: Plan) -> dict[str, Any]:
    """Only how long new weights take to serve: published ahead of their checkpoint, and with it."""
    found: dict[str, Any] = {}
    shape = Shape(prompts=1, samples=2, prompt_tokens=48, new_tokens=8)
    for dtype in plan.dtypes:
        sides: dict[str, Samples] = {"published": {}, "with_checkpoint": {}}
        with tempfile.TemporaryDirectory(prefix="regreen-bench-") as folder:
            ours = Services(Path(folder), plan.model, dtype, plan.threads)
            async with ours.running():
                await ours.warm_up()
                groups = await ours.rollout(prompts_of(shape), shape)
                for number in range(1, plan.rounds + 1):
                    for side, measured in (
                        ("published", ours.live),
                        ("with_checkpoint", ours.live_when_whole),
                    ):
                        await ours.update(groups)
                        values = await measured()
                        say(f"{dtype} round {number}/{plan.rounds} {side}: {_short(values)}")
                        for name, value in values.items():
                            sides[side].setdefault(name, []).append(value)
                engine = ours.served.engine
        seconds = {side: spreads(rows) for side, rows in sides.items()}
        within = target(seconds["published"]["live_s"]["median"], "at most", 2.0)
        found[dtype] = {"engine": engine, "seconds": seconds, "live": within}
    return {"bench": "live", "threads": plan.threads, "cpus": os.cpu_count(), "live": found} | {
        "load_1m": round(os.getloadavg()[0], 2)
    }


async def grown(plan: Plan, ours: Services) -> dict[str, dict[str, Any]]:
    """One group at every size: seconds of rollout and update, and tokens computed."""
    base = replace(plan.shape, prompts=1)
    found: dict[str, dict[str, Any]] = {}
    for name, sizes in asdict(plan.sizes).items():
        rows: dict[str, Any] = {}
        for size in sizes:
            shape = replace(base, **{name: size})
            if plan.used() > 1:
                rows[str(size)] = {"left_out": "no time was left (--minutes)"}
                continue
            try:
                rows[str(size)] = await _one_size(ours, shape)
            except RegreenError as error:
                rows[str(size)] = {"left_out": str(error)}
            say(f"one group, {name} {size}: {_short(rows[str(size)])}")
        found[name] = rows
    return found


async def _one_size(ours: Services, shape: Shape) -> dict[str, float]:
    began_s = time.perf_counter()
    groups = await ours.rollout(prompts_of(shape), shape)
    rolled_s = time.perf_counter()
    metrics = await ours.update(groups)
    ended_s = time.perf_counter()
    sampled = sum(sum(rollout.mask) for group in groups for rollout in group)
    return {
        "rollout_s": round(rolled_s - began_s, 2),
        "update_s": round(ended_s - rolled_s, 2),
        "sampled_tokens": sampled,
        "tokens": int(metrics["tokens"]),
        "tokens_computed": int(metrics["tokens_computed"]),
    }


async def updates(plan: Plan, dtype: str) -> dict[str, Any]:
    """Both updates on one batch (`learner_svc.bench`)."""
    shape = plan.shape
    options = {
        "model": plan.model,
        "dtype": dtype,
        "threads": plan.threads,
        "rounds": plan.rounds,
        "groups": 1,
        "samples": shape.samples,
        "prompt-tokens": shape.prompt_tokens,
        "completion-tokens": shape.new_tokens,
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    process = await asyncio.create_subprocess_exec(
        *following([sys.executable, "-m", "learner_svc.bench", "--json", *arguments]),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": str(plan.threads)},
    )
    out, _ = await process.communicate()
    if process.returncode != 0:
        return {"skipped": f"learner_svc.bench ended with {process.returncode}"}
    # Libraries may greet on standard output; the object begins the first line that opens one.
    text = "\n" + out.decode("utf-8", "replace")
    found: dict[str, Any] = json.loads(text[text.index("\n{") :])
    return found


def spreads(rows: Samples) -> dict[str, dict[str, float]]:
    """Median, lowest and highest of each row."""
    return {
        name: {
            "median": round(statistics.median(values), 2),
            "lowest": round(min(values), 2),
            "highest": round(max(values), 2),
        }
        for name, values in rows.items()
    }


def target(value: float, side: str, bound: float) -> dict[str, Any]:
    """A figure with its target, and whether it is met."""
    met = value >= bound if side == "at least" else value <= bound
    return {"ratio": value, "target": f"{side} {bound:g}", "met": met}


def targets(steps: Mapping[str, Any], compared: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What was measured and has a target."""
    found: dict[str, dict[str, Any]] = {}
    for dtype, one in steps.items():
        middle = {
            side: {name: row["median"] for name, row in rows.items()}
            for side, rows in one["seconds"].items()
        }
        ours, trl, peaks = middle["ours"], middle.get("trl"), one["peak_mb"]
        if trl:
            step = round(trl["step_s"] / ours["step_s"], 2)
            found[f"TRL's step over ours, {dtype}"] = target(step, "at least", _STEP_TARGETS[dtype])
            update = round(trl["update_s"] / ours["update_s"], 2)
            found[f"padded update over ours, {dtype}"] = target(update, "at least", 2.2)
            generate = round(trl["generate_s"] / ours["rollout_s"], 2)
            name = f"transformers.generate over our rollout, {dtype}"
            found[name] = target(generate, "at least", 3.0)
            memory = round(peaks["ours"] / peaks["trl"], 2)
            found[f"our peak memory over TRL's, {dtype}"] = target(memory, "at most", 1.0)
        live = target(ours["live_s"], "at most", 2.0)
        found[f"seconds until new weights serve, {dtype}"] = live
    for dtype, one in compared.items():
        for what in ("loss", "grad_norm") if "ratio" in one else ():
            a, b = one[f"{what}_ours"], one[f"{what}_trl"]
            apart = float(f"{abs(a - b) / max(abs(a), abs(b), 1e-9):.2g}")
            name = f"{what} of both updates on one group, apart by, {dtype}"
            found[name] = target(apart, "at most", _EQUAL[dtype])
    return found


async def measure(plan: Plan) -> dict[str, Any]:
    """Everything, in one run; the report."""
    steps, compared = {}, {}
    for dtype in plan.dtypes:
        say(f"{dtype}: both updates on one batch")
        compared[dtype] = await updates(plan, dtype)
        say(f"{dtype}: whole steps")
        steps[dtype] = await whole_steps(plan, dtype)
    reason = "this processor only emulates bf16 (it has no amx_bf16), and Regreen trains in fp32"
    return {
        "bench": "rl",
        "shape": asdict(plan.shape),
        "threads": plan.threads,
        "cpus": os.cpu_count(),
        "load_1m": round(os.getloadavg()[0], 2),
        "steps": steps,
        "updates": compared,
        "targets": targets(steps, compared),
        "skipped": {} if "bf16" in plan.dtypes else {"bf16": reason},
    }


def table(report: Mapping[str, Any]) -> str:
    """The report as lines."""
    if report.get("bench") == "live":
        return _live_table(report)
    shape = report["shape"]
    lines = [
        "{prompts} prompts x {samples} samples x ({prompt_tokens} + {new_tokens}) tokens, ".format(
            **shape
        )
        + f"{report['threads']} threads"
    ]
    for dtype, one in report["steps"].items():
        lines.append(f"{dtype}: {one['rounds']} rounds; TRL: {one['trl']}")
        for side, rows in one["seconds"].items():
            for name, row in rows.items():
                spread = f"({row['lowest']:.1f} to {row['highest']:.1f})"
                lines.append(f"{dtype} {side:5} {name:12} {row['median']:8.1f} s  {spread}")
        for side, peak in one["peak_mb"].items():
            lines.append(f"{dtype} {side:5} peak memory  {peak:8} MB")
        for name, rows in one["growth"].items():
            lines += [f"{dtype} one group, {name} {n}: {_short(row)}" for n, row in rows.items()]
    for dtype, one in report["updates"].items():
        lines.append(f"{dtype} both updates on one batch: {_short(one)}")
    for name, found in report["targets"].items():
        verdict = "met" if found["met"] else "missed"
        lines.append(f"{name}: {found['ratio']}, {found['target']}: {verdict}")
    lines += [f"{name}: left out, {reason}" for name, reason in report["skipped"].items()]
    return "\n".join(lines) + "\n"


def _live_table(report: Mapping[str, Any]) -> str:
    lines = [f"{report['threads']} threads, load {report['load_1m']}"]
    for dtype, one in report["live"].items():
        for side, rows in one["seconds"].items():
            for name, row in rows.items():
                spread = f"({row['lowest']:.1f} to {row['highest']:.1f})"
                lines.append(f"{dtype} {side:15} {name:9} {row['median']:8.1f} s  {spread}")
        verdict = "met" if one["live"]["met"] else "missed"
        lines.append(
            f"seconds until new weights serve, {dtype}, {one['engine']}: "
            f"{one['live']['ratio']}, {one['live']['target']}: {verdict}"
        )
    return "\n".join(lines) + "\n"


def _short(values: Mapping[str, Any]) -> str:
    told = {
        name: f"{value:.1f}" if isinstance(value, float) else str(value)
        for name, value in values.items()
        if not isinstance(value, dict | list)
    }
    return ", ".join(f"{name} {value}" for name, value in told.items())


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def plan_of(argv: Sequence[str] | None) -> tuple[Plan, bool]:
    """The plan that the command line asks for, and whether it wants JSON."""
    usual = Sizes()
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m regreen.train.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--live", action="store_true", help="measure only how long new weights take to serve"
    )
    parser.add_argument("--quick", action="store_true", help="a small shape, for smoke tests")
    parser.add_argument("--prompts", type=int, default=Shape().prompts, help="groups of a step")
    parser.add_argument("--rounds", type=int, default=2, help="rounds that count")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--minutes", type=float, default=40.0, help="time to fit rounds and sizes into, about"
    )
    parser.add_argument("--dtypes", help="fp32,bf16; default: those that the processor is made for")
    parser.add_argument("--home", type=Path, default=default_home())
    for name, sizes in asdict(usual).items():
        flag = name.replace("_", "-")
        text = ",".join(map(str, sizes))
        parser.add_argument(f"--{flag}", default=text, help=f"sizes to grow to; default {text}")
    options = parser.parse_args(argv)
    dtypes = tuple(options.dtypes.split(",")) if options.dtypes else number_types()
    if not set(dtypes) <= set(_STEP_TARGETS):
        parser.error(f"--dtypes {options.dtypes}: give fp32, bf16 or both")
    chosen = {name: _numbers(getattr(options, name)) for name in asdict(usual)}
    quick = Sizes(samples=(4, 8), prompt_tokens=(100, 200), turns=(1, 2))
    plan = Plan(
        model=ensure_default_model(options.home, say).path.resolve(),
        threads=options.threads,
        dtypes=dtypes,
        shape=_QUICK if options.quick else Shape(prompts=options.prompts),
        rounds=1 if options.quick else options.rounds,
        sizes=quick if options.quick else Sizes(**chosen),
        limit_s=60 * options.minutes,
        only_live=options.live,
    )
    return plan, options.json


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    plan, as_json = plan_of(argv)
    report = asyncio.run(live(plan) if plan.only_live else measure(plan))
    sys.stdout.write(json.dumps(report, indent=1) + "\n" if as_json else table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

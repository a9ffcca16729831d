"""What a driver and its services cost beside the engine: a thousand scripted episodes at a time.

- `python -m regreen.rollout.bench --json` prints one JSON object; without the flag, a table.
- Driver, rollouts, queue, Postgres, sandboxes and judge are the real ones; only the engine behind
  the policy service is simulated: it answers a script token by token at a set pace. That pace is
  the floor of a turn's time, and what a turn takes beyond it is the overhead.
- Tools run in real sandboxes of a shipped task. The tool is the cheapest real one (`read_file`),
  because commands would measure the sandboxed program; every rollout ends with the same diff, so
  that its validation is looked up and not run.
- One sweep over episodes at a time says where the overhead leaves the flat part, and what is full
  there; one over turns of an episode says what a turn and what an episode cost, by a line.
- Processor time is split by process, and has a floor: as many empty calls as a turn makes.
"""

import argparse
import asyncio
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from regreen.client.stack import Stack
from regreen.common.v1 import GRADER_BUILD_GATES, MODE_ANY_FIX, PIPELINE_SIMPLIFIED
from regreen.dataset import v1 as pb
from regreen.home import default_home
from regreen.ids import new_id
from regreen.model_store import ensure_default_model
from regreen.rollout.bench_stack import (
    DRIVER,
    Services,
    peak_bytes,
    resident_bytes,
    watching_cores,
)
from regreen.rollout.context import Budget, Knobs, Sampling, labels_of
from regreen.rollout.episode import Runner
from regreen.rollout.worker import Worker

_TASK = "beautifulsoup4-4.11.1__soupsieve-2.10"
_CALLS = 3
"""Calls of one turn: Generate, the tool, RenderChat."""
_EMPTY_CALLS, _LANES = 2000, 8
_LEFT_FLAT = 3.0
"""Times the smallest median overhead, from which on it has left the flat part."""
_FULL = 0.85
"""Share of a core, or of all, from which on a process, or the machine, is full."""
_PAGE = 200
Prepare = Callable[[Stack], Awaitable[str]]
"""Brings a task that rollouts can run on; its id."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one run measures."""

    levels: tuple[int, ...] = (1, 8, 32, 128, 256, 512, 1000)
    """Episodes at a time."""
    turns: int = 8
    """Turns of each episode of the sweep over levels."""
    lengths: tuple[int, ...] = (1, 4, 16)
    """Turns of an episode in the sweep over turns."""
    lengths_at: int = 32
    """Episodes at a time in that sweep."""
    least: int = 2
    """Episodes of a level, however few run at a time."""
    tokens: int = 64
    """Tokens of one output, about."""
    tokens_per_s: float = 20.0
    """Pace of the simulated engine, for each sample."""


QUICK = Plan(
    levels=(1, 4), turns=2, lengths=(1, 3), lengths_at=2, tokens=24, tokens_per_s=200.0, least=2
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One output and the result of its tool, as its trajectory records them."""

    index: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Measured:
    """So many episodes at a time, and what they took."""

    at_once: int
    episodes: int
    wall_s: float
    cpu_s: Mapping[str, float]
    """By process."""
    turns: Sequence[Turn] = field(repr=False)
    resident_bytes: int = 0
    """Of the driver, before."""
    peak_bytes: int = 0
    """Of the driver, meanwhile."""
    busy: Sequence[float] = field(default=(), repr=False)
    """Cores of the machine that were busy, second by second."""
    given_back: int = 0
    """Rollouts that were tried again: a call of theirs took longer than it may."""

    @property
    def tokens(self) -> int:
        """Tokens that were sampled."""
        return sum(turn.tokens for turn in self.turns)


def say(line: str) -> None:
    """Say how far it is, on standard error."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()


def script(plan: Plan) -> dict[str, Any]:
    """Another part of a file in every turn, after words that fill the output."""
    words = "so it is, and " * (plan.tokens // 5)
    turns = max(plan.turns, *plan.lengths)
    return {
        "responses": [
            {"text": words + _call(turn), "turn": turn, "delay_s": 1 / plan.tokens_per_s}
            for turn in range(turns)
        ]
    }


def _call(turn: int) -> str:
    arguments = {"path": "requirements.lock", "start": turn + 1}
    return f"<tool>{json.dumps({'name': 'read_file', 'arguments': arguments})}</tool>"


async def shipped_task(stack: Stack) -> str:
    """A shipped task that the gate has admitted here; its id.

    Raises:
        RuntimeError: the gate does not admit it on this host; says why.
    """
    from regreen.tasks.admit import verify
    from regreen.tasks.jsonl import shipped_distributions, shipped_tasks

    record = next(task for task in shipped_tasks() if task.id == _TASK)
    report = await verify(
        stack, record, shipped_distributions(), repeats=2, progress=lambda _, text: say(text)
    )
    if report.status != pb.TASK_STATUS_ADMITTED:
        raise RuntimeError(f"task {_TASK} is not admitted here: {report.reason}")
    return record.id


class Bench:
    """One stack, and rollouts on it."""

    def __init__(self, plan: Plan, services: Services, stack: Stack, task_id: str) -> None:
        self._plan, self._services, self._stack, self._task_id = plan, services, stack, task_id
        self._runner = Runner(stack)

    async def episodes(self, at_once: int, count: int, turns: int) -> Measured:
        """Run `count` episodes of so many turns through the queue, `at_once` at a time."""
        run_id = (await self._stack.runs.create_run(new_id("bench"), "grpo")).run.id
        budget = Budget(turns=turns, context_tokens=8192, turn_tokens=2 * self._plan.tokens + 64)
        labels = labels_of(budget, Sampling(), Knobs())
        groups = [self._group(run_id, seed, labels) for seed in range(count)]
        for start in range(0, count, _PAGE):
            await self._stack.queue.enqueue_groups(groups[start : start + _PAGE])
        worker = Worker(self._stack, self._runner, run_id=run_id, concurrency=at_once)
        resident = resident_bytes()
        peak_bytes(reset=True)
        before, began_s = self._services.cpu_s(), time.perf_counter()
        async with watching_cores() as busy:
            stats = await worker.run(until_idle=True)
        wall_s, after = time.perf_counter() - began_s, self._services.cpu_s()
        peak = peak_bytes()
        if stats.committed != count:
            raise RuntimeError(f"{stats.committed} of {count} rollouts were committed: {stats}")
        found = await self._turns(run_id)
        cpu_s = {name: after[name] - before[name] for name in after}
        given_back = stats.given_back + stats.expired
        return Measured(
            at_once, count, wall_s, cpu_s, found, resident, peak, tuple(busy), given_back
        )

    def _group(self, run_id: str, seed: int, labels: Mapping[str, str]) -> pb.Group:
        return pb.Group(
            run_id=run_id,
            task_id=self._task_id,
            size=1,
            seed=seed,
            step=1,
            labels=labels,
            pipeline=PIPELINE_SIMPLIFIED,
            mode=MODE_ANY_FIX,
            grader=GRADER_BUILD_GATES,
        )

    async def _turns(self, run_id: str) -> list[Turn]:
        wanted = pb.TrajectoryFilter(run_id=run_id)
        found = []
        async for trajectory in self._stack.trajectories.export_trajectories(wanted):
            found += turns_of(trajectory)
        return found

    async def empty_call_s(self) -> dict[str, float]:
        """Processor seconds of a call that asks for nothing to be done, by its two ends."""
        before = self._services.cpu_s()

        async def lane() -> None:
            for _ in range(_EMPTY_CALLS // _LANES):
                await self._stack.policy.get_policy()

        await asyncio.gather(*(lane() for _ in range(_LANES)))
        after = self._services.cpu_s()
        return {name: (after[name] - before[name]) / _EMPTY_CALLS for name in (DRIVER, "policy")}


def turns_of(trajectory: pb.Trajectory) -> list[Turn]:
    """The turns of a trajectory, each with what its tool took."""
    outputs = [turn for turn in trajectory.turns if turn.role == pb.TURN_ROLE_POLICY]
    results = [turn for turn in trajectory.turns if turn.role == pb.TURN_ROLE_TOOL]
    return [
        Turn(
            index,
            said.token_end - said.token_start,
            said.duration.ToNanoseconds() / 1e9 + seen.duration.ToNanoseconds() / 1e9,
        )
        for index, (said, seen) in enumerate(zip(outputs, results, strict=True))
    ]


async def measure(plan: Plan, home: Path, model: Path, prepare: Prepare) -> dict[str, Any]:
    """Everything, in one run; the report."""
    path = home / "script.json"
    path.write_text(json.dumps(script(plan)))
    services = Services(home, model, path, max(*plan.levels, plan.lengths_at))
    async with services.running() as stack:
        bench = Bench(plan, services, stack, await prepare(stack))
        await bench.episodes(4, 4, max(plan.turns, *plan.lengths))  # validates; warms every path
        empty = await bench.empty_call_s()
        lengths, levels = [], []
        for turns in plan.lengths:
            lengths.append(await bench.episodes(plan.lengths_at, plan.lengths_at, turns))
            say(f"{plan.lengths_at} episodes of {turns} turns")
        for level in plan.levels:
            levels.append(await bench.episodes(level, max(level, plan.least), plan.turns))
            say(f"{level} episodes at a time: {levels[-1].wall_s:.0f} s")
    return report_of(plan, levels, lengths, empty)


def report_of(
    plan: Plan,
    levels: Sequence[Measured],
    lengths: Sequence[Measured],
    empty_s: Mapping[str, float],
) -> dict[str, Any]:
    """All figures of a run, from its rows."""
    cpus = os.cpu_count() or 1
    rows = {str(level.at_once): row_of(level, plan) for level in levels}
    lines = lines_of(lengths)
    floor_ms = _CALLS * sum(empty_s.values()) * 1e3
    return {
        "bench": "episodes",
        "plan": asdict(plan),
        "cpus": cpus,
        "load_1m": round(os.getloadavg()[0], 2),
        "empty_call_cpu_ms": {name: round(value * 1e3, 3) for name, value in empty_s.items()},
        "turn_floor_cpu_ms": round(floor_ms, 3),
        "levels": rows,
        "lengths": {str(round(len(m.turns) / m.episodes)): row_of(m, plan) for m in lengths},
        "lines": lines,
        "ratios": {
            "cpu of a turn over as many empty calls": _ratio(lines["all"]["turn_ms"], floor_ms),
            "cpu of a turn, most at once over fewest flat": _growth(rows),
            "median overhead of the last turn over the first": _by_turn(lengths, plan),
        },
        "knee": knee_of(rows, cpus),
    }


def row_of(measured: Measured, plan: Plan) -> dict[str, Any]:
    """What so many episodes at a time took, for each turn and token."""
    turns, tokens = len(measured.turns), measured.tokens
    over = sorted(1e3 * overhead_s(turn, plan) for turn in measured.turns)
    engine_ms = 1e3 * tokens / plan.tokens_per_s / turns
    cpu = {**measured.cpu_s, "all": sum(measured.cpu_s.values())}
    grown = max(0, measured.peak_bytes - measured.resident_bytes)
    return {
        "episodes": measured.episodes,
        "turns": turns,
        "tokens": tokens,
        "wall_s": round(measured.wall_s, 3),
        "turns_per_s": round(turns / measured.wall_s, 2),
        "cpu_s": {name: round(value, 3) for name, value in cpu.items()},
        "cpu_ms_per_turn": {n: round(1e3 * v / turns, 3) for n, v in cpu.items()},
        "cpu_us_per_token": {n: round(1e6 * v / tokens, 2) for n, v in cpu.items()},
        "cores": {name: round(value / measured.wall_s, 3) for name, value in cpu.items()},
        "busy_cores": round(quantile(sorted(measured.busy or [0.0]), 0.75), 2),
        "given_back": measured.given_back,
        "engine_ms": round(engine_ms, 1),
        "overhead_ms": {f"p{p}": round(quantile(over, p / 100), 2) for p in (50, 95, 99)},
        "turn_over_engine": {
            f"p{p}": round(1 + quantile(over, p / 100) / engine_ms, 3) for p in (50, 95, 99)
        },
        "driver_mb": round(measured.peak_bytes / 1e6, 1),
        "driver_kb_per_episode": round(grown / 1e3 / measured.at_once, 1),
    }


def overhead_s(turn: Turn, plan: Plan) -> float:
    """What a turn took beyond the engine's own time."""
    return turn.seconds - turn.tokens / plan.tokens_per_s


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of the sorted values that at least this share does not exceed."""
    return values[max(0, math.ceil(share * len(values)) - 1)]


def lines_of(lengths: Sequence[Measured]) -> dict[str, dict[str, float]]:
    """Processor time of an episode as a line over its turns, by process.

    `bend` is the share of the longest episode's time that its last piece costs beyond the line
    through the shorter ones: 0 where a turn costs the same however many were before.
    """
    names = [*lengths[0].cpu_s, "all"]
    turns = [len(measured.turns) / measured.episodes for measured in lengths]
    found = {}
    for name in names:
        spent = [1e3 * _cpu(measured, name) / measured.episodes for measured in lengths]
        slope, rest = statistics.linear_regression(turns, spent)
        found[name] = {
            "turn_ms": round(slope, 3),
            "episode_ms": round(rest, 3),
            "bend": round(_bend(turns, spent), 3),
        }
    return found


def _cpu(measured: Measured, name: str) -> float:
    return sum(measured.cpu_s.values()) if name == "all" else measured.cpu_s[name]


def _bend(turns: Sequence[float], spent: Sequence[float]) -> float:
    if len(turns) < 3 or not spent[-1]:
        return 0.0
    slope, rest = statistics.linear_regression(turns[:-1], spent[:-1])
    return (spent[-1] - (rest + slope * turns[-1])) / spent[-1]


def _ratio(over: float, under: float) -> float:
    return round(over / under, 2) if under else math.inf


def _growth(rows: Mapping[str, Mapping[str, Any]]) -> float:
    """Of the most episodes at a time over the fewest from 8 on, which idling hides less."""
    flat = next((row for name, row in rows.items() if int(name) >= 8), next(iter(rows.values())))
    last = list(rows.values())[-1]
    return _ratio(last["cpu_ms_per_turn"]["all"], flat["cpu_ms_per_turn"]["all"])


def _by_turn(lengths: Sequence[Measured], plan: Plan) -> float:
    """Of the longest episodes."""
    turns = lengths[-1].turns
    last = max(turn.index for turn in turns)
    first, end = (
        statistics.median(overhead_s(turn, plan) for turn in turns if turn.index == index)
        for index in (0, last)
    )
    return _ratio(end, first)


def knee_of(rows: Mapping[str, Mapping[str, Any]], cpus: int) -> dict[str, Any]:
    """The last level of the flat part, the first beyond it, and what is full there."""
    flat_ms = min(row["overhead_ms"]["p50"] for row in rows.values())
    names = list(rows)
    beyond = [n for n in names if rows[n]["overhead_ms"]["p50"] > _LEFT_FLAT * flat_ms]
    if not beyond:
        return {"flat_ms": flat_ms, "flat_to": names[-1], "beyond": "", "full": "nothing"}
    first = names.index(beyond[0])
    row = rows[names[first]]
    cores = {name: value for name, value in row["cores"].items() if name != "all"}
    busiest = max(cores, key=lambda name: cores[name])
    if cores[busiest] >= _FULL:
        full = f"a core, by the {busiest} process"
    elif row["busy_cores"] >= _FULL * cpus:
        full = f"all {cpus} cores, most by the {busiest} process"
    else:
        full = f"no core; the busiest process is the {busiest}, so what waits is no processor"
    return {
        "flat_ms": flat_ms,
        "flat_to": names[first - 1] if first else "",
        "beyond": names[first],
        "turns_per_s": row["turns_per_s"],
        "full": full,
    }


def table(report: Mapping[str, Any]) -> str:
    """The report as lines."""
    plan = report["plan"]
    lines = [
        f"{plan['turns']} turns an episode, {plan['tokens_per_s']:g} tokens/s of each sample; "
        f"{report['cpus']} cores, load {report['load_1m']}"
    ]
    processes = [name for name in next(iter(report["levels"].values()))["cpu_s"] if name != "all"]
    head = f"{'at once':>8} {'turns/s':>8} {'p50':>7} {'p95':>7} {'p99':>7} {'x engine':>8}"
    names = "".join(f"{name:>9}" for name in processes)
    tail = "us/token  busy cores  tried again  driver MB (KB/episode)"
    lines.append(f"{head}  ms cpu/turn:{names}      all  {tail}")
    for level, row in report["levels"].items():
        over = "".join(f" {value:7.0f}" for value in row["overhead_ms"].values())
        cpu = "".join(f"{row['cpu_ms_per_turn'][name]:9.2f}" for name in (*processes, "all"))
        lines.append(
            f"{level:>8} {row['turns_per_s']:8.1f}{over} {row['turn_over_engine']['p50']:8.3f}"
            f"             {cpu} {row['cpu_us_per_token']['all']:9.1f}"
            f" {row['busy_cores']:10.2f} {row['given_back']:12}"
            f" {row['driver_mb']:10.0f} ({row['driver_kb_per_episode']:.0f})"
        )
    for name, line in report["lines"].items():
        lines.append(
            f"cpu of an episode, {name:9} {line['episode_ms']:8.1f} ms + {line['turn_ms']:7.2f} ms"
            f" x turns, bend {line['bend']:+.1%}"
        )
    floor = report["turn_floor_cpu_ms"]
    lines.append(f"floor of a turn: {_CALLS} empty calls, {floor:.2f} ms of processor")
    lines += [f"{name}: {ratio}" for name, ratio in report["ratios"].items()]
    lines.append("knee: " + ", ".join(f"{n} {v}" for n, v in report["knee"].items()))
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m regreen.rollout.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    usual = Plan()
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="a small shape, for smoke tests")
    parser.add_argument("--levels", default=",".join(map(str, usual.levels)))
    parser.add_argument("--turns", type=int, default=usual.turns)
    parser.add_argument("--tokens", type=int, default=usual.tokens)
    parser.add_argument("--tokens-per-s", type=float, default=usual.tokens_per_s)
    given = parser.parse_args(argv)
    levels = tuple(int(part) for part in given.levels.split(",") if part)
    plan = Plan(levels, given.turns, tokens=given.tokens, tokens_per_s=given.tokens_per_s)
    model = ensure_default_model(default_home(), say).path.resolve()
    with tempfile.TemporaryDirectory(prefix="regreen-bench-") as folder:
        home = Path(folder)
        home.chmod(0o711)
        plan = QUICK if given.quick else plan
        report = asyncio.run(measure(plan, home, model, shipped_task))
    sys.stdout.write(json.dumps(report, indent=1) + "\n" if given.json else table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

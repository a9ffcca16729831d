"""What a load run's figures are made of, and the report that is made of them.

- Pure: rows in, figures out; `regreen.rollout.bench` measures.
- Percentiles of calls are the client's, queueing and the way there and back included.
"""

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from regreen.rollout.capacity import quantile

CALLS = 3
"""Calls of one turn: Generate, the tool, RenderChat."""
_LEFT_FLAT = 3.0
"""Times the smallest median overhead, from which on it has left the flat part."""
_LEAST_MS = 1.0
"""Least of a flat part: below it a median is one of clocks."""
_FULL = 0.85
"""Share of a core, or of all, from which on a process, or the machine, is full."""
_PERCENTILES = (50, 95, 99)


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
    builds: str = "none"
    """`real`: episodes that change something are measured too, each with a build of its own."""
    build_levels: tuple[int, ...] = (2, 8)
    """Episodes at a time in that sweep."""
    build_turns: int = 2


QUICK = Plan(
    levels=(1, 4),
    turns=2,
    lengths=(1, 3),
    lengths_at=2,
    tokens=24,
    tokens_per_s=200.0,
    least=2,
    builds="real",
    build_levels=(1, 2),
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One output and the result of its tool, as its trajectory records them."""

    index: int
    tokens: int
    seconds: float
    tool_s: float = 0.0
    """Of these, what the tool took."""


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
    episode_s: Sequence[float] = field(default=(), repr=False)
    """Of each episode, from its lease to its answered commit."""
    calls_s: Mapping[str, Sequence[float]] = field(default_factory=dict, repr=False)
    """Of each call, as its client saw it, by method."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """Resident bytes by process, the most that was seen."""

    @property
    def tokens(self) -> int:
        """Tokens that were sampled."""
        return sum(turn.tokens for turn in self.turns)


def report_of(
    plan: Plan,
    levels: Sequence[Measured],
    lengths: Sequence[Measured],
    empty_s: Mapping[str, float],
    builds: Sequence[Measured] = (),
) -> dict[str, Any]:
    """All figures of a run, from its rows."""
    cpus = os.cpu_count() or 1
    rows = {str(level.at_once): row_of(level, plan) for level in levels}
    lines = lines_of(lengths)
    floor_ms = CALLS * sum(empty_s.values()) * 1e3
    return {
        "bench": "load",
        "plan": asdict(plan),
        "cpus": cpus,
        "load_1m": round(os.getloadavg()[0], 2),
        "empty_call_cpu_ms": {name: round(value * 1e3, 3) for name, value in empty_s.items()},
        "turn_floor_cpu_ms": round(floor_ms, 3),
        "levels": rows,
        "lengths": {str(round(len(m.turns) / m.episodes)): row_of(m, plan) for m in lengths},
        "builds": {str(level.at_once): row_of(level, plan) for level in builds},
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
    busy = measured.busy or [0.0]
    rate = measured.episodes / measured.wall_s
    return {
        "at_once": measured.at_once,
        "episodes": measured.episodes,
        "turns": turns,
        "episodes_per_s": round(rate, 4),
        "episodes_per_s_per_core": round(rate / (os.cpu_count() or 1), 4),
        "episodes_per_core_s": round(measured.episodes / cpu["all"], 4),
        "episode_s": _percentiles(measured.episode_s, 3),
        "where_s": where_of(measured, plan),
        "calls_ms": {
            name: {"count": len(found), **_percentiles([1e3 * one for one in found], 2)}
            for name, found in sorted(measured.calls_s.items())
        },
        "memory_mb": {name: round(value / 1e6, 1) for name, value in measured.memory.items()},
        "tokens": tokens,
        "wall_s": round(measured.wall_s, 3),
        "turns_per_s": round(turns / measured.wall_s, 2),
        "cpu_s": {name: round(value, 3) for name, value in cpu.items()},
        "cpu_ms_per_turn": {n: round(1e3 * v / turns, 3) for n, v in cpu.items()},
        "cpu_us_per_token": {n: round(1e6 * v / tokens, 2) for n, v in cpu.items()},
        "cores": {name: round(value / measured.wall_s, 3) for name, value in cpu.items()},
        "busy_cores": round(quantile(sorted(busy), 0.75), 2),
        "mean_busy_cores": round(statistics.fmean(busy), 3),
        "given_back": measured.given_back,
        "engine_ms": round(engine_ms, 1),
        "overhead_ms": {f"p{p}": round(quantile(over, p / 100), 2) for p in _PERCENTILES},
        "turn_over_engine": {
            f"p{p}": round(1 + quantile(over, p / 100) / engine_ms, 3) for p in _PERCENTILES
        },
        "driver_mb": round(measured.peak_bytes / 1e6, 1),
        "driver_kb_per_episode": round(grown / 1e3 / measured.at_once, 1),
    }


def _percentiles(values: Sequence[float], digits: int) -> dict[str, float]:
    """Empty where nothing was seen."""
    ordered = sorted(values)
    if not ordered:
        return {}
    return {f"p{p}": round(quantile(ordered, p / 100), digits) for p in _PERCENTILES}


def where_of(measured: Measured, plan: Plan) -> dict[str, float]:
    """Where the time of an episode goes, on average: seconds of each part.

    `around` is all that is no turn: lease, sandbox, first prompt, final build, judge, commit.
    """
    turns, count = measured.turns, measured.episodes
    engine_s = sum(turn.tokens for turn in turns) / plan.tokens_per_s / count
    tool_s = sum(turn.tool_s for turn in turns) / count
    turns_s = sum(turn.seconds for turn in turns) / count
    found = {"engine": engine_s, "policy": turns_s - tool_s - engine_s, "tools": tool_s}
    if measured.episode_s:
        found["around"] = statistics.fmean(measured.episode_s) - turns_s
    return {name: round(value, 3) for name, value in found.items()}


def overhead_s(turn: Turn, plan: Plan) -> float:
    """What a turn took beyond the engine's own time."""
    return turn.seconds - turn.tokens / plan.tokens_per_s


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
    beyond = [
        n for n in names if rows[n]["overhead_ms"]["p50"] > _LEFT_FLAT * max(flat_ms, _LEAST_MS)
    ]
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
    for kind in ("levels", "builds"):
        lines += [_episodes_line(kind, row) for row in report[kind].values()]
    lines += _call_lines(list(report["levels"].values())[-1])
    for name, line in report["lines"].items():
        lines.append(
            f"cpu of an episode, {name:9} {line['episode_ms']:8.1f} ms + {line['turn_ms']:7.2f} ms"
            f" x turns, bend {line['bend']:+.1%}"
        )
    floor = report["turn_floor_cpu_ms"]
    lines.append(f"floor of a turn: {CALLS} empty calls, {floor:.2f} ms of processor")
    lines += [f"{name}: {ratio}" for name, ratio in report["ratios"].items()]
    lines.append("knee: " + ", ".join(f"{n} {v}" for n, v in report["knee"].items()))
    return "\n".join(lines) + "\n"


def _episodes_line(kind: str, row: Mapping[str, Any]) -> str:
    where = ", ".join(f"{name} {value:.2f}" for name, value in row["where_s"].items())
    memory = ", ".join(f"{name} {value:.0f}" for name, value in row["memory_mb"].items())
    took = ", ".join(f"{name} {value:.2f}" for name, value in row["episode_s"].items())
    builds = "with real builds" if kind == "builds" else "with no builds"
    return (
        f"{row['at_once']} at a time {builds}: {row['episodes_per_s']:.3f} episodes/s, "
        f"{row['episodes_per_s_per_core']:.3f} a core; {took} s, of it {where}; MB: {memory}"
    )


def _call_lines(row: Mapping[str, Any]) -> list[str]:
    """Of one level."""
    lines = [f"calls at {row['at_once']} at a time, as their clients saw them, ms:"]
    for name, found in row["calls_ms"].items():
        shown = "".join(f" {found[f'p{p}']:9.1f}" for p in _PERCENTILES)
        lines.append(f"{name:48} {found['count']:7}{shown}")
    return lines

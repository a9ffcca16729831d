"""What a load run says about larger fleets: demands fitted to it, held against it, projected.

- Fitted to the sweep over turns, which runs at one number of episodes at a time, and with real
  builds to the first of their levels; every other level is predicted and held against its measure.
- What others kept busy is taken from the sweep over turns alone: from the level that is predicted
  it would hide what the model lacks. A prediction is the mean of several draws.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from regreen.rollout.capacity import (
    ENGINE,
    PROGRAMS,
    Demand,
    Fleet,
    Found,
    first_full,
    fleet_for,
    needed,
    simulate,
)

Report = Mapping[str, Any]
_DRAWS = 10
SWEEPS = {"none": "levels", "real": "builds"}
"""Levels of a report by what their builds were."""


def fit(report: Report, builds: str = "none") -> Demand:
    """What an episode of a load run asks for.

    Raises:
        ValueError: the report holds no such levels.
    """
    lengths = report["lengths"]
    turns = [int(name) for name in lengths]
    p50_s = [row["episode_s"]["p50"] for row in lengths.values()]
    lines = report["lines"]
    demand = Demand(
        turns=int(report["plan"]["turns"]),
        turn_s={name: max(0.0, lines[name]["turn_ms"]) / 1e3 for name in PROGRAMS},
        episode_s={name: max(0.0, lines[name]["episode_ms"]) / 1e3 for name in PROGRAMS},
        engine_s=statistics.fmean(row["engine_ms"] for row in lengths.values()) / 1e3,
    )
    found = [
        simulate(replace(demand, turns=n), fleet_of(report), row["at_once"], row["episodes"])
        for n, row in zip(turns, lengths.values(), strict=True)
    ]
    rest = [was - one.episode_s["p50"] for was, one in zip(p50_s, found, strict=True)]
    slope, start = statistics.linear_regression(turns, rest)
    demand = replace(demand, turn_wait_s=max(0.0, slope), episode_wait_s=max(0.0, start))
    return demand if builds == "none" else _with_builds(demand, report)


def _with_builds(demand: Demand, report: Report) -> Demand:
    """An episode that builds takes what the first level with real builds took beyond its turns."""
    rows = report["builds"]
    if not rows:
        raise ValueError(
            "the report holds no real builds; run `regreen bench load --builds real`, "
            "or leave --builds out"
        )
    if not report.get("counts_builds"):
        raise ValueError(
            "the report lacks the processor time of builds that had ended; measure as root on a "
            "host with control groups of version 1, or leave --builds out"
        )
    row = next(iter(rows.values()))
    turns = row["turns"] / row["episodes"]
    each = {n: row["cpu_s"][n] / row["episodes"] - turns * demand.turn_s[n] for n in PROGRAMS}
    episode_s = {name: max(0.0, value) for name, value in each.items()}
    return replace(demand, turns=round(turns), episode_s=episode_s)


def fleet_of(report: Report) -> Fleet:
    """The machine on which it was measured."""
    rows = report["lengths"].values()
    others = statistics.fmean(row["mean_busy_cores"] - row["cores"]["all"] for row in rows)
    return Fleet(int(report["cpus"]), others=max(0.0, others))


def compare(demand: Demand, report: Report, builds: str = "none") -> list[dict[str, Any]]:
    """Every level as predicted and as measured; `fitted` tells those that the fit has seen."""
    fleet = fleet_of(report)
    return [
        {
            "at_once": row["at_once"],
            "fitted": builds == "real" and number == 0,
            **_held_against(demand, fleet, row),
        }
        for number, row in enumerate(report[SWEEPS[builds]].values())
    ]


def _held_against(demand: Demand, fleet: Fleet, row: Report) -> dict[str, dict[str, float]]:
    """Mean and deviation of some draws of a level, beside what was measured once."""
    told = [
        simulate(demand, fleet, row["at_once"], row["episodes"], seed) for seed in range(_DRAWS)
    ]
    pairs = {
        "episodes_per_s": ([one.episodes_per_s for one in told], row["episodes_per_s"]),
        "p50_s": ([one.episode_s["p50"] for one in told], row["episode_s"]["p50"]),
        "p95_s": ([one.episode_s["p95"] for one in told], row["episode_s"]["p95"]),
    }
    return {
        name: {
            "predicted": round(statistics.fmean(said), 3),
            "deviation": round(statistics.stdev(said), 3),
            "measured": round(was, 3),
            "error": round(statistics.fmean(said) / was - 1, 3),
        }
        for name, (said, was) in pairs.items()
    }


def project(demand: Demand, fleet: Fleet, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """What a fleet does with so many episodes at a time, and what it would take."""
    return [
        {
            **_row(simulate(demand, fleet, number)),
            "needed": needed(demand, number),
            "with_needed": _row(simulate(demand, fleet_for(demand, number), number)),
        }
        for number in numbers
    ]


def _row(found: Found) -> dict[str, Any]:
    return {
        "at_once": found.at_once,
        "episodes_per_s": round(found.episodes_per_s, 3),
        "episode_s": {name: round(value, 2) for name, value in found.episode_s.items()},
        "bottleneck": found.bottleneck,
        "busy": {name: round(value, 3) for name, value in found.busy.items()},
    }


def measured(report: Report, builds: str = "none") -> str:
    """What was measured, as a table."""
    head = (
        "| at a time | episodes/s, a core | episode p50, p95, p99 s | of it engine, policy, tools, "
        "around s | busiest programs, cores | memory of services and driver MB | busy cores |"
    )
    lines = [head, "|---|---|---|---|---|---|---|"]
    for row in report[SWEEPS[builds]].values():
        cores = {name: row["cores"][name] for name in PROGRAMS}
        busiest = sorted(cores, key=lambda name: -cores[name])[:3]
        memory = ", ".join(f"{name} {value:.0f}" for name, value in row["memory_mb"].items())
        cells = [
            str(row["at_once"]),
            f"{row['episodes_per_s']:.3g}, {row['episodes_per_s_per_core']:.3g}",
            ", ".join(f"{value:.3g}" for value in row["episode_s"].values()),
            ", ".join(f"{value:.3g}" for value in row["where_s"].values()),
            ", ".join(f"{name} {cores[name]:.2f}" for name in busiest),
            memory,
            f"{row['mean_busy_cores']:.2f} of {report['cpus']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def capacity(
    report: Report, numbers: Sequence[int], builds: str = "none", fleet: Fleet | None = None
) -> dict[str, Any]:
    """The fit, its errors, what is full first, and the projection."""
    demand = fit(report, builds)
    fleet = fleet or Fleet(int(report["cpus"]))
    name, at_once = first_full(demand, fleet)
    return {
        "builds": builds,
        "demand": {
            "turns": demand.turns,
            "alone_s": round(demand.alone_s, 3),
            "engine_s": round(demand.of(ENGINE), 3),
            "cores_s": round(demand.cores_s, 4),
            "waits_s": round(demand.turns * demand.turn_wait_s + demand.episode_wait_s, 3),
            "by_program_s": {one: round(demand.of(one), 4) for one in PROGRAMS},
        },
        "fit": compare(demand, report, builds),
        "first_full": {"station": name, "at_once": round(at_once)},
        "fleet": {"cores": fleet.cores, "replicas": dict(fleet.replicas), "samples": fleet.samples},
        "projection": project(demand, fleet, numbers),
    }


def markdown(found: Report) -> str:
    """The fit and the projection as tables."""
    lines = [
        "| at a time | episodes/s: predicted ± deviation, measured, error | p50 s | p95 s |",
        "|---|---|---|---|",
    ]
    for row in found["fit"]:
        cells = [
            f"{one['predicted']:.4g} ± {one['deviation']:.2g}, {one['measured']:.4g}, "
            f"{one['error']:+.0%}"
            for one in (row["episodes_per_s"], row["p50_s"], row["p95_s"])
        ]
        name = f"{row['at_once']}{' (fitted)' if row['fitted'] else ''}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    first = found["first_full"]
    lines += [
        "",
        f"Full first: {first['station']}, at about {first['at_once']} episodes at a time.",
        "",
        "| at a time | here: episodes/s, p95 s, full | needed | with it: episodes/s, p95 s |",
        "|---|---|---|---|",
    ]
    for row in found["projection"]:
        more, wanted = row["with_needed"], row["needed"]
        asked = ", ".join(f"{value} {name}" for name, value in wanted.items())
        full = row["bottleneck"] or "nothing"
        lines.append(
            f"| {row['at_once']} | {row['episodes_per_s']:.4g}, {row['episode_s']['p95']:.4g}, "
            f"{full} | {asked} | {more['episodes_per_s']:.4g}, {more['episode_s']['p95']:.4g} |"
        )
    return "\n".join(lines) + "\n"

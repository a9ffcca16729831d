"""Runs to look at: where each stands, how it went, and how it differs from others.

- Reads only; every list is read to its last page.
- A metric or setting that a run lacks is absent (None), never 0.
- A step is the newest that has metrics; after a crash the checkpoint may be of an earlier one, from
  which the run goes on.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from regreen.client.stack import Stack
from regreen.dataset import v1 as dataset_pb
from regreen.rpc.errors import InvalidArgument, NotFound
from regreen.train.parallel import run_bounded
from regreen.train.record import KINDS, all_settings, resolved_of, settings_of
from regreen.train.rows import all_checkpoints, all_runs, last_checkpoint

ALL_KINDS = ("sft", "grpo", "eval")
HEADLINE = {"sft": "learner/loss", "grpo": "reward_mean"}
"""The metric of use of each kind; evaluations record none."""
_AT_ONCE = 8
_HIGH = frozenset({"reward_mean", "solve_rate", "learned_groups"})
_LOW = frozenset({"learner/loss", "hack_rate", "truncated_share", "lost", "zero_variance_share"})
"""Metrics of which less is better, beside times and hacks."""


@dataclass(frozen=True, slots=True)
class Overview:
    """One run in short."""

    run: dataset_pb.Run
    steps: int
    total_steps: int
    """0 where the kind has no steps."""
    start: str
    """Name of the weights that it started from; empty where the kind has none."""
    metric: dataset_pb.MetricPoint | None
    checkpoint: dataset_pb.CheckpointRecord | None


@dataclass(frozen=True, slots=True)
class Details:
    """One run in whole."""

    overview: Overview
    points: Sequence[dataset_pb.MetricPoint]
    """Of the last steps, in step order."""
    checkpoints: Sequence[dataset_pb.CheckpointRecord]
    """Newest first."""
    resume: str
    """The command that goes on with it; empty where there is none."""


@dataclass(frozen=True, slots=True)
class Course:
    """A metric of a run over its steps."""

    first: dataset_pb.MetricPoint
    last: dataset_pb.MetricPoint
    best: dataset_pb.MetricPoint | None
    """None where neither more nor less is better."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs side by side, in the order that they were asked for."""

    runs: Sequence[dataset_pb.Run]
    fields: Mapping[str, Sequence[Any]]
    """Differing fields of the config; None where a run has none."""
    metrics: Mapping[str, Sequence[Course | None]]
    """None where a run lacks the metric."""


def check_kind(kind: str) -> str:
    """`kind` if there are such runs, or none is asked for.

    Raises:
        InvalidArgument: there are none.
    """
    if kind and kind not in ALL_KINDS:
        raise InvalidArgument("kind", f"{kind!r} is unknown", f"use one of {', '.join(ALL_KINDS)}")
    return kind


async def overviews(stack: Stack, kind: str = "") -> list[Overview]:
    """Every run of a kind, or of any, newest first."""
    runs = [run async for run in all_runs(stack, check_kind(kind))]
    found: dict[str, Overview] = {}

    async def one(run: dataset_pb.Run) -> None:
        found[run.id] = await overview(stack, run)

    await run_bounded((partial(one, run) for run in runs), _AT_ONCE)
    return [found[run.id] for run in runs]


async def overview(stack: Stack, run: dataset_pb.Run) -> Overview:
    """One run in short."""
    name = HEADLINE.get(run.kind)
    points = await stack.runs.list_metrics(run.id, names=[name]) if name else []
    record = await last_checkpoint(stack, run.id)
    steps = max(points[-1].step if points else 0, record.step if record else 0)
    if steps == 0 or run.kind not in KINDS:
        every = await stack.runs.list_metrics(run.id)
        steps = max(steps, every[-1].step if every else 0)
    return Overview(
        run=run,
        steps=steps,
        total_steps=_total_steps(run),
        start=str(settings_of(run).get("start", "")),
        metric=points[-1] if points else None,
        checkpoint=record,
    )


async def details(stack: Stack, run: dataset_pb.Run, steps: int, home: str = "") -> Details:
    """One run with the metrics of its last `steps` steps and all its checkpoints."""
    points = await stack.runs.list_metrics(run.id)
    shown = sorted({point.step for point in points})[-steps:]
    return Details(
        overview=await overview(stack, run),
        points=[point for point in points if shown and point.step >= shown[0]],
        checkpoints=[record async for record in all_checkpoints(stack, run.id)],
        resume=f"regreen runs resume {run.name}{home}" if run.kind in KINDS else "",
    )


async def compare(
    stack: Stack, runs: Sequence[dataset_pb.Run], wanted: Sequence[str] = ()
) -> Comparison:
    """Runs side by side, with the `wanted` metrics, or all.

    Raises:
        NotFound: no run has a wanted metric; says which there are.
    """
    courses = [_courses(await stack.runs.list_metrics(run.id)) for run in runs]
    known = sorted({name for found in courses for name in found})
    for name in wanted:
        if name not in known:
            told = f"there are {', '.join(known)}" if known else "there is none yet"
            raise NotFound(f"metric: none of these runs has {name!r}; {told}")
    configs = [_flat(_config(run)) for run in runs]
    names = sorted({name for config in configs for name in config})
    values = {name: [config.get(name) for config in configs] for name in names}
    return Comparison(
        runs=runs,
        fields={name: row for name, row in values.items() if any(v != row[0] for v in row)},
        metrics={name: [found.get(name) for found in courses] for name in wanted or known},
    )


def _total_steps(run: dataset_pb.Run) -> int:
    settings = settings_of(run)
    try:
        if run.kind == "sft":
            count = sum(map(len, resolved_of(run)["train_ids"]))
            return int(settings["epochs"]) * math.ceil(count / int(settings["batch_size"]))
        return int(settings["steps"]) if run.kind == "grpo" else 0
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return 0  # recorded by hand, or by another version


def _config(run: dataset_pb.Run) -> dict[str, Any]:
    """What a run was asked for, and which weights it began with."""
    start = resolved_of(run).get("start") or {}
    begun = {name: start[name] for name in ("uri", "sha256") if start.get(name)}
    return {"kind": run.kind, **all_settings(run), "start_weights": begun}


def _courses(points: Sequence[dataset_pb.MetricPoint]) -> dict[str, Course]:
    series: dict[str, list[dataset_pb.MetricPoint]] = {}
    for point in points:
        series.setdefault(point.name, []).append(point)
    return {name: Course(found[0], found[-1], _best(name, found)) for name, found in series.items()}


def _best(name: str, points: Sequence[dataset_pb.MetricPoint]) -> dataset_pb.MetricPoint | None:
    """The best point, the earliest of equal ones."""
    if name in _HIGH:
        return max(points, key=lambda point: (point.value, -point.step))
    if name in _LOW or name.startswith(("seconds/", "hack/")):
        return min(points, key=lambda point: (point.value, point.step))
    return None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level, `hyperparameters.learning_rate`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            whole = isinstance(value, float) and value.is_integer()
            found[prefix + name] = int(value) if whole else value
    return found

"""The report as one JSON document: every figure of the page, computed from rows.

- Pure functions of loaded rows; the same rows give the same document, apart from its date.
- "all" pools pipelines or modes within a task before averaging over tasks.
- Figures that cannot be known are None, never 0.
- Rates, tool shares, flags and times are given for every cell: subject, pipeline and mode.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from regreen.evals.compare import compare, select
from regreen.evals.markov import difference, tool_shares, transitions
from regreen.evals.rows import Outcome, outcomes_by_task
from regreen.evals.stats import mean_pass_at_k, solve_rate
from regreen.rollout.baselines import TOLD

Json = dict[str, Any]
_KS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class RunFacts:
    """A training run as the report shows it."""

    name: str
    kind: str
    state: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, Sequence[tuple[float, float]]]
    """Metric name to (step, value)."""
    checkpoints: int


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """A task as the report shows it."""

    id: str
    split: str
    status: str
    category: str
    blame: str
    python: str
    modes: tuple[str, ...]
    validation_s: float
    gate_reason: str
    gate_checks: tuple[tuple[str, int, bool], ...]
    """Name, repeat and whether it held."""


@dataclass(frozen=True, slots=True)
class ReportInput:
    """Everything that a report is computed from."""

    title: str
    created: str
    environment: Mapping[str, str]
    outcomes: Sequence[Outcome]
    subjects: Sequence[str]
    """In the order in which they are shown: policies by training stage, then scripts."""
    grader: str
    runs: Sequence[RunFacts] = ()
    tasks: Sequence[TaskFacts] = ()
    """Those that were evaluated."""
    left_out: Sequence[TaskFacts] = ()
    """Tasks of the same splits that the gate did not admit."""
    not_gated: int = 0
    """Tasks of the same splits that were never gated here."""
    commands: Sequence[str] = ()
    lost: int = 0
    notes: Sequence[str] = field(default_factory=tuple)
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall time by stage of all that the report tells of."""


def document(source: ReportInput) -> Json:
    """The whole report as plain values."""
    policies = [name for name in source.subjects if not name.startswith("baseline:")]
    comparisons = _comparisons(source, policies)
    found: Json = {
        "title": source.title,
        "created": source.created,
        "headline": _headline(comparisons, policies),
        "environment": dict(source.environment),
        "commands": list(source.commands),
        "notes": list(source.notes),
        "wall_seconds": dict(source.seconds),
        "grader": source.grader,
        "subjects": list(source.subjects),
        "scripts_told": _scripts_told(source.subjects),
        "lost": source.lost,
        "cells": _cells(source),
        "graders": _graders(source),
        "coverage_measured": sum(outcome.coverage for outcome in source.outcomes),
        "attempts": len(source.outcomes),
        "comparisons": comparisons,
        "tools": _tools(source.outcomes, source.subjects),
        "tool_changes": _tool_changes(source.outcomes, policies),
        "runs": [_run(run) for run in source.runs],
        "tasks": [_task(task, source) for task in source.tasks],
        "left_out": [asdict(task) for task in source.left_out],
        "not_gated": source.not_gated,
    }
    cleaned: Json = _clean(found)
    return cleaned


def _scripts_told(subjects: Sequence[str]) -> Json:
    """What each script among the subjects is told of a task."""
    told = {f"baseline:{name}": text for name, text in TOLD.items()}
    return {subject: told[subject] for subject in subjects if subject in told}


def _cells(source: ReportInput) -> list[Json]:
    pipelines = sorted({o.pipeline for o in source.outcomes}, reverse=True)
    modes = sorted({o.mode for o in source.outcomes})
    found = []
    for subject in source.subjects:
        for pipeline in ["all", *pipelines] if len(pipelines) > 1 else pipelines:
            for mode in ["all", *modes] if len(modes) > 1 else modes:
                chosen = select(source.outcomes, subject=subject, pipeline=pipeline, mode=mode)
                if chosen:
                    names = {"subject": subject, "pipeline": pipeline, "mode": mode}
                    found.append(names | _cell(chosen, source.grader))
    return found


def _cell(chosen: Sequence[Outcome], grader: str) -> Json:
    by_task = outcomes_by_task(chosen, grader)
    return {
        **asdict(solve_rate(by_task)),
        "pass_at": {str(k): v for k in _KS if (v := mean_pass_at_k(by_task, k)) is not None},
        "hack_rate": _mean(bool(o.hacks) for o in chosen),
        "judged_by_model": _mean(o.judged_by != "rules only" for o in chosen if o.judged_by),
        "gave_up": _mean(o.end == "gave_up" for o in chosen),
        "truncated": _mean(o.end.endswith("_limit") for o in chosen),
        "stuck": _mean(o.end == "stuck" for o in chosen),
        "turns": _mean(len(o.tools) for o in chosen),
        "tokens": _mean(o.tokens for o in chosen),
        "sampled_tokens": _mean(o.sampled_tokens for o in chosen),
        "seconds": _mean(o.seconds.get("total", 0.0) for o in chosen),
        "tool_shares": tool_shares([o.tools for o in chosen]),
        "hacks": _hacks(chosen),
        "stages": _stages(chosen),
    }


def _graders(source: ReportInput) -> list[Json]:
    """Workflow by grader on the same rows."""
    pipelines = sorted({o.pipeline for o in source.outcomes}, reverse=True)
    found = []
    for subject in source.subjects:
        for pipeline in pipelines:
            chosen = select(source.outcomes, subject=subject, pipeline=pipeline)
            rates = {
                grader: asdict(solve_rate(by_task))
                for grader in ("build", "build_gates", "build_gates_judge")
                if (by_task := outcomes_by_task(chosen, grader))
            }
            if rates:
                found.append({"subject": subject, "pipeline": pipeline, "rates": rates})
    return found


def _comparisons(source: ReportInput, policies: Sequence[str]) -> list[Json]:
    """Every pair of policies, by pipeline too; the last policy and each script, over everything."""
    pipelines = sorted({o.pipeline for o in source.outcomes}, reverse=True)
    places = ["all", *pipelines] if len(pipelines) > 1 else ["all"]
    scripts = [name for name in source.subjects if name not in policies]
    wanted = [
        *((a, b, place) for a, b in itertools.combinations(policies, 2) for place in places),
        *((script, policies[-1], "all") for script in scripts if policies),
    ]
    return [
        compare(source.outcomes, a, b, grader=source.grader, pipeline=place).to_json()
        for a, b, place in wanted
    ]


def _headline(comparisons: Sequence[Json], policies: Sequence[str]) -> str:
    """Last trained policy against the first, over everything."""
    for found in comparisons:
        pair = (found["first"], found["second"], found["pipeline"])
        if len(policies) > 1 and pair == (policies[0], policies[-1], "all"):
            return str(found["sentence"])
    return "No two policies were evaluated, so there is nothing to compare."


def _tools(outcomes: Sequence[Outcome], subjects: Sequence[str]) -> Json:
    tools = _all_tools(outcomes)
    found: Json = {}
    for subject in subjects:
        paths = [outcome.tools for outcome in select(outcomes, subject=subject)]
        if paths:
            matrix = transitions(paths, tools).to_json()
            found[subject] = {"shares": tool_shares(paths), "transitions": matrix}
    return found


def _tool_changes(outcomes: Sequence[Outcome], policies: Sequence[str]) -> list[Json]:
    """Change of the transition matrix from each policy to the next one."""
    tools, found = _all_tools(outcomes), []
    for first, second in itertools.pairwise(policies):
        left = transitions([o.tools for o in select(outcomes, subject=first)], tools)
        right = transitions([o.tools for o in select(outcomes, subject=second)], tools)
        if left.counts.any() and right.counts.any():
            delta = difference(left, right).round(6).tolist()
            found.append(
                {
                    "first": first,
                    "second": second,
                    "rows": list(left.rows),
                    "columns": list(left.columns),
                    "delta": delta,
                }
            )
    return found


def _all_tools(outcomes: Sequence[Outcome]) -> list[str]:
    return sorted({tool for outcome in outcomes for tool in outcome.tools})


def _hacks(chosen: Sequence[Outcome]) -> Json:
    counts = Counter(hack for outcome in chosen for hack in outcome.hacks)
    flagged = sum(bool(outcome.hacks) for outcome in chosen)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {"trajectories": len(chosen), "flagged": flagged, "classes": dict(ranked)}


def _stages(chosen: Sequence[Outcome]) -> Json:
    """Mean seconds of an episode by stage."""
    names = sorted({name for outcome in chosen for name in outcome.seconds})
    return {name: _mean(o.seconds.get(name, 0.0) for o in chosen) for name in names}


def _run(run: RunFacts) -> Json:
    found = asdict(run)
    found["metrics"] = {name: [list(p) for p in points] for name, points in run.metrics.items()}
    return found


def _task(task: TaskFacts, source: ReportInput) -> Json:
    found = asdict(task)
    own = [outcome for outcome in source.outcomes if outcome.task_id == task.id]
    found["solved"] = {
        subject: [
            sum(outcome.solved.get(source.grader, False) for outcome in chosen),
            len(chosen),
        ]
        for subject in source.subjects
        if (chosen := select(own, subject=subject))
    }
    return found


def _mean(values: Iterable[float]) -> float | None:
    found = [float(value) for value in values]
    return sum(found) / len(found) if found else None


def _clean(value: Any) -> Any:
    """Plain JSON values; what is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

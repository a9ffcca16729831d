"""`regreen runs list|show|compare|resume`: training and evaluation runs as they are recorded."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from regreen.cli import output
from regreen.cli.listen import listener
from regreen.cli.options import Home, Json, open_stack
from regreen.cli.train import print_result
from regreen.dataset import v1 as pb
from regreen.rpc.errors import InvalidArgument
from regreen.train.overview import (
    Comparison,
    Course,
    Details,
    Overview,
    check_kind,
    compare,
    details,
    overviews,
)
from regreen.train.progress import Listener
from regreen.train.record import all_settings, resolved_of
from regreen.train.resume import resume_run
from regreen.train.rows import TrainResult, known_run

app = typer.Typer(no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="Name or id of the run.")]
_ABSENT = "absent"
"""What a run lacks, in tables; null in JSON."""
_ACROSS = 8
"""Steps side by side in a table."""


@app.command("list")
def list_runs(
    home: Home = None,
    kind: Annotated[str, typer.Option(help="sft, grpo or eval.")] = "",
    json_output: Json = False,
) -> None:
    """List all runs, newest first."""
    rows = output.run(_list(home, kind))
    if json_output:
        output.print_json_lines(map(_overview_json, rows))
        return
    columns = ["name", "kind", "status", "steps", "start", "created", "metric", "checkpoint"]
    output.print_table("", columns, map(_row, rows))


@app.command()
def show(
    name: Name,
    home: Home = None,
    steps: Annotated[int, typer.Option(min=1, help="Newest steps to show metrics of.")] = 10,
    json_output: Json = False,
) -> None:
    """Print one run: settings, progress, metrics, checkpoints, how to resume it."""
    found = output.run(_show(home, name, steps))
    if json_output:
        output.print_json(
            _overview_json(found.overview)
            | {
                "metrics": [output.as_dict(point) for point in found.points],
                "checkpoints": [output.as_dict(record) for record in found.checkpoints],
                "resume": found.resume,
            }
        )
        return
    _print_details(found)


@app.command("compare")
def compare_runs(
    names: Annotated[list[str], typer.Argument(help="Names or ids of two or more runs.")],
    home: Home = None,
    metric: Annotated[
        list[str], typer.Option(help="Metric to compare; repeat it. Default: all.")
    ] = [],  # noqa: B006
    json_output: Json = False,
) -> None:
    """Show runs side by side: settings that differ, and how each metric went."""
    found = output.run(_compare(home, names, metric))
    if json_output:
        output.print_json(_comparison_json(found))
        return
    shown = [run.name for run in found.runs]
    rows = [[field, *map(_value, values)] for field, values in found.fields.items()]
    output.print_table("Settings that differ", ["setting", *shown], rows)
    rows = [[name, *map(_course, courses)] for name, courses in found.metrics.items()]
    output.print_table("Metrics: first, last and best, each @ its step", ["metric", *shown], rows)


@app.command()
def resume(name: Name, home: Home = None, json_output: Json = False) -> None:
    """Go on with a training run, with the settings that it was created with."""

    async def work(listen: Listener) -> TrainResult:
        async with open_stack(home, patience_s=120.0) as stack:
            return await resume_run(stack, name, listen)

    with output.progress() as show:
        result = output.run(work(listener(show)))
    print_result(result, json_output)


async def _list(home: Path | None, kind: str) -> list[Overview]:
    check_kind(kind)
    async with open_stack(home) as stack:
        return await overviews(stack, kind)


async def _show(home: Path | None, name: str, steps: int) -> Details:
    option = f" --home {shlex.quote(str(home))}" if home else ""
    async with open_stack(home) as stack:
        return await details(stack, await known_run(stack, name), steps, option)


async def _compare(home: Path | None, names: Sequence[str], metrics: Sequence[str]) -> Comparison:
    if len(names) < 2:
        raise InvalidArgument("names", f"has only {names[0]!r}", "name two runs or more")
    async with open_stack(home) as stack:
        runs = [await known_run(stack, name) for name in names]
        if len({run.id for run in runs}) < len(runs):
            raise InvalidArgument("names", "has a run twice", "name each run once")
        return await compare(stack, runs, list(dict.fromkeys(metrics)))


def _row(found: Overview) -> list[str]:
    run, metric, record = found.run, found.metric, found.checkpoint
    return [
        run.name,
        run.kind,
        run.state,
        _steps(found),
        found.start,
        _at(run.create_time),
        f"{metric.name} {metric.value:.4g}" if metric else "",
        f"step {record.step} {record.digest.sha256[:12]}" if record else "",
    ]


def _steps(found: Overview) -> str:
    return f"{found.steps} of {found.total_steps}" if found.total_steps else str(found.steps or "")


def _overview_json(found: Overview) -> dict[str, Any]:
    return output.as_dict(found.run) | {
        "steps": found.steps,
        "total_steps": found.total_steps,
        "start": found.start,
        "metric": output.as_dict(found.metric) if found.metric else None,
        "checkpoint": output.as_dict(found.checkpoint) if found.checkpoint else None,
    }


def _print_details(found: Details) -> None:
    at, run = found.overview, found.overview.run
    started = resolved_of(run).get("start") or {}
    rows: list[tuple[str, object]] = [
        ("id", run.id),
        ("kind", run.kind),
        ("status", run.state),
        ("steps", _steps(at)),
        ("created", _at(run.create_time)),
        ("changed", _at(run.update_time)),
        ("start weights", started.get("uri", "")),
    ]
    output.print_table(run.name, ["field", "value"], rows)
    output.print_table("Settings", ["setting", "value"], sorted(all_settings(run).items()))
    steps = sorted({point.step for point in found.points})
    values = {(point.name, point.step): point.value for point in found.points}
    names = sorted({point.name for point in found.points})
    for begin in range(0, len(steps), _ACROSS):
        part = steps[begin : begin + _ACROSS]
        cells = [[name, *(_number(values.get((name, step))) for step in part)] for name in names]
        output.print_table("Metrics", ["step", *map(str, part)], cells)
    records = [
        [str(record.step), _at(record.create_time), record.digest.sha256, record.uri]
        for record in found.checkpoints
    ]
    output.print_table("Checkpoints", ["step", "created", "digest", "place"], records)
    typer.echo(f"resume: {found.resume or 'runs of this kind are not resumed by name'}")


def _comparison_json(found: Comparison) -> dict[str, Any]:
    shown = [run.name for run in found.runs]
    return {
        "runs": [
            {"id": r.id, "name": r.name, "kind": r.kind, "state": r.state} for r in found.runs
        ],
        "fields": {f: dict(zip(shown, row, strict=True)) for f, row in found.fields.items()},
        "metrics": {
            name: dict(zip(shown, map(_course_json, courses), strict=True))
            for name, courses in found.metrics.items()
        },
    }


def _course_json(course: Course | None) -> dict[str, Any] | None:
    if course is None:
        return None
    return {
        "first": _point_json(course.first),
        "last": _point_json(course.last),
        "best": _point_json(course.best) if course.best else None,
    }


def _point_json(point: pb.MetricPoint) -> dict[str, Any]:
    return {"step": point.step, "value": point.value}


def _course(course: Course | None) -> str:
    if course is None:
        return _ABSENT
    points = [course.first, course.last, *([course.best] if course.best else [])]
    return ", ".join(f"{point.value:.4g} @ {point.step}" for point in points)


def _value(value: object) -> str:
    return _ABSENT if value is None else str(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _at(time: Any) -> str:
    return str(time.ToDatetime().strftime("%Y-%m-%d %H:%M:%S"))

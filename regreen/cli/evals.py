"""`regreen eval` and `regreen report`: measure policies and show the result."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from regreen.cli import output
from regreen.cli.listen import listener
from regreen.cli.options import Home, Json, open_stack, parse_settings
from regreen.evals.report import ReportFiles, whole_cells, write_report
from regreen.evals.run import EvalConfig, EvalResult, evaluate
from regreen.train.progress import Listener

OUT = Path("build/report")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("eval")(evaluate_command)
    app.command()(report)


def evaluate_command(
    home: Home = None,
    name: Annotated[str, typer.Option(help="Name; the same name continues it.")] = "eval",
    subject: Annotated[
        list[str],
        typer.Option(
            help="base, a run, or baseline:noop, :newest, :previous or :pin-back; repeat it."
        ),
    ] = ["base"],  # noqa: B006
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="Run the scripted baselines too.")
    ] = True,
    task: Annotated[
        list[str], typer.Option(help="Task id; repeat it. Default: admitted test tasks.")
    ] = [],  # noqa: B006
    split: Annotated[str, typer.Option(help="Split to take tasks from.")] = "test",
    mode: Annotated[list[str], typer.Option(help="any_fix, keep_new; repeat it.")] = [  # noqa: B006
        "any_fix",
        "keep_new",
    ],
    pipeline: Annotated[list[str], typer.Option(help="simplified, full; repeat it.")] = [  # noqa: B006
        "simplified",
        "full",
    ],
    grader: Annotated[
        str, typer.Option(help="build, build_gates or build_gates_judge.")
    ] = "build_gates_judge",
    samples: Annotated[int, typer.Option(min=1, help="Trajectories of each cell.")] = 4,
    concurrency: Annotated[int, typer.Option(min=1, help="Episodes at a time.")] = 4,
    set: Annotated[
        list[str], typer.Option("--set", help="Episode setting, for example budget.turns=8.")
    ] = [],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Seed of every cell.")] = 0,
    json_output: Json = False,
) -> None:
    """Evaluate policies and scripted baselines on the same tasks."""

    async def work(listen: Listener) -> EvalResult:
        config = EvalConfig(
            name=name,
            subjects=tuple(subject),
            baselines=baselines,
            tasks=tuple(task),
            split=split,
            modes=tuple(mode),
            pipelines=tuple(pipeline),
            grader=grader,
            samples=samples,
            concurrency=concurrency,
            labels=parse_settings(set),
            seed=seed,
        )
        async with open_stack(home, patience_s=120.0) as stack:
            return await evaluate(stack, config, listen)

    with output.progress() as show:
        result = output.run(work(listener(show)))
    if json_output:
        output.print_json(asdict(result))
    else:
        output.print_table("", ["field", "value"], list(asdict(result).items()))


def report(
    home: Home = None,
    out: Annotated[Path, typer.Option(help="Directory for report.html and report.json.")] = OUT,
    name: Annotated[
        list[str] | None,
        typer.Option("--eval", help="Name of an evaluation; repeat it. Default: all."),
    ] = None,
    run: Annotated[
        list[str] | None, typer.Option(help="Name of a training run; repeat it. Default: all.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Write the report of evaluations and training runs."""

    async def work() -> ReportFiles:
        async with open_stack(home) as stack:
            return await write_report(stack, out, evals=name or (), runs=run or ())

    files = output.run(work())
    if json_output:
        typer.echo(files.json.read_text())
    else:
        print_summary(files.json)
        typer.echo(f"{files.headline}\n{files.html}\n{files.json}")


def print_summary(path: Path) -> None:
    """One row a subject of a written report, and where the others are."""
    found = json.loads(path.read_text("utf-8"))
    whole = whole_cells(found)
    rows = [
        [cell["subject"], cell["tasks"], cell["samples"], *map(_percent, _rate(cell))]
        for cell in whole
    ]
    if not rows:
        return
    columns = ["subject", "tasks", "attempts", "solved", "from", "to"]
    output.print_table("Solved, mean over tasks, with 95% interval", columns, rows)
    typer.echo(
        f"{found['attempts']} attempts in all, {found['lost']} lost to the platform; "
        f"{len(found['cells'])} rows by pipeline and mode are in the report"
    )


def _rate(cell: dict[str, Any]) -> tuple[float | None, ...]:
    return cell["value"], cell["low"], cell["high"]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"

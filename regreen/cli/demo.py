"""`regreen demo` and `regreen study`: the whole loop on real broken builds, once or by seeds."""

from pathlib import Path
from typing import Annotated

import typer

from regreen import demo
from regreen import study as studies
from regreen.cli import output
from regreen.cli.evals import print_summary
from regreen.cli.listen import listener
from regreen.cli.options import Home, Json
from regreen.home import default_home
from regreen.rpc.errors import InvalidArgument


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(run)
    app.command("study")(study)


def run(
    home: Home = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer tasks, samples and steps.")] = False,
    json_output: Json = False,
) -> None:
    """Gate, measure, train and measure again; run it again to go on or to see the report."""
    plan = demo.QUICK if quick else demo.FULL
    with output.progress() as show:
        result = output.run(
            demo.run_demo((home or default_home()).absolute(), plan, listener(show), show)
        )
    if json_output:
        output.print_json(
            {
                "html": str(result.html),
                "json": str(result.json),
                "headline": result.headline,
                "seconds": result.seconds,
            }
        )
        return
    output.print_table("Wall time", ["stage", "seconds"], list(result.seconds.items()))
    print_summary(result.json)
    typer.echo(result.headline)
    typer.echo(f"report: {result.html}\n  data: {result.json}")


def study(
    home: Home = None,
    seeds: Annotated[
        str, typer.Option(help="Seeds, separated by commas; each is a chain of its own.")
    ] = "1,2,3",
    out: Annotated[Path, typer.Option(help="Directory for results.md and results.json.")] = Path(
        "build/results"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Hardly any tasks and steps: only to see it run.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Train and measure with several seeds; hours on a CPU, run it again to go on."""
    try:
        numbers = [int(word) for word in seeds.split(",")]
    except ValueError:
        output.fail(InvalidArgument("seeds", f"{seeds!r} are none", "give, for example, 1,2,3"))
    plan = studies.QUICK if quick else studies.PLAN
    with output.progress() as show:
        result = output.run(
            studies.run_study(
                (home or default_home()).absolute(), plan, numbers, out, listener(show), show
            )
        )
    if json_output:
        output.print_json(result.found)
        return
    typer.echo(result.markdown.read_text())
    typer.echo(f"results: {result.markdown}\n   data: {result.json}\n report: {result.html}")

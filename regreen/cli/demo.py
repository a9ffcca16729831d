"""`regreen demo`: the whole loop on real broken builds, with a report at the end."""

from typing import Annotated

import typer

from regreen import demo
from regreen.cli import output
from regreen.cli.evals import print_summary
from regreen.cli.listen import listener
from regreen.cli.options import Home, Json
from regreen.home import default_home


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(run)


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

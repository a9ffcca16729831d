"""The `regreen` command: one entry point, one module per group of commands.

- Commands parse and print; the work is in `regreen.stack`, `rollout`, `train`, `evals` and `tasks`.
"""

from typing import Annotated

import typer

import regreen
from regreen.cli import (
    bench,
    demo,
    doctor,
    evals,
    fix,
    rollout,
    sandbox,
    stack,
    state,
    tasks,
    train,
    traj,
)

app = typer.Typer(
    name="regreen",
    help="Train, evaluate and serve agents that turn broken builds green again.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
stack.register(app)
doctor.register(app)
fix.register(app)
evals.register(app)
demo.register(app)
bench.register(app)
app.add_typer(tasks.app, name="tasks", help="Import, prepare and verify tasks.")
app.add_typer(rollout.app, name="rollout", help="Run episodes.")
app.add_typer(state.app, name="state", help="Look at, import, export and delete states.")
app.add_typer(sandbox.app, name="sandbox", help="Look at and delete sandboxes.")
app.add_typer(train.app, name="train", help="Train a policy.")
app.add_typer(traj.app, name="traj", help="Look at trajectories.")


def _version(value: bool) -> None:
    if value:
        typer.echo(regreen.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train, evaluate and serve agents that turn broken builds green again."""


def main() -> None:
    """Run the command line."""
    app()

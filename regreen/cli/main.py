"""The `regreen` command: one entry point, one module per group of commands.

- Commands parse and print; the work is in `regreen.stack`, `rollout`, `train`, `evals` and `tasks`.
- Only the module of the command that is called is loaded; help and completion load all of them.
"""

import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import regreen
from regreen.rpc.errors import RegreenError

COMMANDS = {
    "stack": ("up", "down", "status", "logs"),
    "doctor": ("doctor",),
    "fix": ("fix",),
    "evals": ("eval", "report"),
    "demo": ("demo", "study"),
    "bench": ("bench",),
    "capacity": ("capacity",),
}
"""Modules beside this one with their commands."""
GROUPS = {
    "tasks": "Import, prepare and verify tasks.",
    "rollout": "Run episodes.",
    "state": "Look at, import, export and delete states.",
    "sandbox": "Look at and delete sandboxes.",
    "train": "Train a policy.",
    "runs": "Look at runs and resume them.",
    "traj": "Look at trajectories.",
    "quotas": "Look at what tenants have of what their quotas bound.",
    "tokens": "Make, list and revoke the tokens of callers.",
    "certs": "Make and renew certificates of services and clients.",
}
"""Groups of commands, each the module of its name."""


def _version(value: bool) -> None:
    if value:
        typer.echo(regreen.__version__)
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train, evaluate and serve agents that turn broken builds green again."""


class _Words(TyperGroup):
    """The command line, in which an empty word is none: it would be the present directory."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse empty words, such as those of a variable that is not set."""
        if not ctx.resilient_parsing:
            for place, word in enumerate(args):
                if not word or re.fullmatch(r"--[a-z-]+=", word):
                    before = word.rstrip("=") or (args[place - 1] if place else "the program")
                    raise typer.BadParameter(f"nothing is given after {before}; leave it out")
        return super().parse_args(ctx, args)


def make_app(words: Sequence[str] = ()) -> typer.Typer:
    """The command line, or only the part of it that a call with these words needs."""
    app = typer.Typer(
        name="regreen",
        cls=_Words,
        help="Train, evaluate and serve agents that turn broken builds green again.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    called = words[0] if words else ""
    known = called in GROUPS or any(called in names for names in COMMANDS.values())
    for module, names in COMMANDS.items():
        if not known or called in names:
            import_module(f"regreen.cli.{module}").register(app)
    for group, told in GROUPS.items():
        if not known or called == group:
            app.add_typer(import_module(f"regreen.cli.{group}").app, name=group, help=told)
    return app


def main() -> None:
    """Run the command line; an error of what was given is one line, wherever it comes up."""
    try:
        make_app(sys.argv[1:])()
    except RegreenError as error:
        from regreen.cli import output

        sys.exit(output.tell(error))
    except OSError as error:
        from regreen.cli import output

        sys.exit(output.tell_os(error))

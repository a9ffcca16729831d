"""`regreen capacity`: what a load run says about more episodes at a time, and larger fleets."""

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from regreen.cli import output
from regreen.cli.options import Json
from regreen.rollout.capacity import PROGRAMS, Fleet
from regreen.rollout.capacity_fit import capacity as capacity_of
from regreen.rollout.capacity_fit import markdown, measured
from regreen.rpc.errors import InvalidArgument

_KEYS = ("cores", "replicas", "samples", "others")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(capacity)


def capacity(
    source: Annotated[Path, typer.Option("--from", help="Report of `regreen bench load`.")] = Path(
        "build/bench/load.json"
    ),
    episodes: Annotated[
        str, typer.Option(help="Episodes at a time to project; 100000 takes minutes.")
    ] = "1000,10000,100000",
    builds: Annotated[str, typer.Option(help="Episodes with none or real builds.")] = "none",
    fleet: Annotated[
        Path | None,
        typer.Option(
            help="TOML or JSON: cores, replicas by service, samples; default: what was measured.",
            show_default=False,
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """Project episodes a second for more at a time, and name what is full first.

    Prints what was measured, and how far the model is off at each number that was measured.
    """
    try:
        numbers = [int(part) for part in episodes.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        problem = f"{episodes!r} is no list of whole numbers above 0"
        output.fail(InvalidArgument("episodes", problem, "give some as 1000,10000"))
    if builds not in ("none", "real"):
        output.fail(InvalidArgument("builds", f"{builds!r} is unknown", "give none or real"))
    report = _read("from", source, "make one with `regreen bench load`")
    if report.get("bench") != "load":
        problem = f"{source} is no report of `regreen bench load`"
        output.fail(InvalidArgument("from", problem, "name its load.json"))
    try:
        found = capacity_of(report, numbers, builds, _fleet(fleet) if fleet else None)
    except ValueError as error:
        output.fail(InvalidArgument("from", str(error), "or leave --builds out"))
    if json_output:
        output.print_json(found)
    else:
        typer.echo(f"{measured(report, builds)}\n{markdown(found)}", nl=False)


def _fleet(path: Path) -> Fleet:
    """The fleet in a file."""
    given = _read("fleet", path, "name a TOML or JSON file")
    if unknown := sorted(set(given) - set(_KEYS)):
        problem = f"{path} has {unknown[0]!r}"
        output.fail(InvalidArgument("fleet", problem, f"it may have {', '.join(_KEYS)}"))
    replicas = given.get("replicas", {})
    if unknown := sorted(set(replicas) - set(PROGRAMS)):
        problem = f"{path} has replicas of {unknown[0]!r}"
        output.fail(InvalidArgument("fleet", problem, f"name some of {', '.join(PROGRAMS)}"))
    whole = [given.get("cores", 0), *replicas.values()]
    if any(type(number) is not int or number < 1 for number in whole):
        problem = f"{path}: cores and replicas are whole numbers above 0"
        output.fail(InvalidArgument("fleet", problem, "give cores = 64 for one"))
    return Fleet(**given)


def _read(name: str, path: Path, remedy: str) -> dict[str, Any]:
    try:
        text = path.read_text()
        found = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        output.fail(InvalidArgument(name, f"{path} cannot be read: {error}", remedy))
    if not isinstance(found, dict):
        output.fail(InvalidArgument(name, f"{path} holds no table", remedy))
    return found

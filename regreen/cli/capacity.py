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

_MOST = 1_000_000
"""Episodes at a time: a simulation of more would not end today."""
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
    if not numbers or not all(0 < number <= _MOST for number in numbers):
        problem = f"{episodes!r} is no list of whole numbers from 1 to {_MOST:,}"
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
        output.fail(InvalidArgument("from", str(error), "name another report"))
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        problem = f"{source} lacks what a whole report holds ({error})"
        output.fail(InvalidArgument("from", problem, "make one with `regreen bench load`"))
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
    if not isinstance(replicas, dict):
        problem = f"{path}: replicas are {replicas!r}"
        output.fail(InvalidArgument("fleet", problem, "give a table: driver = 4"))
    if unknown := sorted(set(replicas) - set(PROGRAMS)):
        problem = f"{path} has replicas of {unknown[0]!r}"
        output.fail(InvalidArgument("fleet", problem, f"name some of {', '.join(PROGRAMS)}"))
    whole = [given.get("cores", 0), *replicas.values()]
    if any(type(number) is not int or number < 1 for number in whole):
        problem = f"{path}: cores and replicas are whole numbers above 0"
        output.fail(InvalidArgument("fleet", problem, "give cores = 64 for one"))
    samples, others = given.get("samples", 0), given.get("others", 0.0)
    if type(samples) is not int or samples < 0:
        problem = f"{path}: samples are a whole number from 0 on"
        output.fail(InvalidArgument("fleet", problem, "give samples = 512 for one"))
    if type(others) not in (int, float) or not 0 <= others < given["cores"]:
        problem = f"{path}: others are a number of cores, less than all"
        output.fail(InvalidArgument("fleet", problem, "leave it out, or give others = 0.5 for one"))
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

"""`regreen bench`: figures as ratios against named peers, from one run.

- Each benchmark is a module of the service it measures and prints one JSON object.
- A peer that is absent is named with the reason, never left out silently.
- What a benchmark tells of its progress on standard error is passed on as it comes.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from regreen.cli import output
from regreen.cli.options import Json
from regreen.home import default_home
from regreen.rpc.errors import InvalidArgument

BENCHMARKS = {
    "sandbox": "sandbox_svc.bench",
    "policy": "policy_svc.bench",
    "learner": "learner_svc.bench",
    "weight-sync": "learner_svc.bench_sync",
    "sandbox-service": "sandbox_svc.bench_service",
    "sandbox-warm": "sandbox_svc.bench_warm",
    "sandbox-failures": "sandbox_svc.bench_failures",
    "sandbox-prepare": "sandbox_svc.bench_prepare",
    "sandbox-tasks": "sandbox_svc.bench_tasks",
    "mine": "regreen.mine.bench",
    "dataset-queue": "dataset_svc.bench_queue",
    "dataset-store": "dataset_svc.bench_store",
    "rl": "regreen.train.bench",
    "load": "regreen.rollout.bench",
}
"""Modules by name; a run that names none takes the usual ones."""
USUAL = ("sandbox", "policy", "learner", "dataset-queue")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(bench)


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"{', '.join(BENCHMARKS)}; default: {', '.join(USUAL)}.", show_default=False
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for the JSON files.")] = Path("build/bench"),
    builds: Annotated[
        str,
        typer.Option(help="Of `load`: real measures episodes that build as well as none."),
    ] = "none",
    levels: Annotated[
        str,
        typer.Option(help="Of `load`: episodes at a time, 1,8,32 for one.", show_default=False),
    ] = "",
    json_output: Json = False,
) -> None:
    """Measure sandboxes, generation, training and the queue against their peers."""
    chosen = names or list(USUAL)
    unknown = [name for name in chosen if name not in BENCHMARKS]
    if unknown:
        known = ", ".join(BENCHMARKS)
        output.fail(InvalidArgument("names", f"{unknown[0]!r} is unknown", f"give one of {known}"))
    of_load = _of_load(chosen, builds, levels)
    _make_folder(out)
    if {"policy", "learner", "weight-sync", "rl", "load"} & set(chosen):
        _make_model()
    results: dict[str, Any] = {}
    failed = []
    for number, name in enumerate(chosen):
        began_s, stage = time.monotonic(), f"[{number + 1}/{len(chosen)}] {name}"
        output.STDERR.print(stage, highlight=False, markup=False)
        found = _run(BENCHMARKS[name], of_load if name == "load" else ())
        ended = f"{stage} ended after {time.monotonic() - began_s:.0f} s"
        output.STDERR.print(ended, highlight=False, markup=False)
        if found is None:
            failed.append(name)
            continue
        results[name] = found
        (out / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
        if not json_output:
            output.print_table(name, ["figure", "value"], list(_flat(found).items()))
    if json_output:
        output.print_json(results)
    if failed:
        output.STDERR.print(f"failed: {', '.join(failed)}", style="red")
        raise typer.Exit(output.FAILED)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        writable = os.access(out, os.W_OK)
    except OSError as error:
        problem = f"{out} cannot be written: {error.strerror}"
        output.fail(InvalidArgument("out", problem, "name a directory you can write"))
    if not writable:
        output.fail(InvalidArgument("out", f"{out} cannot be written", "name another directory"))


def _make_model() -> None:
    """Convert the default model if it is not there yet."""
    command = [sys.executable, "-m", "regreen.model_store", "--home", str(default_home())]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=False)


def _of_load(chosen: Sequence[str], builds: str, levels: str) -> list[str]:
    """The flags that only `load` has."""
    if builds not in ("none", "real"):
        output.fail(InvalidArgument("builds", f"{builds!r} is unknown", "give none or real"))
    if not re.fullmatch(r"([1-9]\d*(,[1-9]\d*)*)?", levels):
        problem = f"{levels!r} is no list of whole numbers above 0"
        output.fail(InvalidArgument("levels", problem, "give some as 1,8,32"))
    given = [f"--builds={builds}"] if builds != "none" else []
    given += [f"--levels={levels}"] if levels else []
    if given and "load" not in chosen:
        name = given[0][2:].partition("=")[0]
        output.fail(InvalidArgument(name, "only load has it", "name load, or leave it out"))
    return given


def _run(module: str, flags: Sequence[str] = ()) -> dict[str, Any] | None:
    command = [sys.executable, "-m", module, "--json", *flags]
    # Standard error stays that of this command, so progress is seen at once.
    ended = subprocess.run(command, stdout=subprocess.PIPE, env=os.environ, check=False)
    if ended.returncode != 0:
        return None
    # Libraries may greet on standard output; the object begins the first line that opens one.
    text = "\n" + ended.stdout.decode("utf-8", "replace")
    found: dict[str, Any] = json.loads(text[text.index("\n{") :])
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    rows: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows |= _flat(value, f"{name}.")
        elif isinstance(value, list):
            rows[name] = f"{len(value)}, see the JSON file"
        elif isinstance(value, float):
            rows[name] = f"{value:.4g}"
        else:
            rows[name] = str(value)
    return rows

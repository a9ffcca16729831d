"""`regreen tasks mend`: look for source fixes by migration rules for tasks that there are.

- Nothing of the set is changed: what was gained is written to a directory that
  `python -m regreen.tasks.merge` takes.
"""

from pathlib import Path
from typing import Annotated

import typer

from regreen.cli import output
from regreen.cli.options import Home, Json, sandbox_place
from regreen.client.access import Access
from regreen.client.channel import connect
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.mine.mend import MODE, Outcome, mend_all
from regreen.pkgindex import PackageIndex, index_urls
from regreen.rpc.errors import InvalidArgument
from regreen.rules.rule import library
from regreen.tasks.environment import Distributions
from regreen.tasks.gate import SHIPPED_REPEATS, Gate
from regreen.tasks.jsonl import (
    load_distributions,
    load_tasks,
    shipped_distributions,
    shipped_tasks,
    write_lines,
)
from regreen.tasks.model import TaskRecord
from regreen.tasks.verify import ServiceGateClient


def register(app: typer.Typer) -> None:
    """Add the commands to `regreen tasks`."""
    app.command()(mend)
    app.command()(rules)


def mend(
    ids: Annotated[
        list[str] | None,
        typer.Argument(help="Only these tasks; default: all.", show_default=False),
    ] = None,
    tasks: Annotated[
        Path | None, typer.Option(help="Directory of a task set; default: the set that ships.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory to write the tasks to that gained a fix.")
    ] = None,
    home: Home = None,
    sandbox: Annotated[str, typer.Option(help="Address of a sandbox service.")] = "",
    every: Annotated[
        bool, typer.Option("--every", help="Also tasks that have another keep_new fix.")
    ] = False,
    repeats: Annotated[
        int, typer.Option(min=1, max=20, help="Runs of each gate check.")
    ] = SHIPPED_REPEATS,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Tasks at a time.")] = 1,
    json_output: Json = False,
) -> None:
    """Try the migration rules on tasks; a fix counts once the gate has admitted it."""
    records = load_tasks(tasks / "tasks.jsonl") if tasks else shipped_tasks()
    known = load_distributions(tasks / "distributions.jsonl") if tasks else shipped_distributions()
    if lacking := set(ids or ()) - {task.id for task in records}:
        output.fail(InvalidArgument("ids", f"{min(lacking)!r} is no task of the set"))
    chosen = [
        task
        for task in records
        if (not ids or task.id in ids) and (every or all(f.mode != MODE for f in task.fixes))
    ]
    place = output.run(sandbox_place(home, sandbox))
    found = output.run(_mend(chosen, known, place, repeats, workers, out))
    if json_output:
        output.print_json_lines(
            {"id": o.task.id, "gained": o.gained, "said": o.said, "tries": o.tries} for o in found
        )
        return
    rows = [[o.task.id, "gained" if o.gained else "-", o.tries, o.said] for o in found]
    output.print_table("", ["task", "keep_new", "tries", "what"], sorted(rows, key=str))


def rules(json_output: Json = False) -> None:
    """List the migration rules and the upstream notes that ask for them."""
    if json_output:
        output.print_json_lines(
            {
                "name": rule.name,
                "culprit": rule.culprit,
                "since": rule.since,
                "gone": rule.gone,
                "what": rule.what,
                "source": rule.source,
                "heading": rule.heading,
            }
            for rule in library()
        )
        return
    output.print_table(
        "",
        ["rule", "culprit", "since", "gone", "what", "upstream notes"],
        [
            [r.name, r.culprit, r.since, r.gone, r.what, f"{r.source} ({r.heading})"]
            for r in library()
        ],
    )


async def _mend(
    chosen: list[TaskRecord],
    known: Distributions,
    place: tuple[str, Access | None],
    repeats: int,
    workers: int,
    out: Path | None,
) -> list[Outcome]:
    channel = connect(*place)
    done: list[Outcome] = []
    try:
        with output.progress() as show:

            def ended(outcome: Outcome) -> None:
                done.append(outcome)
                if out:  # whatever ends this run, what was gained is there
                    _write([one.task for one in done if one.gained], known, out)
                word = "gained" if outcome.gained else "no"
                text = f"{outcome.task.id} {word}: {outcome.said}"
                output.STDERR.print(text, highlight=False, markup=False)

            def say(task_id: str, text: str) -> None:
                show("mend", len(done), len(chosen), f"{task_id}: {text}")

            states = StateClient(channel, patience_s=120.0)
            client = ServiceGateClient(states, SandboxClient(channel, patience_s=120.0))
            async with PackageIndex(index_urls()) as index:
                gate = Gate(client, known, index, repeats=repeats)
                return await mend_all(gate, chosen, workers=workers, say=say, done=ended)
    finally:
        await channel.close()


def _write(tasks: list[TaskRecord], known: Distributions, out: Path) -> None:
    """Write tasks, with the releases that they refer to."""
    pins = {
        pin
        for task in tasks
        for pin in (*task.pins_pass, *task.pins_fail, *task.wheelhouse, *task.build.tools)
    }
    write_lines(out / "distributions.jsonl", [known[pin] for pin in sorted(pins & set(known))])
    write_lines(out / "tasks.jsonl", tasks)

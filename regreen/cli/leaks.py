"""`regreen tasks leaks`: whether a split gives away what another is to measure."""

from collections import Counter

import typer

from regreen.cli import output
from regreen.cli.options import Home, Json, open_stack
from regreen.dataset import v1 as pb
from regreen.tasks.leaks import facts, held_out, leaks


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("leaks")(show_leaks)


def show_leaks(home: Home = None, json_output: Json = False) -> None:
    """Look for admitted tasks of two splits that give each other away; exits with 1 if some do.

    One family of packages, nearly the same log, nearly the same patch. Prints as well how many test
    tasks have a culprit that broke no task of another split.
    """

    async def work() -> list[pb.Task]:
        wanted = pb.TaskFilter(statuses=[pb.TASK_STATUS_ADMITTED])
        async with open_stack(home) as stack:
            return await stack.tasks.all_tasks(wanted)

    every = [facts(task) for task in output.run(work())]
    found, apart = leaks(every), held_out(every)
    counts = dict(sorted(Counter(task.split or "none" for task in every).items()))
    if json_output:
        rows = [
            {"kind": one.kind, "tasks": [one.first, one.second], "splits": list(one.splits),
             "share": one.share}
            for one in found
        ]  # fmt: skip
        output.print_json({"splits": counts, "leaks": rows, "held_out": apart})
    else:
        for leak in found:
            typer.echo(f"{leak.kind}: {leak}")
        text = ", ".join(f"{count} {split}" for split, count in counts.items()) or "none admitted"
        typer.echo(f"{text}; {len(apart)} of test by a culprit held out; {len(found)} leaks")
    if found:
        raise typer.Exit(output.FAILED)

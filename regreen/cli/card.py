"""`regreen tasks stats`: the tables of the data card, from the stored tasks and gate reports."""

from functools import partial
from typing import Annotated

import typer

from regreen.cli import output
from regreen.cli.options import Home, Json, check_split, open_stack, task_status
from regreen.dataset import v1 as pb
from regreen.tasks.admit import last_report
from regreen.tasks.card import Card, card
from regreen.train.parallel import run_bounded

_AT_ONCE = 16


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("stats")(stats)


def stats(
    home: Home = None,
    status: Annotated[str, typer.Option(help="Only tasks of this status.")] = "",
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "",
    json_output: Json = False,
) -> None:
    """Count tasks as the data card does; seconds are of what the gate did here."""
    found = output.run(_card(home, status, split))
    if json_output:
        output.print_json(found.as_json())
        return
    output.print_table(f"{found.total} tasks", ["what", "how many"], found.lines())


async def _card(home: Home, status: str, split: str) -> Card:
    wanted = pb.TaskFilter(
        split=check_split(split), statuses=[task_status(status)] if status else []
    )
    async with open_stack(home) as stack:
        tasks = await stack.tasks.all_tasks(wanted)
        reports: dict[str, pb.GateReport] = {}

        async def read(task_id: str) -> None:
            if report := await last_report(stack, task_id):
                reports[task_id] = report

        judged = [task.id for task in tasks if task.status != pb.TASK_STATUS_NEW]
        await run_bounded((partial(read, task_id) for task_id in judged), _AT_ONCE)
    return card(tasks, reports)

"""`regreen sandbox list|show|delete`: what runs now.

- Sandboxes are made by rollouts and by clients; the command line looks at them and ends them.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from regreen.cli import output
from regreen.cli.options import Address, Home, Json, open_stack, parse_labels, read_pages
from regreen.client.stack import Stack
from regreen.sandbox import v1 as pb

app = typer.Typer(no_args_is_help=True)


@app.command("list")
def list_sandboxes(
    home: Home = None,
    address: Address = "",
    label: Annotated[
        list[str] | None, typer.Option(help="Only those that carry name=value; repeatable.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most this many.")] = 1000,
    json_output: Json = False,
) -> None:
    """List sandboxes, oldest first."""
    rows = output.run(_list(home, address, label or [], limit))
    if json_output:
        output.print_json_lines(rows)
        return
    output.print_table(
        "",
        ["id", "state", "made", "expires", "forked from", "labels"],
        [
            [
                row.id,
                row.state_id,
                _at(row.create_time),
                _at(row.expire_time),
                row.parent_id,
                " ".join(f"{name}={value}" for name, value in sorted(row.labels.items())),
            ]
            for row in rows
        ],
    )


@app.command("show")
def show_sandbox(
    id: Annotated[str, typer.Argument(help="Sandbox id.")],
    home: Home = None,
    address: Address = "",
    json_output: Json = False,
) -> None:
    """Print a sandbox, its limits and the commands in it that outlive their call."""
    box, commands = output.run(_show(home, address, id))
    if json_output:
        kept = [output.as_dict(command) for command in commands]
        output.print_json({"sandbox": output.as_dict(box), "executions": kept})
        return
    facts = output.as_dict(box)
    limits = facts.pop("limits", {})
    for name, value in (*facts.items(), *limits.items()):
        typer.echo(f"{name:14} {value}")
    output.print_table(
        "commands",
        ["id", "made", "command", "ended"],
        [[row.id, _at(row.create_time), " ".join(row.argv), _end(row)] for row in commands],
    )


@app.command("delete")
def delete_sandbox(
    id: Annotated[str, typer.Argument(help="Sandbox id.")],
    home: Home = None,
    address: Address = "",
    json_output: Json = False,
) -> None:
    """Kill everything in a sandbox and delete it; its state stays."""
    output.run(_delete(home, address, id))
    output.print_deleted(id, json_output)


async def read_sandboxes(
    stack: Stack, limit: int, labels: dict[str, str] | None = None
) -> list[pb.Sandbox]:
    """Sandboxes that carry all labels, oldest first."""
    return await read_pages(
        lambda size, token: stack.sandbox.list_sandboxes(
            page_size=size, page_token=token, labels=labels
        ),
        "sandboxes",
        limit,
    )


def _at(time: Any) -> str:
    return str(time.ToDatetime().strftime("%Y-%m-%d %H:%M:%S"))


def _end(row: pb.Execution) -> str:
    if not row.HasField("result"):
        return ""
    reason = pb.EndReason.Name(row.result.reason).removeprefix("END_REASON_").lower()
    number = {pb.END_REASON_EXIT: row.result.exit_code, pb.END_REASON_SIGNAL: row.result.signal}
    return f"{reason} {number.get(row.result.reason, '')}".strip()


async def _list(home: Path | None, address: str, words: list[str], limit: int) -> list[pb.Sandbox]:
    labels = parse_labels(words, "label")
    async with open_stack(home, address=address) as stack:
        return await read_sandboxes(stack, limit, labels)


async def _show(home: Path | None, address: str, id: str) -> tuple[pb.Sandbox, list[pb.Execution]]:
    async with open_stack(home, address=address) as stack:
        box = await stack.sandbox.get_sandbox(id)
        return box, list(await stack.execs.list_execs(id))


async def _delete(home: Path | None, address: str, id: str) -> None:
    async with open_stack(home, address=address) as stack:
        await stack.sandbox.get_sandbox(id)  # the service takes one that is absent as deleted
        await stack.sandbox.delete_sandbox(id)

"""`regreen traj list|show`: what the agents did."""

from pathlib import Path
from typing import Annotated

import typer

from regreen.cli import output
from regreen.cli.options import Home, Json, open_stack
from regreen.dataset import v1 as pb

app = typer.Typer(no_args_is_help=True)
_ROLES = {
    pb.TURN_ROLE_PROMPT: "prompt",
    pb.TURN_ROLE_POLICY: "policy",
    pb.TURN_ROLE_TOOL: "tool",
}


@app.command("list")
def list_trajectories(
    home: Home = None,
    run: Annotated[str, typer.Option(help="Run id or name.")] = "",
    task: Annotated[str, typer.Option(help="Task id.")] = "",
    actor: Annotated[str, typer.Option(help="policy, expert or baseline:<name>.")] = "",
    policy: Annotated[str, typer.Option(help="Policy name, for example base or grpo.")] = "",
    hack: Annotated[str, typer.Option(help="Hack class.")] = "",
    solved: Annotated[bool, typer.Option("--solved", help="Only solved ones.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most this many.")] = 50,
    json_output: Json = False,
) -> None:
    """List trajectories, newest first."""
    rows = output.run(
        _list(
            home,
            run,
            pb.TrajectoryFilter(
                task_id=task, actor=actor, policy=policy, hack=hack, solved_only=solved
            ),
            limit,
        )
    )
    if json_output:
        output.print_json_lines(rows)
        return
    output.print_table(
        "",
        ["id", "task", "policy", "actor", "solved", "reward", "hacks"],
        [
            [
                row.id,
                row.task_id,
                row.policy,
                row.actor,
                "yes" if row.reward.solved else "no",
                f"{row.reward.value:.2f}",
                " ".join(row.reward.hacks),
            ]
            for row in rows
        ],
    )


@app.command()
def show(
    id: Annotated[str, typer.Argument(help="Trajectory id.")],
    home: Home = None,
    json_output: Json = False,
) -> None:
    """Print one trajectory, turn by turn."""
    found = output.run(_get(home, id))
    if json_output:
        output.print_json(found)
        return
    verdict = "solved" if found.reward.solved else "not solved"
    typer.echo(f"{found.id}  task {found.task_id}  {found.actor} {found.policy}  {verdict}")
    for turn in found.turns:
        role = _ROLES.get(turn.role, "?")
        state = f" {turn.state_id}" if turn.state_id else ""
        span = f"[{turn.token_start}:{turn.token_end}]"
        typer.echo(f"\n--- {turn.index} {role} {turn.tool} {span}{state}")
        typer.echo(turn.text)
    typer.echo("\n--- reward")
    for part in found.reward.parts:
        typer.echo(f"{part.name:14} {part.value:+.3f}  {part.detail}")
    typer.echo(f"{'value':14} {found.reward.value:+.3f}  {found.validation.summary}")


async def _list(
    home: Path | None, run: str, filter: pb.TrajectoryFilter, limit: int
) -> list[pb.Trajectory]:
    rows: list[pb.Trajectory] = []
    async with open_stack(home) as stack:
        if run:
            filter.run_id = (await stack.runs.get_run(run)).id
        token = ""
        while len(rows) < limit:
            page = await stack.trajectories.list_trajectories(
                page_size=min(limit - len(rows), 1000), page_token=token, filter=filter
            )
            rows += page.trajectories
            token = page.next_page_token
            if not token:
                break
    return rows


async def _get(home: Path | None, id: str) -> pb.Trajectory:
    async with open_stack(home) as stack:
        return await stack.trajectories.get_trajectory(id)

"""`regreen traj list|show|stats|prune|learn`: what the agents did, and what is kept of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from regreen.cli import output
from regreen.cli.options import Home, Json, nothing_of, open_stack, parse_age
from regreen.client.stack import Stack
from regreen.dataset import v1 as pb
from regreen.rollout.past import fill
from regreen.rpc.errors import InvalidArgument
from regreen.train.rows import known_run

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
    tool: Annotated[str, typer.Option(help="Tool that was called.")] = "",
    verdict: Annotated[str, typer.Option(help="The judge's: accepted or rejected.")] = "",
    text: Annotated[str, typer.Option(help="Text in a turn, at least 3 characters.")] = "",
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
                task_id=task,
                actor=actor,
                policy=policy,
                hack=hack,
                solved_only=solved,
                tool=tool,
                verdict=verdict,
                text=text,
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
        score = f" score {turn.score:+.2f}" if turn.score else ""
        typer.echo(f"\n--- {turn.index} {role} {turn.tool} {span}{state}{score}")
        typer.echo(turn.text)
    typer.echo("\n--- reward")
    for part in found.reward.parts:
        typer.echo(f"{part.name:14} {part.value:+.3f}  {part.detail}")
    typer.echo(f"{'value':14} {found.reward.value:+.3f}  {found.validation.summary}")


@app.command()
def stats(
    home: Home = None,
    run: Annotated[str, typer.Option(help="Run id or name.")] = "",
    json_output: Json = False,
) -> None:
    """Count trajectories by policy, actor, whether solved, and hack class."""
    found = output.run(_stats(home, run))
    if json_output:
        output.print_json(found)
        return
    rows = [
        [name, value, str(count)]
        for name, counts in sorted(found.counts.items())
        for value, count in sorted(counts.values.items())
    ]
    output.print_table(f"{found.total} trajectories", ["by", "value", "trajectories"], rows)


@app.command()
def prune(
    older_than: Annotated[str, typer.Option(help="Age such as 30d, 12h, or 0s for all.")],
    home: Home = None,
    run: Annotated[str, typer.Option(help="Only of this run, by id or name.")] = "",
    keep_solved: Annotated[bool, typer.Option("--keep-solved", help="Keep solved ones.")] = False,
    keep_flagged: Annotated[
        bool, typer.Option("--keep-flagged", help="Keep ones with a hack class.")
    ] = False,
    keep_experts: Annotated[
        bool, typer.Option("--keep-experts", help="Keep experts' and baselines'.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say how many would go, up to 10,000.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Remove old trajectories; those of active runs stay. Tokens go after the grace period."""
    age_s = parse_age(older_than)
    if age_s is None:
        output.fail(
            InvalidArgument("older-than", f"{older_than!r} is no age", "give one like 30d or 12h")
        )
    keep = {"solved": keep_solved, "flagged": keep_flagged, "experts": keep_experts}
    found = output.run(_prune(home, run, age_s, keep, dry_run))
    if json_output:
        output.print_json(found)
        return
    verb = "would go" if dry_run else "removed"
    typer.echo(f"{found.pruned} trajectories {verb}, {found.token_bytes} bytes of tokens")


@app.command()
def learn(
    home: Home = None,
    newest: Annotated[int, typer.Option(min=0, max=1000, help="Solved ones to read.")] = 200,
    json_output: Json = False,
) -> None:
    """Record what training tasks and solved trajectories show in the knowledge base."""
    recorded = output.run(_learn(home, newest))
    if json_output:
        output.print_json({"recorded": recorded})
        return
    typer.echo(f"{recorded} items are new in the knowledge base")


async def _stats(home: Path | None, run: str) -> pb.GetTrajectoryStatsResponse:
    async with open_stack(home) as stack:
        run_id = (await known_run(stack, run)).id if run else ""
        return await stack.archive.get_trajectory_stats(run_id)


async def _prune(
    home: Path | None, run: str, age_s: float, keep: Mapping[str, bool], dry_run: bool
) -> pb.PruneTrajectoriesResponse:
    total = pb.PruneTrajectoriesResponse()
    async with open_stack(home) as stack:
        run_id = (await known_run(stack, run)).id if run else ""
        while True:
            part = await stack.archive.prune_trajectories(
                age_s,
                run_id=run_id,
                keep=keep,
                limit=10_000 if dry_run else 1000,
                dry_run=dry_run,
            )
            total.pruned += part.pruned
            total.token_bytes += part.token_bytes
            if dry_run or not part.more:
                return total


async def _learn(home: Path | None, newest: int) -> int:
    async with open_stack(home) as stack:
        return await fill(stack, trajectories=newest)


async def _list(
    home: Path | None, run: str, filter: pb.TrajectoryFilter, limit: int
) -> list[pb.Trajectory]:
    rows: list[pb.Trajectory] = []
    async with open_stack(home) as stack:
        if run:
            filter.run_id = (await known_run(stack, run)).id
        token = ""
        while len(rows) < limit:
            page = await stack.trajectories.list_trajectories(
                page_size=min(limit - len(rows), 1000), page_token=token, filter=filter
            )
            rows += page.trajectories
            token = page.next_page_token
            if not token:
                break
        if not rows:
            await _check_there(stack, filter)
    return rows


async def _check_there(stack: Stack, filter: pb.TrajectoryFilter) -> None:
    """Refuse a filter by something that no trajectory, or no task, has."""
    if filter.task_id:
        await stack.tasks.get_task(filter.task_id)
    counts = (await stack.archive.get_trajectory_stats("")).counts
    for field in ("policy", "actor", "hack"):
        value, known = getattr(filter, field), counts[field].values
        if value and value not in known:
            raise nothing_of(field, value, known)


async def _get(home: Path | None, id: str) -> pb.Trajectory:
    async with open_stack(home) as stack:
        return await stack.trajectories.get_trajectory(id)

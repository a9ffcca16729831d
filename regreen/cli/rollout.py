"""`regreen rollout run|branch|worker|parked|release`: run episodes; see what was set aside.

- `branch` goes on after a turn of a stored trajectory, from its tokens and its State.
- `run` commits every trajectory to the dataset; a failing episode is a result, not an error.
- `worker` leases rollouts from the queue until it is stopped; stop it at any time, nothing is lost.
"""

import asyncio
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from regreen.cli import output
from regreen.cli.listen import listener
from regreen.cli.options import Home, Json, open_stack
from regreen.dataset import v1 as pb
from regreen.ids import derive_seed
from regreen.rollout.baselines import baseline, check_baseline
from regreen.rollout.branch import branch_point
from regreen.rollout.episode import Runner, run_branch, run_episode
from regreen.rollout.progress import TurnListener, show_turns
from regreen.rollout.worker import RolloutProgress, Worker, WorkerStats, knowledge_of, outcome
from regreen.train.names import grader_of, mode_of, pipeline_of
from regreen.train.progress import Meter
from regreen.train.rows import known_run
from regreen.train.weights import name_served

app = typer.Typer(no_args_is_help=True)


@app.command()
def run(
    task: Annotated[str, typer.Option(help="Task id.")],
    home: Home = None,
    pipeline: Annotated[str, typer.Option(help="simplified or full.")] = "simplified",
    mode: Annotated[str, typer.Option(help="any_fix or keep_new.")] = "any_fix",
    grader: Annotated[
        str, typer.Option(help="build, build_gates or build_gates_judge.")
    ] = "build_gates_judge",
    actor: Annotated[
        str, typer.Option(help="policy, or baseline:noop, :newest, :previous or :pin-back.")
    ] = "policy",
    samples: Annotated[int, typer.Option(min=1, max=1000, help="Episodes.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the first episode.")] = 0,
    keep_states: Annotated[
        bool, typer.Option("--keep-states", help="Keep a State per turn, to branch there.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Run episodes on one task and store their trajectories."""
    settings = {"knobs.keep_states": str(keep_states)}
    with output.progress() as show:
        found = output.run(
            _run(home, task, pipeline, mode, grader, actor, samples, seed, settings, show)
        )
    _print(found, json_output)


@app.command()
def branch(
    trajectory: Annotated[str, typer.Argument(help="Trajectory id.")],
    turn: Annotated[int, typer.Option(min=0, help="Go on after this turn (`traj show`).")],
    home: Home = None,
    samples: Annotated[int, typer.Option(min=1, max=1000, help="Branches.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the first branch.")] = 0,
    keep_states: Annotated[
        bool, typer.Option("--keep-states", help="Keep a State per turn, to branch again.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Sample again from a turn of a stored trajectory, over its exact tokens and files."""
    settings = {"knobs.keep_states": str(keep_states)}
    with output.progress() as show:
        found = output.run(_branch(home, trajectory, turn, samples, seed, settings, show))
    _print(found, json_output)


def _print(found: list[pb.Trajectory], json_output: bool) -> None:
    if json_output:
        output.print_json_lines(found)
        return
    for item in found:
        typer.echo(f"{item.id}  {outcome(item)}")


@app.command()
def parked(
    home: Home = None,
    run: Annotated[str, typer.Option(help="Only of this run, by id or name.")] = "",
    json_output: Json = False,
) -> None:
    """List tasks that are set aside because their rollouts were lost while others succeeded."""
    tasks = output.run(_parked(home, run))
    if json_output:
        output.print_json_lines(tasks)
        return
    rows = [[task.run_id, task.task_id, str(task.lost), task.reason[:80]] for task in tasks]
    output.print_table("", ["run", "task", "lost", "reason"], rows)


@app.command()
def release(
    run: Annotated[str, typer.Argument(help="Run id or name.")],
    task: Annotated[str, typer.Argument(help="Task id.")],
    home: Home = None,
    json_output: Json = False,
) -> None:
    """Have a parked task tried again."""
    count = output.run(_release(home, run, task))
    if json_output:
        output.print_json({"rollouts": count})
        return
    typer.echo(f"{count} rollouts of {task} wait again")


async def _parked(home: Path | None, run: str) -> list[pb.ParkedTask]:
    tasks: list[pb.ParkedTask] = []
    async with open_stack(home) as stack:
        run_id = (await known_run(stack, run)).id if run else ""
        token = ""
        while True:
            page = await stack.parking.list_parked_tasks(run_id, page_token=token)
            tasks += page.tasks
            token = page.next_page_token
            if not token:
                return tasks


async def _release(home: Path | None, run: str, task: str) -> int:
    async with open_stack(home) as stack:
        run_id = (await known_run(stack, run)).id
        return await stack.parking.release_task(run_id, task)


@app.command()
def worker(
    home: Home = None,
    run: Annotated[str, typer.Option(help="Only rollouts of this run, by id or name.")] = "",
    concurrency: Annotated[int, typer.Option(min=1, help="Episodes at a time.")] = 4,
    until_idle: Annotated[bool, typer.Option(help="End when nothing waits.")] = False,
    json_output: Json = False,
) -> None:
    """Lease rollouts from the queue and run them."""
    stats = output.run(_work(home, run, concurrency, until_idle))
    if json_output:
        output.print_json({name: getattr(stats, name) for name in stats.__slots__})
    else:
        output.STDERR.print(str(stats), highlight=False)


async def _run(
    home: Path | None,
    task_id: str,
    pipeline: str,
    mode: str,
    grader: str,
    actor: str,
    samples: int,
    seed: int,
    settings: Mapping[str, str],
    show: output.ProgressPrinter,
) -> list[pb.Trajectory]:
    in_pipeline, in_mode, by_grader = pipeline_of(pipeline), mode_of(mode), grader_of(grader)
    scripted = "" if actor == "policy" else actor.removeprefix("baseline:")
    if scripted:
        check_baseline(scripted)
    found: list[pb.Trajectory] = []
    meter = Meter(listener(show), "episodes", samples)
    listen = (
        show_turns(show, "episodes", 0, 1, task_id) if samples == 1 else one_line(meter, task_id)
    )
    async with open_stack(home) as stack:
        task = await stack.tasks.get_task(task_id)
        script = baseline(scripted, task) if scripted else None
        name = "" if script else await name_served(stack)
        for sample in range(samples):
            trajectory = await run_episode(
                stack,
                task,
                pipeline=in_pipeline,
                mode=in_mode,
                grader=by_grader,
                actor=script,
                seed=derive_seed(seed, sample),
                settings=settings,
                policy_name=name,
                knowledge=await knowledge_of(stack),
                listener=listen,
            )
            await stack.trajectories.commit_trajectory(trajectory)
            found.append(trajectory)
            meter.advance(detail=f"{task_id}: {outcome(trajectory)}")
    return found


async def _branch(
    home: Path | None,
    trajectory_id: str,
    turn: int,
    samples: int,
    seed: int,
    settings: Mapping[str, str],
    show: output.ProgressPrinter,
) -> list[pb.Trajectory]:
    found: list[pb.Trajectory] = []
    meter = Meter(listener(show), "branches", samples)
    async with open_stack(home) as stack:
        origin = await stack.trajectories.get_trajectory(trajectory_id)
        branch_point(origin, turn)
        task = await stack.tasks.get_task(origin.task_id)
        name, knowledge = await name_served(stack), await knowledge_of(stack)
        for sample in range(samples):
            trajectory = await run_branch(
                stack,
                task,
                origin,
                turn,
                seed=derive_seed(seed, "branch", trajectory_id, turn, sample),
                settings=settings,
                policy_name=name,
                knowledge=knowledge,
                listener=one_line(meter, task.id),
            )
            await stack.trajectories.commit_trajectory(trajectory)
            found.append(trajectory)
            meter.advance(detail=f"{task.id}: {outcome(trajectory)}")
    return found


def one_line(meter: Meter, task_id: str) -> TurnListener:
    """A listener that shows the turns of many episodes in the one line of their meter."""
    return lambda progress: meter.report(detail=f"{task_id}, {progress}")


def rollout_lines(clock: Callable[[], float] = time.monotonic) -> Callable[[RolloutProgress], None]:
    """A listener that prints a line on standard error for each rollout that comes or goes."""
    start_s = clock()

    def listen(progress: RolloutProgress) -> None:
        line = f"[{clock() - start_s:6.1f}s] {progress}"
        output.STDERR.print(line, highlight=False, markup=False)

    return listen


async def _work(home: Path | None, run: str, concurrency: int, until_idle: bool) -> WorkerStats:
    async with open_stack(home, patience_s=120.0) as stack:
        run_id = (await known_run(stack, run)).id if run else ""
        found = Worker(
            stack, Runner(stack), run_id=run_id, concurrency=concurrency, listener=rollout_lines()
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, found.stop)
        return await found.run(until_idle=until_idle)

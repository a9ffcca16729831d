"""`regreen train sft|grpo`: train a policy on the local stack.

- A run is resumed by its name; what is fixed at its creation cannot be changed by resuming it.
- `--dry-run` checks what the command would check, prints what it would do, and writes nothing.
"""

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from regreen.cli import output
from regreen.cli.listen import listener
from regreen.cli.options import Home, Json, open_stack, parse_numbers, parse_settings
from regreen.client.stack import Stack
from regreen.learner import v1 as learner_pb
from regreen.train.config import GrpoConfig, SftConfig
from regreen.train.plan import SERVE, Plan, plan_grpo, plan_sft
from regreen.train.progress import Listener
from regreen.train.rl import train_grpo
from regreen.train.rows import TrainResult
from regreen.train.sft import train_sft

C = TypeVar("C")
app = typer.Typer(no_args_is_help=True)
Name = Annotated[str, typer.Option(help="Name of the run; the same name continues it.")]
Start = Annotated[str, typer.Option(help="Weights to start from: base, or the name of a run.")]
Tasks = Annotated[
    list[str], typer.Option("--task", help="Task id; repeat it. Default: admitted train tasks.")
]
Hyper = Annotated[
    list[str], typer.Option("--hyper", help="Hyperparameter, for example learning_rate=1e-5.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only check, and print what would be done.")
]


@app.command()
def sft(
    home: Home = None,
    name: Name = "sft",
    start: Start = "base",
    task: Tasks = [],  # noqa: B006
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the trajectories.")] = 2,
    batch_size: Annotated[int, typer.Option(min=1, help="Trajectories of one step.")] = 8,
    hyper: Hyper = [],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Seed of order and experts.")] = 0,
    dry_run: DryRun = False,
    json_output: Json = False,
) -> None:
    """Fine-tune on expert trajectories of verified fixes."""

    def config() -> SftConfig:
        return SftConfig(
            name=name,
            start=start,
            tasks=tuple(task),
            epochs=epochs,
            batch_size=batch_size,
            hyperparameters=parse_numbers(hyper),
            seed=seed,
        )

    if dry_run:
        _print_plan(output.run(_planned(home, config, plan_sft)), json_output)
        return

    async def work(listen: Listener) -> TrainResult:
        made = config()
        async with open_stack(home, patience_s=120.0) as stack:
            return await train_sft(stack, made, listen)

    with output.progress() as show:
        result = output.run(work(listener(show)))
    print_result(result, json_output)


@app.command()
def grpo(
    home: Home = None,
    name: Name = "grpo",
    start: Start = "sft",
    task: Tasks = [],  # noqa: B006
    steps: Annotated[int, typer.Option(min=1, help="Learner steps.")] = 20,
    groups: Annotated[int, typer.Option(min=1, help="Groups of one step.")] = 4,
    group_size: Annotated[int, typer.Option(min=2, help="Rollouts of one group.")] = 4,
    pipeline: Annotated[str, typer.Option(help="simplified or full.")] = "simplified",
    mode: Annotated[list[str], typer.Option(help="any_fix, keep_new; repeat it.")] = ["any_fix"],  # noqa: B006
    grader: Annotated[
        str, typer.Option(help="build, build_gates or build_gates_judge.")
    ] = "build_gates",
    concurrency: Annotated[
        int, typer.Option(min=0, help="Rollouts at a time here; 0 leaves them to other workers.")
    ] = 4,
    colocate: Annotated[
        bool, typer.Option("--colocate", help="The policy sleeps while the learner steps.")
    ] = False,
    broadcast: Annotated[
        bool, typer.Option("--broadcast", help="Servers take weights from the learner, not disk.")
    ] = False,
    hyper: Hyper = [],  # noqa: B006
    set: Annotated[
        list[str], typer.Option("--set", help="Episode setting, for example budget.turns=8.")
    ] = [],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Seed of the whole run.")] = 0,
    dry_run: DryRun = False,
    json_output: Json = False,
) -> None:
    """Train with group relative policy optimisation."""

    def config() -> GrpoConfig:
        return GrpoConfig(
            name=name,
            start=start,
            tasks=tuple(task),
            modes=tuple(mode),
            pipeline=pipeline,
            grader=grader,
            steps=steps,
            groups_per_step=groups,
            group_size=group_size,
            concurrency=concurrency,
            colocate=colocate,
            broadcast=broadcast,
            hyperparameters=parse_numbers(hyper),
            labels=parse_settings(set),
            seed=seed,
        )

    if dry_run:
        _print_plan(output.run(_planned(home, config, plan_grpo)), json_output)
        return

    async def work(listen: Listener) -> TrainResult:
        made = config()
        async with open_stack(home, patience_s=120.0) as stack:
            return await train_grpo(stack, made, listen)

    with output.progress() as show:
        result = output.run(work(listener(show)))
    print_result(result, json_output)


async def _planned(
    home: Path | None, config: Callable[[], C], plan: Callable[[Stack, C], Awaitable[Plan]]
) -> Plan:
    made = config()
    async with open_stack(home) as stack:
        return await plan(stack, made)


def _print_plan(plan: Plan, json_output: bool) -> None:
    if json_output:
        output.print_json(_plan_json(plan))
        return
    rows: list[tuple[str, object]] = [
        ("action", plan.action),
        ("tasks", f"{len(plan.tasks)}: {' '.join(plan.tasks)}"),
        ("modes", " ".join(plan.modes)),
        ("pipeline", " ".join(plan.pipelines)),
        ("grader", plan.grader),
        ("start", f"{plan.start}, {plan.weights.uri}"),
        ("goes on from", f"step {plan.steps_done}, {plan.goes_on_from.uri}"),
        ("steps", plan.steps),
        *((name.replace("_", " "), count) for name, count in plan.amounts.items()),
    ]
    if plan.learner is not None:
        rows += [
            ("engine", plan.learner.engine),
            ("processes", _processes(plan.learner)),
            ("parameters", f"{plan.learner.trainable_parameters} of {plan.learner.parameters}"),
            ("memory", _memory(plan.learner)),
        ]
    left = plan.steps > plan.steps_done and plan.action != SERVE
    time = "no earlier run was measured" if left else "no step is left"
    if plan.time is not None:
        time = f"about {plan.time.seconds:.0f} s, by {plan.time.steps} steps of {plan.time.run}"
    rows.append(("time", time))
    rows += [("note", note) for note in plan.notes]
    output.print_table(f"{plan.kind} {plan.name}", ["field", "value"], rows)


def _processes(learner: learner_pb.EstimateRunResponse) -> str:
    divided = learner.hyperparameters.sequence_parallel
    said = f"{learner.processes} on the learner's machine"
    return f"{said}; {divided} ranks divide each sequence" if divided > 1 else said


def _memory(learner: learner_pb.EstimateRunResponse) -> str:
    needed, there = learner.estimated_memory_bytes, learner.available_memory_bytes
    said = f"about {needed / 2**30:.1f} GiB of {there / 2**30:.1f} GiB available"
    kept = learner.host_memory_bytes / 2**30
    return f"{said}, and {kept:.1f} GiB of the host's" if kept else said


def _plan_json(plan: Plan) -> dict[str, Any]:
    return asdict(plan) | {"learner": output.as_dict(plan.learner) if plan.learner else None}


def print_result(result: TrainResult, json_output: bool) -> None:
    """Where a run ended, as a table or as JSON."""
    values = {name: _plain(value) for name, value in asdict(result).items()}
    if json_output:
        output.print_json(values)
    else:
        output.print_table("", ["field", "value"], list(values.items()))


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value

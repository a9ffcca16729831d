"""`regreen tasks import --format|add|export`: tasks of other systems, and builds of one's own.

- An import of another format exits with 0 once everything is stored, waiting or not.
- `add` exits with 0 for a task that is admitted, or unverified because no fix was given.
- What an export leaves out is printed with the reason; an export of nothing fails.
"""

import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

import typer

from regreen.cli import output
from regreen.cli.options import Home, Json, check_split, open_stack
from regreen.client.stack import Stack
from regreen.dataset import v1 as pb
from regreen.home import default_home
from regreen.rpc.errors import FailedPrecondition, InvalidArgument
from regreen.tasks.add import Added, add
from regreen.tasks.checkout import Wish, check_out
from regreen.tasks.exchange import SFT, Imported, export_chats, export_tasks, import_found
from regreen.tasks.formats.items import Written
from regreen.tasks.formats.registry import OURS, PROJECT, detect, format_of, read
from regreen.tasks.formats.sft import STYLES
from regreen.tasks.gate import REPEATS
from regreen.tasks.records import FOLDER, RecordStore
from regreen.train.rows import known_run

_SHOWN = 20


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("add")(add_build)
    app.command("export")(export)


def kind_of(path: Path | None, format: str) -> str:
    """The format of an import; fails where it is none."""
    try:
        if format and format != OURS:
            format_of(format)
        if format or path is None:
            return format or OURS
        return detect(path)
    except InvalidArgument as error:
        output.fail(error)


def import_foreign(
    path: Path, format: str, split: str, images: Path | None, home: Path | None, json_output: bool
) -> None:
    """Store the tasks of another format and say what they wait for."""
    where = home or default_home()
    with output.progress() as show:

        async def work() -> Imported:
            check_split(split)
            if format == PROJECT:
                remedy = f"use `regreen tasks add {path}`"
                raise InvalidArgument("path", f"{path} is a project of its own", remedy)
            found = read(path, format)
            async with open_stack(home) as stack:
                keep = RecordStore(where / FOLDER)
                return await import_found(
                    stack, found, where, keep, show, split=split, images=images
                )

        done = output.run(work())
    if json_output:
        output.print_json(
            {
                "format": format,
                "imported": done.imported,
                "unchanged": done.unchanged,
                "repeated": done.repeated,
                "waiting": done.waiting,
                "to_gate": done.native,
                "states": done.states,
            }
        )
        return
    text = f"{done.imported} imported, {done.unchanged} unchanged"
    typer.echo(f"{text}, {len(done.waiting)} waiting, {len(done.native)} to be gated here")
    for id, needs in list(done.waiting.items())[:_SHOWN]:
        typer.echo(f"{id}: needs {needs}")
    if len(done.waiting) > _SHOWN:
        typer.echo(f"... and {len(done.waiting) - _SHOWN} more: `regreen tasks list`")


def ours(tasks: list[pb.Task]) -> list[pb.Task]:
    """Those that can be prepared and judged here; says how many of other systems wait."""
    counts = Counter(task.foreign.format for task in tasks if task.HasField("foreign"))
    for format, count in sorted(counts.items()):
        output.STDERR.print(f"{count} tasks of {format} wait for what they need", style="yellow")
    return [task for task in tasks if not task.HasField("foreign")]


def why_not_gated(task: pb.Task) -> str:
    """Why a task whose record is not here is not judged."""
    if task.HasField("foreign"):
        return f"is of {task.foreign.format} and needs {', '.join(task.foreign.needs)}"
    if task.status == pb.TASK_STATUS_UNVERIFIED:
        return "no fix of it is known: add it again with one"
    return "its record is not here"


def add_build(
    path: Annotated[str, typer.Argument(help="Project's directory, or address of a repository.")],
    id: Annotated[str, typer.Option(help="Task id; default: name, version and digest.")] = "",
    commit: Annotated[str, typer.Option(help="Broken commit of a repository.")] = "",
    fix_commit: Annotated[str, typer.Option(help="Commit that repairs it.")] = "",
    fix_patch: Annotated[Path | None, typer.Option(help="Unified diff that repairs it.")] = None,
    mode: Annotated[str, typer.Option(help="any_fix or keep_new.")] = "any_fix",
    subdirectory: Annotated[str, typer.Option(help="The project inside the repository.")] = ".",
    python: Annotated[str, typer.Option(help="Interpreter, for example 3.11.")] = "",
    lock: Annotated[str, typer.Option(help="File of name==version lines in the project.")] = "",
    test: Annotated[list[str] | None, typer.Option(help="pytest argument; repeat it.")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    timeout: Annotated[float, typer.Option(min=1, help="Seconds of one test run.")] = 300.0,
    repeats: Annotated[int, typer.Option(min=2, max=20, help="Runs of each check.")] = REPEATS,
    home: Home = None,
    json_output: Json = False,
) -> None:
    """Make a task of a failing build of your own: detect, pin, find what fails, gate.

    A `task.toml` in the project may say the same. Without a fix the task is unverified: it may be
    tried, and is never trained on. Exits with 1 if the gate refuses it.
    """
    where = home or default_home()
    wish = Wish(
        id, subdirectory, python, tuple(test or ()), lock, split, timeout,
        commit=commit, fix_patch=fix_patch, fix_commit=fix_commit, mode=mode,
    )  # fmt: skip
    with output.progress() as show, tempfile.TemporaryDirectory(prefix="regreen-add-") as folder:

        async def work() -> Added:
            check_split(split)
            if fix_patch is not None and fix_commit:
                raise InvalidArgument("fix-commit", "and fix-patch are given", "give one of them")
            checkout = check_out(path, wish, Path(folder))
            async with open_stack(home, patience_s=120.0) as stack:
                keep = RecordStore(where / FOLDER)
                scratch = Path(folder)
                return await add(stack, checkout, where, scratch, show, repeats=repeats, keep=keep)

        done = output.run(work())
    _print_added(done, json_output)
    if done.report.status not in (pb.TASK_STATUS_ADMITTED, pb.TASK_STATUS_UNVERIFIED):
        raise typer.Exit(output.FAILED)


def _print_added(done: Added, json_output: bool) -> None:
    task, report = done.task, done.report
    status = pb.TaskStatus.Name(report.status).removeprefix("TASK_STATUS_").lower()
    if json_output:
        output.print_json(
            {
                "id": task.id,
                "status": status,
                "reason": report.reason,
                "state": report.state_id,
                "python": task.environment.python,
                "packages": len(task.environment.pins),
                "fail_to_pass": list(task.fail_to_pass),
                "fixes": dict(report.fixes),
                "notes": list(done.notes),
            }
        )
        return
    typer.echo(f"{task.id}  {status}  {report.reason}".rstrip())
    spec = task.environment
    typer.echo(f"python {spec.python}, {len(spec.pins)} packages, {task.fail_to_pass_count} tests")
    for note in done.notes:
        typer.echo(f"note: {note}")


def export(
    ids: Annotated[list[str] | None, typer.Argument(help="Task ids; default: admitted.")] = None,
    format: Annotated[
        str, typer.Option(help="harbor, swe-bench, swe-smith, bump, parquet or sft.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Directory that does not exist yet.")] = None,
    split: Annotated[str, typer.Option(help="Only train, validation or test; sft: train.")] = "",
    every: Annotated[bool, typer.Option("--every-status", help="Not only admitted tasks.")] = False,
    run: Annotated[str, typer.Option(help="sft: only rollouts of this run.")] = "",
    style: Annotated[str, typer.Option(help="sft: tools (calls apart) or text.")] = "tools",
    tokens: Annotated[bool, typer.Option("--tokens", help="sft: exact token ids too.")] = False,
    home: Home = None,
    json_output: Json = False,
) -> None:
    """Write tasks for another system, or chats of solved rollouts for fine-tuning.

    Chats are those of solved rollouts of admitted tasks without a flagged hack; the others are
    counted by reason.
    """
    where = home or default_home()
    with output.progress() as show:

        async def work() -> Written:
            if out is None:
                raise InvalidArgument("out", "is not given", "name a directory to write")
            check_split(split)
            if format != SFT:
                format_of(format)
            if style not in STYLES:
                raise InvalidArgument("style", f"{style!r} is not known", "give tools or text")
            async with open_stack(home) as stack:
                if format == SFT:
                    chosen = await _chosen(stack, ids or [], split or "train", every=every)
                    wanted = {task.id for task in chosen if task.labels.get("control") != "true"}
                    chats = await _rollouts(stack, run)
                    return await export_chats(chats, wanted, out, show, style=style, tokens=tokens)
                tasks = await _chosen(stack, ids or [], split, every=every)
                if not tasks:
                    remedy = "gate some first, or give --every-status"
                    raise FailedPrecondition(f"no admitted task to export; {remedy}")
                keep = RecordStore(where / FOLDER)
                return await export_tasks(stack, tasks, format, out, where, keep, show)

        written = output.run(work())
    _print_written(written, format, json_output)
    if not written.count:
        raise typer.Exit(output.FAILED)


async def _chosen(stack: Stack, ids: list[str], split: str, *, every: bool) -> list[pb.Task]:
    if ids:
        return [await stack.tasks.get_task(id) for id in dict.fromkeys(ids)]
    admitted = [] if every else [pb.TASK_STATUS_ADMITTED]
    return await stack.tasks.all_tasks(pb.TaskFilter(statuses=admitted, split=split))


async def _rollouts(stack: Stack, run: str) -> AsyncIterator[pb.Trajectory]:
    """The trajectories of a run, or all."""
    wanted = pb.TrajectoryFilter(run_id=(await known_run(stack, run)).id if run else "")
    return stack.trajectories.export_trajectories(wanted)


def _print_written(written: Written, format: str, json_output: bool) -> None:
    if json_output:
        output.print_json(
            {
                "format": format,
                "written": written.count,
                "left_out": written.left_out,
                "paths": [str(path) for path in written.paths],
            }
        )
        return
    typer.echo(f"{written.count} written")
    if format == SFT:
        for reason, count in written.left_out.items():
            typer.echo(f"left out: {count} {reason}")
        return
    for reason, number in Counter(written.left_out.values()).most_common():
        typer.echo(f"left out: {number}, each because it {reason}")

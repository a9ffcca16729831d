"""`regreen tasks` import|add|list|show|stats|prepare|verify|export|leaks|mine|mend|rules.

- `verify` exits with 0 only if every task that it was asked about is admitted.
- Each row of a table says why a task is not admitted.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from regreen.cli import card, exchange, leaks, mend, mine, output
from regreen.cli.options import (
    Home,
    Json,
    check_split,
    nothing_of,
    open_stack,
    parse_age,
    task_status,
)
from regreen.client.stack import Stack
from regreen.common import v1 as common_pb
from regreen.dataset import v1 as pb
from regreen.home import default_home
from regreen.rpc.errors import FailedPrecondition, InvalidArgument, NotFound
from regreen.tasks.admit import Admission, ReportingGateClient, import_records, reasons_of
from regreen.tasks.evidence import fitting
from regreen.tasks.formats.registry import OURS, only_file
from regreen.tasks.gate import REPEATS
from regreen.tasks.jsonl import (
    load_distributions,
    load_tasks,
    shipped_distributions,
    shipped_evidence,
    shipped_tasks,
)
from regreen.tasks.model import Evidence
from regreen.tasks.records import FOLDER, RECORD_LABEL, RecordStore, record_sha256
from regreen.train.parallel import run_bounded

app = typer.Typer(no_args_is_help=True)
mine.register(app)
mend.register(app)
exchange.register(app)
card.register(app)
leaks.register(app)
Ids = Annotated[list[str] | None, typer.Argument(help="Task ids.", show_default=False)]
All = Annotated[bool, typer.Option("--all", help="Every task.")]


@app.command("import")
def import_tasks(
    path: Annotated[
        Path | None,
        typer.Argument(help="File or directory of tasks; default: the set that ships."),
    ] = None,
    format: Annotated[
        str,
        typer.Option(help="regreen, swe-bench, swe-smith, harbor, bump, parquet; default: found."),
    ] = "",
    distributions: Annotated[
        Path | None, typer.Option(help="JSON Lines of releases that the tasks refer to.")
    ] = None,
    split: Annotated[
        str, typer.Option(help="Put tasks of other systems into train, validation or test.")
    ] = "",
    images: Annotated[
        Path | None, typer.Option(help="Directory of image archives, named TASK.tar.")
    ] = None,
    home: Home = None,
    json_output: Json = False,
) -> None:
    """Store tasks; unchanged ones stay as they are. Those of other systems wait for what they need.

    Nothing that a file says of itself counts as verified: `regreen tasks verify` decides.
    """
    kind = exchange.kind_of(path, format or (OURS if distributions else ""))
    if path is not None and kind != OURS:
        exchange.import_foreign(path, kind, split, images, home, json_output)
        return
    if split or images:
        output.fail(InvalidArgument("split", "and images are for tasks of other systems"))

    async def work() -> pb.ImportTasksResponse:
        records = load_tasks(only_file(path)) if path else shipped_tasks()
        known = load_distributions(distributions) if distributions else shipped_distributions()
        async with open_stack(home) as stack:
            return await import_records(stack, records, known, keep=_records(home))

    answer = output.run(work())
    if json_output:
        output.print_json({"imported": answer.imported, "unchanged": answer.unchanged})
    else:
        typer.echo(f"{answer.imported} imported, {answer.unchanged} unchanged")


@app.command("list")
def list_tasks(
    home: Home = None,
    status: Annotated[
        str, typer.Option(help="new, admitted, rejected, quarantined, waiting or unverified.")
    ] = "",
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "",
    culprit: Annotated[str, typer.Option(help="Package whose release broke the build.")] = "",
    json_output: Json = False,
) -> None:
    """List tasks."""

    async def work() -> tuple[list[pb.Task], dict[str, str]]:
        wanted = pb.TaskFilter(split=check_split(split), culprit=culprit)
        if status:
            wanted.statuses.append(task_status(status))
        async with open_stack(home) as stack:
            tasks = await stack.tasks.all_tasks(wanted)
            if culprit and not tasks:
                known = (await stack.tasks.get_task_stats()).counts["culprit"].values
                if culprit not in known:
                    raise nothing_of("culprit", culprit, known)
            return tasks, {} if json_output else await reasons_of(stack, tasks)

    rows, reasons = output.run(work())
    if json_output:
        output.print_json_lines(rows)
        return
    output.print_table(
        "",
        ["task", "status", "split", "python", "category", "blame", "modes", "reason"],
        [
            [
                row.id,
                _shown_status(row),
                row.split,
                row.environment.python,
                row.category,
                row.blame,
                " ".join(_mode(mode) for mode in row.modes),
                _short(reasons.get(row.id, "")),
            ]
            for row in rows
        ],
    )
    counts = Counter(map(_shown_status, rows))
    output.STDERR.print(", ".join(f"{count} {name}" for name, count in sorted(counts.items())))


@app.command()
def show(
    id: Annotated[str, typer.Argument(help="Task id.")],
    home: Home = None,
    json_output: Json = False,
) -> None:
    """Print one task and the gate's evidence."""

    async def work() -> tuple[pb.Task, pb.GateReport | None]:
        async with open_stack(home) as stack:
            task = await stack.tasks.get_task(id)
            try:
                return task, await stack.tasks.get_gate_report(id)
            except NotFound:
                return task, None

    task, report = output.run(work())
    shipped = _shipped(task)
    if json_output:
        gate = output.as_dict(report) if report else None
        came = shipped.model_dump() if shipped else None
        output.print_json({"task": output.as_dict(task), "gate": gate, "shipped": came})
        return
    typer.echo(f"{task.id}  {status_name(task.status)}  {task.category}  blame {task.blame}")
    if report and report.reason:
        typer.echo(report.reason)
    typer.echo(f"python {task.environment.python}, {len(task.environment.pins)} pins")
    typer.echo(f"tests {' '.join(task.environment.test.arguments)}")
    if task.environment.egress:
        typer.echo(f"rollouts may reach {', '.join(task.environment.egress)}")
    typer.echo(f"fail to pass {task.fail_to_pass_count}, pass to pass {task.pass_to_pass_count}")
    for check in report.checks if report else []:
        mark, around = (
            "ok " if check.ok else "BAD",
            f" [{check.conditions}]" * bool(check.conditions),
        )
        typer.echo(f"  {mark} {check.name} {check.repeat}{around}: {check.detail}")
    if shipped and not report:
        typer.echo(f"not judged here; shipped as judged on {shipped.judged}, {shipped.python}:")
        for runs in shipped.checks:
            alike = f"{len(runs.results)} different" if len(runs.results) > 1 else "the same"
            bad = f", {runs.failed} BAD" if runs.failed else ""
            typer.echo(f"  {runs.runs} runs of {runs.name}, {alike} outcomes{bad}: {runs.detail}")
    for held in report.quarantined if report else []:
        typer.echo(f"  quarantined ({' '.join(held.causes)}) {held.id}")
        for line in held.outcomes:
            typer.echo(f"    {line}")
    for line in report.drift if report else []:
        typer.echo(f"  changed: {line}")
    typer.echo(task.error_log)


def _shipped(task: pb.Task) -> Evidence | None:
    """What the gate saw of a shipped record before it shipped, if the task is of that record."""
    known = {record_sha256(record): record for record in shipped_tasks()}
    record = known.get(task.labels[RECORD_LABEL]) if RECORD_LABEL in task.labels else None
    return next(iter(fitting(shipped_evidence(), [record])), None) if record else None


@app.command()
def prepare(
    ids: Ids = None,
    every: All = False,
    home: Home = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Tasks at a time.")] = 2,
    json_output: Json = False,
) -> None:
    """Build the states of tasks, without gating them; exits with 1 unless all were built."""
    with output.progress() as show_progress:
        rows = output.run(_prepare(home, _wanted(ids, every), concurrency, show_progress))
    if json_output:
        output.print_json_lines(rows)
    else:
        for row in rows:
            typer.echo(f"{row['id']}  {row['state'] or 'not prepared: ' + row['error']}")
    if any(row["error"] for row in rows):
        raise typer.Exit(output.FAILED)


@app.command()
def verify(
    ids: Ids = None,
    every: All = False,
    home: Home = None,
    split: Annotated[str, typer.Option(help="Every task of train, validation or test.")] = "",
    repeats: Annotated[int, typer.Option(min=2, max=20, help="Runs of each check.")] = REPEATS,
    again: Annotated[bool, typer.Option(help="Also tasks that were decided here before.")] = False,
    older_than: Annotated[
        str, typer.Option(help="Also tasks that were decided longer ago: 7d, 12h, 30m.")
    ] = "",
    rebuild: Annotated[
        bool, typer.Option(help="Make environments anew from their hashes, not from what is kept.")
    ] = False,
    concurrency: Annotated[int, typer.Option(min=1, help="Tasks at a time.")] = 2,
    json_output: Json = False,
) -> None:
    """Prepare and gate tasks: broken fails, the reference fix passes, a no-op fails, repeatedly.

    What was decided before stands, so that a run that was cut short goes on; `--older-than` lets it
    stand for so long only, for a timer. Prints what changed. Exits with 1 unless every task is
    admitted.
    """
    asked = _Asked(
        _wanted(ids, every or bool(split)), split, repeats, again, _age(older_than), rebuild,
        concurrency,
    )  # fmt: skip
    with output.progress() as show_progress:
        reports = output.run(_verify(home, asked, show_progress))
    if json_output:
        output.print_json_lines(_row(report) for report in reports)
    else:
        table = [[r.task_id, status_name(r.status), _short(_why(r))] for r in reports]
        output.print_table("", ["task", "status", "reason"], table)
        for report in reports:
            for line in report.drift:
                typer.echo(f"{report.task_id}: {line}")
    counts = Counter(status_name(report.status) for report in reports)
    counts["changed"] = sum(bool(report.drift) for report in reports)
    output.STDERR.print(", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    if any(report.status != pb.TASK_STATUS_ADMITTED for report in reports):
        raise typer.Exit(output.FAILED)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What `verify` was asked for."""

    ids: list[str]
    split: str
    repeats: int
    again: bool
    older_than_s: float | None
    rebuild: bool
    concurrency: int


def _row(report: pb.GateReport) -> dict[str, object]:
    return {
        "id": report.task_id,
        "status": status_name(report.status),
        "state": report.state_id,
        "reason": _why(report),
        "depends_on": list(report.depends_on),
        "quarantined": {held.id: list(held.causes) for held in report.quarantined},
        "fixes": dict(report.fixes),
        "repeats": report.repeats,
        "drift": list(report.drift),
        "time": report.create_time.ToJsonString(),
    }


def _why(report: pb.GateReport) -> str:
    return "" if report.status == pb.TASK_STATUS_ADMITTED else report.reason


def _age(text: str) -> float | None:
    """Seconds of an age such as 7d."""
    if not text:
        return None
    age_s = parse_age(text)
    if age_s is None:
        output.fail(InvalidArgument("older-than", f"{text!r} is no age", "give one like 7d or 12h"))
    return age_s


async def _verify(
    home: Path | None, asked: _Asked, show_progress: output.ProgressPrinter
) -> list[pb.GateReport]:
    ids = asked.ids
    check_split(asked.split)
    async with open_stack(home, patience_s=120.0) as stack:
        tasks = await _stored(stack, ids, asked.split)
        if asked.split and not tasks:
            raise NotFound(
                f"no task is in the split {asked.split!r}; import some with `regreen tasks import`"
            )
        records = _records(home).of_tasks(tasks, shipped_tasks())
        known = {record.id for record in records}
        if not ids:
            tasks = exchange.ours(tasks)
        for task in tasks:
            if task.id not in known and not ids:
                why = exchange.why_not_gated(task)
                output.STDERR.print(f"{task.id}: skipped, {why}", style="yellow")
            elif task.id not in known and task.HasField("foreign"):
                raise FailedPrecondition(f"task {task.id!r} {exchange.why_not_gated(task)}")
        chosen = [task.id for task in tasks if ids or task.id in known]
        done: set[str] = set()

        def progress(task_id: str, text: str) -> None:
            if text.partition(":")[0] in ("admitted", "rejected", "quarantined", "waiting"):
                done.add(task_id)
            show_progress("tasks", len(done), len(chosen), f"{task_id}: {text[:120]}")

        admission = Admission(
            stack,
            records,
            shipped_distributions(),
            repeats=asked.repeats,
            again=asked.again,
            older_than_s=asked.older_than_s,
            rebuild=asked.rebuild,
            progress=progress,
        )
        done |= await admission.standing(chosen)
        show_progress("tasks", len(done), len(chosen), f"{len(done)} decided before")
        decided = await admission.run(chosen, concurrency=asked.concurrency)
        return [await stack.tasks.get_gate_report(task.id) for task in decided]


async def _stored(stack: Stack, ids: list[str], split: str = "") -> list[pb.Task]:
    """The tasks of these ids, or all of a split, or all."""
    if not ids:
        return await stack.tasks.all_tasks(pb.TaskFilter(split=split))
    return [await stack.tasks.get_task(task_id) for task_id in dict.fromkeys(ids)]


async def _prepare(
    home: Path | None, ids: list[str], concurrency: int, show_progress: output.ProgressPrinter
) -> list[dict[str, str]]:
    """One row a task: its id, and its state or what was wrong."""
    async with open_stack(home, patience_s=120.0) as stack:
        tasks = await _stored(stack, ids)
        tasks = tasks if ids else exchange.ours(tasks)
        rows = [{"id": task.id, "state": "", "error": ""} for task in tasks]
        count = 0

        async def one(task: pb.Task, row: dict[str, str]) -> None:
            nonlocal count

            def say(text: str) -> None:
                show_progress("prepare", count, len(tasks), f"{task.id}: {text}")

            client = ReportingGateClient(stack.state, stack.sandbox, say)
            try:
                row["state"] = (await client.prepare(task.environment)).id
            except (InvalidArgument, NotFound, FailedPrecondition) as error:
                row["error"] = error.message
            count += 1
            say("prepared" if row["state"] else "not prepared")

        work = [partial(one, task, row) for task, row in zip(tasks, rows, strict=True)]
        await run_bounded(work, concurrency)
    return rows


def _records(home: Path | None) -> RecordStore:
    return RecordStore((home or default_home()) / FOLDER)


def _short(reason: str, most: int = 100) -> str:
    return reason if len(reason) <= most else f"{reason[: most - 1]}…"


def _wanted(ids: list[str] | None, every: bool) -> list[str]:
    if not ids and not every:
        output.fail(InvalidArgument("ids", "none given", "name tasks, or say --all"))
    return ids or []


def status_name(status: pb.TaskStatus.ValueType) -> str:
    """The word for a task's status."""
    return pb.TaskStatus.Name(status).removeprefix("TASK_STATUS_").lower()


def _shown_status(task: pb.Task) -> str:
    """The status, and whether it is a control: nothing can fix it, so that a pass is cheating."""
    mark = " control" if task.labels.get("control") == "true" else ""
    return f"{status_name(task.status)}{mark}"


def _mode(mode: common_pb.Mode.ValueType) -> str:
    return common_pb.Mode.Name(mode).removeprefix("MODE_").lower()

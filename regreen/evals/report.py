"""The report of evaluations and training runs: `report.html` and `report.json`.

- Everything comes from rows of the dataset service, so it can be written again at any time.
- The page is one file: no scripts, no external assets; readable in light and dark, and printed.
- Both files appear whole or not at all; a figure on the page is the figure in the JSON.
- Evaluations are pooled only if they measured the same way; an attempt is counted once.
"""

import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from regreen.client.stack import Stack
from regreen.dataset import v1 as dataset_pb
from regreen.evals import svg
from regreen.evals.rows import Outcome, load_outcomes
from regreen.evals.summary import Json, ReportInput, RunFacts, TaskFacts, document
from regreen.rpc.errors import FailedPrecondition, InvalidArgument, NotFound, RegreenError
from regreen.train.names import mode_name
from regreen.train.weights import BASE

_PACKAGES = ("regreen", "torch", "deepspeed", "transformers", "openvino", "grpcio", "numpy")


@dataclass(frozen=True, slots=True)
class ReportFiles:
    """What was written."""

    html: Path
    json: Path
    headline: str


async def write_report(
    stack: Stack,
    out_dir: Path,
    *,
    evals: Sequence[str] = (),
    runs: Sequence[str] = (),
    commands: Sequence[str] = (),
    notes: Sequence[str] = (),
    seconds: Mapping[str, float] | None = None,
    title: str = "Regreen report",
    now: datetime | None = None,
) -> ReportFiles:
    """Write the report of evaluations `evals` and training runs `runs`, by name; empty means all.

    `seconds` is the wall time of each stage of the whole, where somebody took it.

    Raises:
        NotFound: no run of such a name.
        FailedPrecondition: there is neither an evaluation nor a training run, or the evaluations
            measured in different ways.
        InvalidArgument: `out_dir` cannot be written.
    """
    source = await load(
        stack, evals=evals, runs=runs, commands=commands, notes=notes, title=title, now=now
    )
    found = document(replace(source, seconds=seconds or {}))
    html = render(found)
    files = ReportFiles(out_dir / "report.html", out_dir / "report.json", found["headline"])
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(files.json, text + "\n")
        write_whole(files.html, html)
    except OSError as error:
        problem = f"{out_dir} cannot be written: {error.strerror}"
        raise InvalidArgument("out", problem, "name a directory you can write") from error
    return files


async def load(
    stack: Stack,
    *,
    evals: Sequence[str],
    runs: Sequence[str],
    commands: Sequence[str],
    notes: Sequence[str],
    title: str,
    now: datetime | None,
) -> ReportInput:
    """Read everything that the report is computed from."""
    every = await _runs(stack)
    evaluations = _chosen(every, evals, {"eval"})
    trained = sorted(_chosen(every, runs, {"sft", "grpo"}), key=_created)
    if not evaluations and not trained:
        raise FailedPrecondition("nothing was trained or evaluated yet; run `regreen eval` first")
    _check_alike(evaluations)
    short = short_names([run.name for run in trained])
    outcomes = [
        replace(outcome, subject=short.get(outcome.subject, outcome.subject))
        for outcome in await _outcomes(stack, evaluations)
    ]
    task_ids = sorted({outcome.task_id for outcome in outcomes})
    facts = [await _task_facts(stack, await stack.tasks.get_task(id)) for id in task_ids]
    others = await _others(stack, facts)
    graders = sorted({outcome.graded for outcome in outcomes})
    return ReportInput(
        title=title,
        created=(now or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M UTC"),
        environment=await _environment(stack),
        outcomes=outcomes,
        subjects=_ordered_subjects(outcomes, [short[run.name] for run in trained]),
        grader=graders[0] if graders else "build_gates_judge",
        runs=[await _run_facts(stack, run, short[run.name]) for run in trained],
        tasks=facts,
        left_out=[
            await _task_facts(stack, task)
            for task in others
            if task.status not in (dataset_pb.TASK_STATUS_NEW, dataset_pb.TASK_STATUS_ADMITTED)
        ],
        not_gated=sum(task.status == dataset_pb.TASK_STATUS_NEW for task in others),
        commands=commands,
        lost=sum(int(MessageToDict(run.summary).get("lost", 0)) for run in evaluations),
        notes=notes,
    )


def render(found: Json) -> str:
    """The page of a document."""
    environment = Environment(
        loader=PackageLoader("regreen.evals"),
        autoescape=select_autoescape(default_for_string=True, default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "number": _number, "seconds": _seconds}
    return environment.get_template("report.html.j2").render(
        doc=found, plots=_plots(found), whole=whole_cells(found)
    )


def _plots(found: Json) -> dict[str, Any]:
    whole = [
        (cell["subject"], cell["value"], cell["low"], cell["high"])
        for cell in whole_cells(found)
        if cell["value"] is not None
    ]
    shares = {name: tools["shares"] for name, tools in found["tools"].items() if tools["shares"]}
    matrices = {
        name: _heat(tools["transitions"], tools["transitions"]["probabilities"])
        for name, tools in found["tools"].items()
    }
    changes = [
        (f"{change['first']} to {change['second']}", _heat(change, change["delta"], signed=True))
        for change in found["tool_changes"]
    ]
    return {
        "rates": Markup(svg.interval_chart(whole)),
        "shares": Markup(svg.share_bars(shares)) if shares else "",
        "wall": Markup(svg.share_bars({"wall time": _shares(found["wall_seconds"])})),
        "matrices": matrices,
        "changes": changes,
        "curves": {run["name"]: _curves(run) for run in found["runs"]},
    }


def _shares(amounts: Mapping[str, float]) -> dict[str, float]:
    total = sum(amounts.values())
    return {name: amount / total for name, amount in amounts.items()} if total else {}


def whole_cells(found: Json) -> list[Json]:
    """Of a document the cells that pool all that their subject did, one a subject."""
    return [cell for cell in found["cells"] if _is_whole(cell, found["cells"])]


def _is_whole(cell: Json, cells: Sequence[Json]) -> bool:
    """Whether a cell pools all that its subject did."""
    own = [other for other in cells if other["subject"] == cell["subject"]]
    return bool(cell["samples"] == max(other["samples"] for other in own)) and cell is next(
        other for other in own if other["samples"] == cell["samples"]
    )


def _heat(axes: Json, values: Sequence[Sequence[float]], *, signed: bool = False) -> Markup:
    return Markup(svg.heat_map(axes["rows"], axes["columns"], values, signed=signed))


_CURVES: tuple[tuple[str, bool, Mapping[str, str]], ...] = (
    ("Loss", False, {"learner/loss": "loss"}),
    ("Reward", False, {"reward_mean": "mean reward"}),
    (
        "Solved, flagged, without spread",
        True,
        {
            "solve_rate": "solved",
            "hack_rate": "flagged as hack",
            "zero_variance_share": "groups without spread",
        },
    ),
    (
        "Distance from the sampling policy",
        False,
        {
            "learner/approx_kl": "KL",
            "learner/kl": "KL to base",
            "learner/clip_fraction": "clipped share",
            "staleness_mean": "staleness (versions)",
        },
    ),
    ("Gradient norm", False, {"learner/grad_norm": "gradient norm"}),
    ("Sampled tokens per rollout", False, {"sampled_tokens_mean": "tokens"}),
    ("Seconds per step", False, {"seconds/rollout": "rollouts", "seconds/learn": "learning"}),
)


def _curves(run: Json) -> list[tuple[str, Markup]]:
    """Titled plots of the metrics that a run has."""
    found = []
    for title, percent, names in _CURVES:
        series = {
            label: run["metrics"][name] for name, label in names.items() if name in run["metrics"]
        }
        if plot := svg.line_chart(series, y_label=title, percent=percent):
            found.append((title, Markup(plot)))
    tools = {
        name.removeprefix("tool_share/"): points
        for name, points in run["metrics"].items()
        if name.startswith("tool_share/")
    }
    if plot := svg.line_chart(tools, y_label="Tool shares", percent=True):
        found.append(("Tool shares", Markup(plot)))
    return found


def _ordered_subjects(outcomes: Sequence[Outcome], trained: Sequence[str]) -> list[str]:
    seen = {outcome.subject for outcome in outcomes}
    policies = [name for name in [BASE, *trained] if name in seen]
    others = sorted(seen - set(policies), key=lambda name: (name.startswith("baseline:"), name))
    return policies + others


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names without the part before the last hyphen that all of them share."""
    heads = [name.split("-")[:-1] for name in names] if len(set(names)) > 1 else [[]]
    shared = next(
        (i for i, parts in enumerate(zip(*heads, strict=False)) if len(set(parts)) > 1),
        min(map(len, heads), default=0),
    )
    short = {name: "-".join(name.split("-")[shared:]) for name in names}
    taken = {"", BASE} & set(short.values())
    return {name: name for name in names} if taken else short


async def _runs(stack: Stack) -> list[dataset_pb.Run]:
    found: list[dataset_pb.Run] = []
    token = ""
    while True:
        page = await stack.runs.list_runs(page_size=200, page_token=token)
        found += page.runs
        token = page.next_page_token
        if not token:
            return found


def _chosen(
    every: Sequence[dataset_pb.Run], names: Sequence[str], kinds: set[str]
) -> list[dataset_pb.Run]:
    of_kind = [run for run in every if run.kind in kinds]
    if not names:
        return of_kind
    known = {run.name: run for run in of_kind} | {run.id: run for run in of_kind}
    for name in names:
        if name not in known:
            there = ", ".join(run.name for run in of_kind[:10]) or "none"
            kind = " or ".join(sorted(kinds))
            raise NotFound(f"no {kind} run named {name!r}; there are: {there}")
    return [known[name] for name in names]


def _created(run: dataset_pb.Run) -> int:
    return run.create_time.ToNanoseconds()


async def _run_facts(stack: Stack, run: dataset_pb.Run, name: str) -> RunFacts:
    metrics: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for point in await stack.runs.list_metrics(run.id):
        metrics[point.name].append((float(point.step), point.value))
    checkpoints = await stack.runs.list_checkpoints(run.id, page_size=1000)
    config = MessageToDict(run.config)
    return RunFacts(
        name=name,
        kind=run.kind,
        state=run.state,
        settings={name: _whole(value) for name, value in config.get("settings", {}).items()},
        metrics=dict(sorted(metrics.items())),
        checkpoints=len(checkpoints.checkpoints),
    )


def _whole(value: Any) -> Any:
    """A setting as it was given: a protobuf struct stores every number as a float."""
    match value:
        case float() if value.is_integer():
            return int(value)
        case list():
            return [_whole(item) for item in value]
        case dict():
            return {name: _whole(item) for name, item in value.items()}
    return value


def _check_alike(evaluations: Sequence[dataset_pb.Run]) -> None:
    """Refuse evaluations whose figures must not be pooled."""
    seen: dict[str, tuple[str, object]] = {}
    for run in evaluations:
        config = MessageToDict(run.config)
        settings = config.get("settings", {})
        facts = {name: settings.get(name) for name in ("grader", "labels")}
        for subject, weights in config.get("resolved", {}).get("weights", {}).items():
            facts[f"the weights of {subject}"] = weights
        for name, value in facts.items():
            other, before = seen.setdefault(name, (run.name, value))
            if before != value:
                raise FailedPrecondition(
                    f"evaluations {other!r} and {run.name!r} differ in {name}; "
                    "name those that belong together with --eval"
                )


async def _outcomes(stack: Stack, evaluations: Sequence[dataset_pb.Run]) -> list[Outcome]:
    """What was measured; a draw that several evaluations made is counted once."""
    found: dict[tuple[object, ...], Outcome] = {}
    for run in evaluations:
        seed = MessageToDict(run.config).get("settings", {}).get("seed")
        for o in await load_outcomes(stack, run.id):
            key = (o.subject, o.task_id, o.pipeline, o.mode, o.sample, seed)
            found.setdefault(key, o)
    return list(found.values())


async def _others(stack: Stack, evaluated: Sequence[TaskFacts]) -> list[dataset_pb.Task]:
    """Tasks of the splits of what was evaluated that were not; none that no one could run here."""
    ids = {task.id for task in evaluated}
    found: list[dataset_pb.Task] = []
    for split in sorted({task.split for task in evaluated} - {""}):
        every = await stack.tasks.all_tasks(dataset_pb.TaskFilter(split=split))
        found += [t for t in every if t.id not in ids and not t.HasField("foreign")]
    return found


async def _task_facts(stack: Stack, task: dataset_pb.Task) -> TaskFacts:
    try:
        gate = await stack.tasks.get_gate_report(task.id)
    except NotFound:
        gate = dataset_pb.GateReport()
    return TaskFacts(
        id=task.id,
        split=task.split,
        status=dataset_pb.TaskStatus.Name(task.status).removeprefix("TASK_STATUS_").lower(),
        category=task.category,
        blame=task.blame,
        python=task.environment.python,
        modes=tuple(mode_name(mode) for mode in task.modes),
        validation_s=task.validation_time.ToNanoseconds() * 1e-9,
        gate_reason=gate.reason,
        gate_checks=tuple((check.name, check.repeat, check.ok) for check in gate.checks),
    )


async def _environment(stack: Stack) -> dict[str, str]:
    """Machine and versions of the process that writes the report, and what the policy serves."""
    found = {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": _memory(),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {version}" for name, version in _versions().items()),
    }
    try:
        policy = await stack.policy.get_policy()
        found["policy"] = f"{policy.model}, engine {policy.engine}, {policy.dtype}"
    except RegreenError:
        found["policy"] = "not running while the report was written"
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory() -> str:
    size_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{size_bytes / 2**30:.0f} GiB"


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_whole(path: Path, text: str) -> None:
    """Put a file in its place whole, or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"

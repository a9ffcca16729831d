"""Compares cold and warm validations of every task of the repository: the verdicts must be equal.

- `python -m sandbox_svc.bench_tasks --json` prints one JSON object; without the flag, a table.
- Each task is validated untouched, with a change of a source file that means nothing, and with
  each of its reference fixes; `--healthy` adds the environment in which its tests are green.
- Two verdicts are equal if outcome, every test's outcome, the failing required tests and the
  changes left out are. Where they differ the cold run is repeated: a test that differs from itself
  says nothing of warmth, and is listed as such.
- What has to run cold is listed with the reason; what cannot be prepared here, with the error.
- `--out` is appended to as the tasks end; what is in it is not measured again.
"""

import argparse
import asyncio
import collections
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regreen.pkgindex import PackageIndex, index_urls
from regreen.rpc import logging
from regreen.rpc.errors import RegreenError
from regreen.tasks import environment as env
from regreen.tasks.jsonl import shipped_distributions, shipped_tasks
from regreen.tasks.model import Fix, TaskRecord
from regreen.tasks.upstream import release_files
from sandbox_svc import metrics
from sandbox_svc.backends.base import Command, Limits
from sandbox_svc.bench_warm import Bench, target, timed
from sandbox_svc.builders.base import REPO, FileChange
from sandbox_svc.spares import Miss
from sandbox_svc.specs import changes_from_proto, spec_from_proto
from sandbox_svc.state_records import State
from sandbox_svc.verdicts import ValidationOptions, difference

_FILE_BYTES = 8 << 20
_SOURCES = f"cd {REPO} && find . -name '*.py' -size -200k -not -path '*/.*' | sort"
_Case = tuple[str, tuple[FileChange, ...], dict[str, str]]
"""A name, a diff, and the pins that it must hold."""


async def _read(bench: Bench, state: State, paths: Sequence[str]) -> dict[str, bytes]:
    """Files of a State's repository."""
    async with bench.box(state) as box:
        return {path: await box.read_file(f"{REPO}/{path}", _FILE_BYTES) for path in paths}


async def _comment(bench: Bench, state: State) -> tuple[FileChange, ...]:
    """A comment at the end of the first source file that is no test."""
    async with bench.box(state) as box:
        found = (await box.run(Command(("sh", "-c", _SOURCES), cwd="/"))).stdout.text.split("\n")
        keep = ("setup.py", "conftest.py")
        own = [p[2:] for p in found if p and "test" not in p and p.rpartition("/")[2] not in keep]
        inner = sorted(own, key=lambda p: (not p.endswith("__init__.py"), p.count("/"), p))
        if not inner:
            return ()
        text = await box.read_file(f"{REPO}/{inner[0]}", _FILE_BYTES)
        return (FileChange(inner[0], text + b"\n# nothing\n"),)


async def _reference(
    bench: Bench, index: PackageIndex, task: TaskRecord, fix: Fix, state: State
) -> tuple[FileChange, ...]:
    if fix.origin == "pins-restored":
        found = env.restored_pins(task, state.python)
    elif fix.origin == "upstream" and task.overlay is not None:
        paths = task.overlay.fix_paths
        files = await release_files(index, task.package, task.overlay.sdist, paths)
        found = env.replaced_files(files)
    else:
        found = env.edited_files(fix, await _read(bench, state, env.edit_paths([fix])))
    return changes_from_proto(found)


async def _cases(
    bench: Bench, index: PackageIndex, task: TaskRecord, state: State, *, healthy: bool
) -> list[_Case]:
    cases: list[_Case] = [("untouched", (), {})]
    if comment := await _comment(bench, state):
        cases.append(("comment", comment, {}))
    for fix in () if healthy else task.fixes:
        diff = await _reference(bench, index, task, fix, state)
        cases.append((f"{fix.mode}/{fix.origin}", diff, env.held_pins(task, fix.mode)))
    return cases


def _misses() -> dict[str, float]:
    return {why.value: metrics.WARM_MISSES.labels(why.value)._value.get() for why in Miss}


def _why_cold(bench: Bench, state: State, before: dict[str, float]) -> str:
    kinds = [why for why, count in _misses().items() if count > before[why]]
    return bench.pool.why_off(state.id) or ", ".join(kinds) or "unknown"


async def _compare(bench: Bench, state: State, case: _Case) -> dict[str, Any]:
    """One diff, cold and warm."""
    name, diff, held = case
    options = ValidationOptions(held_pins=held)
    unstable = state.metadata["spec"]["test"]["unstable"]
    cold, cold_s = await timed(bench.cold, state, diff, options)
    await bench.pool.settled()
    before = _misses()
    warm, warm_s = await timed(bench.warm, state, diff, options)
    row: dict[str, Any] = {"case": name, "outcome": cold.outcome.value, "tests": len(cold.tests)}
    row |= {"warm": warm.warm, "cold_s": round(cold_s, 3), "warm_s": round(warm_s, 3)}
    if not warm.warm:
        row["why_cold"] = _why_cold(bench, state, before)
    told = difference(cold, warm, unstable)
    row["same"] = not told
    if told:
        row["difference"] = told
        row["cold_differs_from_itself"] = told  # as both were cold
        if warm.warm:
            again, _ = await timed(bench.cold, state, diff, options)
            row["cold_differs_from_itself"] = difference(cold, again, unstable)
    return row


def _healthy(task: TaskRecord) -> TaskRecord:
    """The record with the environment of its fix as the one that it starts with."""
    python = task.good_python or task.python
    return task.model_copy(
        update={"pins_fail": task.pins_pass, "python": python, "wheelhouse": [], "choices": []}
    )


async def _prepare(bench: Bench, task: TaskRecord, releases: env.Distributions) -> State:
    spec = spec_from_proto(env.environment(task, releases))
    return await bench.states.prepare(
        spec.digest, lambda p: bench.builder.prepare(spec, bench.runtime, Limits(), p)
    )


class Tasks:
    """The tasks to compare, one after the other; the next one is prepared meanwhile."""

    def __init__(self, bench: Bench, index: PackageIndex, out: Path | None) -> None:
        self.bench, self.index, self.out = bench, index, out
        self.releases = shipped_distributions()
        self.rows: list[dict[str, Any]] = []
        if out is not None and out.exists():
            self.rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]

    async def run(self, tasks: Sequence[TaskRecord], *, healthy: bool, deadline: float) -> None:
        """Compare what was not compared yet, until `deadline` of the monotonic clock."""
        done = {(row["task"], row["healthy"]) for row in self.rows}
        todo = [task for task in tasks if (task.id, healthy) not in done]
        ready: asyncio.Task[State] | None = None
        for number, task in enumerate(todo):
            if time.monotonic() > deadline:
                break
            mine = ready or self._begin(task, healthy)
            ready = self._begin(todo[number + 1], healthy) if number + 1 < len(todo) else None
            row = {"task": task.id, "healthy": healthy, **await self._one(task, mine, healthy)}
            self.rows.append(row)
            cases = row.get("cases", [])
            same = sum(case["same"] for case in cases)
            told = row.get("skipped") or f"{same} of {len(cases)} same"
            sys.stderr.write(f"{number + 1}/{len(todo)} {task.id}: {told}\n")
            if self.out is not None:
                with self.out.open("a", encoding="utf-8") as sink:
                    sink.write(json.dumps(row) + "\n")
        if ready is not None:
            ready.cancel()
            await asyncio.gather(ready, return_exceptions=True)

    def _begin(self, task: TaskRecord, healthy: bool) -> "asyncio.Task[State]":
        record = _healthy(task) if healthy else task
        return asyncio.create_task(_prepare(self.bench, record, self.releases))

    async def _one(
        self, task: TaskRecord, preparing: "asyncio.Task[State]", healthy: bool
    ) -> dict[str, Any]:
        try:
            state = await preparing
            self.bench.pool.warm(state)
            await self.bench.pool.settled()
            cases = await _cases(self.bench, self.index, task, state, healthy=healthy)
            rows = [await _compare(self.bench, state, case) for case in cases]
            await self.bench.pool.drop(state.id)
            await self.bench.states.delete(state.id)
            return {"cases": rows}
        except RegreenError as error:
            return {"skipped": f"{type(error).__name__}: {error}"[:300]}


def report_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The sums over all tasks; what differs is listed one by one."""
    cases = [
        {"task": row["task"], "healthy": row["healthy"], **case}
        for row in rows
        for case in row.get("cases", ())
    ]
    warm = [case for case in cases if case["warm"]]
    ratios = [case["cold_s"] / case["warm_s"] for case in warm if case["warm_s"]]
    cold = collections.Counter(str(c["why_cold"]) for c in cases if not c["warm"])
    differing = [case for case in cases if not case["same"]]
    real = [case for case in differing if not case["cold_differs_from_itself"]]
    skipped = {row["task"]: row["skipped"] for row in rows if "skipped" in row}
    return {
        "bench": "warm_verdicts",
        "cpus": os.cpu_count(),
        "tasks": len({row["task"] for row in rows}),
        "compared": len(cases),
        "served_warm": len(warm),
        "same": len(cases) - len(differing),
        "differ": len(real),
        "differ_cold_from_itself_too": len(differing) - len(real),
        "passed_warm": sum(case["outcome"] == "passed" for case in warm),
        "cold_over_warm_median": round(statistics.median(ratios), 2) if ratios else 0.0,
        "cold_because": dict(cold),
        "differences": differing,
        "targets": {
            "verdicts that differ, cold and warm": target(len(real), "at most", 0),
            "tasks that could not be compared": target(len(skipped), "at most", 0),
            "verdicts that were served warm": target(len(warm), "at least", 1),
        },
        "skipped": skipped,
        "rows": list(rows),
    }


async def measure(options: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Every chosen task, cold and warm; the report."""
    tasks = [t for t in shipped_tasks() if not options.only or t.id in options.only]
    tasks.sort(key=lambda task: task.seconds)
    deadline = time.monotonic() + options.minutes * 60
    async with Bench(home) as bench, PackageIndex(index_urls()) as index:
        work = Tasks(bench, index, options.out)
        for healthy in (False, True) if options.healthy else (False,):
            await work.run(tasks, healthy=healthy, deadline=deadline)
        return report_of(work.rows)


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = []
    for row in report["rows"]:
        name = row["task"] + (" (healthy)" if row["healthy"] else "")
        for case in row.get("cases", ()):
            how = "warm" if case["warm"] else f"cold ({case['why_cold']})"
            same = "same" if case["same"] else f"DIFFERS: {case['difference']}"
            lines.append(
                f"{name:52} {case['case']:24} {case['outcome']:12} {case['tests']:5} tests  "
                f"{case['cold_s']:7.2f} s  {case['warm_s']:7.2f} s  {how:14} {same}"
            )
    lines += [f"{name}: skipped, {reason}" for name, reason in report["skipped"].items()]
    kept = ("tasks", "compared", "served_warm", "passed_warm", "same", "differ")
    lines += [f"{key:28} {report[key]}" for key in (*kept, "differ_cold_from_itself_too")]
    for name, found in report["targets"].items():
        told = "met" if found["met"] else "missed"
        lines.append(f"{name}: {found['ratio']}, {found['target']}: {told}")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; 1 if a verdict differs that does not differ from itself cold."""
    parser = argparse.ArgumentParser(prog="sandbox_svc.bench_tasks", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--only", action="append", default=[], help="id of one task; repeatable")
    parser.add_argument("--healthy", action="store_true", help="the environments of the fixes too")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no task after this")
    parser.add_argument("--out", type=Path, help="file of JSON lines to go on with")
    options = parser.parse_args(argv)
    logging.configure("bench", "warning")
    home = Path(tempfile.mkdtemp(prefix="regreen-tasks-"))
    home.chmod(0o711)
    try:
        report = asyncio.run(measure(options, home))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    sys.stdout.write(json.dumps(report, indent=1) + "\n" if options.json else table(report))
    return 1 if report["differ"] and not options.json else 0


if __name__ == "__main__":
    sys.exit(main())

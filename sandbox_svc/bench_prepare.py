"""Preparing States with the byte code that is kept of their wheels, and without, in turn.

- Each State is of a task that ships, from files that are here; `seconds` is a whole preparation,
  with installing and the first run of its tests, `compile` the part that byte code is.
- `python -m sandbox_svc.bench_prepare --json` prints one JSON object; without the flag, a table.
"""

import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regreen.rpc.errors import RegreenError
from regreen.tasks import environment as env
from regreen.tasks.jsonl import shipped_distributions, shipped_tasks
from sandbox_svc.backends.base import Limits, Mount, Runtime
from sandbox_svc.bench_warm import Bench, report_of, target
from sandbox_svc.builders.base import EnvironmentSpec, Stage
from sandbox_svc.builders.compiled import COMPILED, ByteCode
from sandbox_svc.builders.interpreters import Interpreter
from sandbox_svc.specs import spec_from_proto
from sandbox_svc.wheelhouse import Wheel

TASKS = (
    "jsonschema-extractor-1.0__2.0",
    "flask-httpauth-4.2.0__flask-3.1.3",
    "flask-login-0.6.2__flask-2.3.0",
    "tox-gh-actions-3.4.0__3.5.0",
)
"""With 8, 18, 56 and 66 packages."""


class _Nothing(ByteCode):
    """Shows a State an empty folder, so that it compiles all that it installs."""

    async def mount(
        self,
        wheels: Sequence[Wheel],
        interpreter: Interpreter,
        mounts: Sequence[Mount],
        runtime: Runtime,
        limits: Limits,
    ) -> Mount:
        return Mount(self._store.compiled_folder(()), COMPILED)


async def _once(bench: Bench, spec: EnvironmentSpec) -> dict[str, float]:
    """Seconds of a preparation, and of compiling in it."""
    at: dict[str, float] = {}

    def hear(stage: Stage) -> None:
        at.setdefault(stage.stage, time.perf_counter())

    began = time.perf_counter()
    await bench.states.prepare(
        spec.digest,
        lambda _: bench.builder.prepare(spec, bench.runtime, Limits(), hear),
        rebuild=True,
    )
    ended = time.perf_counter()
    return {"seconds": ended - began, "compile": at["snapshot"] - at["compile"]}


async def _row(bench: Bench, spec: EnvironmentSpec, rounds: int) -> dict[str, Any]:
    """Both ways in turn, after one preparation that fetches, builds and keeps."""
    ways = {"kept": bench.builder.byte_code, "without": _Nothing(bench.store)}
    await _once(bench, spec)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, byte_code in ways.items():
            bench.builder.byte_code = byte_code
            found[way].append(await _once(bench, spec))
    bench.builder.byte_code = ways["kept"]
    row: dict[str, Any] = {"packages": len(spec.pins), "samples": rounds}
    for part in ("seconds", "compile"):
        for way, samples in found.items():
            row[f"{part}_{way}"] = round(statistics.median(one[part] for one in samples), 3)
        row[f"{part}_ratio"] = round(row[f"{part}_without"] / row[f"{part}_kept"], 2)
    return row


async def measure_prepare(rounds: int, home: Path) -> dict[str, Any]:
    """Preparations of some tasks' States; the report."""
    records = {task.id: task for task in shipped_tasks()}
    rows: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    async with Bench(home) as bench:
        for name in TASKS:
            try:
                spec = spec_from_proto(env.environment(records[name], shipped_distributions()))
                rows[name] = await _row(bench, spec, rounds)
            except RegreenError as error:
                skipped[name] = str(error)
    return {
        "bench": "prepare",
        "rounds": rounds,
        "cpus": os.cpu_count(),
        "load_1m": round(os.getloadavg()[0], 2),
        "rows": rows,
        "targets": {
            f"without over kept, {name}": target(row["seconds_ratio"], "at least", 1.0)
            for name, row in rows.items()
        },
        "skipped": skipped,
    }


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    report = report_of("sandbox_svc.bench_prepare", __doc__, argv, 4, measure_prepare)
    if report is None:
        return 0
    for name, row in report["rows"].items():
        sys.stdout.write(
            f"{name:36} {row['packages']:3} packages   without {row['seconds_without']:6.2f} s"
            f"   kept {row['seconds_kept']:6.2f} s   {row['seconds_ratio']:4.2f}x   of it compiling"
            f" {row['compile_without']:5.2f} and {row['compile_kept']:5.2f} s\n"
        )
    for name, found in report["targets"].items():
        told = "met" if found["met"] else "missed"
        sys.stdout.write(f"{name}: {found['ratio']}, {found['target']}: {told}\n")
    for name, reason in report["skipped"].items():
        sys.stdout.write(f"{name}: skipped, {reason}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What one upgrade tried costs: the miner's way beside that of a script, on the same candidates.

- `python -m regreen.mine.bench --json` prints one JSON object; it starts a sandbox service of its
  own unless `--sandbox` names one.
- The script does what a careful person would: install the upgrade, run the tests twice, put the
  pins back, run once more, without byte code on disk. It runs in a sandbox of the same State.
- The miner's way is one validation of the same State with the upgraded lock; what breaks is run
  again by the gate, so the runs that a gate adds for each record are counted to it in full.
- Both ways run the same tests of the same candidates, in turn, in one run on one host; candidates
  are shipped tasks whose interpreter is here.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from regreen.client.channel import connect
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.lockfile import format_lock, lock_of
from regreen.mine.lab import MiningClient
from regreen.rpc.errors import RegreenError
from regreen.sandbox.v1 import sandbox_pb2 as pb
from regreen.tasks import environment as env
from regreen.tasks.jsonl import shipped_distributions, shipped_tasks
from regreen.tasks.model import TaskRecord

GATED_SHARE = 0.5
"""Upgrades tried that end as a record, about: 47 breaks of 97 tries in the first prototype."""
GATE_RUNS = 5
PROTOTYPE = {"rebuild_s": 2.6, "upgrade_tried_s": 19.0, "break_worker_s": 70.0}
"""Figures of the first prototype, on another day and a busier host: for orientation only."""
_INSTALL = (
    "/opt/regreen/bin/uv pip install --quiet --no-deps --offline --no-index --no-build "
    "--find-links /wheelhouse --python /work/env/bin/python"
)
_TESTS = (
    "env -u PYTHONPYCACHEPREFIX PYTHONDONTWRITEBYTECODE=1 /work/env/bin/python -m pytest -q "
    "-o addopts= -o cache_dir=/tmp/c --continue-on-collection-errors >/dev/null 2>&1"
)


def chosen(interpreters: Sequence[str], count: int) -> list[TaskRecord]:
    """Fast shipped dependency upgrades whose interpreter is here."""
    fitting = [
        task
        for task in shipped_tasks()
        if task.kind == "dependency-upgrade" and task.python in interpreters and not task.choices
    ]
    return sorted(fitting, key=lambda task: (task.seconds or 99.0, task.id))[:count]


def script(task: TaskRecord) -> str:
    """One upgrade as a person would try it."""
    before, after = set(task.pins_pass), set(task.pins_fail)
    roots = " ".join(task.tests.arguments)
    forth = " ".join(sorted(after - before))
    back = " ".join(sorted(before - after))
    run = f"{_TESTS} {roots}"
    return f"{_INSTALL} {forth}\n{run}\n{run}\n{_INSTALL} {back}\n{run}\nexit 0\n"


async def measure(address: str, count: int, repeats: int) -> dict[str, Any]:
    """Time both ways on the same candidates."""
    channel = connect(address)
    rows: list[dict[str, Any]] = []
    try:
        states = StateClient(channel, patience_s=120.0)
        boxes = SandboxClient(channel, patience_s=120.0)
        found = (await boxes.get_capabilities()).interpreters
        for task in chosen(sorted(found), count):
            client = MiningClient(states, boxes)
            try:
                rows.append(await _one(client, task, repeats))
            except RegreenError as error:
                rows.append({"task": task.id, "error": str(error)[:200]})
            finally:
                await client.clear()
            sys.stderr.write(f"{json.dumps(rows[-1])}\n")
    finally:
        await channel.close()
    return summary(rows)


async def _one(client: MiningClient, task: TaskRecord, repeats: int) -> dict[str, Any]:
    good = task.model_copy(
        update={"pins_fail": task.pins_pass, "pins_pass": [], "wheelhouse": task.pins_fail}
    )
    spec = env.environment(good, shipped_distributions())
    del spec.test.fail_to_pass[:]
    await client.prepare(spec)  # files are fetched, wheels built; not what is measured
    await client.clear()
    began = time.perf_counter()
    state = await client.prepare(spec)
    prepare_s = time.perf_counter() - began
    baseline_s = state.baseline.duration.ToTimedelta().total_seconds()
    lock = format_lock(lock_of(task.pins_fail, task.python))
    changes = env.replaced_files({env.LOCK: lock.encode()})
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(repeats):
        began = time.perf_counter()
        verdict = await client.validate(
            state.id, changes, held_pins={}, required_tests=(), skip_cache_lookup=True
        )
        ours.append(time.perf_counter() - began)
        assert verdict.outcome != pb.VALIDATION_OUTCOME_PASSED, task.id
        box = await client.sandboxes.create_sandbox(state.id)
        try:
            began = time.perf_counter()
            await client.sandboxes.run(
                box.id, ["/bin/sh", "-c", script(task)], cwd="/work/repo", timeout_s=600.0
            )
            theirs.append(time.perf_counter() - began)
        finally:
            await client.sandboxes.delete_sandbox(box.id)
    return {
        "task": task.id,
        "prepare_s": round(prepare_s - baseline_s, 3),
        "validation_s": round(statistics.median(ours), 3),
        "script_s": round(statistics.median(theirs), 3),
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Totals over all candidates, and the two ratios."""
    good = [row for row in rows if "error" not in row]
    ours = sum(row["validation_s"] for row in good)
    theirs = sum(row["script_s"] for row in good)
    gated = ours * (1 + GATED_SHARE * GATE_RUNS)
    return {
        "candidates": len(good),
        "upgrades_tried_per_core_hour": round(3600 * len(good) / ours, 1) if ours else 0.0,
        "script_upgrades_per_core_hour": round(3600 * len(good) / theirs, 1) if theirs else 0.0,
        "times_faster_an_upgrade_tried": round(theirs / ours, 2) if ours else 0.0,
        "times_faster_with_the_gate": round(theirs / gated, 2) if gated else 0.0,
        "prototype": PROTOTYPE,
        "rows": list(rows),
    }


@contextlib.contextmanager
def service() -> Iterator[str]:
    """A sandbox service of this run alone; its address."""
    with tempfile.TemporaryDirectory(prefix="regreen-bench-") as folder:
        Path(folder).chmod(0o711)
        address = f"unix:{folder}/s.sock"
        command = [sys.executable, "-m", "sandbox_svc", "--listen", address, "--home", folder]
        command += ["--metrics", "127.0.0.1:0", "--warm-states", "0"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield address
        finally:
            process.terminate()
            process.wait()


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m regreen.mine.bench", description=__doc__
    )
    parser.add_argument("--sandbox", default="", help="address of a running sandbox service")
    parser.add_argument("--count", type=int, default=5, help="candidates")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    with contextlib.ExitStack() as exits:
        address = options.sandbox or exits.enter_context(service())
        found = asyncio.run(measure(address, options.count, options.repeats))
    sys.stdout.write(json.dumps(found, indent=None if options.json else 1) + "\n")


if __name__ == "__main__":
    main()

"""Measures sandboxes inside one worker container against one container per sandbox, pooled or not.

- `python -m sandbox_svc.worker.bench --docker IMAGE` prints a table and writes the same as JSON.
- All take turns within one run; the pool has time to fill between them. The worker is asked over
  gRPC, as a client would; the Docker runtime is called in this process, which spares it that way.
- Medians with quartiles in milliseconds, and the ratio of medians.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from regreen.sandbox import v1 as pb
from sandbox_svc.backends.base import Command, Limits
from sandbox_svc.backends.docker import DockerRuntime
from sandbox_svc.backends.docker_pool import PoolSize
from sandbox_svc.fleet.calls import METHODS, Endpoint, Worker
from sandbox_svc.worker.docker import DockerWorker, WorkerOptions

_OUT = Path("build/bench/sandbox_worker.json")
_SHARE = 4
"""The slower contender takes one turn in so many."""
Turn = Callable[[], Awaitable[None]]


async def measure(image: str, rounds: int, home: Path) -> dict[str, Any]:
    """Create, run `true`, delete: by either way, in turns; the report."""
    runtime = DockerRuntime(home / "docker", image=image, run_probes=False)
    pooled = DockerRuntime(home / "pool", image=image, run_probes=False, pool=PoolSize(each=1))
    await runtime.start()
    await pooled.start()
    try:
        async with DockerWorker(WorkerOptions(image, home / "worker")) as outer:
            worker = Worker(Endpoint("worker", "", "", outer.address))
            turns = {
                "worker": await _in_worker(worker),
                "docker": _in_docker(runtime),
                "docker_pooled": _in_docker(pooled),
            }
            samples = await _take(turns, rounds, pooled)
            await worker.close()
    finally:
        await runtime.close()
        await pooled.close()
    rows = {}
    for name, values in samples.items():
        low, middle, high = statistics.quantiles(values, n=4)
        rows[f"{name}_create_exec_delete"] = {
            "median_ms": round(middle, 3),
            "p25_ms": round(low, 3),
            "p75_ms": round(high, 3),
            "samples": len(values),
        }
    medians = {name: statistics.median(values) for name, values in samples.items()}
    ratios = {
        f"{slow}/{quick}": round(medians[slow] / medians[quick], 1)
        for slow, quick in (
            ("docker", "worker"),
            ("docker_pooled", "worker"),
            ("docker", "docker_pooled"),
        )
    }
    return {
        "bench": "sandbox_worker",
        "cpus": os.cpu_count(),
        "load_1m": round(os.getloadavg()[0], 2),
        "rows": rows,
        "ratios": ratios,
    }


async def _in_worker(worker: Worker) -> Turn:
    prepare = METHODS["StateService/PrepareState"]
    request = pb.PrepareStateRequest(spec=pb.EnvironmentSpec(builder="system"))
    events = [event async for event in worker.stream(prepare, request, 60.0)]
    state_id = events[-1].state.id
    create, run, delete = (
        METHODS[f"SandboxService/{name}"] for name in ("CreateSandbox", "Run", "DeleteSandbox")
    )

    async def turn() -> None:
        made = await worker.call(create, pb.CreateSandboxRequest(state_id=state_id))
        command = pb.Command(argv=["true"], cwd="/")
        await worker.call(run, pb.RunRequest(sandbox_id=made.sandbox.id, command=command))
        await worker.call(delete, pb.DeleteSandboxRequest(id=made.sandbox.id))

    return turn


def _in_docker(runtime: DockerRuntime) -> Turn:
    async def turn() -> None:
        box = await runtime.create([], limits=Limits())
        await box.run(Command(("true",), cwd="/"))
        await box.delete()

    return turn


async def _take(
    turns: dict[str, Turn], rounds: int, pooled: DockerRuntime
) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in turns}
    for turn in turns.values():
        await turn()
    for number in range(rounds):
        for name, turn in turns.items():
            if name != "worker" and number % _SHARE:
                continue
            async with asyncio.timeout(60):
                while not pooled.pool.waiting:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            began = time.perf_counter()
            await turn()
            samples[name].append((time.perf_counter() - began) * 1e3)
    return samples


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    parser = argparse.ArgumentParser(prog="sandbox_svc.worker.bench", description=__doc__)
    parser.add_argument("--docker", required=True, metavar="IMAGE", help="image of both")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=_OUT, help="where the JSON goes")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="regreen-bench-", ignore_cleanup_errors=True) as home:
        Path(home).chmod(0o711)
        report = asyncio.run(measure(options.docker, max(8, options.rounds), Path(home)))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name, row in report["rows"].items():
        sys.stdout.write(f"{name:32} {row['median_ms']:9.2f} ms  ({row['samples']} samples)\n")
    for name, ratio in report["ratios"].items():
        sys.stdout.write(f"{name:32} {ratio:9.1f} x\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

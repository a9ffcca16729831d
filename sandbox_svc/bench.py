"""Measures sandboxes against a plain process and, when an engine answers, against Docker.

- `python -m sandbox_svc.bench --json` prints one JSON object; without the flag, a table.
- All contenders take turns within one run, so that load of the host falls on all of them.
- Medians with quartiles in milliseconds, and ratios of medians; raw samples on request.
- Nothing is claimed of a contender that did not run: it is listed with the reason.
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from regreen.rpc.errors import RegreenError
from sandbox_svc.backends.base import Box, Command, Limits, Runtime
from sandbox_svc.backends.embedded import EmbeddedRuntime

_TRUE = Command(("/bin/true",), cwd="/")
Contender = Callable[[], Awaitable[None]]


async def _posix_spawn() -> None:
    """posix_spawn of a host program, waited for: the floor of any command."""
    _spawn_and_wait()


def _spawn_and_wait() -> None:
    pid = os.posix_spawn("/bin/true", ["/bin/true"], {})
    os.waitpid(pid, 0)


async def _bubblewrap() -> None:
    """A one-shot bubblewrap over the host's root, the usual daemonless wrapper."""
    process = await asyncio.create_subprocess_exec(
        *("bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "--proc", "/proc"),
        *("--dev", "/dev", "--tmpfs", "/tmp", "/bin/true"),
    )
    if await process.wait() != 0:
        raise RuntimeError("bwrap failed")


def _cycle(runtime: Runtime, layers: list[str]) -> Contender:
    async def once() -> None:
        box = await runtime.create(layers, limits=Limits())
        await box.run(_TRUE)
        await box.delete()

    return once


def _exec(box: Box) -> Contender:
    async def once() -> None:
        await box.run(_TRUE)

    return once


def _freeze_and_fork(runtime: Runtime) -> Contender:
    """A step of a tree of rollouts: write, freeze, start one child, run one command there."""

    async def once() -> None:
        box = await runtime.create([], limits=Limits())
        await box.write_file("/work/repo/step", os.urandom(16))
        child = await runtime.create([await box.freeze()], limits=Limits())
        await child.run(_TRUE)
        await child.delete()
        await box.delete()

    return once


async def _contenders(runtime: Runtime, kind: str) -> dict[str, Contender]:
    box = await runtime.create([], limits=Limits())
    await box.write_file("/work/repo/file", b"x" * 1000)
    layer = await box.freeze()
    return {
        f"{kind}_create_exec_delete": _cycle(runtime, [layer]),
        f"{kind}_exec": _exec(await runtime.create([layer], limits=Limits())),
        f"{kind}_freeze_fork_exec": _freeze_and_fork(runtime),
    }


async def measure(rounds: int, docker_image: str, home: Path) -> dict[str, Any]:
    """All contenders, interleaved; the report."""
    skipped: dict[str, str] = {}
    embedded = EmbeddedRuntime(home / "embedded", run_probes=False)
    runtimes: list[Runtime] = [embedded]
    contenders: dict[str, Contender] = {"posix_spawn": _posix_spawn}
    if shutil.which("bwrap"):
        contenders["bubblewrap"] = _bubblewrap
    else:
        skipped["bubblewrap"] = "bwrap is not installed"
    await embedded.start()
    try:
        contenders |= await _contenders(embedded, "embedded")
        docker = await _docker(home, docker_image, skipped)
        if docker is not None:
            runtimes.append(docker)
            contenders |= await _contenders(docker, "docker")
        samples = await _interleave(contenders, rounds)
    finally:
        for runtime in runtimes:
            await runtime.close()
    return _report(samples, skipped, rounds)


async def _docker(home: Path, image: str, skipped: dict[str, str]) -> Runtime | None:
    from sandbox_svc.backends.docker import DockerRuntime

    runtime = DockerRuntime(home / "docker", image=image, run_probes=False)
    try:
        await runtime.start()
    except RegreenError as error:
        skipped["docker"] = str(error)
        return None
    return runtime


async def _interleave(contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for once in contenders.values():
        await once()
    for number in range(rounds):
        for name, once in contenders.items():
            if name.startswith("docker") and number % 5:
                continue
            began = time.perf_counter()
            await once()
            samples[name].append((time.perf_counter() - began) * 1e3)
        if number % 10 == 9:
            sys.stderr.write(f"round {number + 1}/{rounds}\n")
    return samples


def _report(
    samples: dict[str, list[float]], skipped: dict[str, str], rounds: int
) -> dict[str, Any]:
    rows = {}
    for name, values in samples.items():
        low, middle, high = statistics.quantiles(values, n=4)
        rows[name] = {
            "median_ms": round(middle, 3),
            "p25_ms": round(low, 3),
            "p75_ms": round(high, 3),
            "min_ms": round(min(values), 3),
            "samples": len(values),
        }
    medians = {name: float(row["median_ms"]) for name, row in rows.items()}
    ratios = {}
    for name, base in (
        ("embedded_exec", "posix_spawn"),
        ("embedded_create_exec_delete", "posix_spawn"),
        ("embedded_create_exec_delete", "bubblewrap"),
        ("docker_exec", "embedded_exec"),
        ("docker_create_exec_delete", "embedded_create_exec_delete"),
        ("docker_freeze_fork_exec", "embedded_freeze_fork_exec"),
    ):
        if name in medians and base in medians:
            ratios[f"{name}/{base}"] = round(medians[name] / medians[base], 2)
    return {
        "bench": "sandbox",
        "rounds": rounds,
        "cpus": os.cpu_count(),
        "load_1m": round(os.getloadavg()[0], 2),
        "root": os.geteuid() == 0,
        "rows": rows,
        "ratios": ratios,
        "skipped": skipped,
    }


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    parser = argparse.ArgumentParser(prog="sandbox_svc.bench", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rounds", type=int, default=100, help="turns of each contender")
    parser.add_argument("--docker-image", default="debian:bookworm-slim", help="base of Docker")
    parser.add_argument("--home", type=Path, help="directory to work in; default: a fresh one")
    options = parser.parse_args(argv)
    home = options.home or Path(tempfile.mkdtemp(prefix="regreen-bench-"))
    try:
        report = asyncio.run(measure(max(5, options.rounds), options.docker_image, home))
    finally:
        if options.home is None:
            shutil.rmtree(home, ignore_errors=True)
    if options.json:
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
        return 0
    for name, row in report["rows"].items():
        sys.stdout.write(f"{name:32} {row['median_ms']:9.2f} ms  ({row['samples']} samples)\n")
    for name, ratio in report["ratios"].items():
        sys.stdout.write(f"{name:58} {ratio:8.2f}x\n")
    for name, reason in report["skipped"].items():
        sys.stdout.write(f"{name}: skipped, {reason}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Measures the sandbox service through gRPC against the kernel's floor and against Docker.

- `python -m sandbox_svc.bench_service --json` prints one JSON object; without the flag, a table.
- The service runs as a process of its own, as users run it, on a unix socket.
- The floor is a C program (`floor.c`) that makes the same namespaces and mounts with nothing
  around them; without a C compiler it is left out, and said so.
- At each concurrency all contenders take turns within one run, so that load falls on all of them,
  with a rest after each turn for what it leaves to be cleared away.
- A target is a ratio, reported as met or missed; nothing here fails because a machine is slow.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import uvloop

from regreen.common.v1 import CHANGE_KIND_ADD, FileChange
from regreen.sandbox import v1 as pb
from sandbox_svc import bench_burst, bench_forks
from sandbox_svc.bench_warm import target
from sandbox_svc.floor import Floor

LEVELS = (1, 2, 8, 32)
_READY_S, _CALL_S = 60.0, 600.0
_ROUNDS = 10
"""In which the contenders take turns: a host is faster and slower for seconds at a time."""
_REST_S = 1.0
"""After each contender's turn: what it left to be cleared away is nobody else's load."""
_TARGETS: dict[str, tuple[str, float]] = {
    "docker cycle over ours": ("at least", 40.0),
    "our cycle over the floor": ("at most", 5.0),
    "our exec over fork and exec": ("at most", 3.0),
    "slowest over fastest fork by size": ("at most", 1.25),
    "slowest over fastest fork by layers": ("at most", 1.25),
    "slowest over fastest fork by children": ("at most", 1.25),
}
"""Ratios, the first three at each concurrency, and the bound that each is to keep."""
Once = Callable[[], Awaitable[None]]
Samples = dict[str, list[float]]


class Service:
    """A sandbox service process and the calls of it that are measured."""

    def __init__(self, home: Path, *flags: str) -> None:
        self._home, self._flags = home, flags
        self.address = f"unix:{home / 'sandbox.sock'}"

    async def __aenter__(self) -> "Service":
        command = [sys.executable, "-m", "sandbox_svc", "--home", str(self._home)]
        command += ["--listen", self.address, "--metrics", "127.0.0.1:0", *self._flags]
        self._log = (self._home / "service.log").open("ab")
        self._process = await asyncio.create_subprocess_exec(
            *command, stdout=self._log, stderr=self._log
        )
        self.channel = grpc.aio.insecure_channel(self.address)
        self._sandboxes: Any = pb.SandboxServiceStub(self.channel)
        self._states: Any = pb.StateServiceStub(self.channel)
        await self._sandboxes.GetCapabilities(
            pb.GetCapabilitiesRequest(), timeout=_READY_S, wait_for_ready=True
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.channel.close()
        self._process.terminate()
        await self._process.wait()
        self._log.close()

    @property
    def pid(self) -> int:
        """Process id of the service."""
        return self._process.pid

    @property
    def resident_bytes(self) -> int:
        """Resident memory of the service process."""
        pages = Path(f"/proc/{self._process.pid}/statm").read_text("ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    async def create(self, state_id: str) -> str:
        """A new sandbox; its id."""
        request = pb.CreateSandboxRequest(state_id=state_id)
        return str((await self._sandboxes.CreateSandbox(request, timeout=_CALL_S)).sandbox.id)

    async def run(self, sandbox_id: str, *argv: str, cwd: str = "/") -> pb.CommandResult:
        """One command to its end."""
        command = pb.Command(argv=argv, cwd=cwd)
        request = pb.RunRequest(sandbox_id=sandbox_id, command=command)
        found: pb.CommandResult = (await self._sandboxes.Run(request, timeout=_CALL_S)).result
        return found

    async def read(self, state_id: str) -> pb.State:
        """Look a State up."""
        request = pb.GetStateRequest(id=state_id)
        found: pb.GetStateResponse = await self._states.GetState(request, timeout=_CALL_S)
        return found.state

    async def live(self) -> int:
        """How many sandboxes there are."""
        count, token = 0, ""
        while True:
            request = pb.ListSandboxesRequest(page_size=1000, page_token=token)
            page = await self._sandboxes.ListSandboxes(request, timeout=_CALL_S)
            count, token = count + len(page.sandboxes), page.next_page_token
            if not token:
                return count

    async def look(self, sandbox_id: str) -> None:
        """A call that asks for nothing to be done: what the way to the service takes by itself."""
        await self._sandboxes.GetSandbox(pb.GetSandboxRequest(id=sandbox_id), timeout=_CALL_S)

    async def delete(self, sandbox_id: str) -> None:
        """Delete a sandbox."""
        await self._sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=sandbox_id), timeout=_CALL_S)

    async def root_state(self) -> str:
        """A State with one small file over the host's programs."""
        file = FileChange(path="file", kind=CHANGE_KIND_ADD, content=b"x" * 1000)
        spec = pb.EnvironmentSpec(builder="system", overlay=[file])
        async for event in self._states.PrepareState(pb.PrepareStateRequest(spec=spec)):
            if event.HasField("state"):
                return str(event.state.id)
        raise RuntimeError("the preparation ended without a state")

    async def grown(self, state_id: str, script: str) -> str:
        """A State on top of another: what a shell script leaves."""
        box = await self.create(state_id)
        try:
            ended = await self.run(box, "sh", "-ec", script)
            if ended.exit_code:
                raise RuntimeError(ended.stderr.head.decode(errors="replace"))
            request = pb.SnapshotSandboxRequest(id=box)
            return str((await self._sandboxes.SnapshotSandbox(request, timeout=_CALL_S)).state.id)
        finally:
            await self.delete(box)

    async def cycle(self, state_id: str) -> None:
        """Create, one command, delete."""
        box = await self.create(state_id)
        await self.run(box, "/bin/true")
        await self.delete(box)


async def at_once(once: Once, count: int, lanes: int) -> list[float]:
    """`count` turns in `lanes` at a time; milliseconds of each."""
    found: list[float] = []

    async def lane(turns: int) -> None:
        for _ in range(turns):
            began = time.perf_counter()
            await once()
            found.append((time.perf_counter() - began) * 1e3)

    share = max(1, count // lanes)
    await asyncio.gather(*(lane(share) for _ in range(lanes)))
    return found


class Docker:
    """The Docker SDK's own way: a container for each turn, a client for each thread."""

    def __init__(self, image: str, threads: ThreadPoolExecutor) -> None:
        self._image, self._threads, self._local = image, threads, threading.local()
        self._clients: list[Any] = []
        self._client.images.get(image)
        self._live = self._start()

    @property
    def _client(self) -> Any:
        """This thread's client; one that threads share loses connections when many are open."""
        import docker.client

        connect_engine: Any = docker.client.DockerClient.from_env
        if not hasattr(self._local, "client"):
            self._local.client = connect_engine(timeout=120)
            self._clients.append(self._local.client)
        return self._local.client

    def _start(self) -> Any:
        container = self._client.containers.create(
            self._image, ["sleep", "1000"], network_mode="none", init=True
        )
        container.start()
        return container

    def _cycle(self) -> None:
        container = self._start()
        container.exec_run(["/bin/true"])
        container.remove(force=True)

    def _exec(self) -> None:
        live = self._client.containers.prepare_model({"Id": self._live.id})
        live.exec_run(["/bin/true"])

    async def cycle(self) -> None:
        """Create, start, one command, remove."""
        await asyncio.get_running_loop().run_in_executor(self._threads, self._cycle)

    async def exec(self) -> None:
        """One command in a running container."""
        await asyncio.get_running_loop().run_in_executor(self._threads, self._exec)

    def close(self) -> None:
        """Remove what is left."""
        self._live.remove(force=True)
        for client in self._clients:
            client.close()


async def levels(
    service: Service, state: str, floor: Floor | None, docker: Docker | None, turns: int
) -> dict[str, Samples]:
    """Cycles and commands at each concurrency, contenders interleaved."""
    live = await service.create(state)
    found: dict[str, Samples] = {}
    for lanes in LEVELS:
        count = max(3 * turns // _ROUNDS, lanes)
        rows: Samples = {}

        async def one(name: str, once: Once, times: int, lanes: int = lanes) -> None:
            rows.setdefault(name, []).extend(await at_once(once, times, lanes))  # noqa: B023
            await asyncio.sleep(_REST_S)

        for _ in range(_ROUNDS):
            if floor is not None:
                measured = await asyncio.to_thread(floor.turns, count, lanes)
                rows.setdefault("floor", []).extend(measured)
                measured = await asyncio.to_thread(floor.plain_turns, count, lanes)
                rows.setdefault("fork_exec", []).extend(measured)
            await one("cycle", lambda: service.cycle(state), count)
            await one("exec", lambda: _exec(service, live), count)
            await one("call", lambda: service.look(live), count)
            if docker is not None:
                await one("docker_cycle", docker.cycle, max(lanes, count // 5))
                await one("docker_exec", docker.exec, max(lanes, count // 5))
        found[str(lanes)] = rows
        _say(f"concurrency {lanes}")
    await service.delete(live)
    return found


async def _exec(service: Service, sandbox_id: str) -> None:
    await service.run(sandbox_id, "/bin/true")


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def _docker(image: str, skipped: dict[str, str]) -> Iterator[Docker | None]:
    threads = ThreadPoolExecutor(max(LEVELS), thread_name_prefix="bench-docker")
    docker = None
    try:
        docker = Docker(image, threads)
    except Exception as error:  # noqa: BLE001 - no package, no engine, no image: all are told
        skipped["docker"] = f"{type(error).__name__}: {error}"[:300]
    try:
        yield docker
    finally:
        if docker is not None:
            docker.close()
        threads.shutdown()


async def measure(home: Path, image: str, turns: int, *, large: bool) -> dict[str, Any]:
    """Everything, in one run; the report."""
    skipped: dict[str, str] = {}
    floor = Floor.build(home / "floor", skipped)
    (home / "service").mkdir()
    with _docker(image, skipped) as docker:
        async with Service(home / "service", *bench_forks.FLAGS) as service:
            root = await service.root_state()
            by_level = await levels(service, root, floor, docker, turns)
            (home / "other").mkdir()
            async with Service(home / "other", "--warm-seats", "8") as other:
                by_kind = await bench_forks.forks(service, root, other, turns, large=large)
    return _report(by_level, by_kind, await bench_burst.burst(home, Service), skipped, turns)


def _report(
    by_level: dict[str, Samples],
    by_kind: dict[str, Samples],
    bursts: dict[str, Any],
    skipped: dict[str, str],
    turns: int,
) -> dict[str, Any]:
    ratios: dict[str, float] = {}
    for lanes, rows in by_level.items():
        middle = {name: statistics.median(values) for name, values in rows.items()}
        for name, over, under in (
            ("docker cycle over ours", "docker_cycle", "cycle"),
            ("our cycle over the floor", "cycle", "floor"),
            ("docker exec over ours", "docker_exec", "exec"),
            ("our exec over fork and exec", "exec", "fork_exec"),
            ("an empty call over fork and exec", "call", "fork_exec"),
        ):
            if over in middle and under in middle:
                ratios[f"{name}, at {lanes}"] = round(middle[over] / middle[under], 2)
    for kind, rows in by_kind.items():
        middles = [statistics.median(values) for values in rows.values()]
        ratios[f"slowest over fastest fork by {kind}"] = round(max(middles) / min(middles), 2)
    return {
        "bench": "sandbox-service",
        "turns": turns,
        "cpus": os.cpu_count(),
        "load_1m": round(os.getloadavg()[0], 2),
        "root": os.geteuid() == 0,
        "levels": {lanes: _rows(rows) for lanes, rows in by_level.items()},
        "forks": {kind: _rows(rows) for kind, rows in by_kind.items()},
        "bursts": bursts,
        "ratios": ratios,
        "targets": _targets(ratios) | bench_burst.targets(bursts),
        "skipped": skipped,
    }


def _targets(ratios: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Which of the ratios that have a target meet it."""
    kinds = {name: name.partition(", at ")[0] for name in ratios}
    return {n: target(ratios[n], *_TARGETS[k]) for n, k in kinds.items() if k in _TARGETS}


def _rows(samples: Samples) -> dict[str, dict[str, float]]:
    found = {}
    for name, values in samples.items():
        low, middle, high = statistics.quantiles(values, n=4)
        found[name] = {
            "median_ms": round(middle, 3),
            "p25_ms": round(low, 3),
            "p75_ms": round(high, 3),
            "samples": len(values),
        }
    return found


def _table(report: dict[str, Any]) -> str:
    lines = []
    for title in ("levels", "forks"):
        for group, rows in report[title].items():
            for name, row in rows.items():
                spread = f"{row['p25_ms']:9.2f} to {row['p75_ms']:9.2f}"
                lines.append(
                    f"{title} {group:9} {name:22} {row['median_ms']:9.2f} ms  ({spread}, "
                    f"{row['samples']} samples)"
                )
    for name, found in report["bursts"].items():
        lines.append(f"{bench_burst.BURST} forks at once, {name}: {found}")
    lines += [f"{name:50} {ratio:8.2f}x" for name, ratio in report["ratios"].items()]
    for name, found in report["targets"].items():
        verdict = "met" if found["met"] else "missed"
        lines.append(f"{name}: {found['ratio']}, {found['target']}: {verdict}")
    lines += [f"{name}: skipped, {reason}" for name, reason in report["skipped"].items()]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    parser = argparse.ArgumentParser(prog="sandbox_svc.bench_service", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--turns", type=int, default=100, help="a third of the turns at each concurrency"
    )
    parser.add_argument("--docker-image", default="debian:bookworm-slim", help="image for Docker")
    parser.add_argument("--no-large", action="store_true", help="leave out the state of 1 GB")
    options = parser.parse_args(argv)
    home = Path(tempfile.mkdtemp(prefix="regreen-bench-"))
    home.chmod(0o711)
    try:
        report = uvloop.run(
            measure(home, options.docker_image, max(10, options.turns), large=not options.no_large)
        )
    finally:
        shutil.rmtree(home, ignore_errors=True)
    sys.stdout.write(json.dumps(report, indent=1) + "\n" if options.json else _table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

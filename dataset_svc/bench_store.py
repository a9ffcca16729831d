"""Measures storage at size: a bulk load, what a trajectory takes, and each read verb afterwards.

- `python -m dataset_svc.bench_store --json` prints one JSON object; without the flag, a table.
- `--trajectories` sets the size, a million by default, with `--turns` turns each; the load ends
  after `--minutes`, and everything is then measured on what it has stored by then.
- The service runs as a process of its own over a Postgres of its own, with all indexes in place
  from the start; the load goes through gRPC, as a user's would.
- Reads take turns over random arguments, through gRPC, after an ANALYZE and with nothing else
  running; a verb is asked until it has `--asks` samples or half a minute is over.
"""

import argparse
import asyncio
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import psycopg

from dataset_svc import synthetic
from dataset_svc.bench_queue import service
from dataset_svc.database import upgrade
from dataset_svc.localpg import LocalPostgres, LocalPostgresConfig
from regreen.common import v1 as common_pb
from regreen.dataset import v1 as pb

_CALL_S, _LOAD_S = 120.0, 12 * 3600.0
_TASKS, _RUNS, _TEMPLATES = 1000, 100, 500
_VERB_S = 30.0
_TELL, _LOOK = 10_000, 100
_OF_RUN = 200
"""Trajectories in a row that are of one run."""
_TABLES = ("trajectories", "turns", "reward_parts", "verdicts", "blobs")
Ask = Callable[[random.Random], Awaitable[object]]


async def prepare(channel: grpc.aio.Channel) -> tuple[list[str], list[str]]:
    """Tasks and finished runs; their ids."""
    tasks = [synthetic.task(number) for number in range(_TASKS)]
    made: Any = pb.TaskServiceStub(channel)
    await made.ImportTasks(pb.ImportTasksRequest(request_id=_new(), tasks=tasks), timeout=_CALL_S)
    runs: Any = pb.RunServiceStub(channel)
    run_ids = []
    for number in range(_RUNS):
        request = pb.CreateRunRequest(request_id=_new(), name=f"store-{number}", kind="grpo")
        run_ids.append((await runs.CreateRun(request, timeout=_CALL_S)).run.id)
    return [task.id for task in tasks], run_ids


async def load(
    channel: grpc.aio.Channel,
    count: int,
    turns: int,
    task_ids: list[str],
    run_ids: list[str],
    most_s: float,
) -> tuple[int, float]:
    """Store trajectories by the bulk path until it is time; how many, and how long it took."""
    rng = random.Random(0)
    templates = [synthetic.trajectory(n, task_ids[0], turns=turns) for n in range(_TEMPLATES)]
    began_s = time.perf_counter()
    sent = 0

    async def requests() -> AsyncIterator[pb.CommitTrajectoriesRequest]:
        nonlocal sent
        for number in range(count):
            if number % _LOOK == 0 and time.perf_counter() - began_s > most_s:
                sys.stderr.write(f"time is over after {number} of {count} trajectories\n")
                return
            request = pb.CommitTrajectoriesRequest(trajectory=templates[number % _TEMPLATES])
            made = request.trajectory
            made.id, made.seed = trajectory_id(number), number
            made.task_id = task_ids[rng.randrange(_TASKS)]
            made.run_id = run_ids[number // _OF_RUN % _RUNS]
            made.group_id, made.group_index = f"grp_{number // 8:032x}", number % 8
            made.turns[-1].text += f" and mark{number:08x} is what it printed"
            for place in range(0, len(made.token_ids), 40):
                made.token_ids[place] = rng.randrange(32_000)
            yield request
            sent = number + 1
            if number and number % _TELL == 0:
                spent_s = time.perf_counter() - began_s
                left_s = (count - number) * spent_s / number
                told = f"{number} of {count} trajectories, {number / spent_s:.0f} a second"
                sys.stderr.write(f"{told}, {left_s / 60:.0f} min left\n")
                sys.stderr.flush()

    stub: Any = pb.ArchiveServiceStub(channel)
    answer = await stub.CommitTrajectories(requests(), timeout=_LOAD_S)
    if answer.stored != sent:
        raise RuntimeError(f"{answer.stored} of {sent} trajectories were stored")
    return sent, time.perf_counter() - began_s


def verbs(
    channel: grpc.aio.Channel, count: int, task_ids: list[str], run_ids: list[str]
) -> dict[str, Ask]:
    """Every read, with random arguments."""
    stub: Any = pb.TrajectoryServiceStub(channel)
    archive: Any = pb.ArchiveServiceStub(channel)

    def get(*, tokens: bool) -> Ask:
        def ask(rng: random.Random) -> Awaitable[object]:
            wanted = trajectory_id(rng.randrange(count))
            request = pb.GetTrajectoryRequest(id=wanted, without_tokens=not tokens)
            asked: Awaitable[object] = stub.GetTrajectory(request, timeout=_CALL_S)
            return asked

        return ask

    def listed(filter: Callable[[random.Random], dict[str, Any]]) -> Ask:
        def ask(rng: random.Random) -> Awaitable[object]:
            request = pb.ListTrajectoriesRequest(filter=pb.TrajectoryFilter(**filter(rng)))
            asked: Awaitable[object] = stub.ListTrajectories(request, timeout=_CALL_S)
            return asked

        return ask

    async def paged(rng: random.Random) -> None:
        token = ""
        for _ in range(10):
            request = pb.ListTrajectoriesRequest(
                page_token=token, filter=pb.TrajectoryFilter(run_id=rng.choice(run_ids[:1]))
            )
            token = (await stub.ListTrajectories(request, timeout=_CALL_S)).next_page_token
            if not token:
                return

    def stats(*, of_run: bool) -> Ask:
        def ask(rng: random.Random) -> Awaitable[object]:
            run_id = rng.choice(run_ids) if of_run else ""
            request = pb.GetTrajectoryStatsRequest(run_id=run_id)
            asked: Awaitable[object] = archive.GetTrajectoryStats(request, timeout=_CALL_S)
            return asked

        return ask

    keep_new = common_pb.MODE_KEEP_NEW
    return {
        "get": get(tokens=True),
        "get without tokens": get(tokens=False),
        "list": listed(lambda rng: {}),
        "list by run": listed(lambda rng: {"run_id": rng.choice(run_ids)}),
        "list by task": listed(lambda rng: {"task_id": rng.choice(task_ids)}),
        "list by group": listed(lambda rng: {"group_id": f"grp_{rng.randrange(count) // 8:032x}"}),
        "list by policy": listed(lambda rng: {"policy": rng.choice(("base", "sft", "grpo"))}),
        "list by actor": listed(lambda rng: {"actor": rng.choice(("policy", "expert"))}),
        "list by absent actor": listed(lambda rng: {"actor": "nobody"}),
        "list by absent mode": listed(lambda rng: {"mode": keep_new}),
        "list solved": listed(lambda rng: {"solved_only": True}),
        "list by hack": listed(lambda rng: {"hack": rng.choice(synthetic.HACKS)}),
        "list by tool": listed(lambda rng: {"tool": rng.choice(synthetic.TOOLS)}),
        "list by verdict": listed(lambda rng: {"verdict": "rejected"}),
        "list by run and tool": listed(
            lambda rng: {"run_id": rng.choice(run_ids), "tool": rng.choice(synthetic.TOOLS)}
        ),
        "search rare text": listed(lambda rng: {"text": f"mark{rng.randrange(count):08x}"}),
        "search absent text": listed(lambda rng: {"text": f"zq{rng.randrange(10**9)}xj"}),
        "search common text": listed(lambda rng: {"text": "has no attribute"}),
        "search text in a task": listed(
            lambda rng: {"task_id": rng.choice(task_ids), "text": "printed"}
        ),
        "ten pages of a run": paged,
        "stats of a run": stats(of_run=True),
        "stats": stats(of_run=False),
    }


async def read(asks: dict[str, Ask], most: int) -> dict[str, dict[str, float]]:
    """Latency of each verb."""
    found = {}
    for name, ask in asks.items():
        rng = random.Random(name)
        samples_ms: list[float] = []
        began_s = time.perf_counter()
        while len(samples_ms) < most and time.perf_counter() - began_s < _VERB_S:
            asked_s = time.perf_counter()
            await ask(rng)
            samples_ms.append((time.perf_counter() - asked_s) * 1000)
        cuts = statistics.quantiles(samples_ms * 2, n=100, method="inclusive")
        found[name] = {"p50_ms": cuts[49], "p99_ms": cuts[98], "asks": len(samples_ms)}
        sys.stderr.write(f"{name}: p99 {cuts[98]:.1f} ms\n")
    return found


def sizes(url: str, blobs: Path, count: int) -> dict[str, float]:
    """Bytes on disk for each trajectory, by table with its indexes, and of its tokens."""
    found = {}
    with psycopg.connect(url.replace("postgresql+psycopg://", "postgresql://")) as connection:
        connection.autocommit = True
        connection.execute("VACUUM ANALYZE")
        for table in _TABLES:
            row = connection.execute("SELECT pg_total_relation_size(%s::regclass)", (table,))
            found[table] = (row.fetchone() or (0,))[0] / count
    stored = [path.stat() for path in blobs.rglob("*") if path.is_file()]
    found["tokens"] = sum(info.st_size for info in stored) / count
    found["tokens on disk"] = sum(info.st_blocks * 512 for info in stored) / count
    return found


async def measure(
    asked: int, turns: int, asks: int, directory: str | None, most_s: float
) -> dict[str, Any]:
    """The load and the reads; the report."""
    home = Path(tempfile.mkdtemp(prefix="regreen-bench-store-", dir=directory))
    home.chmod(0o711)
    try:
        with LocalPostgres(LocalPostgresConfig(home=home / "pg")) as postgres:
            upgrade(postgres.url())
            async with service(home, postgres.url()) as channel:
                task_ids, run_ids = await prepare(channel)
                count, wall_s = await load(channel, asked, turns, task_ids, run_ids, most_s)
                size = await asyncio.to_thread(sizes, postgres.url(), home / "blobs", count)
                found = await read(verbs(channel, count, task_ids, run_ids), asks)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    on_disk = sum(value for name, value in size.items() if name != "tokens")
    rows = count * (turns + 3)  # its own, its turns, a reward part and a blob's
    return {
        "trajectories": count,
        "trajectories_asked": asked,
        "turns": turns,
        "load_s": wall_s,
        "trajectories_per_s": count / wall_s,
        "rows_per_s": rows / wall_s,
        "bytes_per_trajectory": on_disk,
        "bytes_by_table": size,
        "reads": found,
    }


def trajectory_id(number: int) -> str:
    """The id of the n-th trajectory."""
    return f"trj_{number:032x}"


def _new() -> str:
    return uuid.uuid4().hex


def main(argv: list[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m dataset_svc.bench_store", description=__doc__
    )
    parser.add_argument("--trajectories", type=int, default=1_000_000)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=60.0, help="longest load")
    parser.add_argument("--asks", type=int, default=200, help="samples of each read")
    parser.add_argument("--directory", help="where the data goes; default: the temporary one")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(argv)
    size = (given.trajectories, given.turns, given.asks, given.directory, 60 * given.minutes)
    found = asyncio.run(measure(*size))
    if given.json:
        print(json.dumps(found, indent=2))  # noqa: T201
        return 0
    for name, value in found.items():
        for part, figure in value.items() if isinstance(value, dict) else [("", value)]:
            shown = figure if isinstance(figure, dict) else {"": figure}
            told = "  ".join(f"{key} {number:.4g}".strip() for key, number in shown.items())
            print(f"{name:22} {part:24} {told}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())

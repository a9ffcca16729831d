"""Measures the rollout queue through gRPC against bare Postgres: lease and commit, the same rows.

- `python -m dataset_svc.bench_queue --json` prints one JSON object; without the flag, a table.
- The service runs as a process of its own over a Postgres of its own, as users run it.
- Bare means a script that knows the answer: two transactions for each rollout, pipelined prepared
  statements that write the very rows which the service wrote, from processes of its own; no checks,
  no tokens, no contract. The service also stores the tokens of each rollout as a blob.
- Both take turns in one run on one server, each on a copy of the same database.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import grpc
import psycopg
from psycopg import sql

from dataset_svc import synthetic
from dataset_svc.database import upgrade
from dataset_svc.localpg import LocalPostgres, LocalPostgresConfig
from regreen.common import v1 as common_pb
from regreen.dataset import v1 as pb

_READY_S, _CALL_S = 60.0, 120.0
_ROUNDS, _GROUP, _TASKS = 2, 4, 20
_BARE_PROCESSES, _BARE_CONNECTIONS = 2, 8
_LEASE = (
    "WITH one AS (SELECT id FROM rollouts WHERE state = 'waiting' "
    "ORDER BY step, group_seq, group_index LIMIT 1 FOR UPDATE SKIP LOCKED) "
    "UPDATE rollouts SET state = 'leased', lease_id = %s, expire_time = now() + interval '120 s' "
    "FROM one WHERE rollouts.id = one.id RETURNING rollouts.id, group_id, group_index"
)
_COMMIT = "UPDATE rollouts SET state = 'committed', trajectory_id = %s, expire_time = NULL, "
_COMMIT += "final_time = now() WHERE id = %s"
_GROUPS = (
    "UPDATE groups SET pending = pending - 1, "
    "state = CASE WHEN pending = 1 THEN 'complete' ELSE state END WHERE id = %s"
)
_NEW_LEASE = "INSERT INTO leases (id, rollout_id, worker, attempt) VALUES (%s, %s, %s, %s)"
_NEW_REQUEST = (
    "INSERT INTO requests (method, request_id, fingerprint, answer) VALUES (%s, %s, %s, %s)"
)
_NEW_BLOB = "INSERT INTO blobs (sha256, size_bytes) VALUES (%s, 1) ON CONFLICT DO NOTHING"
_CHILDREN = ("turns", "reward_parts", "verdicts")


@contextlib.asynccontextmanager
async def service(home: Path, url: str) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a dataset service of its own."""
    address = f"unix:{home}/dataset.sock"
    command = [sys.executable, "-m", "dataset_svc", "--listen", address, "--database-url", url]
    command += ["--metrics", "127.0.0.1:0", "--home", str(home), "--log-level", "warning"]
    with (home / "service.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = pb.TaskServiceStub(channel)
            request = pb.GetTaskStatsRequest()
            await stub.GetTaskStats(request, timeout=_READY_S, wait_for_ready=True)
            yield channel
    finally:
        process.terminate()
        await process.wait()


async def enqueue(channel: grpc.aio.Channel, name: str, rollouts: int) -> tuple[str, list[str]]:
    """A run with waiting rollouts; its id and its tasks'."""
    tasks = [synthetic.task(number) for number in range(_TASKS)]
    made: Any = pb.TaskServiceStub(channel)
    await made.ImportTasks(pb.ImportTasksRequest(request_id=_new(), tasks=tasks), timeout=_CALL_S)
    runs: Any = pb.RunServiceStub(channel)
    request = pb.CreateRunRequest(request_id=_new(), name=name, kind="grpo")
    run_id: str = (await runs.CreateRun(request, timeout=_CALL_S)).run.id
    groups = [
        pb.Group(
            run_id=run_id,
            task_id=tasks[number % _TASKS].id,
            size=_GROUP,
            pipeline=common_pb.PIPELINE_SIMPLIFIED,
            mode=common_pb.MODE_ANY_FIX,
            grader=common_pb.GRADER_BUILD_GATES,
            step=1,
        )
        for number in range(rollouts // _GROUP)
    ]
    queue: Any = pb.RolloutQueueServiceStub(channel)
    for start in range(0, len(groups), 500):
        part = groups[start : start + 500]
        await queue.EnqueueGroups(
            pb.EnqueueGroupsRequest(request_id=_new(), groups=part), timeout=_CALL_S
        )
    return run_id, [task.id for task in tasks]


async def ours(
    channel: grpc.aio.Channel, run_id: str, workers: int, turns: int
) -> dict[str, float | int]:
    """Lease and commit every rollout of a run."""
    queue: Any = pb.RolloutQueueServiceStub(channel)
    lease_s: list[float] = []
    commit_s: list[float] = []

    async def work(name: str) -> None:
        while True:
            began_s = time.perf_counter()
            request = pb.LeaseRolloutsRequest(
                request_id=_new(), worker=name, count=1, run_id=run_id
            )
            leases = (await queue.LeaseRollouts(request, timeout=_CALL_S)).leases
            if not leases:
                return
            lease_s.append(time.perf_counter() - began_s)
            made = synthetic.trajectory(
                int(leases[0].id[-12:], 16), leases[0].group.task_id, turns=turns
            )
            made.grader = leases[0].group.grader
            made.ClearField("seed")
            began_s = time.perf_counter()
            commit = pb.CommitRolloutRequest(
                request_id=_new(), lease_id=leases[0].id, trajectory=made
            )
            await queue.CommitRollout(commit, timeout=_CALL_S)
            commit_s.append(time.perf_counter() - began_s)

    began_s = time.perf_counter()
    await asyncio.gather(*(work(f"w{number}") for number in range(workers)))
    wall_s = time.perf_counter() - began_s
    return {"rollouts": len(commit_s), "wall_s": wall_s, **_latency("lease", lease_s),
            **_latency("commit", commit_s)}  # fmt: skip


def _latency(name: str, samples_s: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(samples_s, n=100)
    return {f"{name}_p50_ms": cuts[49] * 1000, f"{name}_p99_ms": cuts[98] * 1000}


def rows_of(url: str, limit: int) -> dict[str, Any]:
    """What the service wrote for some rollouts: columns, trajectories and their rows."""
    with psycopg.connect(_plain(url)) as connection:
        found: dict[str, Any] = {}
        cursor = connection.execute("SELECT * FROM trajectories ORDER BY id LIMIT %s", (limit,))
        names = [column.name for column in cursor.description or ()]
        found["trajectories"] = names, [list(row) for row in cursor]
        ids = [row[names.index("id")] for row in found["trajectories"][1]]
        for table in _CHILDREN:
            statement = sql.SQL("SELECT * FROM {} WHERE trajectory_id = ANY(%s)")
            cursor = connection.execute(statement.format(sql.Identifier(table)), (ids,))
            found[table] = [c.name for c in cursor.description or ()], [list(r) for r in cursor]
    return found


def bare_process(url: str, rows: dict[str, Any], connections: int) -> tuple[int, float, float]:
    """Lease and commit until nothing waits; how many rollouts, from when to when."""
    began_s = time.time()
    count = asyncio.run(_bare(url, rows, connections))
    return count, began_s, time.time()


async def _bare(url: str, rows: dict[str, Any], connections: int) -> int:
    return sum(await asyncio.gather(*(_bare_one(url, rows) for _ in range(connections))))


async def _bare_one(url: str, rows: dict[str, Any]) -> int:
    from psycopg.types.json import Json

    def adapted(row: Sequence[Any]) -> list[Any]:
        return [Json(value) if isinstance(value, dict) else value for value in row]

    names, trajectories = rows["trajectories"]
    kept = [n for n, name in enumerate(names) if name not in ("seq", "create_time")]
    at = {name: place for place, name in enumerate(names[n] for n in kept)}
    templates = [adapted([row[n] for n in kept]) for row in trajectories]
    ids = [row[names.index("id")] for row in trajectories]
    children: dict[str, tuple[int, dict[str, list[list[Any]]]]] = {}
    for table in _CHILDREN:
        place = rows[table][0].index("trajectory_id")
        by_id: dict[str, list[list[Any]]] = {}
        for row in rows[table][1]:
            by_id.setdefault(row[place], []).append(adapted(row))
        children[table] = place, by_id
    insert = _insert("trajectories", [names[n] for n in kept])
    inserts = {table: _insert(table, rows[table][0]) for table in _CHILDREN}
    done = 0
    async with await psycopg.AsyncConnection.connect(_plain(url), autocommit=False) as connection:
        connection.prepare_threshold = 0
        while True:
            lease_id = f"lse_{uuid.uuid4().hex}"
            cursor = await connection.execute(_LEASE, (lease_id,))
            slot = await cursor.fetchone()
            if slot is None:
                return done
            async with connection.pipeline():
                await connection.execute(_NEW_LEASE, (lease_id, slot[0], "w", 0))
                await connection.execute(_NEW_REQUEST, ("Lease", _new(), b"x" * 32, b"x" * 250))
                await connection.commit()
            pick = done % len(templates)
            new_id = f"trj_{uuid.uuid4().hex}"
            row = list(templates[pick])
            row[at["id"]], row[at["lease_id"]] = new_id, lease_id
            row[at["arrays_sha256"]] = new_id  # its blob is as new as the service's
            row[at["group_id"]], row[at["group_index"]] = slot[1], slot[2]
            async with connection.pipeline():
                await connection.execute(_NEW_BLOB, (row[at["arrays_sha256"]],))
                await connection.execute(insert, row)
                for table in _CHILDREN:
                    place, by_id = children[table]
                    for child in by_id.get(ids[pick], ()):
                        values = list(child)
                        values[place] = new_id
                        await connection.execute(inserts[table], values)
                await connection.execute(_COMMIT, (new_id, slot[0]))
                await connection.execute(_GROUPS, (slot[1],))
                await connection.execute(_NEW_REQUEST, ("Commit", _new(), b"x" * 32, b"x" * 40))
                await connection.commit()
            done += 1


def _insert(table: str, columns: Sequence[str]) -> sql.Composed:
    return sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
        sql.Identifier(table),
        sql.SQL(", ").join(map(sql.Identifier, columns)),
        sql.SQL(", ").join([sql.Placeholder()] * len(columns)),
    )


def bare(pool: ProcessPoolExecutor, url: str, rows: dict[str, Any]) -> dict[str, float | int]:
    """The same rollouts by a script."""
    share = _BARE_CONNECTIONS // _BARE_PROCESSES
    made = [pool.submit(bare_process, url, rows, share) for _ in range(_BARE_PROCESSES)]
    counts, began_s, ended_s = zip(*(one.result() for one in made), strict=True)
    return {"rollouts": sum(counts), "wall_s": max(ended_s) - min(began_s)}


async def measure(rollouts: int, workers: int, turns: int, *, fsync: bool) -> dict[str, Any]:
    """Both contenders, in turn; the report."""
    home = Path(tempfile.mkdtemp(prefix="regreen-bench-queue-"))
    home.chmod(0o711)
    config = LocalPostgresConfig(home=home / "pg", fsync=fsync)
    pool = ProcessPoolExecutor(_BARE_PROCESSES, mp_context=get_context("forkserver"))
    mine: list[dict[str, float | int]] = []
    theirs: list[dict[str, float | int]] = []
    try:
        with LocalPostgres(config) as postgres, pool:
            upgrade(postgres.url())
            for _ in range(2 * _BARE_PROCESSES):  # so that both have imported what they need
                pool.submit(time.sleep, 0.5)
            for number in range(_ROUNDS):
                async with service(home, postgres.url()) as channel:
                    run_id, _ = await enqueue(channel, f"round-{number}", rollouts // _ROUNDS)
                postgres.create_database(f"bare_{number}", template="regreen")
                async with service(home, postgres.url()) as channel:
                    mine.append(await ours(channel, run_id, workers, turns))
                rows = rows_of(postgres.url(), 200)
                loop = asyncio.get_running_loop()
                url = postgres.url(f"bare_{number}")
                theirs.append(await loop.run_in_executor(None, bare, pool, url, rows))
    finally:
        import shutil

        shutil.rmtree(home, ignore_errors=True)
    return _report(mine, theirs, workers, turns, fsync=fsync)


def _report(
    mine: Sequence[dict[str, float | int]],
    theirs: Sequence[dict[str, float | int]],
    workers: int,
    turns: int,
    *,
    fsync: bool,
) -> dict[str, Any]:
    def rate(parts: Sequence[dict[str, float | int]]) -> float:
        return sum(p["rollouts"] for p in parts) / sum(p["wall_s"] for p in parts)

    figures = {name: statistics.fmean(part[name] for part in mine) for name in mine[0]
               if name.endswith("_ms")}  # fmt: skip
    return {
        "workers": workers,
        "turns": turns,
        "fsync": fsync,
        "rollouts": sum(part["rollouts"] for part in mine),
        "service_rollouts_per_s": rate(mine),
        "bare_rollouts_per_s": rate(theirs),
        "bare_connections": _BARE_CONNECTIONS,
        "share_of_bare": rate(mine) / rate(theirs),
        "share_by_round": [rate([a]) / rate([b]) for a, b in zip(mine, theirs, strict=True)],
        **figures,
    }


def _plain(url: str) -> str:
    return url.replace("postgresql+psycopg://", "postgresql://")


def _new() -> str:
    return uuid.uuid4().hex


def main(argv: list[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m dataset_svc.bench_queue", description=__doc__
    )
    parser.add_argument("--rollouts", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--no-fsync", action="store_true", help="without waiting for the disk")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(argv)
    found = asyncio.run(
        measure(given.rollouts, given.workers, given.turns, fsync=not given.no_fsync)
    )
    if given.json:
        print(json.dumps(found, indent=2))  # noqa: T201
        return 0
    for name, value in found.items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"{name:28} {shown}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Queue and store under fault: every rollout is committed exactly once, and none is stuck.

- Workers live in processes, several in each; they, the service and Postgres are taken away at
  random moments: processes of workers and the service by `kill -9`, Postgres by
  `pg_ctl restart -m immediate`.
- The service and Postgres are taken away only when the service has answered since the last time:
  the run goes on however slow the machine is. It ends early where nothing is committed any more, or
  a process of workers ends by itself.
- A worker writes down what it was answered, in a file, before it goes on: an answered commit must
  be in the database, as it was answered, whatever was killed after.
- Some workers fall silent past their lease and commit then: they may succeed only where nobody
  else was given the rollout; some give up with a reason, which must be kept.
- The collector of unnamed blobs runs all the time, without any grace.
- Commits, heartbeats and reasons are answered about as often as they were meant to be.
- In the end each slot has one trajectory, no trajectory has no slot, nothing waits, is leased or
  lost, every group can be taken once, and every blob that a row names is there.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psycopg

from regreen.blobs import Digest, open_blobs
from regreen.client.channel import connect, new_request_id
from regreen.client.dataset import RolloutQueueClient, RunClient, TaskClient
from regreen.dataset import v1 as pb
from regreen.rpc.errors import (
    Aborted,
    DeadlineExceeded,
    LeaseExpired,
    RegreenError,
    Unavailable,
)
from tests.integration import dataset_samples as samples
from tests.load.postgres import Postgres, remove

GROUP = 4
_TASKS = 20
_SILENT, _GIVES_UP = 0.004, 0.02
"""Shares of leases that outlive themselves, and that end with a reason."""
_BEATS = 0.2  # below it is the luck of leases that are kept alive
_ANSWERED, _TELLING = 0.5, 20
"""Share of what is meant to be done that has to be answered, and from how many on: some dies."""
_LOOK_S = 0.1
_LATE = (DeadlineExceeded, Unavailable)
_REASON = "the sandbox went away"


class _StuckError(Exception):
    """The run can go on no further; says why."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How large a run is, and after how many commits, in the mean, what is taken away."""

    workers: int = 200
    rollouts: int = 20_000
    per_process: int = 10
    """Workers that live, and die, together."""
    worker_every: int = 40
    """Of every so many commits one worker dies; `per_process` of them at once."""
    service_every: int = 1500
    postgres_every: int = 2500
    least: int = 3
    """Kills of the service, and restarts of Postgres, that a run does not end without."""
    most: int = 1_000_000
    """Kills of each kind after which there are no more."""
    lease_s: float = 20.0
    """Longer than a worker with four leases needs, however many share the machine."""
    stall_s: float = 120.0
    """Without a commit for so long a run is stuck; far longer than a lease and a restart."""
    deadline_s: float = 1800.0
    seed: int = 1


@dataclass
class Run:
    """One run and what it has seen."""

    home: Path
    plan: Plan
    postgres: Postgres
    tell: Callable[[str], None] = lambda line: None
    killed: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    processes: dict[int, BaseProcess] = field(default_factory=dict)
    _service: subprocess.Popen[bytes] | None = None
    _born: int = 0
    _answered: bool = False
    _committed: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.plan.seed)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.ledger = self.home / "ledger"
        self.ledger.mkdir()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])

    async def run(self) -> dict[str, Any]:
        """All of it; the report."""
        self._start_service()
        async with connect(self.address) as channel:
            self.queue = RolloutQueueClient(channel, patience_s=600.0)
            run_id, task_ids = await self._enqueue(channel)
            began_s = time.monotonic()
            jobs = [
                asyncio.create_task(job)
                for job in (
                    self._keep_service(),
                    self._keep_workers(run_id, task_ids),
                    self._often("process", self._process_every, self._kill_process),
                    self._often("service", self.plan.service_every, self._kill_service),
                    self._often("postgres", self.plan.postgres_every, self._restart_postgres),
                )
            ]
            try:
                async with asyncio.timeout(self.plan.deadline_s):
                    await self._until_done(run_id, jobs)
            except TimeoutError:
                self.faults.append(f"not done within {self.plan.deadline_s} s")
            except _StuckError as error:
                self.faults.append(str(error))
            finally:
                for job in jobs:
                    job.cancel()
                await asyncio.gather(*jobs, return_exceptions=True)
                self._end_workers()
            wall_s = time.monotonic() - began_s
            if self._service is None or self._service.poll() is not None:
                self._start_service()
            taken = await self._take_all(run_id)
        self.end_service()
        return await self._report(wall_s, taken)

    async def _enqueue(self, channel: Any) -> tuple[str, list[str]]:
        tasks = [samples.task() for _ in range(_TASKS)]
        await TaskClient(channel, patience_s=600.0).import_tasks(tasks)
        run = (await RunClient(channel, patience_s=600.0).create_run("load", "grpo")).run
        groups = [
            samples.group(run.id, tasks[n % _TASKS].id, GROUP, step=1 + n // 100)
            for n in range(self.plan.rollouts // GROUP)
        ]
        for start in range(0, len(groups), 500):
            await self.queue.enqueue_groups(groups[start : start + 500])
        return run.id, [task.id for task in tasks]

    async def _until_done(self, run_id: str, jobs: "list[asyncio.Task[None]]") -> None:
        told_s, moved_s = 0.0, time.monotonic()
        while True:
            for job in jobs:
                if job.done() and not job.cancelled() and (error := job.exception()):
                    raise error
            if time.monotonic() - moved_s > self.plan.stall_s:
                raise _StuckError(f"stuck at {self._committed} commits, killed {dict(self.killed)}")
            try:
                state = dict((await self.queue.get_queue(run_id)).rollouts)
            except _LATE:
                continue
            if state.get("committed", 0) > self._committed:
                moved_s = time.monotonic()
            self._answered, self._committed = True, state.get("committed", 0)
            taken_away = ("process", "service", "postgres")
            enough = all(self.killed[what] >= self.plan.least for what in taken_away)
            if not state.get("waiting") and not state.get("leased") and enough:
                return
            if time.monotonic() > told_s:
                self.tell(f"{state} killed {dict(self.killed)}")
                told_s = time.monotonic() + 5.0
            await asyncio.sleep(0.25)

    @property
    def _nearly_done(self) -> bool:
        return self._committed >= 0.9 * self.plan.rollouts

    async def _take_all(self, run_id: str) -> list[str]:
        ids: list[str] = []
        while taken := await self.queue.take_groups(run_id, 200):
            ids += [item.group.id for item in taken]
        return ids

    # ---- what is taken away

    async def _often(self, what: str, every: int, take_away: Callable[[], None]) -> None:
        due = self.rng.uniform(0.5, 1.5) * every
        while self.killed[what] < self.plan.most:
            await asyncio.sleep(_LOOK_S)
            lacks = self._nearly_done and self.killed[what] < self.plan.least
            if self._committed >= due or lacks:
                await asyncio.to_thread(take_away)
                due = self._committed + self.rng.uniform(0.5, 1.5) * every

    @property
    def _process_every(self) -> int:
        return self.plan.worker_every * self.plan.per_process

    def _kill_process(self) -> None:
        if self.processes:
            victim = self.rng.choice(list(self.processes.values()))
            if victim.pid is not None and victim.is_alive():
                os.kill(victim.pid, signal.SIGKILL)
                self.killed["process"] += 1

    def _kill_service(self) -> None:
        service = self._service
        if service is not None and service.poll() is None and self._is_back():
            service.kill()
            service.wait()
            self.killed["service"] += 1

    def _restart_postgres(self) -> None:
        if self._is_back():
            self.postgres.restart()
            self.killed["postgres"] += 1

    def _is_back(self) -> bool:
        """Whether the service has answered since it, or Postgres, was taken away; asked once."""
        back, self._answered = self._answered, False
        return back

    # ---- what is kept running

    def _start_service(self) -> None:
        with (self.home / "service.log").open("ab") as log:
            self._service = subprocess.Popen(
                [
                    sys.executable, "-m", "dataset_svc", f"--listen={self.address}",
                    "--metrics=127.0.0.1:0", f"--home={self.home}", "--log-level=warning",
                    f"--database-url={self.postgres.url}", f"--lease-s={self.plan.lease_s}",
                    "--retry-s=0.2", "--upkeep-s=1", "--max-rpcs=1000",
                    "--blob-grace-s=0",
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    async def _keep_service(self) -> None:
        while True:
            if self._service is not None and self._service.poll() is not None:
                self._start_service()
            await asyncio.sleep(0.05)

    async def _keep_workers(self, run_id: str, task_ids: list[str]) -> None:
        size = self.plan.per_process
        while True:
            for number in [n for n, process in self.processes.items() if not process.is_alive()]:
                code = self.processes.pop(number).exitcode
                if code != -signal.SIGKILL:
                    raise _StuckError(f"the workers of process {number} ended with {code}")
            for _ in range(-(-self.plan.workers // size) - len(self.processes)):
                self._born += 1
                lot = Lot(self._born, size, self.address, run_id, str(self.ledger), self.plan)
                process = self._context.Process(target=work, args=(lot,), daemon=True)
                await asyncio.to_thread(process.start)
                self.processes[self._born] = process
            await asyncio.sleep(0.05)

    def _end_workers(self) -> None:
        for process in self.processes.values():
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        for process in self.processes.values():
            process.join(10)

    def end_service(self) -> None:
        """End the service; safe to call twice."""
        if self._service is not None and self._service.poll() is None:
            self._service.terminate()
            self._service.wait(120)

    # ---- what must be so in the end

    async def _report(self, wall_s: float, taken: list[str]) -> dict[str, Any]:
        answered: dict[str, str] = {}
        told: Counter[str] = Counter()
        for path in self.ledger.iterdir():
            for line in path.read_text().splitlines():
                what, _, rest = line.partition(" ")
                told[what] += 1
                if what == "committed":
                    rollout_id, trajectory_id = rest.split()
                    answered[rollout_id] = trajectory_id
        with psycopg.connect(self.postgres.url) as connection:
            await self._check(connection, answered, taken)
            reasons = connection.execute(
                "SELECT count(*) FROM leases WHERE error = %s", (_REASON,)
            ).fetchone()
            if reasons is None or reasons[0] < told["gave-up"]:
                self.faults.append(f"reasons kept: {reasons}, answered: {told['gave-up']}")
        self._check_answers(told)
        return {
            "rollouts": self.plan.rollouts,
            "workers": self.plan.workers,
            "wall_s": round(wall_s, 1),
            "rollouts_per_s": round(self.plan.rollouts / wall_s, 1),
            "killed": dict(self.killed),
            "workers_killed": self.killed["process"] * self.plan.per_process,
            "processes_born": self._born,
            "answered": dict(told),
            "faults": self.faults,
        }

    def _check_answers(self, told: "Counter[str]") -> None:
        """A fault for what hardly ever worked, of what is done often enough to tell."""
        shares = {"committed": 1.0, "beat": _BEATS - _GIVES_UP - _SILENT, "gave-up": _GIVES_UP}
        for what, share in shares.items():
            least = int(_ANSWERED * share * self.plan.rollouts)
            if told[what] < least and least >= _TELLING:
                self.faults.append(f"{what}: {told[what]} answered, {least} at least were due")

    async def _check(
        self, connection: "psycopg.Connection[Any]", answered: dict[str, str], taken: list[str]
    ) -> None:
        def rows(statement: str) -> list[Any]:
            return connection.execute(statement).fetchall()

        wanted = self.plan.rollouts // GROUP * GROUP
        states = dict(rows("SELECT state, count(*) FROM rollouts GROUP BY state"))
        self._expect("rollouts by state", states, {"committed": wanted})
        pairs = rows("SELECT id, trajectory_id FROM rollouts")
        self._expect("trajectories named", len({pair[1] for pair in pairs}), wanted)
        stored = rows(
            "SELECT t.id FROM trajectories t JOIN rollouts r ON r.trajectory_id = t.id "
            "AND r.group_id = t.group_id AND r.group_index = t.group_index "
            "AND r.lease_id = t.lease_id"
        )
        self._expect("trajectories of the slot and lease that name them", len(stored), wanted)
        self._expect("trajectories", rows("SELECT count(*) FROM trajectories")[0][0], wanted)
        slots = dict(pairs)
        wrong = [key for key, value in answered.items() if slots.get(key) != value]
        self._expect("answered commits that are not as answered", len(wrong), 0)
        groups = wanted // GROUP
        self._expect("groups taken", (len(taken), len(set(taken))), (groups, groups))
        turns = rows("SELECT count(*) FROM turns")[0][0]
        self._expect("turns", turns, 4 * wanted)
        blobs = open_blobs(self.home / "blobs", fsync=False)
        named = rows("SELECT DISTINCT arrays_sha256, arrays_bytes FROM trajectories")
        gone = [sha for sha, size in named if not await blobs.exists(Digest(sha, size))]
        self._expect("blobs that are gone", len(gone), 0)

    def _expect(self, what: str, found: object, wanted: object) -> None:
        if found != wanted:
            self.faults.append(f"{what}: {found}, not {wanted}")


@dataclass(frozen=True, slots=True)
class Lot:
    """The workers of one process, and all that they need to know."""

    number: int
    size: int
    address: str
    run_id: str
    ledger: str
    plan: Plan


def work(lot: Lot) -> None:
    """The life of one process of workers."""
    asyncio.run(_work_all(lot))


async def _work_all(lot: Lot) -> None:
    async with connect(lot.address) as channel, asyncio.TaskGroup() as group:
        queue = RolloutQueueClient(channel, patience_s=600.0)
        for place in range(lot.size):
            group.create_task(_work(queue, lot, place))


async def _work(queue: RolloutQueueClient, lot: Lot, place: int) -> None:
    name = f"w{lot.number}.{place}"
    rng = random.Random(f"{lot.plan.seed} {name}")
    handle = os.open(Path(lot.ledger) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(line: str) -> None:
        os.write(handle, f"{line}\n".encode())

    while True:
        try:
            answer = await queue.ask_for_rollouts(name, rng.randint(1, 4), run_id=lot.run_id)
        except _LATE:  # what it leased, if anything, runs out
            continue
        for lease in answer.leases:
            with contextlib.suppress(LeaseExpired):
                await _one(queue, lease, rng, note, lot.plan.lease_s)
        if not answer.leases:
            await asyncio.sleep(answer.poll_after.ToTimedelta().total_seconds())


async def _one(
    queue: RolloutQueueClient,
    lease: pb.Lease,
    rng: random.Random,
    note: Callable[[str], None],
    lease_s: float,
) -> None:
    """One leased rollout: most are committed at once."""
    luck = rng.random()
    try:
        if luck < _GIVES_UP:
            with contextlib.suppress(*_LATE):
                await queue.fail_rollout(lease.id, _REASON, outage=True)
                note(f"gave-up {lease.rollout_id}")
            return
        if luck < _GIVES_UP + _SILENT:
            await asyncio.sleep(lease_s * rng.uniform(1.0, 2.0))
        elif luck < _BEATS:
            with contextlib.suppress(*_LATE):
                await queue.heartbeat([lease.id])
                note(f"beat {lease.rollout_id}")
        trajectory = samples.trajectory(lease.group.task_id, tokens=400, salt=lease.id)
        done = await _committed(queue, lease, trajectory)
    except LeaseExpired:
        note(f"refused {lease.rollout_id}")
        raise
    except RegreenError as error:
        note(f"error {type(error).__name__}: {error}")
        raise
    note(f"committed {lease.rollout_id} {done.trajectory_id}")


async def _committed(
    queue: RolloutQueueClient, lease: pb.Lease, trajectory: pb.Trajectory
) -> pb.CommitRolloutResponse:
    """Commit until it is answered, under one request id; concurrent work may get in the way."""
    request_id = new_request_id()
    while True:
        try:
            return await queue.commit_rollout(lease.id, trajectory, request_id=request_id)
        except (Aborted, *_LATE):
            await asyncio.sleep(0.1)


def storm(plan: Plan, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """One run in a directory that goes afterwards; the report."""
    home = Path(tempfile.mkdtemp(prefix="regreen-load-"))
    home.chmod(0o711)
    try:
        with Postgres(home / "pg") as postgres:
            run = Run(home, plan, postgres, tell)
            try:
                report = asyncio.run(run.run())
            finally:
                run.end_service()
            if report["faults"]:
                sys.stderr.write((home / "service.log").read_text("utf-8", "replace")[-40_000:])
            return report
    finally:
        remove(home)


def main(argv: list[str] | None = None) -> int:
    """Run it; 0 when nothing was at fault."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m tests.load.queue", description=__doc__
    )
    usual = Plan()
    parser.add_argument("--workers", type=int, default=usual.workers)
    parser.add_argument("--rollouts", type=int, default=usual.rollouts)
    parser.add_argument("--per-process", type=int, default=usual.per_process)
    parser.add_argument("--deadline-s", type=float, default=usual.deadline_s)
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.add_argument("--out", type=Path, default=Path("build/bench/queue-faults.json"))
    given = parser.parse_args(argv)
    sizes = (given.workers, given.rollouts, given.per_process)
    plan = Plan(*sizes, deadline_s=given.deadline_s, seed=given.seed)
    report = storm(plan, lambda line: print(line, file=sys.stderr, flush=True))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(report, indent=2) + "\n")
    for name, value in report.items():
        print(f"{name:16} {value}")
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())

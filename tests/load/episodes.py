"""Episodes, 24 at a time, while any process is killed at random: none lost, none doubled.

- A scripted policy; a quarter of the episodes build a change that no other one has made.
- Killed are the rollout worker, the four services that episodes need, Postgres with all its
  processes, spawners and first processes of sandboxes, each kind as often as the others; what
  learns has a run of its own (`tests.load.train`). In each third of the time two kinds are spared,
  so that their memory is seen over a life that is as long; one kind, which the seed chooses, is
  spared throughout.
- A kill waits until an episode was committed since the last one, then for a random time.
- At the end the queue is emptied, and the database must show one trajectory for each rollout.
- Memory is flat when a process does not grow once it has lived for a while: over the longest life
  that was seen of a kind its line rises by less than a sixth of the mean size, and 10 MB. A line is
  drawn within lives, since kills keep the ages of a kind the same throughout. A kind that was not
  seen for half of a third of the time says nothing, which is a fault.
- The one that was spared throughout may rise by 3 MB over the second half of the run, Postgres by
  a sixteenth of its size (`memory`).
- Of Postgres all processes are weighed, without what they share; it is judged where it is spared,
  since the process of a new connection fills its caches for minutes.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regreen.client.stack import Endpoints, Stack
from regreen.common.v1 import GRADER_BUILD_GATES, MODE_ANY_FIX, PIPELINE_SIMPLIFIED
from regreen.dataset import v1 as pb
from regreen.rollout.bench_stack import resident_bytes
from regreen.rollout.capacity import quantile
from regreen.rollout.context import Budget, Knobs, Sampling, labels_of
from regreen.rpc.errors import RegreenError
from tests.integration.rollout.world import PIN, VALIDATE, call
from tests.load import processes, train
from tests.load.memory import GROWN_S, POSTGRES_SHARE, Size, growth, own_bytes, steady
from tests.load.postgres import Postgres, remove
from tests.load.train_check import look_at_rollouts
from tests.load.train_party import KINDS as ALL_KINDS
from tests.load.train_party import Party

SERVICES = ("dataset", "sandbox", "policy", "judge")
KINDS = tuple(kind for kind in ALL_KINDS if kind not in ("learner", "rank", "engine"))
_RUN, _SIZE = "load", 2
_BUILDS = 1000
_BUDGET = Budget(turns=3, wall_s=60.0, validation_s=60.0)
"""Short: a sandbox whose worker was killed stays for as long as an episode may take."""
_STALL_S = 240.0
"""Without a commit for so long it is stuck; far longer than any process takes to come back."""
SPARED = (("dataset", "judge"), ("sandbox", "spawner"), ("policy", "driver"))
"""Kinds that are not killed in each third of the time: those whose memory is looked at."""
WEIGHED = (*(kind for kinds in SPARED for kind in kinds), "postgres")
"""Kinds whose memory is looked at."""
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is run and killed."""

    minutes: float = 30.0
    at_once: int = 24
    seed: int = 1
    pace_s: float = 6.0
    """Longest wait between an episode that was committed after a kill and the next kill."""
    spare: str = ""
    """The kind that is never killed; by default the seed's."""

    @property
    def spared(self) -> tuple[str, ...]:
        """What is never killed: that kind, and what it cannot outlive."""
        kind = self.spare or WEIGHED[self.seed % len(WEIGHED)]
        needed = {"spawner": ("sandbox",), "postgres": ("dataset",)}  # whose connections it serves
        return (kind, *needed.get(kind, ()))

    @property
    def stretch_s(self) -> float:
        """How long a kind is spared."""
        return 60 * self.minutes / len(SPARED)


def script() -> dict[str, Any]:
    """Fixes, one in four that gives up, and one in four that builds what nobody has built."""
    texts = []
    for number in range(_BUILDS):
        change = call("write_file", path="/work/repo/load.py", content=f"NUMBER = {number}\n")
        texts += [PIN, change, f"Let me see {number}. {PIN}", call("give_up", reason="no way")]
    rest = [{"text": VALIDATE, "turn": turn} for turn in (1, 2)]
    return {"responses": [{"texts": texts, "turn": 0, "rotate": True}, *rest]}


@dataclass
class Soak:
    """A run that is killed, and what has been seen of it."""

    party: Party
    plan: Plan
    run_id: str
    stack: Stack
    tell: train.Tell
    killed: Counter[str] = field(default_factory=Counter)
    asked: int = 0
    """Rollouts."""
    committed: int = 0
    back_s: list[float] = field(default_factory=list)
    """From each kill to the next commit that was seen."""
    sizes: dict[str, list[Size]] = field(default_factory=lambda: defaultdict(list))
    faults: list[str] = field(default_factory=list)
    began_s: float = field(default_factory=time.monotonic)
    _moved_s: float = field(default_factory=time.monotonic)
    _waiting: int = 0
    _over: bool = False

    async def run(self) -> float:
        """Until the time is over and the queue is empty; seconds that it took."""
        tasks = [
            asyncio.create_task(work())
            for work in (self.party.keep, self._disturb, self._feed, self._weigh)
        ]
        try:
            while not (self._over and self.committed >= self.asked):
                self._over = time.monotonic() - self.began_s > 60 * self.plan.minutes
                if time.monotonic() - self._moved_s > _STALL_S:
                    self.faults.append(f"stuck at {self.committed} of {self.asked}")
                    break
                if ended := [task for task in tasks if task.done() and task.exception()]:
                    self.faults.append(repr(ended[0].exception()))
                    break
                await asyncio.sleep(0.2)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.faults += self.party.faults
        return time.monotonic() - self.began_s

    async def _feed(self) -> None:
        """Keep the queue filled, and count what was committed."""
        number = 0
        while True:
            with contextlib.suppress(RegreenError):  # its service was killed
                found = (await self.stack.queue.get_queue(self.run_id)).rollouts
                self._waiting = found["waiting"]
                if found["committed"] > self.committed:
                    self.committed, self._moved_s = found["committed"], time.monotonic()
                if not self._over and self._waiting < self.plan.at_once:
                    await self._add(number)
                    number += 1
            await asyncio.sleep(0.1)

    async def _add(self, number: int) -> None:
        labels = labels_of(_BUDGET, Sampling(), Knobs())
        groups = [
            pb.Group(
                run_id=self.run_id,
                task_id=train.TASKS[0],
                size=_SIZE,
                seed=number * self.plan.at_once + place,
                step=1,
                labels=labels,
                pipeline=PIPELINE_SIMPLIFIED,
                mode=MODE_ANY_FIX,
                grader=GRADER_BUILD_GATES,
            )
            for place in range(self.plan.at_once)
        ]
        request_id = f"load-{number}"
        while True:  # the same request until it is answered: asked twice, added once
            try:
                await self.stack.queue.enqueue_groups(groups, request_id=request_id)
                self.asked += _SIZE * len(groups)
                return
            except RegreenError as error:
                self.tell(f"    groups are added again: {error}")
                await asyncio.sleep(0.5)

    async def _disturb(self) -> None:
        rng = random.Random(self.plan.seed)
        deck: list[str] = []
        while not self._over:
            since_s = self._moved_s
            while self._moved_s == since_s:  # noqa: ASYNC110 - a database
                await asyncio.sleep(0.05)
            if self.killed:
                self.back_s.append(self._moved_s - since_s)
            await asyncio.sleep(rng.uniform(0, self.plan.pace_s))
            deck = deck or rng.sample(KINDS, len(KINDS))
            elapsed_s = time.monotonic() - self.began_s
            spared = SPARED[min(int(elapsed_s / self.plan.stretch_s), len(SPARED) - 1)]
            spared += self.plan.spared
            kind = next((one for one in deck if one not in spared and self.party.found(one)), "")
            if not kind:
                deck = []
                continue
            deck.remove(kind)
            pid = rng.choice(self.party.found(kind) or [0])
            if pid and not self._over and self.party.kill(kind, pid):
                self._moved_s = time.monotonic()
                self.killed[kind] += 1
                self.tell(
                    f"{time.strftime('%H:%M:%S')} kill {self.killed.total()}: {kind} (pid {pid}), "
                    f"{self.committed} of {self.asked} committed"
                )

    async def _weigh(self) -> None:
        while True:
            for kind in WEIGHED:
                weigh = own_bytes if kind == "postgres" else resident_bytes
                for pid in self.party.found(kind):
                    if born := processes.start_time(pid):
                        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - born / _TICKS_PER_S
                        self.sizes[kind].append((born, age_s, weigh(pid)))
            await asyncio.sleep(1.0)

    def report(self, took_s: float) -> dict[str, Any]:
        """Figures of the run, and what of its memory is at fault."""
        memory = {}
        for kind in WEIGHED:
            sizes = self.sizes[kind]
            found = growth(sizes)
            memory[kind] = {
                "mean_mb": round(found.mean_bytes / 1e6, 1),
                "most_mb": round(max((size for _, _, size in sizes), default=0) / 1e6, 1),
                "mb_per_hour": round(found.bytes_per_s * 3600 / 1e6, 1),
                "longest_s": round(found.longest_s),
            }
            if kind == "postgres":  # what serves a connection fills its caches for minutes
                continue
            if found.longest_s < self.plan.stretch_s / 2 - GROWN_S:
                self.faults.append(f"memory of {kind} was not seen for long: {memory[kind]}")
            if not found.flat:
                self.faults.append(f"memory of {kind} grows: {memory[kind]}")
        kind = self.plan.spared[0]
        kept = steady(self.sizes[kind], POSTGRES_SHARE if kind == "postgres" else 0.0)
        spared = {
            "kind": kind,
            "warm_s": round(kept.seconds),
            "risen_mb": round(kept.risen_bytes / 1e6, 2),
            "shows_mb_per_hour": round(kept.seen_bytes_per_s * 3600 / 1e6, 1),
        }
        if not kept.flat:
            self.faults.append(f"what was spared grows, or was not seen throughout: {spared}")
        back_s = sorted(self.back_s)
        return {
            "minutes": round(took_s / 60, 2),
            "at_once": self.plan.at_once,
            "asked": self.asked,
            "committed": self.committed,
            "episodes_per_s": round(self.committed / took_s, 3),
            "kills": self.killed.total(),
            "killed": dict(self.killed),
            "next_commit_s": {
                f"p{p}": round(quantile(back_s, p / 100), 2) for p in (50, 95, 100) if back_s
            },
            "memory": memory,
            "spared": spared,
            "load_1m": round(os.getloadavg()[0], 2),
            "cpus": os.cpu_count(),
        }


async def _all(home: Path, plan: Plan, postgres: Postgres, tell: train.Tell) -> dict[str, Any]:
    load = train.Load(home, train.Plan(seed=plan.seed), postgres, tell, script())
    load.database(_RUN, "template1")
    flags = {name: [*load.flags(_RUN, load.model)[name]] for name in SERVICES}
    flags["sandbox"] += ["--max-sandboxes", str(16 * plan.at_once)]
    job = home / "job.json"
    party = Party(home / _RUN, postgres, flags, job, "tests.load.episodes_driver")
    party.start(*SERVICES)
    try:
        async with Stack(Endpoints(**party.endpoints, learner=""), patience_s=120.0) as stack:
            await load.prepare(stack)
            run_id = (await stack.runs.create_run(_RUN, "grpo")).run.id
            given = {
                "endpoints": {**party.endpoints, "learner": ""},
                "run_id": run_id,
                "at_once": plan.at_once,
            }
            job.write_text(json.dumps(given))
            party.start("driver")
            soak = Soak(party, plan, run_id, stack, tell)
            report = soak.report(await soak.run())
    finally:
        await asyncio.to_thread(party.stop)
    found = look_at_rollouts(postgres.url_of(_RUN), _RUN, soak.asked)
    return {**report, **found.facts, "faults": soak.faults + found.faults}


def soak(
    plan: Plan, tell: train.Tell = lambda line: None, keep: Path | None = None
) -> Mapping[str, Any]:
    """One run in a directory that goes afterwards; the report.

    `keep` gets the logs where something was at fault.
    """
    home = Path(tempfile.mkdtemp(prefix="regreen-load-"))
    home.chmod(0o711)
    try:
        with Postgres(home / "pg") as postgres:
            report = asyncio.run(_all(home, plan, postgres, tell))
        if keep is not None and report["faults"]:
            keep.mkdir(parents=True, exist_ok=True)
            for log in home.glob("*/*.log"):
                shutil.copy(log, keep / f"{log.parent.name}-{log.name}")
        return report
    finally:
        remove(home)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; 0 when nothing was at fault."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m tests.load.episodes", description=__doc__
    )
    usual = Plan()
    parser.add_argument("--minutes", type=float, default=usual.minutes)
    parser.add_argument("--at-once", type=int, default=usual.at_once)
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.add_argument("--pace-s", type=float, default=usual.pace_s)
    parser.add_argument("--spare", choices=WEIGHED, default=None, help="by default the seed's")
    parser.add_argument("--out", type=Path, default=Path("build/bench/load-faults.json"))
    given = parser.parse_args(argv)
    plan = Plan(given.minutes, given.at_once, given.seed, given.pace_s, given.spare or "")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    report = soak(
        plan, lambda line: print(line, file=sys.stderr, flush=True), given.out.with_suffix("")
    )
    given.out.write_text(json.dumps(report, indent=2) + "\n")
    for name, value in report.items():
        print(f"{name:16} {value}")
    print(f"{'verdict':16} {'BREACH' if report['faults'] else 'held'}")
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""Training while any process is killed at random moments: equal weights, no group lost or twice.

- Synchronous: a scripted policy; a run undisturbed and one that is killed begin from copies of one
  database, in which the run was just made. Their last weights must be equal bit for bit.
- Asynchronous: a real engine samples step n + 1 from older weights while step n is learned; there
  the database must prove by itself that no group is lost or used twice (`train_check`).
- Killed are the driver with its rollout workers, every service, the learner's rank, the policy's
  engine, Postgres with all its processes, and spawner and first processes of sandboxes: each kind
  as often as the others, in an order and at moments drawn from the seed.
- A kill waits until the run has gone on since the last one, then for a random time; kills are
  spread over the steps, and a run that ends before all of them are done is a fault.
"""

import argparse
import asyncio
import contextlib
import filecmp
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from regreen.client.stack import Endpoints, Stack
from regreen.dataset import v1 as pb
from regreen.rollout.context import Budget, Knobs, Sampling, labels_of
from regreen.train.progress import Progress
from regreen.train.rl import train_grpo
from sandbox_svc.wheelhouse import DistStore
from tests.fixtures.policy.model import default_model
from tests.fixtures.tasks.tiny_task import tiny_spec
from tests.integration import dataset_samples as samples
from tests.integration.rollout.world import PIN, VALIDATE, call, task_of
from tests.load import train_model
from tests.load.postgres import Postgres, remove
from tests.load.train_check import different, look
from tests.load.train_driver import Job
from tests.load.train_party import KINDS, SERVICES, Party

_GROUPS, _SIZE, _RUN = 2, 2, "storm"
TASKS = ("greet-a", "greet-b")
_STALL_S = 240.0
"""Without progress for so long a run is stuck; far longer than any process takes to come back."""
_WAYS = ("", "Let me see. ", "This one again. ")
Tell = Callable[[str], None]


def script() -> dict[str, Any]:
    """Neighbours fare differently, and which ones a group has depends on its seed."""
    texts = [
        text
        for number, words in enumerate(_WAYS)
        for text in (words + PIN, words + call("give_up", reason=f"no way {number}"))
    ]
    rest = [{"text": VALIDATE, "turn": turn} for turn in (1, 2)]
    return {"responses": [{"texts": texts, "turn": 0, "rotate": True}, *rest]}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is run and killed."""

    kills: int = 50
    """In each mode."""
    steps: int = 0
    """Of each run; 0 takes half as many as kills."""
    seed: int = 1
    modes: tuple[str, ...] = ("sync", "async")
    deadline_s: float = 3600.0
    """Of each mode."""

    @property
    def all_steps(self) -> int:
        """Steps of each run."""
        return self.steps or max(4, self.kills // 2)


@dataclass
class Storm:
    """A run that is killed, and what has been seen of it."""

    party: Party
    plan: Plan
    progress: Path
    pace_s: float
    rng: random.Random
    tell: Tell
    killed: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    step: int = 0
    took_s: float = 0.0
    _stepped_s: list[float] = field(default_factory=list)
    _seen: int = 0
    _killed_s: float = 0.0
    _last: list[Any] = field(default_factory=list)
    _moved_s: float = field(default_factory=time.monotonic)

    async def run(self) -> None:
        """Until the driver is done, or nothing goes on any more."""
        self.party.start()
        keeper = asyncio.create_task(self.party.keep())
        killer = asyncio.create_task(self._disturb())
        watcher = asyncio.create_task(self._watch())
        try:
            async with asyncio.timeout(self.plan.deadline_s):
                await self.party.done.wait()
        except TimeoutError:
            self.party.faults.append(f"not done within {self.plan.deadline_s:.0f} s")
        finally:
            for task in (killer, watcher, keeper):
                task.cancel()
            ended = await asyncio.gather(killer, watcher, keeper, return_exceptions=True)
            self.party.faults += [f"{e!r}" for e in ended if isinstance(e, Exception)]
            await asyncio.to_thread(self.party.stop)

    @property
    def step_s(self) -> float:
        """Time of one step, those before the first not counted."""
        if len(self._stepped_s) < 2:
            return 1.0
        return (self._stepped_s[-1] - self._stepped_s[0]) / (len(self._stepped_s) - 1)

    async def _watch(self) -> None:
        """Read what the driver reports; what says nothing new is no progress."""
        while True:
            with contextlib.suppress(FileNotFoundError):
                lines = self.progress.read_bytes().split(b"\n")[self._seen : -1]
                self._seen += len(lines)
                for line in lines:
                    told = json.loads(line)
                    if told != self._last and told[0] in ("grpo", "rollouts", "learn"):
                        self._last, self._moved_s = told, time.monotonic()
                        if told[0] == "grpo" and told[1] != self.step:
                            self.step = told[1]
                            self._stepped_s.append(self._moved_s)
            if time.monotonic() - self._moved_s > _STALL_S:
                self.party.faults.append(f"stuck at step {self.step}, killed {dict(self.killed)}")
                self.party.done.set()
                return
            await asyncio.sleep(0.05)

    async def _disturb(self) -> None:
        deck: list[str] = []
        wanted = 0 if self.pace_s < 0 else self.plan.kills
        while self.kills < wanted:
            due = int(self.kills * (self.plan.all_steps - 1) / wanted)  # by which step at least
            since_s = self._moved_s
            while self._moved_s == since_s or self.step < due:  # noqa: ASYNC110 - a file
                await asyncio.sleep(0.05)
            back_s = self._moved_s
            if self.kills:
                self.tell(f"    went on {back_s - self._killed_s:.1f} s later, step {self.step}")
            if self.step <= due:
                await asyncio.sleep(self.rng.uniform(0, self.pace_s))
            if not deck:
                deck = self.rng.sample(KINDS, len(KINDS))
            kind = next((one for one in deck if self.party.found(one)), "")
            if not kind:
                deck = []
                continue
            deck.remove(kind)
            pid = self.rng.choice(self.party.found(kind) or [0])
            if not pid or not self.party.kill(kind, pid):
                continue
            self._killed_s = time.monotonic()
            self._moved_s = self._killed_s
            self.kills += 1
            self.killed[kind] += 1
            self.tell(
                f"{time.strftime('%H:%M:%S')} kill {self.kills}/{wanted}: {kind} (pid {pid}) "
                f"at step {self.step}"
            )


class Load:
    """Both modes on one Postgres, in a directory that goes afterwards."""

    def __init__(
        self,
        home: Path,
        plan: Plan,
        postgres: Postgres,
        tell: Tell,
        played: Mapping[str, Any] | None = None,
    ) -> None:
        """`played` is another script than that of training."""
        self.home, self.plan, self.postgres, self.tell = home, plan, postgres, tell
        self._shared = home / "shared"
        self._shared.mkdir()
        made = home / "made"
        made.mkdir()
        spec = tiny_spec(DistStore(self._shared / "sandbox" / "dists"), made)
        self._task = task_of(spec)
        self._script = home / "script.json"
        self._script.write_text(json.dumps(played or script()))
        self.model = train_model.blank(home / "blank", default_model())

    def party(self, name: str, model: Path, *, real: bool = False) -> Party:
        """Services of a run over the database of its name; States are shared."""
        flags = self.flags(name, model, real=real)
        return Party(self.home / name, self.postgres, flags, self.home / name / "job.json")

    def flags(self, name: str, model: Path, *, real: bool = False) -> Mapping[str, Sequence[str]]:
        """Those of each service of such a run."""
        policy = ["--model", str(model), "--http", ""]
        policy += ["--engine", "torch", "--threads", "1"] if real else self._scripted
        return {
            "dataset": ["--database-url", self.postgres.url_of(name)],
            "sandbox": ["--home", str(self._shared), "--warm-seats", "1"],
            "policy": policy,
            "judge": [],
            "learner": ["--engine", "plain"],
        }

    @property
    def _scripted(self) -> list[str]:
        return ["--engine", "scripted", "--script", str(self._script)]

    def job(self, party: Party, model: Path, **changes: Any) -> Job:
        """The driver's job over a party."""
        config = {
            "name": _RUN,
            "base_uri": str(model),
            "tasks": TASKS,
            "steps": self.plan.all_steps,
            "groups_per_step": _GROUPS,
            "group_size": _SIZE,
            "max_refills": 2,
            "concurrency": 4,
            "labels": labels_of(Budget(turns=3), Sampling(), Knobs()),
            "idle_deadline_s": 180.0,
            "recovery_deadline_s": 180.0,
            # A script has no logprobs to correct by.
            "hyperparameters": {"learning_rate": 1e-3, "importance_cap": -1.0},
        }
        home = party.home
        made = Job(
            party.endpoints, config | changes, str(home / "progress"), str(home / "result.json")
        )
        made.write(home / "job.json")
        return made

    async def prepare(self, stack: Stack) -> None:
        """Tasks that differ by what their log says, admitted."""
        await stack.sandbox.get_capabilities()  # a stream is not tried again; this is
        state_id = ""
        async for event in stack.state.prepare_state(self._task.environment):
            if event.HasField("state"):
                state_id = event.state.id
        for name in TASKS:
            task = pb.Task()
            task.CopyFrom(self._task)
            task.id = name
            await stack.tasks.import_tasks([task])
            report = samples.report(name)
            report.state_id = state_id
            error = f"cannot import name 'hello' from 'wordlib' (/{name}.py)"
            report.error_log = f"E   ImportError: {error}\n"
            await stack.tasks.record_gate(report)

    async def begin(self, name: str) -> None:
        """A database with tasks and a run that has done nothing yet."""
        await asyncio.to_thread(self.database, name, "template1")
        party = self.party(name, self.model)
        job = self.job(party, self.model)
        party.start(*SERVICES)
        try:
            async with Stack(Endpoints(**party.endpoints), patience_s=120.0) as stack:
                await self.prepare(stack)
                with contextlib.suppress(_MadeError):
                    await train_grpo(stack, job.grpo(), _stop)
        finally:
            await asyncio.to_thread(party.stop)

    def database(self, name: str, template: str) -> None:
        """A database of that name, a copy of another one."""
        with psycopg.connect(self.postgres.url, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')  # type: ignore[arg-type]

    async def quiet(self) -> Storm:
        """The run that nothing disturbs."""
        await self.begin("begun")
        return await self._run("quiet", self.model, -1.0)

    async def _run(self, name: str, model: Path, pace_s: float, **changes: Any) -> Storm:
        """A run of its own database; undisturbed where the pace is below 0."""
        real = bool(changes)
        await asyncio.to_thread(self.database, name, "begun" if not real else "template1")
        party = self.party(name, model, real=real)
        self.job(party, model, **changes)
        if real:
            await self._prepared(party)
        rng = random.Random(f"{self.plan.seed} {name}")
        storm = Storm(party, self.plan, party.home / "progress", pace_s, rng, self.tell)
        began_s = time.monotonic()
        await storm.run()
        storm.took_s = time.monotonic() - began_s
        self.tell(f"{name}: {storm.took_s:.0f} s, {storm.step} steps")
        if pace_s >= 0 and storm.kills < self.plan.kills:
            party.faults.append(f"the run ended after {storm.kills} of {self.plan.kills} kills")
        return storm

    async def _prepared(self, party: Party) -> None:
        party.start("dataset", "sandbox")
        try:
            async with Stack(Endpoints(**party.endpoints), patience_s=120.0) as stack:
                await self.prepare(stack)
        finally:
            await asyncio.to_thread(party.stop)

    async def sync(self, quiet: Storm) -> dict[str, Any]:
        """A disturbed run from the beginning of the quiet one; equal weights."""
        storm = await self._run("struck", self.model, quiet.step_s)
        report = self._report("struck", storm)
        report["faults"] += [f"quiet: {f}" for f in self._report("quiet", quiet)["faults"]]
        (want, file), (found, other) = self._weights("quiet"), self._weights("struck")
        report["undisturbed_sha256"], report["sha256"] = want, found
        if not want or want != found:
            report["faults"].append(f"weights differ: {want or 'none'} and {found or 'none'}")
            urls = [self.postgres.url_of(name) for name in ("quiet", "struck")]
            report["faults"] += different(*urls, _RUN)
        elif not filecmp.cmp(file, other, shallow=False):
            report["faults"].append(f"{file} and {other} are not bit-equal")
        return report

    async def asynchronous(self, quiet: Storm) -> dict[str, Any]:
        """A real engine one step ahead of the learner."""
        source = self.party("quiet", self.model)
        source.start("dataset")
        try:
            async with Stack(Endpoints(**source.endpoints), patience_s=120.0) as stack:
                await stack.queue.get_queue("")  # a stream is not tried again; this is
                wanted = pb.TrajectoryFilter()
                shown = {
                    (tuple(t.token_ids), tuple(t.loss_mask))
                    async for t in stack.trajectories.export_trajectories(wanted)
                }
        finally:
            await asyncio.to_thread(source.stop)
        model = self.home / "taught"
        loss = await asyncio.to_thread(train_model.taught, model, self.model, sorted(shown))
        self.tell(f"async: a model was shown {len(shown)} contexts, loss {loss:.3f}")
        storm = await self._run(
            "ahead",
            model,
            quiet.step_s,
            prefetch=True,
            checkpoint_every=2,
            hyperparameters={"learning_rate": 1e-6},
        )
        return self._report("ahead", storm)

    def _weights(self, name: str) -> tuple[str, Path]:
        """Digest and file of the last weights."""
        with contextlib.suppress(FileNotFoundError):
            result = json.loads((self.home / name / "result.json").read_text())
            with psycopg.connect(self.postgres.url_of(name)) as connection:
                row = connection.execute(
                    "SELECT uri FROM checkpoints WHERE sha256 = %s", (result["sha256"],)
                ).fetchone()
            if row is not None:
                return str(result["sha256"]), Path(row[0]) / "model.safetensors"
        return "", Path()

    def _report(self, name: str, storm: Storm) -> dict[str, Any]:
        """What is known of a run."""
        faults = list(storm.party.faults)
        facts: dict[str, Any] = {}
        try:
            found = look(self.postgres.url_of(name), _RUN, self.plan.all_steps, _GROUPS)
            facts, more = found.facts, found.faults
            faults += more
        except (psycopg.Error, IndexError) as error:
            faults.append(f"the database cannot be looked at: {error!r}")
        return {**facts, "kills": storm.kills, "killed": dict(storm.killed), "faults": faults}


class _MadeError(BaseException):
    """The run is made."""


def _stop(progress: Progress) -> None:
    raise _MadeError


async def _all(home: Path, plan: Plan, postgres: Postgres, tell: Tell) -> dict[str, Any]:
    load = Load(home, plan, postgres, tell)
    quiet = await load.quiet()
    parts = {"sync": load.sync, "async": load.asynchronous}
    return {mode: await parts[mode](quiet) for mode in plan.modes}


def storm(plan: Plan, tell: Tell = lambda line: None, keep: Path | None = None) -> dict[str, Any]:
    """One run in a directory that goes afterwards; the report.

    `keep` gets the logs where something was at fault.
    """
    home = Path(tempfile.mkdtemp(prefix="regreen-train-"))
    home.chmod(0o711)
    try:
        with Postgres(home / "pg") as postgres:
            report = asyncio.run(_all(home, plan, postgres, tell))
        if keep is not None and any(part["faults"] for part in report.values()):
            for log in home.glob("*/*.log"):
                keep.mkdir(parents=True, exist_ok=True)
                shutil.copy(log, keep / f"{log.parent.name}-{log.name}")
        return report
    finally:
        remove(home)


def main(argv: list[str] | None = None) -> int:
    """Run it; 0 when nothing was at fault."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m tests.load.train", description=__doc__
    )
    usual = Plan()
    parser.add_argument("--kills", type=int, default=usual.kills, help="in each mode")
    parser.add_argument("--steps", type=int, default=usual.steps, help="0: half as many as kills")
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.add_argument("--mode", choices=("sync", "async", "both"), default="both")
    parser.add_argument("--deadline-s", type=float, default=usual.deadline_s)
    parser.add_argument("--out", type=Path, default=Path("build/bench/train-faults.json"))
    given = parser.parse_args(argv)
    modes = usual.modes if given.mode == "both" else (given.mode,)
    plan = Plan(given.kills, given.steps, given.seed, modes, given.deadline_s)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    report = storm(
        plan, lambda line: print(line, file=sys.stderr, flush=True), given.out.with_suffix("")
    )
    given.out.write_text(json.dumps(report, indent=2) + "\n")
    for mode, part in report.items():
        for name, value in part.items():
            print(f"{mode:5} {name:20} {value}")
        print(f"{mode:5} {'verdict':20} {'BREACH' if part['faults'] else 'held'}")
    return 1 if any(part["faults"] for part in report.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

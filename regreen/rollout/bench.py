"""The whole stack under load: scripted episodes, up to a thousand at a time, and what they cost.

- `python -m regreen.rollout.bench --json` prints one JSON object; without the flag, a table.
- Driver, rollouts, queue, Postgres, sandboxes and judge are the real ones; only the engine behind
  the policy service is simulated: it answers a script token by token at a set pace. That pace is
  the floor of a turn's time, and what a turn takes beyond it is the overhead.
- With real builds (`--builds real`) each episode changes the source in a way of its own, so that
  its validation is built and tested, and not looked up.
- Tools run in real sandboxes of a shipped task. The tool is the cheapest real one (`read_file`),
  because commands would measure the sandboxed program; every rollout ends with the same diff, so
  that its validation is looked up and not run.
- One sweep over episodes at a time says where the overhead leaves the flat part, and what is full
  there; one over turns of an episode says what a turn and what an episode cost, by a line.
- Processor time is split by process, and has a floor: as many empty calls as a turn makes.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from regreen.client.stack import Stack
from regreen.common.v1 import GRADER_BUILD_GATES, MODE_ANY_FIX, MODE_KEEP_NEW, PIPELINE_SIMPLIFIED
from regreen.dataset import v1 as pb
from regreen.home import default_home
from regreen.ids import new_id
from regreen.model_store import ensure_default_model
from regreen.rollout.bench_report import QUICK, Measured, Plan, Turn, report_of, table
from regreen.rollout.bench_stack import (
    DRIVER,
    Services,
    peak_bytes,
    resident_bytes,
    watching,
)
from regreen.rollout.context import Budget, Knobs, Sampling, labels_of
from regreen.rollout.episode import Runner
from regreen.rollout.worker import RolloutProgress, Worker

_TASK = "m2r-0.2.1__docutils-0.20.1"
"""Small, and fair in both modes: episodes that build are told by theirs."""
_EMPTY_CALLS, _LANES = 2000, 8
_PAGE = 200
_WAYS = 4096
"""Changes to choose from where builds are real."""
_WRITTEN = "/work/repo/load.py"
_KEEP = "versions must stay new"
"""What the prompt says in the mode of episodes that build."""
Prepare = Callable[[Stack], Awaitable[str]]
"""Brings a task that rollouts can run on; its id."""


def say(line: str) -> None:
    """Say how far it is, on standard error."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()


def script(plan: Plan) -> dict[str, Any]:
    """Another part of a file in every turn, after words that fill the output."""
    words = "so it is, and " * (plan.tokens // 5)
    turns = max(plan.turns, *plan.lengths)
    reads = [
        {"text": words + _read(turn), "turn": turn, "delay_s": 1 / plan.tokens_per_s}
        for turn in range(turns)
    ]
    return {"responses": [_changes(plan), *reads] if plan.builds == "real" else reads}


def _changes(plan: Plan) -> dict[str, Any]:
    """A file that no other episode writes, chosen by the seed, where versions must stay."""
    mark = new_id("load")
    texts = [
        _call("write_file", path=_WRITTEN, content=f"{mark} {number}\n") for number in range(_WAYS)
    ]
    pace_s = 1 / plan.tokens_per_s
    return {"texts": texts, "turn": 0, "when": _KEEP, "rotate": True, "delay_s": pace_s}


def _read(turn: int) -> str:
    return _call("read_file", path="requirements.lock", start=turn + 1)


def _call(name: str, /, **arguments: object) -> str:
    return f"<tool>{json.dumps({'name': name, 'arguments': arguments})}</tool>"


async def shipped_task(stack: Stack) -> str:
    """A shipped task that the gate has admitted here; its id.

    Raises:
        RuntimeError: the gate does not admit it on this host; says why.
    """
    from regreen.tasks.admit import verify
    from regreen.tasks.jsonl import shipped_distributions, shipped_tasks

    record = next(task for task in shipped_tasks() if task.id == _TASK)
    report = await verify(
        stack, record, shipped_distributions(), repeats=2, progress=lambda _, text: say(text)
    )
    if report.status != pb.TASK_STATUS_ADMITTED:
        raise RuntimeError(f"task {_TASK} is not admitted here: {report.reason}")
    return record.id


class Bench:
    """One stack, and rollouts on it."""

    def __init__(self, plan: Plan, services: Services, stack: Stack, task_id: str) -> None:
        self._plan, self._services, self._stack, self._task_id = plan, services, stack, task_id
        self._runner = Runner(stack)

    async def episodes(
        self, at_once: int, count: int, turns: int, *, builds: bool = False
    ) -> Measured:
        """Run `count` episodes of so many turns through the queue, `at_once` at a time."""
        run_id = (await self._stack.runs.create_run(new_id("bench"), "grpo")).run.id
        budget = Budget(turns=turns, context_tokens=8192, turn_tokens=2 * self._plan.tokens + 64)
        labels = labels_of(budget, Sampling(), Knobs())
        groups = [self._group(run_id, seed, labels, builds) for seed in range(count)]
        for start in range(0, count, _PAGE):
            await self._stack.queue.enqueue_groups(groups[start : start + _PAGE])
        clock = _Episodes()
        worker = Worker(
            self._stack, self._runner, run_id=run_id, concurrency=at_once, listener=clock
        )
        self._services.calls_s.clear()
        resident = resident_bytes()
        peak_bytes(reset=True)
        before, began_s = self._services.cpu_s(), time.perf_counter()
        async with watching(self._services) as seen:
            stats = await worker.run(until_idle=True)
        wall_s, after = time.perf_counter() - began_s, self._services.cpu_s()
        peak, calls_s = peak_bytes(), dict(self._services.calls_s)
        if stats.committed != count:
            raise RuntimeError(f"{stats.committed} of {count} rollouts were committed: {stats}")
        found = await self._turns(run_id)
        cpu_s = {name: after[name] - before[name] for name in after}
        given_back = stats.given_back + stats.expired
        return Measured(
            at_once, count, wall_s, cpu_s, found, resident, peak, tuple(seen.busy), given_back,
            clock.took_s, calls_s, {**seen.memory, DRIVER: peak},
        )  # fmt: skip

    def _group(self, run_id: str, seed: int, labels: Mapping[str, str], builds: bool) -> pb.Group:
        return pb.Group(
            run_id=run_id,
            task_id=self._task_id,
            size=1,
            seed=seed,
            step=1,
            labels=labels,
            pipeline=PIPELINE_SIMPLIFIED,
            mode=MODE_KEEP_NEW if builds else MODE_ANY_FIX,  # what the script knows it by
            grader=GRADER_BUILD_GATES,
        )

    async def _turns(self, run_id: str) -> list[Turn]:
        wanted = pb.TrajectoryFilter(run_id=run_id)
        found = []
        async for trajectory in self._stack.trajectories.export_trajectories(wanted):
            found += turns_of(trajectory)
        return found

    async def empty_call_s(self) -> dict[str, float]:
        """Processor seconds of a call that asks for nothing to be done, by its two ends."""
        before = self._services.cpu_s()

        async def lane() -> None:
            for _ in range(_EMPTY_CALLS // _LANES):
                await self._stack.policy.get_policy()

        await asyncio.gather(*(lane() for _ in range(_LANES)))
        after = self._services.cpu_s()
        return {name: (after[name] - before[name]) / _EMPTY_CALLS for name in (DRIVER, "policy")}


class _Episodes:
    """How long each episode takes, from its lease to its answered commit."""

    def __init__(self) -> None:
        self._began_s: dict[str, float] = {}
        self.took_s: list[float] = []

    def __call__(self, progress: RolloutProgress) -> None:
        """Hear of a rollout. One that is tried again took the time of all its tries."""
        if progress.what == "leased":
            self._began_s.setdefault(progress.rollout_id, time.perf_counter())
        elif progress.what == "committed":
            self.took_s.append(time.perf_counter() - self._began_s[progress.rollout_id])


def turns_of(trajectory: pb.Trajectory) -> list[Turn]:
    """The turns of a trajectory, each with what its tool took."""
    outputs = [turn for turn in trajectory.turns if turn.role == pb.TURN_ROLE_POLICY]
    results = [turn for turn in trajectory.turns if turn.role == pb.TURN_ROLE_TOOL]
    return [
        Turn(
            index,
            said.token_end - said.token_start,
            said.duration.ToNanoseconds() / 1e9 + seen.duration.ToNanoseconds() / 1e9,
            seen.duration.ToNanoseconds() / 1e9,
        )
        for index, (said, seen) in enumerate(zip(outputs, results, strict=True))
    ]


async def measure(plan: Plan, home: Path, model: Path, prepare: Prepare) -> dict[str, Any]:
    """Everything, in one run; the report."""
    path = home / "script.json"
    path.write_text(json.dumps(script(plan)))
    most = max(*plan.levels, plan.lengths_at, *plan.build_levels)
    services = Services(home, model, path, most)
    async with services.running() as stack:
        task_id = await prepare(stack)
        bench = Bench(plan, services, stack, task_id)
        await bench.episodes(4, 4, max(plan.turns, *plan.lengths))  # validates; warms every path
        empty = await bench.empty_call_s()
        lengths, levels, builds = list[Measured](), list[Measured](), list[Measured]()
        for turns in plan.lengths:
            lengths.append(await bench.episodes(plan.lengths_at, plan.lengths_at, turns))
            say(f"{plan.lengths_at} episodes of {turns} turns")
        for level in plan.levels:
            levels.append(await bench.episodes(level, max(level, plan.least), plan.turns))
            say(f"{level} episodes at a time: {levels[-1].wall_s:.0f} s")
        for level in plan.build_levels if plan.builds == "real" else ():
            turns = plan.build_turns
            builds.append(await bench.episodes(level, 2 * level, turns, builds=True))
            say(f"{level} episodes at a time that build: {builds[-1].wall_s:.0f} s")
    report = report_of(plan, levels, lengths, empty, builds)
    return {**report, "counts_builds": services.counts_builds}


_SHAPE = ("levels", "turns", "tokens", "tokens_per_s", "builds")
"""Options that choose a shape."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m regreen.rollout.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    usual = Plan()
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="a small shape, for smoke tests")
    parser.add_argument("--levels", help=",".join(map(str, usual.levels)))
    parser.add_argument("--turns", type=int, help=str(usual.turns))
    parser.add_argument("--tokens", type=int, help=str(usual.tokens))
    parser.add_argument("--tokens-per-s", type=float, help=str(usual.tokens_per_s))
    parser.add_argument("--builds", choices=("none", "real"), help=usual.builds)
    given = vars(parser.parse_args(argv))
    shape = {name: given[name] for name in _SHAPE if given[name] is not None}
    if given["quick"] and shape:
        flag = next(iter(shape)).replace("_", "-")
        parser.error(f"--quick is a shape of its own; leave --{flag} out")
    if "levels" in shape:
        shape["levels"] = tuple(int(part) for part in shape["levels"].split(",") if part)
    plan = QUICK if given["quick"] else replace(usual, **shape)
    model = ensure_default_model(default_home(), say).path.resolve()
    with tempfile.TemporaryDirectory(prefix="regreen-bench-") as folder:
        home = Path(folder)
        home.chmod(0o711)
        report = asyncio.run(measure(plan, home, model, shipped_task))
    sys.stdout.write(json.dumps(report, indent=1) + "\n" if given["json"] else table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs the tests of one validation in several forks at once, each its share of the test files.

- Every worker is a fresh fork of the State with the same diff: a process, a result pipe, a key,
  controls, files, a network and process ids of its own. Nothing is shared, so nothing interferes.
- The limits of one sandbox are divided among them.
- Each collects everything and runs its files in the order of the whole. Workers that collected
  otherwise than the others, left a test out, share a test's id, were tampered with or did not come
  to their own end have no result together: the tests are run again, one after the other.
- Only States for which that was shown to be the same are run so: untouched, and with a diff that
  passes, every test had the same outcome. A State that was seen to differ never is again.
"""

import asyncio
import json
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from regreen.rpc import logging
from regreen.rpc.errors import RegreenError
from sandbox_svc import metrics
from sandbox_svc.backends.base import Box, Captured, EndReason, Limits, Runtime
from sandbox_svc.builders import testrun
from sandbox_svc.builders.testrun import TestRun
from sandbox_svc.conditions import PINNED
from sandbox_svc.forks import fork_of
from sandbox_svc.plans import apply, placed
from sandbox_svc.state_records import State
from sandbox_svc.states import StateStore
from sandbox_svc.verdicts import Outcome, Plan, Validation

REMEMBERED = 1024
TRIALS = 3
"""Trials of one State that may come to nothing, until the service starts anew."""
_LEAST_MEMORY, _LEAST_PIDS = 256 << 20, 32
"""Of one worker."""
_NO_TESTS = 5


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """When tests are run by several workers."""

    most: int = 1
    """Workers of one validation; 1: none beside the first."""
    check_share: float = 0.05
    """Share of their verdicts that a run one after the other checks."""
    least_s: float = 4.0
    """Time that the tests of a State take, below which it is not worth it."""
    gain: float = 0.8
    """Share of the time of a serial run that workers must be expected to stay below."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What was shown of a State."""

    created_s: float
    count: int
    files: Mapping[str, float]
    """Seconds of the tests of each file."""

    def share(self) -> dict[str, int]:
        """The worker of each file: the longest first, always to who has least."""
        return shares(self.files, self.count)


class Workers:
    """Which States may be run by several workers, and running them."""

    checks, mismatches = metrics.WORKER_CHECKS, metrics.WORKER_MISMATCHES

    def __init__(
        self,
        states: StateStore,
        runtime: Runtime,
        home: Path,
        *,
        limits: Limits,
        settings: WorkerSettings,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._states, self._runtime, self._limits = states, runtime, limits
        self._settings, self._chance = settings, chance
        self._home = home / "workers"
        self._known: OrderedDict[str, Proof | str] = OrderedDict()
        self._trials: OrderedDict[str, int] = OrderedDict()
        states.changed.append(self._changed)

    def why_not(self, state_id: str) -> str:
        """Why a State's tests are run one after the other; empty if they need not be."""
        found = self._look(self._states.known(state_id))
        if found is None:
            return "it was not shown to be the same"
        return found if isinstance(found, str) else ""

    def proof(self, plan: Plan, seed: int) -> Proof | None:
        """What allows a plan to be run by workers."""
        if not self._suits(plan, seed) or plan.alone:
            return None
        found = self._look(plan.state)
        return found if isinstance(found, Proof) else None

    def trial(self, plan: Plan, serial: Validation) -> Proof | None:
        """What is to be shown of a State, now that a serial verdict on it passes."""
        good = serial.outcome is Outcome.PASSED and serial.lasting and not serial.partial
        if not good or not self._suits(plan, plan.options.seed):
            return None
        if self._look(plan.state) is not None:
            return None
        tried = self._trials.get(plan.state.id, 0)
        files: dict[str, float] = {}
        for test in serial.tests:
            home = test.id.partition("::")[0]
            files[home] = files.get(home, 0.0) + test.seconds
        found = Proof(plan.state.created_s, self._count(len(files)), files)
        if tried >= TRIALS or found.count < 2 or not self._worth(found, serial.seconds):
            return None
        self._trials[plan.state.id] = tried + 1
        while len(self._trials) > REMEMBERED:
            self._trials.popitem(last=False)
        return found

    def _suits(self, plan: Plan, seed: int) -> bool:
        """Whether a plan is one that workers can run as they are."""
        options = plan.options
        special = seed or options.coverage or options.stop_early or options.only_tests
        special = special or options.conditions != PINNED
        return not special and plan.lock is None and options.repeat == 1

    def _count(self, files: int) -> int:
        limits = self._limits
        bounds = [self._settings.most, files, int(limits.cpus)]
        bounds += [limits.memory_bytes // _LEAST_MEMORY, limits.pids // _LEAST_PIDS]
        return max(1, min(bounds))

    def _worth(self, proof: Proof, wall_s: float) -> bool:
        """Whether workers would be faster: each collects all, and runs its share."""
        total = sum(proof.files.values())
        if total < self._settings.least_s:
            return False
        loads = [0.0] * proof.count
        for file, number in proof.share().items():
            loads[number] += proof.files[file]
        return max(0.0, wall_s - total) + max(loads) <= self._settings.gain * wall_s

    def wants_check(self, _state_id: str) -> bool:
        """Whether a verdict of workers is to be checked by a serial run."""
        return self._chance() < self._settings.check_share

    def check_again(self, state_id: str) -> None:
        """A check came to nothing; others will."""

    def prove(self, state_id: str, proof: Proof) -> None:
        """A State was shown to be the same in workers; one that is deleted by now is nothing."""
        if self._states.peek(state_id) is None:
            return
        self._remember(state_id, proof)
        fields = {"created_s": proof.created_s, "count": proof.count, "files": dict(proof.files)}
        self._write(state_id, fields)
        logging.get().info("state_runs_in_workers", state_id=state_id, workers=proof.count)

    def differed(self, state_id: str, what: str) -> None:
        """A State's verdicts differ: its tests are never run by workers again."""
        self.mismatches.inc()
        logging.get().error("workers_verdict_differs", state_id=state_id, difference=what)
        state = self._states.peek(state_id)
        if state is None:
            return  # deleted meanwhile, and what was known of it with it
        self._remember(state_id, f"its verdicts differed: {what}")
        self._write(state_id, {"created_s": state.created_s, "never": what})

    def _remember(self, state_id: str, found: Proof | str) -> None:
        self._known[state_id] = found
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def _write(self, state_id: str, fields: Mapping[str, Any]) -> None:
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            new = self._home / f".{state_id}"
            new.write_text(json.dumps(fields), encoding="utf-8")
            new.rename(self._home / state_id)
        except OSError as error:
            logging.get().error("proof_not_recorded", state_id=state_id, error=str(error))

    def _look(self, state: State) -> Proof | str | None:
        """What is known of a State, also from before a restart."""
        found = self._known.get(state.id)
        if found is None:
            found = self._read(state)
            if found is not None:
                self._remember(state.id, found)
        current = not isinstance(found, Proof) or (
            found.created_s == state.created_s and found.count == self._count(len(found.files))
        )
        return found if current else None

    def _read(self, state: State) -> Proof | str | None:
        try:
            fields = json.loads((self._home / state.id).read_text("utf-8"))
            if fields["created_s"] != state.created_s:
                return None
            if "never" in fields:
                return f"its verdicts differed: {fields['never']}"
            return Proof(fields["created_s"], fields["count"], fields["files"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _changed(self, state_id: str) -> None:
        if self._states.peek(state_id) is None:
            self._known.pop(state_id, None)
            (self._home / state_id).unlink(missing_ok=True)

    async def run(
        self, plan: Plan, options: testrun.RunOptions, proof: Proof
    ) -> tuple[Plan, TestRun] | str:
        """The plan as applied and the run of all workers, or why there is none."""
        part = {"of": proof.count, "files": proof.share()}
        works = [
            asyncio.create_task(
                self._one(plan, replace(options, part={"share": {**part, "number": number}}), proof)
            )
            for number in range(proof.count)
        ]
        try:
            await asyncio.wait(works, return_when=asyncio.FIRST_EXCEPTION)
            ended = [work.result() for work in works if work.done()]
        except (RegreenError, _NoResult) as error:
            return str(error)
        finally:
            for work in works:
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)
        plan, runs = ended[0][0], [run for _, run in ended]
        try:
            return plan, merged(runs)
        except _NoResult as error:
            return str(error)

    async def _one(
        self, plan: Plan, options: testrun.RunOptions, proof: Proof
    ) -> tuple[Plan, TestRun]:
        """One worker; a run that did not come to its own end is none."""
        limits = divided(self._limits, proof.count)

        def fork() -> AbstractAsyncContextManager[Box]:
            return fork_of(self._states, self._runtime, plan.state.id, limits)

        async with fork() as box:
            applied = await apply(plan, box)
            run = await testrun.run_tests(box, options)
            run = await testrun.looked_at(run, box, plan.facts, fork, ours=placed(applied))
        if problem := _unfit(run):
            raise _NoResult(problem)
        return applied, run


class _NoResult(Exception):
    """What the workers did cannot be put together."""


def shares(files: Mapping[str, float], count: int) -> dict[str, int]:
    """The worker of each file: the longest first, always to who has least."""
    loads = [(0.0, number) for number in range(count)]
    found: dict[str, int] = {}
    for file in sorted(files, key=lambda f: (-files[f], f)):
        load, number = min(loads)
        loads[number] = (load + files[file] + 1e-6, number)
        found[file] = number
    return found


def divided(limits: Limits, count: int) -> Limits:
    """The limits of one of so many workers; together they keep those of one sandbox."""
    return replace(
        limits,
        memory_bytes=limits.memory_bytes // count,
        pids=limits.pids // count,
        cpus=limits.cpus / count,
        disk_bytes=limits.disk_bytes // count,
        inodes=limits.inodes // count,
        output_bytes=limits.output_bytes // count,
    )


def _unfit(run: TestRun) -> str:
    """Why the run of one worker is none, whatever the others say; empty if it is one."""
    if run.result.reason is not EndReason.EXIT:
        return f"a worker was ended by {run.result.reason.value}"
    if run.result.overruns:
        return f"a worker went over a limit: {', '.join(sorted(run.result.overruns))}"
    if run.tampered or run.crash or not run.complete or run.part is None or run.stopped:
        return f"a worker did not come to its own end {run.tampered or run.crash}".rstrip()
    if len(run.tests) != run.part.chosen:
        return f"{len(run.tests)} of {run.part.chosen} tests of a worker reported"
    if run.status not in (0, 1) and not (run.status == _NO_TESTS and not run.part.chosen):
        return f"pytest of a worker ended with status {run.status}"
    return ""


def merged(runs: Sequence[TestRun]) -> TestRun:
    """The run that all workers together are.

    Raises:
        _NoResult: they are not the parts of one run.
    """
    first, parts = runs[0], [run.part for run in runs if run.part is not None]
    if len({(part.collected, part.ids_sha256) for part in parts}) != 1:
        raise _NoResult("the workers collected different tests")
    if any(run.collect_errors.keys() != first.collect_errors.keys() for run in runs):
        raise _NoResult("the workers could not collect different files")
    tests = {name: test for run in runs for name, test in run.tests.items()}
    if len(tests) != sum(len(run.tests) for run in runs) or len(tests) != parts[0].collected:
        raise _NoResult("the workers ran one test twice, or one not at all")
    status = max((run.status for run in runs if run.status != _NO_TESTS), default=_NO_TESTS)
    results = [run.result for run in runs]
    result = replace(
        first.result,
        exit_code=status,
        stdout=_joined([r.stdout for r in results]),
        stderr=_joined([r.stderr for r in results]),
        wall_s=max(r.wall_s for r in results),
        cpu_s=sum(r.cpu_s for r in results),
        peak_memory_bytes=sum(r.peak_memory_bytes for r in results),
        least_free_bytes=min(r.least_free_bytes for r in results),
        channel=b"",
    )
    replaced = frozenset[str]().union(*(run.replaced for run in runs))
    return replace(
        first, tests=tests, collected=len(tests), status=status, result=result, replaced=replaced,
        part=None,
    )  # fmt: skip


def _joined(streams: Sequence[Captured]) -> Captured:
    """What the workers printed, one after the other."""
    text = b"".join(stream.text.encode() for stream in streams)
    return Captured(head=text, total_bytes=len(text))

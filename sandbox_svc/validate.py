"""Judges a diff: the pinned build and tests in a fresh fork of the task's State.

- The verdict depends on the State, the allowed part of the diff and the options, on nothing else
  that an agent could write: its sandbox, environment and processes are not part of the fork.
- Tests and validation files are those of the State; what the diff says about them is reported, and
  a run that wrote over them is not believed.
- The lock file is the only way to change the environment; the validator installs from it itself.
- Equal requests share one run, which waits for a place itself and ends with its last waiter.
- Only verdicts of runs that came to their own end are cached.
- A run that ends its sandbox twice has failed; one whose sandbox others ended has no verdict.
- A run under other conditions than the pinned ones is cold, serial and marked as a probe.
- A run that was started ahead (`warm.py`) is worth what a cold one is, or is done again cold.
- A run that was shared among forks (`workers.py`) is worth what a serial one is, or done again;
  who passes the cache over asks for an independent look and gets a serial one.
"""

import asyncio
import contextlib
import json
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from regreen.lockfile import Lock, LockChange, lock_change, normalize, parse_lock
from regreen.rpc.errors import (
    FailedPrecondition,
    InfraError,
    InvalidArgument,
    NotFound,
    RegreenError,
    SandboxLost,
)
from sandbox_svc import metrics
from sandbox_svc.backends import base
from sandbox_svc.backends.base import Box, Command, EndReason, Limits, Runtime
from sandbox_svc.backends.fds import no_space
from sandbox_svc.builders import testrun
from sandbox_svc.builders.base import LOCK, REPO, RUNNER, TOOLS, FileChange
from sandbox_svc.builders.interpreters import stamps
from sandbox_svc.builders.protect import check_changes, split_by
from sandbox_svc.builders.standing import refuse_loose
from sandbox_svc.builders.testrun import TestRun
from sandbox_svc.conditions import PINNED, settle
from sandbox_svc.forks import fork_of, own_layers, put_aside
from sandbox_svc.plans import apply, changes_sha256, check_part, key_of, part_of, placed
from sandbox_svc.spares import Miss
from sandbox_svc.states import StateStore
from sandbox_svc.verdicts import (
    Outcome,
    Plan,
    Validation,
    ValidationOptions,
    conclude,
    difference,
    required_ids,
    verdict_without_run,
)
from sandbox_svc.warm import WarmPool
from sandbox_svc.workers import Proof, Workers

log = structlog.get_logger(__name__)

__all__ = ["Outcome", "Validation", "ValidationOptions", "Validator", "changes_sha256"]
CACHE_BYTES = 256 << 20
"""Bound on the texts that cached verdicts hold."""
TRIES = 2
SYNC_TIMEOUT_S = 180.0


class _Rejected(Exception):
    """The diff asks for something that is not allowed."""


class _SandboxEnded(Exception):
    """The first process of a sandbox died under the tests."""

    def __init__(self, log: str, *, itself: bool) -> None:
        super().__init__("the sandbox died under the tests")
        self.log, self.itself = log, itself


@dataclass(slots=True)
class _Flight:
    """A running validation and how many wait for it."""

    task: "asyncio.Task[Validation]"
    waiters: int = 0


Place = Callable[[], contextlib.AbstractAsyncContextManager[object]]
"""Waits for leave to run; the leave is returned at the end."""


class Validator:
    """Validates against the states of one service."""

    def __init__(
        self,
        states: StateStore,
        runtime: Runtime,
        *,
        limits: Limits | None = None,
        clock: Callable[[], float] | None = None,
        place: Place = contextlib.nullcontext,
        cache_bytes: int = CACHE_BYTES,
        warm: WarmPool | None = None,
        workers: Workers | None = None,
    ) -> None:
        self._states, self._runtime, self._place = states, runtime, place
        self._cache_bytes, self._cached_bytes = cache_bytes, 0
        self._limits = limits or Limits()
        self._clock = clock or asyncio.get_running_loop().time
        self._cache: OrderedDict[str, Validation] = OrderedDict()
        self._running: dict[str, _Flight] = {}
        self._indexes: dict[str, Mapping[str, Any]] = {}
        self._warm, self._workers = warm, workers
        self._forks = partial(fork_of, states, runtime)
        self._checks: set[asyncio.Task[None]] = set()

    async def validate(
        self,
        state_id: str,
        changes: Iterable[FileChange],
        options: ValidationOptions | None = None,
        *,
        skip_cache_lookup: bool = False,
    ) -> Validation:
        """The verdict on a diff.

        Raises:
            NotFound: no such state.
            InvalidArgument: a malformed change or option.
            FailedPrecondition: the state was not prepared by a builder of this version, or has
                no test that could be required.
            InfraError: the platform failed; retry, never score.
            DiskFull: it failed and there is no space, so that nothing is known of the diff.
        """
        plan = await self._plan(state_id, changes, options or ValidationOptions())
        key, whole = key_of(plan), key_of(plan, whole=True)
        for one in (whole, key):  # a whole verdict is worth more than one that stopped early
            found = self._cache.get(one)
            if found is not None and not skip_cache_lookup:
                self._cache.move_to_end(one)
                return replace(found, cached=True)
        if skip_cache_lookup:
            plan = replace(plan, alone=True)
            key = key if self._workers is None else f"{key} alone"
        flight = self._running.get(key)
        if flight is None:
            flight = _Flight(asyncio.create_task(self._run_and_keep(plan)))
            self._running[key] = flight
            flight.task.add_done_callback(lambda _: self._landed(key, flight))
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.task.done():
                self._landed(key, flight)
                flight.task.cancel()

    def _landed(self, key: str, flight: _Flight) -> None:
        if self._running.get(key) is flight:
            del self._running[key]

    async def close(self) -> None:
        """End validations that are still running."""
        running = [*(flight.task for flight in self._running.values()), *self._checks]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def checked(self) -> None:
        """Wait until no verdict is being checked and no State tried."""
        while self._checks:
            await asyncio.gather(*self._checks)

    async def _plan(
        self, state_id: str, changes: Iterable[FileChange], options: ValidationOptions
    ) -> Plan:
        state = self._states.known(state_id)
        if "baseline" not in state.metadata:
            raise FailedPrecondition(
                f"state {state_id} has no baseline of tests; prepare one with the builder python"
            )
        if state.metadata.get("runner") != RUNNER:
            raise FailedPrecondition(
                f"state {state_id} was prepared by another version; prepare its spec again"
            )
        if not 1 <= options.repeat <= 10:
            raise InvalidArgument("repeat", f"is {options.repeat}", "use 1 to 10")
        check_part(options)
        if not required_ids(state.metadata, options):
            raise FailedPrecondition(
                f"state {state_id} has no test that must pass; name some in required_tests "
                "or correct test.arguments of its spec"
            )
        refuse_loose(options.required_tests, state.metadata, "required_tests")
        checked = check_changes(changes)
        facts = state.metadata
        kept, reverted, lock = await asyncio.to_thread(split_by, facts, checked)
        digest = changes_sha256([*kept, *([lock] if lock else [])])
        under = [self._runtime.identity(), stamps(facts, state.base), astuple(self._limits)]
        return Plan(state, kept, reverted, lock, options, digest, json.dumps(under))

    async def _run_and_keep(self, plan: Plan) -> Validation:
        async with self._place():
            started = self._clock()
            verdict = await self._judge(plan)
        probe = plan.options.conditions != PINNED
        verdict = replace(verdict, seconds=round(self._clock() - started, 3), probe=probe)
        # A run that did not stop early was a whole one.
        key = key_of(plan, whole=not verdict.partial)
        self._keep(key, verdict)
        source = self._workers if verdict.workers > 1 else self._warm if verdict.warm else None
        if source is not None and source.wants_check(plan.state.id):
            self._later(self._check(plan, key, verdict, source))
        if self._workers is not None and verdict.workers == 1:
            proof = self._workers.trial(plan, verdict)
            if proof is not None:
                self._later(self._try_workers(plan, verdict, proof, self._workers))
        return verdict

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        check = asyncio.create_task(work)
        self._checks.add(check)
        check.add_done_callback(self._checks.discard)

    async def _check(
        self, plan: Plan, key: str, verdict: Validation, source: WarmPool | Workers
    ) -> None:
        """Judge again, cold and serially; if that says something else, it counts from now on."""
        source.checks.inc()
        try:
            async with self._place():
                cold = await self._cold(plan, None, plan.options.seed)
        except (RegreenError, _SandboxEnded) as error:
            log.warning("check_failed", state_id=plan.state.id, error=str(error))
            source.check_again(plan.state.id)
            return
        found = difference(verdict, cold, plan.facts["spec"]["test"]["unstable"])
        if not found or not cold.lasting:
            return
        self._forget(key)
        source.differed(plan.state.id, found)
        if plan.options.repeat == 1:
            kept = key_of(plan, whole=not cold.partial)  # it may have stopped where no other did
            self._keep(kept, replace(cold, seconds=verdict.seconds))

    def _is_full(self, verdict: Validation) -> bool:
        """Whether a verdict may be what it is because the host had no room at some time."""
        short = 0 <= verdict.least_free_bytes < base.FULL_BYTES
        return verdict.outcome is not Outcome.PASSED and (short or self._runtime.disk_is_full())

    async def _try_workers(
        self, plan: Plan, serial: Validation, proof: Proof, workers: Workers
    ) -> None:
        """Show that workers say the same of a diff that passes, and of none."""
        try:
            untouched = await self._plan(plan.state.id, (), ValidationOptions())
            for tried in (plan, untouched):
                async with self._place():
                    if tried is untouched:
                        serial = await self._cold(untouched, None, 0)
                    found = await workers.run(tried, self._options(tried, 0), proof)
                if isinstance(found, str) or not serial.lasting:
                    told = found if isinstance(found, str) else serial.summary
                    log.info("workers_trial_failed", state_id=plan.state.id, reason=told)
                    return
                unstable = plan.facts["spec"]["test"]["unstable"]
                if told := difference(serial, conclude(*found), unstable):
                    workers.differed(plan.state.id, told)
                    return
        except (RegreenError, _SandboxEnded) as error:
            log.warning("workers_trial_failed", state_id=plan.state.id, error=str(error))
            return
        workers.prove(plan.state.id, proof)

    async def _in_workers(self, plan: Plan, seed: int) -> Validation | None:
        """One run shared among several forks; None if it has to be done by one."""
        proof = self._workers.proof(plan, seed) if self._workers is not None else None
        if proof is None or self._workers is None:
            return None
        found = await self._workers.run(plan, self._options(plan, seed), proof)
        metrics.WORKER_RUNS.labels("alone" if isinstance(found, str) else "together").inc()
        if isinstance(found, str):
            log.info("run_again_by_one", state_id=plan.state.id, reason=found)
            return None
        verdict = replace(conclude(*found), workers=proof.count)
        return None if self._is_full(verdict) else verdict

    def _forget(self, key: str) -> None:
        dropped = self._cache.pop(key, None)
        self._cached_bytes -= dropped.weight if dropped else 0

    def _keep(self, key: str, verdict: Validation) -> None:
        """Remember a verdict that lasts; a failure on a host with little room may not."""
        short = base.short_of_room(verdict.least_free_bytes, self._limits)
        if not verdict.lasting or (short and verdict.outcome is not Outcome.PASSED):
            return
        old = self._cache.pop(key, None)
        self._cache[key] = verdict
        self._cached_bytes += verdict.weight - (old.weight if old else 0)
        while self._cached_bytes > self._cache_bytes:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= dropped.weight

    async def _judge(self, plan: Plan) -> Validation:
        try:
            change = self._check_lock(plan)
        except _Rejected as refusal:
            return verdict_without_run(plan, Outcome.REJECTED, str(refusal))
        verdict = await self._once(plan, change, plan.options.seed)
        for number in range(1, plan.options.repeat):
            if verdict.outcome is not Outcome.PASSED:
                break
            again = await self._once(plan, change, plan.options.seed)
            if again.outcome is not Outcome.PASSED:
                summary = f"run {number + 1} differs from the first: {again.summary}"
                verdict = replace(again, summary=summary)
        return verdict

    def _check_lock(self, plan: Plan) -> LockChange | None:
        """What the lock asks for, checked against the wheelhouse and the held pins."""
        before = parse_lock(plan.facts["lock"])
        try:
            after = self._new_lock(plan, before)
        except InvalidArgument as error:
            raise _Rejected(str(error)) from error
        for name, version in plan.options.held_pins.items():
            held = normalize(name)
            has = after.python if held == "python" else after.pins.get(held, "(absent)")
            if has != version:
                raise _Rejected(f"{held} must stay at {version} in this task, the lock has {has}")
        if plan.lock is None:
            return None
        change = lock_change(before, after)
        if change.python and change.python not in plan.facts["interpreters"]:
            allowed = ", ".join(sorted(plan.facts["interpreters"]))
            raise _Rejected(f"{LOCK}: python=={change.python} is not offered; there is {allowed}")
        index = self._index(plan.facts["wheelhouse"])
        for name, version in sorted(change.installed.items()):
            if version not in index.get(name, {}):
                line = after.lines.get(name, 0)
                offered = ", ".join(sorted(index.get(name, {}))) or "no release of it"
                raise _Rejected(
                    f"{LOCK} line {line}: {name}=={version} is not in the wheelhouse; "
                    f"it has {offered}"
                )
        return change

    def _new_lock(self, plan: Plan, before: Lock) -> Lock:
        if plan.lock is None:
            return before
        if plan.lock.content is None:
            raise _Rejected(f"{LOCK} was deleted; it must say what is installed")
        after = parse_lock(plan.lock.content)
        return after if after.python else replace(after, python=before.python)

    def _index(self, house: str) -> Mapping[str, Any]:
        if house not in self._indexes:
            try:
                self._indexes[house] = json.loads(Path(house, "index.json").read_text("utf-8"))
            except OSError as error:
                raise InfraError(f"the wheelhouse of the state is gone: {error}") from error
        return self._indexes[house]

    async def _once(self, plan: Plan, change: LockChange | None, seed: int) -> Validation:
        """One run, in a second fork if the first one lost its sandbox."""
        ends: list[_SandboxEnded] = []
        while len(ends) < TRIES:
            try:
                return await self._fork(plan, change, seed)
            except _SandboxEnded as ended:
                ends.append(ended)
        if not all(ended.itself for ended in ends):
            raise SandboxLost("the sandbox of the tests was ended from outside; validate again")
        text, log = "the run ended its sandbox, twice", ends[-1].log
        return verdict_without_run(plan, Outcome.FAILED, text, log=log, lasting=False)

    async def _fork(self, plan: Plan, change: LockChange | None, seed: int) -> Validation:
        """One run in fresh forks: several or a warm one where that is the same."""
        if plan.options.conditions != PINNED:
            return await self._cold(plan, change, seed)
        if change is None and (shared := await self._in_workers(plan, seed)) is not None:
            return shared
        found = await self._try_warm(plan, seed) if self._warm is not None else None
        return found or await self._cold(plan, change, seed)

    async def _try_warm(self, plan: Plan, seed: int) -> Validation | None:
        """One run in a fork whose interpreter was started ahead; None if it has to be cold."""
        assert self._warm is not None
        async with self._warm.spare(plan, seed) as spare:
            run: TestRun | Miss = Miss.NOT_READY
            if isinstance(spare, Miss):
                run = spare
            else:
                try:
                    plan = await apply(plan, spare.box)
                    run = await spare.finish(self._options(plan, seed))
                    run = run if isinstance(run, Miss) else await self._look(plan, run, spare.box)
                except (FailedPrecondition, NotFound, InfraError):
                    run = Miss.DIED
        self._warm.went(plan.state.id, run if isinstance(run, Miss) else None)
        if isinstance(run, Miss):
            metrics.WARM_MISSES.labels(run.value).inc()
            return None
        metrics.WARM_HITS.inc()
        verdict = replace(conclude(plan, run), warm=True)
        if self._is_full(verdict):
            raise no_space(f"no space to validate; it ended with: {verdict.summary}")
        return verdict

    async def _cold(self, plan: Plan, change: LockChange | None, seed: int) -> Validation:
        """One run in one fresh fork that starts with nothing."""
        fork = self._forks(plan.state.id, self._limits)
        async with own_layers(self._states, self._runtime) as layers, fork as box:
            verdict = await self._in_box(plan, change, seed, box, layers)
            # Looked at before the box goes, which may make room again.
            if self._is_full(verdict):
                raise no_space(f"no space to validate; it ended with: {verdict.summary}")
            return verdict

    async def _in_box(
        self, plan: Plan, change: LockChange | None, seed: int, box: Box, layers: list[str]
    ) -> Validation:
        if change is not None and plan.lock is not None:
            await box.write_file(f"{REPO}/{LOCK}", plan.lock.content or b"", follow=False)
            if not change.empty:
                failed = await self._sync(plan, box)
                if failed is not None:
                    return failed
                await put_aside(self._states, box, layers)
        plan, options = await apply(plan, box), self._options(plan, seed)
        if plan.options.conditions != PINNED:  # a probe, which may have moved all of it
            options = await settle(box, plan.options.conditions, options)
            return conclude(plan, await self._run_tests(box, options))
        run = await self._run_tests(box, options)
        return conclude(plan, await self._look(plan, run, box, layers))

    async def _look(
        self, plan: Plan, run: TestRun, box: Box, layers: Sequence[str] = ()
    ) -> TestRun:
        """The run, as far as what it wrote above these layers of its own lets it be believed."""
        since = len(box.layers) if layers else None
        fork, ours = partial(self._forks, plan.state.id, self._limits, layers), placed(plan)
        return await testrun.looked_at(run, box, plan.facts, fork, ours=ours, since=since)

    def _options(self, plan: Plan, seed: int) -> testrun.RunOptions:
        options = testrun.options_of(plan.facts, plan.state.env)
        return replace(
            options,
            coverage=plan.options.coverage,
            part=part_of(plan),
            seed=seed,
            timeout_s=plan.options.timeout_s or options.timeout_s,
        )

    async def _run_tests(self, box: Box, options: testrun.RunOptions) -> TestRun:
        """Run the tests.

        Raises:
            _SandboxEnded: the sandbox died under the run.
            InfraError: the runtime failed.
        """
        try:
            return await testrun.run_tests(box, options)
        except testrun.BoxEnded as error:
            raise _SandboxEnded(error.log, itself=await box.ended_itself()) from error

    async def _sync(self, plan: Plan, box: Box) -> Validation | None:
        """Install what the lock says, before any change of the source is there."""
        interpreter = plan.facts["interpreters"][plan.facts["python"]]
        done = await box.run(
            Command(
                (interpreter, "-I", "-S", f"{TOOLS}/lib/sync_env.py"),
                env=plan.state.env,
                cwd="/work",
                timeout_s=SYNC_TIMEOUT_S,
            )
        )
        if done.ok:
            return None
        if done.reason is EndReason.INFRA:
            raise InfraError(f"the environment could not be installed: {done.stderr.text[-500:]}")
        log = testrun.readable_log(done)
        if done.reason is EndReason.TIMEOUT:
            summary = "installing the lock took too long"
            return verdict_without_run(plan, Outcome.TIMEOUT, summary, log=log, lasting=False)
        if done.reason is not EndReason.EXIT:
            raise InfraError(f"installing the lock was ended by {done.reason.value}: {log[-500:]}")
        first = next((line for line in log.splitlines() if line.strip()), "no output")
        return verdict_without_run(
            plan, Outcome.BUILD_FAILED, f"the lock cannot be installed: {first}", log=log
        )

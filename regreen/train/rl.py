"""GRPO on rollouts of real repairs: the driver of a reinforcement learning run.

What differs from arXiv:2510.22075, which leaves these open: leave-one-out baseline without division
by the deviation, no KL, clip-higher, truncated members out of the loss and in the baseline, dynamic
refill of groups that do not teach, a curriculum by running pass rates.

- Emit everything: each group that is enqueued is collected by exactly one step, with a recorded
  fate, and is acknowledged by exactly one checkpoint.
- One way in: a fresh start, a restart after kill -9 and the return of a service all go through
  `Ledger.resume`; the queue is put back to the checkpoint that the learner continues from.
- A checkpoint is recorded and its groups acknowledged in one transaction, before a group of the
  next step is taken; metrics of a step are stored before the checkpoint that contains it.
- Its weights serve before that, and the rollouts of the next step begin on them; then the rest is
  written beside. `Ledger` says what becomes of that in a crash.
- The tasks of a step depend on recorded outcomes of earlier steps only, so a resumed run asks for
  the groups that it had asked for.
- A step whose groups teach nothing takes no optimizer step; it is counted, not repeated.
- With `colocate` the policy sleeps from the optimizer step on, and is awake with the weights that
  the next step is rolled out on, or those that it had, before rollouts are asked for.
- Token ids, logprobs and versions go from trajectory to batch unchanged; weights go by reference.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

from regreen.client.stack import Stack
from regreen.dataset import v1 as dataset_pb
from regreen.learner import v1 as learner_pb
from regreen.rollout.worker import worker_pool
from regreen.rpc.errors import InvalidArgument, RegreenError
from regreen.train.batches import grpo_batch
from regreen.train.config import GrpoConfig
from regreen.train.gather import Collected, Gatherer, GatherSettings, group_id
from regreen.train.ledger import Ledger, Position, hyperparameters
from regreen.train.names import grader_of, mode_name, mode_of, pipeline_of
from regreen.train.progress import Listener, Meter, Progress, ignore, stage
from regreen.train.record import exact_settings
from regreen.train.recovery import Recovery, curable
from regreen.train.rows import (
    TrainResult,
    all_trajectories,
    candidates_of,
    find_run,
    open_run,
    result_of,
)
from regreen.train.schedule import Candidate, Curriculum, History
from regreen.train.signals import step_metrics
from regreen.train.weights import (
    BASE,
    Weights,
    next_version_block,
    resolve_weights,
    started_from,
    weights_of,
)

HEAD_START_S = 10.0
"""How long the rest of a checkpoint waits at most for its weights to serve: both want the same
processors and disk, and rollouts wait for the weights. For the rest the next step waits only where
it takes longer than its rollouts."""
_A = TypeVar("_A")
_B = TypeVar("_B")
Workers = Callable[[Stack, str, int], AbstractAsyncContextManager[object]]
"""Rollout workers of a run (stack, run id, rollouts at a time) while the context is open."""


async def train_grpo(
    stack: Stack,
    config: GrpoConfig,
    progress: Listener = ignore,
    *,
    workers: Workers | None = None,
) -> TrainResult:
    """Run, or continue, the GRPO run `config.name` to its last step.

    Raises:
        FailedPrecondition: the name is taken by a run with other settings, or no rollout arrives.
        RegreenError: a service did not come back within `config.recovery_deadline_s`.
    """
    driver = await _prepare(stack, config, progress)
    if driver.run.state == "done":
        result = await result_of(stack, driver.run)
        weights = await resolve_weights(stack, config.name)
        if (await stack.policy.get_policy()).policy.version != weights.version:
            await driver.ledger.serve(weights)  # something else was served since
        return result
    if config.concurrency == 0:
        return await driver.drive()
    async with (workers or _own_workers)(stack, driver.run.id, config.concurrency):
        return await driver.drive()


def _own_workers(stack: Stack, run_id: str, count: int) -> AbstractAsyncContextManager[object]:
    return worker_pool(stack, run_id=run_id, concurrency=count)


@dataclass(frozen=True, slots=True)
class GrpoStart:
    """What a new run works out once, before it has its name."""

    candidates: Sequence[Candidate]
    weights: Weights


async def resolve_start(stack: Stack, config: GrpoConfig) -> GrpoStart:
    """What a new run would begin with; reads only.

    Raises:
        RegreenError: tasks or weights will not do; each says what would.
    """
    candidates = await candidates_of(stack, config.tasks, config.split, config.modes)
    weights = await resolve_weights(stack, config.start, "start", base_uri=config.base_uri)
    return GrpoStart(candidates, weights)


async def check_policy(stack: Stack, config: GrpoConfig) -> None:
    """Raises: InvalidArgument: the policy cannot do what the settings ask of it."""
    if not config.colocate and not config.broadcast:
        return
    policy = await stack.policy.get_policy()
    if config.broadcast and not policy.receivers:
        raise InvalidArgument(
            "broadcast",
            f"the policy's engine ({policy.engine}) receives no weights",
            "leave it out, or serve with SGLang, without data or pipeline parallelism",
        )
    if config.colocate and not policy.can_sleep:
        raise InvalidArgument(
            "colocate",
            f"the policy's engine ({policy.engine}) has no memory to give back",
            "leave it out, or serve with SGLang, started with --enable-memory-saver",
        )


async def _prepare(stack: Stack, config: GrpoConfig, progress: Listener) -> "_Driver":
    await check_policy(stack, config)
    resolved: Mapping[str, object] = {}
    if await find_run(stack, config.name) is None:
        start = await resolve_start(stack, config)
        resolved = {
            "base_version": await next_version_block(stack),
            "base_uri": start.weights.uri if config.start == BASE else "",
            "start": start.weights.to_json(),
            "candidates": [[c.task_id, mode_name(c.mode)] for c in start.candidates],
        }
    exact = exact_settings(config)
    opened = await open_run(stack, config.name, "grpo", config.settings(), resolved, exact)
    kept, run_id = opened.resolved, opened.run.id
    base = started_from(kept)
    settings = GatherSettings(
        groups_per_step=config.groups_per_step,
        group_size=config.group_size,
        max_refills=config.max_refills,
        pipeline=pipeline_of(config.pipeline),
        grader=grader_of(config.grader),
        seed=config.seed,
        full_share=config.full_share,
        max_staleness=config.max_staleness,
        idle_deadline_s=config.idle_deadline_s,
        curriculum=Curriculum(hard_share=config.hard_share),
        labels={"policy": config.name, **config.labels},
        truncated=config.truncated,
    )
    return _Driver(
        stack=stack,
        config=config,
        run=opened.run,
        listener=progress,
        candidates=[Candidate(task, mode_of(mode)) for task, mode in kept["candidates"]],
        settings=settings,
        ledger=Ledger(
            stack,
            run_id,
            learner_pb.RUN_KIND_GRPO,
            base,
            hyperparameters(config.hyperparameters),
            config.engine,
            progress,
            config.colocate,
            config.broadcast,
        ),
        recovery=Recovery(config.recovery_deadline_s, progress),
    )


@dataclass(slots=True)
class _Driver:
    """One GRPO run in this process."""

    stack: Stack
    config: GrpoConfig
    run: dataset_pb.Run
    listener: Listener
    candidates: Sequence[Candidate]
    settings: GatherSettings
    ledger: Ledger
    recovery: Recovery

    async def drive(self) -> TrainResult:
        """Resume and go on, as often as services come back in time."""
        try:
            while True:
                try:
                    position = await self.ledger.resume(serve=True)
                    life = await _Life.begin(self, position)
                    await life.finish()
                    return await result_of(self.stack, self.run)
                except RegreenError as error:
                    await self.recovery.wait_out(error)
                    await self._check_sole()
        finally:
            await self._release()

    async def _check_sole(self) -> None:
        try:
            await self.ledger.check_sole()
        except RegreenError as error:
            # A dataset service that is away cannot tell; the next resume will meet it again.
            if not curable(error):
                raise

    async def _release(self) -> None:
        for undo in (self.ledger.stop, self.ledger.wake):
            try:
                await undo()
            except RegreenError as error:
                # A service is gone or busy; the next start stops the run, and wakes the policy.
                self.listener(Progress("stopped", 0, 0, None, str(error)))


@dataclass(slots=True)
class _Life:
    """From one resume to the end or the next failure."""

    driver: _Driver
    gatherer: Gatherer
    history: History
    meter: Meter
    step: int
    learner_step: int
    version: int
    pending: list[str] = field(default_factory=list)
    """Groups consumed since the last checkpoint."""
    sent: int = 0
    """How many of `pending` the learner was told of."""
    dirty: bool = False
    """Whether an optimizer step was taken since the last checkpoint."""

    @classmethod
    async def begin(cls, driver: _Driver, position: Position) -> "_Life":
        """The state that the recorded rows determine, with the next step's groups enqueued."""
        config = driver.config
        life = cls(
            driver=driver,
            gatherer=Gatherer(
                driver.stack,
                driver.run.id,
                driver.candidates,
                driver.settings,
                epoch=driver.ledger.epoch,
            ),
            history=History(driver.settings.curriculum.window),
            meter=Meter(driver.listener, "grpo", config.steps, done=position.step),
            step=position.step,
            learner_step=position.learner_step,
            version=position.weights.version,
        )
        past = await _recorded_outcomes(driver.stack, driver.run.id, position.step, driver.settings)
        # With prefetch, a step was planned before the outcomes of the step before it were known.
        lag = 1 if config.prefetch else 0
        for step in range(1, position.step + 1):
            if step == position.step + 1 - lag and step < config.steps:
                await life.gatherer.enqueue(position.step + 1, life.history)
            for candidate, solved in past.get(step, ()):
                life.history.add(candidate, solved)
        return life

    async def finish(self) -> None:
        """All remaining steps, then the end of the run."""
        self.meter.report()
        while self.step < self.driver.config.steps:
            await self._one_step(self.step + 1)
            self.driver.recovery.progressed(self.step)
        if self.dirty:
            await self._save()
        summary = {"steps": self.step, "learner_steps": self.learner_step, "version": self.version}
        # Groups of last steps that taught nothing belong to the last checkpoint, and only then is
        # the run done: both or neither, or a restart would wait for groups that are gone.
        await self.driver.stack.runs.update_run(
            self.driver.run.id,
            state="done",
            summary=summary,
            acknowledge_taken=True,
            epoch=self.driver.ledger.epoch,
        )

    async def _one_step(self, step: int) -> None:
        config, driver = self.driver.config, self.driver
        began_s = time.monotonic()
        await self.gatherer.enqueue(step, self.history)
        collected = await self.gatherer.collect(step, self.version, self._rollout_report())
        if config.prefetch and step < config.steps:
            await self.gatherer.enqueue(step + 1, self.history)
        metrics = step_metrics(collected.groups, collected.fates, version=self.version)
        metrics |= {"refills": float(collected.refills), "seconds/rollout": _since(began_s)}
        self.pending += collected.group_ids
        began_s = time.monotonic()
        metrics |= await self._learn(collected, metrics)
        metrics |= {"seconds/learn": _since(began_s), "version": float(self.version)}
        self._absorb(collected)
        self.step = step
        await driver.stack.runs.record_metrics(driver.run.id, step, metrics)
        if self.dirty and (step % config.checkpoint_every == 0 or step == config.steps):
            await self._save()
        else:
            await driver.ledger.wake()
        self.meter.report(step, _headline(metrics), due=True)

    async def _learn(self, collected: Collected, metrics: dict[str, float]) -> dict[str, float]:
        """One optimizer step on the groups that teach; nothing when none does."""
        if not collected.teaching:
            return {"learned_groups": 0.0}
        turn_scores = self.driver.config.turn_scores
        batch = grpo_batch(collected.teaching, metrics, turn_scores=turn_scores)
        fresh = self.pending[self.sent :]
        meter = Meter(self.driver.listener, "learn", batch.tokens)
        detail = f"tokens, {batch.trained_tokens} of them trained"

        def report(done: int, total: int) -> None:
            # Prompts that are shared are computed once, so the learner counts fewer tokens.
            meter.report(batch.tokens * done // total, detail)

        meter.report(detail=detail)
        step = self.learner_step + 1
        learned = [t.id for group in collected.teaching for t in group.trajectories]
        response = await self.driver.ledger.step(
            step, batch.to_bytes(), fresh, report, trajectory_ids=learned
        )
        meter.report(batch.tokens, detail)
        self.learner_step, self.sent, self.dirty = step, len(self.pending), True
        found = {f"learner/{name}": value for name, value in response.metrics.items()}
        found["learned_groups"] = float(len(collected.teaching))
        found["trained_tokens"] = float(batch.trained_tokens)
        return found

    async def _save(self) -> dataset_pb.CheckpointRecord:
        began_s = time.monotonic()
        ledger = self.driver.ledger
        with stage(self.driver.listener, "checkpoint", f"step {self.step}"):
            published = await ledger.publish(self.step)
            served = asyncio.Event()
            record, (pause_s, live_at_s) = await _both(
                self._save_after(served), self._go_on(published, served)
            )
            self.pending, self.sent, self.dirty = [], 0, False
            self.version = record.policy_version
            # The same weights, by the name that stays, are not loaded again.
            pause_s += await ledger.serve(weights_of(record))
        seconds = {
            "seconds/checkpoint": _since(began_s),
            "seconds/weights_live": live_at_s - began_s,
            "seconds/policy_pause": pause_s,
        }
        await self.driver.stack.runs.record_metrics(self.driver.run.id, self.step, seconds)
        return record

    async def _save_after(self, served: asyncio.Event) -> dataset_pb.CheckpointRecord:
        """Write the rest of the checkpoint once its weights serve, or took too long to."""
        with suppress(TimeoutError):
            await asyncio.wait_for(served.wait(), HEAD_START_S)
        return await self.driver.ledger.save(self.step, self.pending)

    async def _go_on(self, published: Weights, served: asyncio.Event) -> tuple[float, float]:
        """Serve weights and have the next step rolled out on them; seconds without sampling, and
        when they served."""
        try:
            pause_s = await self.driver.ledger.serve_published(published)
        finally:
            served.set()
        live_at_s = time.monotonic()
        if self.step < self.driver.config.steps:
            await self.gatherer.enqueue(self.step + 1, self.history)
        return pause_s, live_at_s

    def _absorb(self, collected: Collected) -> None:
        for group in collected.groups:
            candidate = Candidate(group.group.task_id, group.group.mode)
            members = sorted(group.trajectories, key=lambda t: t.group_index)
            self.history.add(candidate, [member.reward.solved for member in members])

    def _rollout_report(self) -> Callable[[int, int, int, str], None]:
        """Reports the rollouts of one step; those that the first report finds were done before."""
        meter: Meter | None = None

        def report(done: int, total: int, under_way: int, detail: str) -> None:
            nonlocal meter
            if meter is None:
                meter = Meter(self.driver.listener, "rollouts", total, done=done)
            # Refills are asked for later; workers elsewhere take part too.
            meter.total = total
            meter.parallel = max(1, self.driver.config.concurrency, under_way)
            meter.report(done, detail)

        return report


Outcomes = dict[int, list[tuple[Candidate, list[bool]]]]


async def _recorded_outcomes(
    stack: Stack, run_id: str, steps: int, settings: GatherSettings
) -> Outcomes:
    """Outcomes of the groups of steps 1 to `steps`, in slot order, as `_absorb` saw them."""
    if steps == 0:
        return {}
    slots = settings.groups_per_step + settings.max_refills
    places = {
        group_id(run_id, step, slot): (step, slot)
        for step in range(1, steps + 1)
        for slot in range(slots)
    }
    members: dict[tuple[int, int], list[dataset_pb.Trajectory]] = {}
    async for row in all_trajectories(stack, dataset_pb.TrajectoryFilter(run_id=run_id)):
        if row.group_id in places:
            members.setdefault(places[row.group_id], []).append(row)
    found: Outcomes = {}
    for (step, _), rows in sorted(members.items()):
        rows.sort(key=lambda row: row.group_index)
        candidate = Candidate(rows[0].task_id, rows[0].mode)
        found.setdefault(step, []).append((candidate, [row.reward.solved for row in rows]))
    return found


async def _both(one: Awaitable[_A], other: Awaitable[_B]) -> tuple[_A, _B]:
    """What both give, beside each other; if one fails, after the other has ended too."""
    found = await asyncio.gather(one, other, return_exceptions=True)
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found  # type: ignore[return-value]


def _since(began_s: float) -> float:
    return time.monotonic() - began_s


def _headline(metrics: dict[str, float]) -> str:
    names = ("reward_mean", "solve_rate", "hack_rate")
    reward, solved, hacked = (metrics.get(name, 0.0) for name in names)
    return f"reward {reward:+.3f}, solved {solved:.0%}, hacks {hacked:.0%}"

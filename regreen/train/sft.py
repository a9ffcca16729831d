"""Supervised fine-tuning on verified expert trajectories.

- Only trajectories that were solved without a flagged hack are learned from (School of Reward
  Hacks, arXiv:2508.17511), and only tokens that the actor said carry loss.
- The trajectories of a run are fixed when it is created; the batch of step s is a pure function of
  (run config, s), so a run killed anywhere continues from its last checkpoint exactly.
- Trajectories of one task stand side by side, so that the learner computes their prompt once.
- Weights move by reference; the result is served only once its checkpoint is recorded.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from regreen.client.stack import Stack
from regreen.dataset import v1 as dataset_pb
from regreen.ids import derive_seed
from regreen.learner import v1 as learner_pb
from regreen.rpc.errors import FailedPrecondition, RegreenError
from regreen.train.batches import sft_batch, trainable
from regreen.train.config import SftConfig
from regreen.train.experts import expert_rows
from regreen.train.ledger import Ledger, hyperparameters
from regreen.train.progress import Listener, Meter, Progress, ignore, stage
from regreen.train.record import exact_settings
from regreen.train.recovery import Recovery, curable
from regreen.train.rows import TrainResult, find_run, open_run, result_of, training_tasks
from regreen.train.weights import BASE, next_version_block, resolve_weights, started_from


async def train_sft(stack: Stack, config: SftConfig, progress: Listener = ignore) -> TrainResult:
    """Run, or continue, the supervised run `config.name` to its last step.

    Expert trajectories that are missing are made first.

    Raises:
        FailedPrecondition: the name is taken by a run with other settings, or no expert
            trajectory was solved.
        RegreenError: a service did not come back within `config.recovery_deadline_s`.
    """
    driver = await _prepare(stack, config, progress)
    if driver.run.state != "done":
        await driver.drive()
    result = await result_of(stack, driver.run)
    if config.publish and result.uri:
        weights = await resolve_weights(stack, config.name)
        await stack.policy.load_version(weights.to_policy(), allow_older=True)
    return result


async def _prepare(stack: Stack, config: SftConfig, progress: Listener) -> "_Driver":
    resolved: Mapping[str, object] = {}
    if await find_run(stack, config.name) is None:
        resolved = await _resolve(stack, config, progress)
    exact = exact_settings(config)
    opened = await open_run(stack, config.name, "sft", config.settings(), resolved, exact)
    kept = opened.resolved
    start = started_from(kept)
    return _Driver(
        stack=stack,
        config=config,
        run=opened.run,
        listener=progress,
        train_ids=[list(ids) for ids in kept["train_ids"]],
        ledger=Ledger(
            stack,
            opened.run.id,
            learner_pb.RUN_KIND_SFT,
            start,
            hyperparameters(config.hyperparameters),
            config.engine,
            progress,
        ),
        recovery=Recovery(config.recovery_deadline_s, progress),
    )


async def _resolve(stack: Stack, config: SftConfig, progress: Listener) -> dict[str, object]:
    """What is worked out once: start, versions, and the trajectories to learn from."""
    start = await resolve_weights(stack, config.start, "start", base_uri=config.base_uri)
    tasks = await training_tasks(stack, config.tasks, config.split)
    rows = await expert_rows(stack, tasks, config, progress)
    train = await learnable(stack, rows, config)
    check_learnable(train, len(tasks))
    return {
        "base_version": await next_version_block(stack),
        "base_uri": start.uri if config.start == BASE else "",
        "start": start.to_json(),
        "train_ids": [train[task_id] for task_id in sorted(train)],
    }


async def learnable(
    stack: Stack, rows: Sequence[dataset_pb.Trajectory], config: SftConfig
) -> dict[str, list[str]]:
    """Ids of the expert trajectories that the learner may see, by task."""
    train: dict[str, list[str]] = {}
    for row in rows:
        whole = await stack.trajectories.get_trajectory(row.id)
        if trainable(whole) and len(whole.token_ids) <= config.max_tokens:
            train.setdefault(row.task_id, []).append(row.id)
    return train


def check_learnable(train: Mapping[str, Sequence[str]], tasks: int) -> None:
    """Refuse a run that would have nothing to learn from.

    Raises:
        FailedPrecondition: no expert trajectory of the tasks can be learned from.
    """
    if not train:
        raise FailedPrecondition(
            f"no solved expert trajectory among {tasks} tasks; check that the reference fixes "
            "pass with `regreen tasks verify`"
        )


def batch_ids(ids: Sequence[Sequence[str]], step: int, *, batch_size: int, seed: int) -> list[str]:
    """Ids of the trajectories of step `step` (from 1).

    `ids` holds those of each task. Every epoch passes over all, with tasks and the trajectories of
    a task reshuffled; a task's stand side by side.
    """
    per_epoch = math.ceil(sum(map(len, ids)) / batch_size)
    epoch, place = divmod(step - 1, per_epoch)
    rng = np.random.default_rng(derive_seed(seed, "epoch", epoch))
    order = [
        ids[task][index]
        for task in rng.permutation(len(ids))
        for index in rng.permutation(len(ids[task]))
    ]
    return order[place * batch_size : (place + 1) * batch_size]


@dataclass(slots=True)
class _Driver:
    """One supervised run in this process."""

    stack: Stack
    config: SftConfig
    run: dataset_pb.Run
    listener: Listener
    train_ids: list[list[str]]
    """By task."""
    ledger: Ledger
    recovery: Recovery
    _cache: dict[str, dataset_pb.Trajectory] = field(default_factory=dict)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.epochs * math.ceil(self.trajectories / self.config.batch_size)

    @property
    def trajectories(self) -> int:
        """Trajectories that are learned from."""
        return sum(map(len, self.train_ids))

    async def drive(self) -> None:
        """Resume and go on, as often as services come back in time."""
        try:
            while True:
                try:
                    await self._to_the_end()
                    return
                except RegreenError as error:
                    await self.recovery.wait_out(error)
                    await self._check_sole()
        finally:
            await self._release()

    async def _to_the_end(self) -> None:
        position = await self.ledger.resume()
        meter = Meter(self.listener, "sft", self.total_steps, done=position.step)
        meter.report()
        for step in range(position.step + 1, self.total_steps + 1):
            metrics = await self._one_step(step, meter)
            self.recovery.progressed(step)
            loss = metrics.get("learner/loss", math.nan)
            meter.report(step, f"step {step}: loss {loss:.4f}", due=True)
        summary = {"steps": self.total_steps, "trajectories": self.trajectories}
        await self.stack.runs.update_run(self.run.id, state="done", summary=summary)

    async def _one_step(self, step: int, meter: Meter) -> dict[str, float]:
        began_s = time.monotonic()
        config = self.config
        wanted = batch_ids(self.train_ids, step, batch_size=config.batch_size, seed=config.seed)
        batch = sft_batch([await self._trajectory(id) for id in wanted])

        def report(done: int, total: int) -> None:
            meter.report(detail=f"step {step}: {done} of {total} tokens")

        response = await self.ledger.step(step, batch.to_bytes(), (), report, trajectory_ids=wanted)
        metrics = {f"learner/{name}": value for name, value in response.metrics.items()}
        metrics |= {
            "trajectories": float(len(wanted)),
            "trained_tokens": float(batch.trained_tokens),
            "seconds/learn": time.monotonic() - began_s,
        }
        await self.stack.runs.record_metrics(self.run.id, step, metrics)
        if step % config.checkpoint_every == 0 or step == self.total_steps:
            with stage(self.listener, "checkpoint", f"step {step}"):
                await self.ledger.save(step, ())
        return metrics

    async def _trajectory(self, id: str) -> dataset_pb.Trajectory:
        if id not in self._cache:
            self._cache[id] = await self.stack.trajectories.get_trajectory(id)
        return self._cache[id]

    async def _check_sole(self) -> None:
        try:
            await self.ledger.check_sole()
        except RegreenError as error:
            # A dataset service that is away cannot tell; the next resume will meet it again.
            if not curable(error):
                raise

    async def _release(self) -> None:
        try:
            await self.ledger.stop()
        except RegreenError as error:
            # The learner is gone or busy; the next start stops the run itself.
            self.listener(Progress("stopped", 0, 0, None, str(error)))

"""Where a run stands: one place that starts, resumes, saves and publishes.

- The learner's checkpoint is the commit point. A checkpoint that was written but not recorded
  before a crash is recorded first (rolled forward), with every group taken up to its step, so no
  consumed group is consumed again.
- After `resume`, queue, learner and policy stand at the same step: groups taken after the
  checkpoint are takeable again and steps after it are forgotten.
- A version number names one set of weights for ever. It is `base_version + driver step`, and higher
  by one for each number before it that a crash left with weights of its own: published, and then
  made again as others. Checkpoints and published weights therefore say their driver step; the
  learner's own step number only counts optimizer steps (a step may have nothing to learn).
- Weights may be served before their checkpoint is whole, never before all groups of their step are
  in. After a crash between the two the policy goes on with them, as what is being rolled out is
  wanted under them, while the learner makes them again from the checkpoint before; unless rollouts
  of the steps that are made again are still out, which are wanted under that one.
- A driver that another one has replaced is told so at its next mutation (the run's epoch), and
  never resumes.
- Recording a checkpoint and acknowledging its groups is one transaction of the dataset service.
- A recorded checkpoint that is damaged is passed over for the newest one that the learner can open;
  the queue is rewound to that one, and progress says so.
- Weights move by reference.
- Watching a step changes nothing; a stream that breaks is not opened again.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from regreen.client.stack import Stack
from regreen.dataset import v1 as dataset_pb
from regreen.learner import v1 as learner_pb
from regreen.policy import v1 as policy_pb
from regreen.rpc import traces
from regreen.rpc.errors import (
    DataLoss,
    FailedPrecondition,
    InfraError,
    InvalidArgument,
    NotFound,
    RegreenError,
    Unavailable,
)
from regreen.train.progress import Listener, Progress, ignore, stage
from regreen.train.rows import all_checkpoints, last_checkpoint
from regreen.train.weights import Weights, weights_of, weights_published

TokenReport = Callable[[int, int], None]
"""Called with tokens done and tokens in all, as the learner counts them."""

_BELOW_0 = frozenset({"importance_cap", "zero_stage"})
"""Hyperparameters that a negative number switches off, or leaves to the engine."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a resumed run stands."""

    step: int
    """Driver steps that are contained in the weights."""
    learner_step: int
    """Optimizer steps that the learner has done."""
    weights: Weights
    """Those of that step."""


@dataclass(slots=True)
class Ledger:
    """Start, resume, save and publish one run."""

    stack: Stack
    run_id: str
    kind: learner_pb.RunKind.ValueType
    base: Weights
    """Weights before the first step, stamped with the run's base version."""
    hyperparameters: learner_pb.Hyperparameters
    engine: str = ""
    listener: Listener = ignore
    colocate: bool = False
    """Whether the policy sleeps during steps, on the learner's GPUs."""
    broadcast: bool = False
    """Whether the policy's servers take published weights from the learner."""
    epoch: int = field(default=0, init=False)
    """Epoch of the run since the last `resume`; 0 before it."""
    _extra: int = field(default=0, init=False)
    """Version numbers that were left to other weights."""

    async def resume(self, *, serve: bool = False) -> Position:
        """Bring queue and learner to the last checkpoint, and the policy too if it is to `serve`.

        Raises:
            FailedPrecondition: the learner is busy with another run, or does not give back the
                recorded position.
            DataLoss: every recorded checkpoint is damaged.
        """
        with stage(self.listener, "start learner"):
            record, started = await self._start(await last_checkpoint(self.stack, self.run_id))
            record = await self._roll_forward(record, started)
        weights = weights_of(record) if record else self.base
        step = record.step if record else 0
        self._extra = weights.version - self.base.version - step
        if serve:  # before the rewind gives out again what was lost
            await self._serve_from(started, step, weights)
        checkpoint_id = record.id if record else ""
        rewound = await self.stack.queue.rewind_run(self.run_id, checkpoint_id=checkpoint_id)
        self.epoch = rewound.epoch
        return Position(step, started.step, weights)

    async def _serve_from(
        self, started: learner_pb.LearnerRun, step: int, weights: Weights
    ) -> None:
        """Have the policy serve what a run that stands at `step` is rolled out with."""
        if await self._is_in(step + 1, started.published.driver_step):
            with contextlib.suppress(NotFound, DataLoss):  # they had not reached the disk
                await self.serve(weights_published(started.published))
                return
        await self.serve(weights)

    async def _is_in(self, first: int, last: int) -> bool:
        """Whether there are such steps, and every rollout of theirs is there."""
        for step in range(first, last + 1):
            rollouts = (await self.stack.queue.get_queue(self.run_id, step=step)).rollouts
            if sum(rollouts.values()) > rollouts["committed"]:
                return False
        return first <= last

    async def check_sole(self) -> None:
        """Make sure that no other driver has taken the run over since `resume`.

        Raises:
            FailedPrecondition: one has; two drivers of one run would undo each other's work.
        """
        if self.epoch and (await self.stack.runs.get_run(self.run_id)).epoch != self.epoch:
            raise FailedPrecondition(
                f"another driver has taken over run {self.run_id}; this one stops"
            )

    async def step(
        self,
        learner_step: int,
        batch: bytes,
        group_ids: Sequence[str],
        report: TokenReport,
        *,
        trajectory_ids: Sequence[str],
    ) -> learner_pb.StepResponse:
        """One optimizer step; `report` is told how far it is while it runs.

        With `colocate` the policy sleeps from then on, until `serve` or `wake`.

        The trace of each trajectory that is in the batch is told of it.

        Raises:
            Unavailable: the learner no longer knows the run or the position; resume.
        """
        if self.colocate:
            await self.stack.policy.sleep()
        with traces.span("learn", run_id=self.run_id, step=learner_step) as link:
            done = await self._step(learner_step, batch, group_ids, report)
        traces.joined("learn", link, trajectory_ids, run_id=self.run_id, step=learner_step)
        return done

    async def _step(
        self, learner_step: int, batch: bytes, group_ids: Sequence[str], report: TokenReport
    ) -> learner_pb.StepResponse:
        try:
            async with self._watched(learner_step, report):
                return await self.stack.learner.step(
                    self.run_id,
                    learner_step,
                    batch=batch,
                    group_ids=group_ids,
                    lend_memory=self.colocate,
                )
        except (NotFound, FailedPrecondition) as error:
            raise Unavailable(f"the learner lost run {self.run_id}: {error}") from error
        except InvalidArgument as error:
            if error.field != "step":
                raise
            raise Unavailable(f"the learner is at another step: {error}") from error

    @asynccontextmanager
    async def _watched(self, learner_step: int, report: TokenReport) -> AsyncIterator[None]:
        watch = asyncio.create_task(self._watch(learner_step, report))
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    async def _watch(self, learner_step: int, report: TokenReport) -> None:
        try:
            async for event in self.stack.learner.watch_run(self.run_id, from_step=learner_step):
                at = event.progress
                # After the last token comes the update; only the answer ends the step.
                if at.step == learner_step and at.tokens_done < at.tokens_total:
                    report(at.tokens_done, at.tokens_total)
                if event.HasField("restart"):
                    self._tell_restart(event.restart, learner_step)
        except RegreenError:
            return  # what the step itself meets is told by its answer

    def _tell_restart(self, restart: learner_pb.Restart, learner_step: int) -> None:
        # Those of earlier steps are told again to everyone who begins to watch.
        if restart.to_step == learner_step - 1:
            how = "stands again" if restart.complete else f"restarts its ranks: {restart.reason}"
            self.listener(
                Progress("recover", restart.number, restart.limit, None, f"the learner {how}")
            )

    async def publish(self, step: int) -> Weights:
        """Have the learner write the weights after driver step `step` for the policy."""
        with self._lost_run():
            made = await self.stack.learner.publish_weights(
                self.run_id, policy_version=self._wanted(step), driver_step=step
            )
        self._extra = made.policy_version - self.base.version - step
        return weights_published(made)

    async def save(self, step: int, group_ids: Sequence[str]) -> dataset_pb.CheckpointRecord:
        """Checkpoint after driver step `step`, with all groups consumed since the last one."""
        with self._lost_run():
            checkpoint = await self.stack.learner.save_checkpoint(
                self.run_id, policy_version=self._wanted(step), driver_step=step
            )
        self._extra = checkpoint.policy_version - self.base.version - step
        return await self._record(checkpoint, group_ids)

    def _wanted(self, step: int) -> int:
        return self.base.version + step + self._extra

    @contextlib.contextmanager
    def _lost_run(self) -> Iterator[None]:
        try:
            yield
        except (NotFound, FailedPrecondition) as error:
            raise Unavailable(f"the learner lost run {self.run_id}: {error}") from error

    async def serve(self, weights: Weights) -> float:
        """Have the policy service serve `weights`; seconds for which no token was sampled."""
        response: policy_pb.LoadVersionResponse | policy_pb.WakeResponse
        if self.colocate:  # asleep or not
            response = await self.stack.policy.wake(weights.to_policy(), allow_older=True)
        else:
            response = await self.stack.policy.load_version(weights.to_policy(), allow_older=True)
        return response.pause.seconds + response.pause.nanos * 1e-9

    async def serve_published(self, weights: Weights) -> float:
        """As `serve`, of what the learner has just published; sent to servers with `broadcast`."""
        if not self.broadcast:
            return await self.serve(weights)
        receivers = (await self.stack.policy.get_policy()).receivers
        try:
            offer = await self.stack.learner.offer_weights(self.run_id, receivers)
        except (InvalidArgument, NotFound, InfraError) as error:
            self.listener(Progress("broadcast", 0, 0, None, f"weights are read: {error}"))
            return await self.serve(weights)
        response = await self.stack.policy.load_version(
            weights.to_policy(), allow_older=True, offer=offer
        )
        return response.pause.seconds + response.pause.nanos * 1e-9

    async def wake(self) -> None:
        """Have the policy awake with what it served, if it may sleep at all."""
        if self.colocate:
            await self.stack.policy.wake()

    async def stop(self) -> None:
        """Free the learner; the run can be resumed from its last checkpoint."""
        try:
            await self.stack.learner.stop_run(self.run_id)
        except NotFound:
            return

    async def _start(
        self, record: dataset_pb.CheckpointRecord | None
    ) -> tuple[dataset_pb.CheckpointRecord | None, learner_pb.LearnerRun]:
        """The run at the newest recorded checkpoint that can be opened, or at a newer one."""
        await self.stop()
        await self._stop_finished()
        started, damages = None, list[DataLoss]()
        try:
            started = await self._start_at("")
        except DataLoss as error:
            damages.append(error)
        if started and (record is None or self._version(started) >= record.policy_version):
            return record, started
        async for candidate in all_checkpoints(self.stack, self.run_id):
            # The learner has lost or never had its own copy: take the recorded one.
            await self.stop()
            try:
                return candidate, await self._start_recorded(candidate, damages)
            except DataLoss as error:
                damages.append(error)
            except NotFound:
                if not damages:
                    raise
                # older checkpoints are removed in time
        raise damages[0]

    async def _start_recorded(
        self, record: dataset_pb.CheckpointRecord, damages: Sequence[DataLoss]
    ) -> learner_pb.LearnerRun:
        started = await self._start_at(record.uri)
        if self._version(started) != record.policy_version:
            raise FailedPrecondition(
                f"checkpoint {record.uri} holds policy version {self._version(started)}, "
                f"recorded is {record.policy_version}; was the directory overwritten?"
            )
        self._tell(damages, record)
        return started

    def _tell(self, damages: Sequence[DataLoss], record: dataset_pb.CheckpointRecord) -> None:
        if damages:
            lost = "; ".join(str(error) for error in damages)
            detail = f"goes on from the checkpoint of step {record.step}: {lost}"
            self.listener(Progress("recover", 1, 1, None, detail))

    async def _stop_finished(self) -> None:
        """Free the learner of runs that ended while their driver was being killed."""
        for run_id in await finished_runs(self.stack, self.run_id):
            with contextlib.suppress(NotFound):  # it has just been stopped
                await self.stack.learner.stop_run(run_id)

    async def _start_at(self, resume_uri: str) -> learner_pb.LearnerRun:
        return await self.stack.learner.start_run(
            self.run_id,
            self.kind,
            self.base.uri,
            hyperparameters=self.hyperparameters,
            engine=self.engine,
            resume_uri=resume_uri,
        )

    def _version(self, run: learner_pb.LearnerRun) -> int:
        return run.checkpoint.policy_version if run.HasField("checkpoint") else self.base.version

    async def _roll_forward(
        self, record: dataset_pb.CheckpointRecord | None, started: learner_pb.LearnerRun
    ) -> dataset_pb.CheckpointRecord | None:
        recorded = record.policy_version if record else self.base.version
        if self._version(started) <= recorded:
            return record
        # The learner knows the groups that it was sent; those of steps that taught nothing are
        # told by their step.
        return await self._record(
            started.checkpoint, started.checkpoint.group_ids, acknowledge_taken=True
        )

    async def _record(
        self,
        checkpoint: learner_pb.Checkpoint,
        group_ids: Sequence[str],
        *,
        acknowledge_taken: bool = False,
    ) -> dataset_pb.CheckpointRecord:
        # Learners of earlier releases did not say it; then no number is left out.
        step = checkpoint.driver_step or checkpoint.policy_version - self.base.version
        record = dataset_pb.CheckpointRecord(
            run_id=self.run_id,
            step=step,
            uri=checkpoint.uri,
            digest=checkpoint.digest,
            policy_version=checkpoint.policy_version,
            group_ids=sorted(set(group_ids)),
        )
        return await self.stack.runs.record_checkpoint(
            record, epoch=self.epoch, acknowledge_taken=acknowledge_taken
        )


async def finished_runs(stack: Stack, run_id: str = "") -> list[str]:
    """Runs that the learner still holds though they have ended, other than `run_id`.

    Raises:
        FailedPrecondition: the learner trains another run that has not ended.
    """
    found, token = list[str](), ""
    while True:
        page = await stack.learner.list_runs(page_token=token)
        for run in page.runs:
            if run.state != learner_pb.RUN_STATE_ACTIVE or run.id == run_id:
                continue
            try:
                recorded = await stack.runs.get_run(run.id)
            except NotFound:
                continue  # not a run of this dataset service
            if recorded.state == "active":
                raise FailedPrecondition(
                    f"the learner trains run {recorded.name!r}, one at a time; wait for it, "
                    "or, if its driver was killed, continue it by name or restart the learner"
                )
            found.append(run.id)
        token = page.next_page_token
        if not token:
            return found


def hyperparameters(values: Mapping[str, float | int | str]) -> learner_pb.Hyperparameters:
    """Hyperparameters by name.

    Raises:
        InvalidArgument: an unknown name (lists the known ones), or a value that cannot be one.
    """
    names = sorted(learner_pb.Hyperparameters.DESCRIPTOR.fields_by_name)
    found = learner_pb.Hyperparameters()
    for name, value in values.items():
        if name not in names:
            raise InvalidArgument(
                f"hyperparameters.{name}", "is unknown", f"use one of {', '.join(names)}"
            )
        least = -math.inf if name in _BELOW_0 else 0
        if not isinstance(value, str) and not (math.isfinite(value) and value >= least):
            problem = f"is {value}"
            raise InvalidArgument(f"hyperparameters.{name}", problem, "give a number from 0 on")
        whole = isinstance(getattr(found, name), int) and isinstance(value, float)
        try:
            setattr(found, name, int(value) if whole and value == int(value) else value)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"hyperparameters.{name}", str(error)) from error
    return found

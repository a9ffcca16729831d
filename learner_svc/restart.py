"""Bringing the ranks of a run up: from a checkpoint that opens, and again after some were lost.

- A restart goes on from exactly the checkpoint that the weights at hand come from, as many ranks
  as before, and does the steps since then again, with the batches that were kept; callers wait.
- Restarts in a row have a bound. A machine that does not come back in the time that a start has
  ends the run: waiting for it was the try.
- Nothing that was answered changes: the record of a step is that of the first time. A step that
  has another loss when it is done again is logged; on CPU that is a fault.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from learner_svc import metrics
from learner_svc.estimate import local_path
from learner_svc.launch import CALL
from learner_svc.process import MachineAway, WorkerProcess
from learner_svc.record import RunFiles, RunState, StepRecord
from learner_svc.run import Restart, Run, RunsConfig, StepProgress
from learner_svc.spec import RunSpec
from regreen.rpc import logging
from regreen.rpc.errors import DataLoss, InfraError, RegreenError

MOST_REPLAYED = 200
"""Steps since the last checkpoint whose batches are kept."""
_LONGEST_WAIT_S = 30.0


class Opener:
    """Starts workers and brings them to where their run stands."""

    def __init__(self, root: Path, config: RunsConfig) -> None:
        self._root, self._config = root, config

    def worker(self, files: RunFiles) -> WorkerProcess:
        """A worker that is yet to be started."""
        return WorkerProcess(files.log, self._root / CALL)

    async def open(
        self, worker: WorkerProcess, files: RunFiles, spec: RunSpec, resumes: Sequence[Path | None]
    ) -> tuple[dict[str, Any], Path | None, str]:
        """Open the first of `resumes` that is whole; also what was wrong with those before it.

        Raises:
            DataLoss: none is whole.
            InfraError: ranks or machines were lost meanwhile, or took too long.
        """
        config = self._config
        await worker.spawn(
            config.processes,
            nodes=config.nodes,
            address=config.address,
            silence_s=config.silence_s,
            timeout_s=config.start_timeout_s,
        )
        local = replace(spec, base_uri=str(local_path(spec.base_uri, "base_uri")))
        damages: list[str] = []
        for resume in resumes:
            message = {
                "op": "start",
                "spec": local.to_json(),
                "resume": str(resume) if resume else "",
                "checkpoints": str(files.checkpoints),
                "extensions": str(self._root / "torch_extensions"),
            }
            try:
                answer = await worker.call(message, timeout_s=config.start_timeout_s)
            except DataLoss as error:
                damages.append(error.message)
                continue
            passed_over = "; ".join(damages)
            return answer, resume, passed_over and f"{passed_over}; went on from {resume}"
        raise DataLoss("; ".join(damages))

    async def restart(self, run: Run, lost: RegreenError) -> None:
        """Bring a run that lost ranks to where it was; the caller holds its lock.

        Raises:
            RegreenError: it cannot be; `lost` itself when the run was stopped meanwhile.
        """
        while True:
            if run.worker is not None:
                await run.worker.kill()
            event = self._next(run, lost)
            metrics.RESTARTS.labels(run.record.spec.kind.value).inc()
            logging.get().warning(
                "restarting", run_id=run.record.spec.run_id, number=event.number, why=event.reason
            )
            await run.publish(event)
            await asyncio.sleep(min(2.0 ** (event.number - 1) - 1, _LONGEST_WAIT_S))
            if run.record.state is not RunState.ACTIVE:
                raise lost
            try:
                await self._again(run)
            except MachineAway:
                raise
            except InfraError as error:
                lost = error
                continue
            await run.publish(replace(event, complete=True))
            return

    def _next(self, run: Run, lost: RegreenError) -> Restart:
        """Count one more restart.

        Raises:
            RegreenError: there are no more, or it could not go on from where it stands.
        """
        limit, number = self._config.max_restarts, run.restarts_in_row + 1
        from_step = _checkpoint_step(run)
        if run.record.state is not RunState.ACTIVE or not limit:
            raise lost
        if number > limit:
            raise InfraError(
                f"{lost.message} -- after {limit} restarts in a row without a further step; see to "
                "the cause, then start the run again or raise max_restarts"
            )
        if run.step - from_step > MOST_REPLAYED:
            raise InfraError(
                f"{lost.message} -- the last checkpoint is {run.step - from_step} steps old, and "
                f"the batches of {MOST_REPLAYED} are kept; save checkpoints more often"
            )
        run.restarts_in_row = number
        run.restarts += 1
        return Restart(number, limit, lost.message, from_step, run.step)

    async def _again(self, run: Run) -> None:
        run.worker = worker = self.worker(run.files)
        resume = run.checkpoint.path if run.checkpoint else None
        await self.open(worker, run.files, run.record.spec, [resume])
        for record in run.files.steps:
            if _checkpoint_step(run) < record.step <= run.step:
                await self._repeat(run, worker, record)

    async def _repeat(self, run: Run, worker: WorkerProcess, record: StepRecord) -> None:
        answer = await worker.call(
            step_message(run.files, record.step, record.group_ids),
            timeout_s=self._config.step_timeout_s,
            progress=lambda done, total: run.progressed(StepProgress(record.step, done, total)),
        )
        loss, before = answer["metrics"].get("loss"), record.metrics.get("loss")
        if loss != before:
            logging.get().warning(
                "repeated with another loss", step=record.step, loss=loss, before=before
            )


def step_message(
    files: RunFiles, step: int, group_ids: Sequence[str], lend_memory: bool = False
) -> dict[str, Any]:
    """The command to do a step whose batch lies with the run."""
    return {
        "op": "step",
        "step": step,
        "batch": str(files.batch(step)),
        "group_ids": list(group_ids),
        "lend_memory": lend_memory,
    }


def _checkpoint_step(run: Run) -> int:
    return run.checkpoint.manifest.step if run.checkpoint else 0

"""The runs of this learner: at most one trains, in worker processes of its own.

- A step whose record cannot be written ends the run's worker: the weights hold a step that nothing
  vouches for, and the run goes on from its last checkpoint.
- A damaged checkpoint is passed over for the one before it, and the run's `error` says so.
- A step is done once: sent again it is answered from the record; another batch under its number is
  refused; a number that is not the next one is refused.
- A step, once begun, is finished and recorded even if its caller has gone.
- A rank or machine that is lost, in a step or between two, is begun anew with all others
  (`restart`); callers wait for it, and only if that does not help has the run failed.
- After a kill -9 of the service, `start` with the run's id goes on from its last checkpoint; the
  steps after it are forgotten, here and in the record, so that their groups can be sent again.
- Only one learner works in a home at a time (a lock that dies with the process).
"""

import asyncio
import contextlib
import fcntl
import functools
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from learner_svc import checkpoint as ckpt
from learner_svc import metrics, published
from learner_svc.estimate import Estimate, estimate, estimate_new, local_path
from learner_svc.process import WorkerProcess
from learner_svc.record import RunFiles, RunRecord, RunState, StepRecord
from learner_svc.restart import MOST_REPLAYED, Opener, step_message
from learner_svc.run import Event, Run, RunsConfig, StepProgress
from learner_svc.spec import RunSpec
from learner_svc.sync import WeightSync
from learner_svc.walls import check_seen
from regreen.blobs import Digest, ObjectBlobs
from regreen.model_store import ensure_default_model
from regreen.rpc import tenants
from regreen.rpc.errors import (
    FailedPrecondition,
    InfraError,
    InvalidArgument,
    NotFound,
    RegreenError,
)

T = TypeVar("T")


class Runs:
    """All runs of a learner."""

    def __init__(self, home: Path, blobs: ObjectBlobs, config: RunsConfig) -> None:
        self._home, self._root = home, home / "learner"
        self._root.mkdir(parents=True, exist_ok=True)
        self._lock_file = (self._root / "lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FailedPrecondition(
                f"another learner works in {self._root}; stop it or set another home"
            ) from None
        self._blobs, self._config = blobs, config
        self._sync = WeightSync(blobs, config.sync)
        self._opener = Opener(self._root, config)
        self._runs: dict[str, Run] = {}
        self._starting = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._load()

    def _load(self) -> None:
        for path in sorted((self._root / "runs").glob("*/run.json")):
            files = RunFiles(path.parent)
            try:
                record = files.read()
            except RegreenError:
                continue
            if record.state is RunState.ACTIVE:
                record = replace(record, state=RunState.STOPPED)
            saved = ckpt.checkpoints(files.checkpoints)
            latest = saved[-1] if saved else None
            newest = published.newest(files.checkpoints)
            run = Run(record, files, checkpoint=latest, published=newest)
            run.step = latest.manifest.step if latest else 0
            run.events = [*files.steps]
            self._runs[record.spec.run_id] = run

    def get(self, run_id: str) -> Run:
        """A run by id.

        Raises:
            NotFound: no such run.
        """
        run = self._runs.get(run_id)
        if run is None or not tenants.sees(run.record.tenant):
            raise NotFound(f"no run {run_id[:80]!r} here; start it")
        return run

    def all(self) -> list[Run]:
        """All runs that the caller sees, newest first."""
        seen = [run for run in self._runs.values() if tenants.sees(run.record.tenant)]
        return sorted(seen, key=lambda run: run.record.created, reverse=True)

    def _folders(self) -> dict[str, tuple[str, Path]]:
        return {name: (run.record.tenant, run.files.directory) for name, run in self._runs.items()}

    async def estimate(self, spec: RunSpec) -> Estimate:
        """What a run would need; starts nothing and raises as `estimate_new`."""
        check_seen(spec, "", self._folders())
        return await asyncio.to_thread(
            estimate_new, spec, self._home, self._config.processes, self._config.nodes
        )

    async def start(self, spec: RunSpec, resume_uri: str) -> Run:
        """Start a run or take it up again.

        Raises:
            InvalidArgument, NotFound, DataLoss: the spec, model or checkpoint will not do.
            AlreadyExists: another tenant has a run of that id.
            FailedPrecondition: another run is active, memory is short, or the default model is
                asked for and not installed.
        """
        spec.check()
        check_seen(spec, resume_uri, self._folders())
        known = self._runs.get(spec.run_id)
        if not spec.base_uri and known:
            spec = replace(spec, base_uri=known.record.spec.base_uri)
        if not spec.base_uri and resume_uri:
            problem = "is empty, but resume_uri is given"
            raise InvalidArgument("base_uri", problem, "name the model that the checkpoint is of")
        if not spec.base_uri:
            base = await asyncio.to_thread(ensure_default_model, self._home)
            spec = replace(spec, base_uri=str(base.path.resolve()))
        # The lock is taken by the work itself: it outlives a caller who gives up.
        return await self._finish(self._start(spec, resume_uri))

    async def _start(self, spec: RunSpec, resume_uri: str) -> Run:
        async with self._starting:
            known = self._runs.get(spec.run_id)
            if known and known.record.state is RunState.ACTIVE:
                if known.record.spec == spec and not resume_uri:
                    return known
                raise FailedPrecondition(f"run {spec.run_id} is active; stop it first")
            for run in self._runs.values():
                if run.record.state is RunState.ACTIVE:
                    shown = run.record.spec.run_id if tenants.sees(run.record.tenant) else "another"
                    raise FailedPrecondition(f"run {shown} is active; one run trains at a time")
            return await self._begin(spec, resume_uri, known)

    async def _begin(self, spec: RunSpec, resume_uri: str, known: Run | None) -> Run:
        files = RunFiles(self._root / "runs" / spec.run_id)
        resumes = _resumes(files, resume_uri)
        folders = [*filter(None, resumes), local_path(spec.base_uri, "base_uri")]
        found = await asyncio.to_thread(
            estimate, spec, folders, self._config.processes, self._config.nodes
        )
        record = RunRecord(
            spec,
            RunState.ACTIVE,
            ckpt.now(),
            estimated_memory_bytes=found.memory_bytes,
            tenant=tenants.own(),
        )
        if known:
            record = replace(record, created=known.record.created, tenant=known.record.tenant)
            files.steps = known.files.steps
        files.drop_batches()
        newest = published.newest(files.checkpoints)
        run = Run(record, files, self._opener.worker(files), published=newest)
        try:
            await self._open(run, spec, resumes)
        except BaseException as error:
            await _kill(run)
            if isinstance(error, RegreenError) and (
                known is not None or not isinstance(error, InvalidArgument | NotFound)
            ):
                self._runs[spec.run_id] = run
                await self._fail(run, error)
            raise
        self._runs[spec.run_id] = run
        self._watch_ranks(run)
        self._show_active()
        return run

    async def _open(self, run: Run, spec: RunSpec, resumes: Sequence[Path | None]) -> None:
        files = run.files
        answer, resume, damage = await self._opener.open(_worker(run), files, spec, resumes)
        run.step = answer["step"]
        files.cut(run.step)
        run.events = [*files.steps]
        if resume is not None:
            run.checkpoint = ckpt.Saved(resume, ckpt.load_manifest(resume))
        run.record = replace(
            run.record,
            engine=answer["engine"],
            trainable_parameters=answer["trainable_parameters"],
            parameters=answer["parameters"],
            error=damage,
        )
        files.write(run.record)

    def _watch_ranks(self, run: Run) -> None:
        """See to ranks that are lost while nobody asks anything of them."""
        worker = _worker(run)

        async def watch() -> None:
            lost = InfraError(f"the run lost ranks: {await worker.lost()}")
            async with run.lock:
                if run.worker is worker and run.record.state is RunState.ACTIVE:
                    with contextlib.suppress(RegreenError):  # it is in the run's record
                        await self._restart(run, lost)

        self._keep(watch())

    async def _restart(self, run: Run, lost: RegreenError) -> None:
        """Begin a run's ranks anew; if that cannot be, it has failed. Under the run's lock."""
        try:
            await self._opener.restart(run, lost)
        except BaseException as error:
            await _kill(run)
            if isinstance(error, RegreenError) and run.record.state is RunState.ACTIVE:
                await self._fail(run, error)
            raise
        self._watch_ranks(run)

    async def step(
        self,
        run_id: str,
        step: int,
        batch: bytes | Digest,
        group_ids: tuple[str, ...],
        *,
        lend_memory: bool = False,
    ) -> tuple[StepRecord, bool]:
        """Do a step, or find that it was done (then the second value is True).

        Raises:
            NotFound: no such run or batch.
            InvalidArgument: malformed batch, or not the next step.
            InfraError: ranks were lost and could not be begun anew; start the run again.
        """
        run = self.get(run_id)
        return await self._finish(self._step(run, step, batch, group_ids, lend_memory))

    async def _step(
        self, run: Run, step: int, batch: bytes | Digest, group_ids: tuple[str, ...], lend: bool
    ) -> tuple[StepRecord, bool]:
        async with run.lock:
            digest = batch.sha256 if isinstance(batch, Digest) else _sha256(batch)
            done = self._done(run, step, digest)
            if done is not None:
                return done, True
            _need_worker(run)
            started = time.monotonic()
            try:
                await self._spool(run, step, batch)
                message = step_message(run.files, step, group_ids, lend)
                answer = await self._call(run, message, self._config.step_timeout_s)
            except BaseException:
                run.files.batch(step).unlink(missing_ok=True)
                raise
            duration_s = time.monotonic() - started
            record = StepRecord(step, digest, group_ids, answer["metrics"], duration_s)
            await self._append(run, record)
            run.step, run.progress, run.restarts_in_row = step, None, 0
            run.files.batch(step - MOST_REPLAYED).unlink(missing_ok=True)
            metrics.observe_step(run.record.spec.kind.value, record)
            await run.publish(record)
            return record, False

    async def _append(self, run: Run, record: StepRecord) -> None:
        try:
            await asyncio.to_thread(run.files.append, record)
        except (OSError, RegreenError) as error:
            problem: RegreenError = InfraError(f"step {record.step} was not recorded: {error}")
            if isinstance(error, RegreenError):
                problem = error
            await _kill(run)
            await self._fail(run, problem)
            raise problem from error

    def _done(self, run: Run, step: int, digest: str) -> StepRecord | None:
        """The record of a step that was done; None for the next step."""
        if step == run.step + 1:
            return None
        record = next((item for item in run.files.steps if item.step == step), None)
        if record is None or step > run.step:
            raise InvalidArgument(
                "step",
                f"is {step}, but the next step of this run is {run.step + 1}",
                f"send step {run.step + 1}",
            )
        if record.batch_sha256 != digest:
            raise InvalidArgument("step", f"{step} was done with another batch", "send the next")
        return record

    async def _spool(self, run: Run, step: int, batch: bytes | Digest) -> None:
        path = run.files.batch(step)
        with ckpt.disk_errors(path):
            if isinstance(batch, Digest):
                await self._blobs.get_file(batch, path)
            else:
                await asyncio.to_thread(path.write_bytes, batch)

    async def _call(
        self,
        run: Run,
        message: dict[str, Any],
        timeout_s: float,
        left: Callable[[], dict[str, Any] | None] = lambda: None,
    ) -> dict[str, Any]:
        """Call the worker, as often as its ranks are lost and stand again; under the run's lock.

        `left` is the answer that one which was lost had no time to give, if it did the work.
        """

        def progress(done: int, total: int) -> None:
            run.progressed(StepProgress(run.step + 1, done, total))

        while True:
            worker = _need_worker(run)
            try:
                return await worker.call(message, timeout_s=timeout_s, progress=progress)
            except InfraError as error:
                if worker.alive:
                    raise
                answer = left()
                await self._restart(run, error)
                if answer is not None:
                    return answer

    async def _fail(self, run: Run, error: RegreenError) -> None:
        """Mark a run whose worker has ended; its last checkpoint stays."""
        run.record = replace(run.record, state=RunState.FAILED, error=error.message)
        # On a full disk the state is lost with the service, which then finds the run stopped.
        with contextlib.suppress(OSError, RegreenError):
            run.files.write(run.record)
        self._show_active()
        await run.publish(None)

    def _show_active(self) -> None:
        active = [run for run in self._runs.values() if run.record.state is RunState.ACTIVE]
        metrics.show_active([run.record.spec.kind.value for run in active])

    async def publish(
        self, run_id: str, policy_version: int, driver_step: int = 0
    ) -> published.Published:
        """Write the weights at hand for policies.

        Raises:
            NotFound: no such run.
            DiskFull: no space; what was published before is intact.
        """
        run = self.get(run_id)
        return await self._finish(self._publish(run, policy_version, driver_step))

    async def _publish(
        self, run: Run, policy_version: int, driver_step: int
    ) -> published.Published:
        async with run.lock:
            place = {"policy_version": policy_version, "driver_step": driver_step}
            message: dict[str, Any] = {"op": "publish", **place}
            with metrics.PUBLISH_SECONDS.time():
                answer = await self._call(run, message, self._config.save_timeout_s)
            run.published = published.at(Path(answer["path"]))
            await self._sync.offer(run.files.directory, run.published)
            return run.published

    async def save(self, run_id: str, policy_version: int, driver_step: int = 0) -> ckpt.Saved:
        """Write a checkpoint.

        Raises:
            NotFound: no such run.
            DiskFull: no space; the previous checkpoint is intact.
        """
        run = self.get(run_id)
        return await self._finish(self._save(run, policy_version, driver_step))

    async def _save(self, run: Run, policy_version: int, driver_step: int) -> ckpt.Saved:
        async with run.lock:
            place = {"policy_version": policy_version, "driver_step": driver_step}
            message = {"op": "save", **place, "keep": self._config.keep_checkpoints}
            known = {saved.path for saved in ckpt.checkpoints(run.files.checkpoints)}

            def left() -> dict[str, Any] | None:
                written = [*ckpt.checkpoints(run.files.checkpoints)]
                if not written or written[-1].path in known:
                    return None
                run.checkpoint = written[-1]
                return {"path": str(written[-1].path)}

            timeout_s = self._config.save_timeout_s
            with metrics.CHECKPOINT_SECONDS.time():
                answer = await self._call(run, message, timeout_s, left)
            path = Path(answer["path"])
            saved = ckpt.Saved(path, ckpt.load_manifest(path))
            run.checkpoint = saved
            run.files.drop_batches(saved.manifest.step)
            await self._sync.offer_saved(run.files.directory, saved)
            await run.publish(saved)
            return saved

    async def stop(self, run_id: str) -> Run:
        """End a run's workers; the run can be started again."""
        run = self.get(run_id)
        if run.record.state is RunState.ACTIVE:
            # Before the worker ends, so that a step it is torn from does not read as a failure.
            run.record = replace(run.record, state=RunState.STOPPED)
        if run.worker is not None:
            await run.worker.stop(self._config.stop_grace_s)
        self._show_active()
        await run.publish(None)
        run.files.write(run.record)
        return run

    async def watch(self, run_id: str, from_step: int) -> AsyncIterator[Event]:
        """Events of a run from a step on, until it ends."""
        run = self.get(run_id)
        seen, progress = 0, run.progress
        while True:
            while seen < len(run.events):
                event = run.events[seen]
                seen += 1
                if not isinstance(event, StepRecord) or event.step >= from_step:
                    yield event
            if run.progress is not None and run.progress is not progress:
                progress = run.progress
                yield progress
            if run.record.state is not RunState.ACTIVE or self._runs.get(run_id) is not run:
                return
            async with run.changed:
                moved = functools.partial(self._moved, run, seen, progress)
                await run.changed.wait_for(moved)

    def _moved(self, run: Run, seen: int, progress: StepProgress | None) -> bool:
        """Whether a watcher that saw this much has something to do."""
        return (
            seen < len(run.events)
            or (run.progress is not None and run.progress is not progress)
            or run.record.state is not RunState.ACTIVE
            or self._runs.get(run.record.spec.run_id) is not run
        )

    async def close(self) -> None:
        """End all workers, also of runs that are being started; the runs stay resumable."""
        for run in self._runs.values():
            if run.record.state is RunState.ACTIVE:
                with contextlib.suppress(RegreenError):
                    await self.stop(run.record.spec.run_id)
        left = [*self._tasks]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        self._lock_file.close()

    async def _finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for work that goes on even if the caller gives up."""
        return await asyncio.shield(self._keep(work))

    def _keep(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _resumes(files: RunFiles, resume_uri: str) -> list[Path | None]:
    """Where to go on from, the best first; None is the base model."""
    if resume_uri:
        return [local_path(resume_uri, "resume_uri")]
    return [saved.path for saved in reversed(ckpt.checkpoints(files.checkpoints))] or [None]


def _worker(run: Run) -> WorkerProcess:
    if run.worker is None:
        raise FailedPrecondition("the run has no worker")
    return run.worker


def _need_worker(run: Run) -> WorkerProcess:
    if run.worker is None or run.record.state is not RunState.ACTIVE:
        raise FailedPrecondition(
            f"run {run.record.spec.run_id} is {run.record.state.value}; StartRun takes it up again "
            "from its last checkpoint" + (f" ({run.record.error})" if run.record.error else "")
        )
    return run.worker


async def _kill(run: Run) -> None:
    if run.worker is not None:
        await run.worker.kill()


def _sha256(batch: bytes) -> str:
    return hashlib.sha256(batch).hexdigest()

"""`regreen.learner.v1.LearnerService`: protobuf in, protobuf out, nothing else.

- Zero and empty mean the default, except where the contract gives zero a meaning of its own.
- `request_id` is answered once; steps are also idempotent by their number and batch.
"""

import re
from collections.abc import AsyncIterator
from dataclasses import asdict, fields, replace
from datetime import datetime
from typing import Any

import grpc

from learner_svc.checkpoint import Saved
from learner_svc.offers import Offers
from learner_svc.published import Published
from learner_svc.record import RunState, StepRecord
from learner_svc.run import Event, Restart, Run, StepProgress
from learner_svc.runs import Runs
from learner_svc.spec import Hyperparameters, RunKind, RunSpec, defaults
from regreen.blobs import Digest, check_digest
from regreen.common.v1 import Digest as DigestMessage
from regreen.common.v1 import WeightOffer
from regreen.learner import v1 as pb
from regreen.rpc.errors import InvalidArgument
from regreen.rpc.idempotency import Idempotency

Context = grpc.aio.ServicerContext[Any, Any]
_KINDS = {pb.RUN_KIND_SFT: RunKind.SFT, pb.RUN_KIND_GRPO: RunKind.GRPO}
_STATES = {
    RunState.ACTIVE: pb.RUN_STATE_ACTIVE,
    RunState.STOPPED: pb.RUN_STATE_STOPPED,
    RunState.FAILED: pb.RUN_STATE_FAILED,
}
_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
"""It names a directory."""
_PAGE = 100
_MAX_PAGE = 1000


class LearnerServicer(pb.LearnerServiceServicer):
    """Translates; `Runs` does the work."""

    def __init__(self, runs: Runs, default_engine: str, address: str = "127.0.0.1") -> None:
        self._runs, self._engine = runs, default_engine
        self._offers = Offers(address)
        self._once: Idempotency[Any] = Idempotency()

    async def close(self) -> None:
        """Break off what still goes on; forget what was answered."""
        await self._once.finish(0.0)
        self._once.close()
        await self._offers.close()

    async def StartRun(self, request: pb.StartRunRequest, context: Context) -> pb.StartRunResponse:
        # Not remembered: after a crash the same request must start the run again.
        run = await self._runs.start(self._spec(request), request.resume_uri)
        return pb.StartRunResponse(run=run_message(run))

    async def EstimateRun(
        self, request: pb.EstimateRunRequest, context: Context
    ) -> pb.EstimateRunResponse:
        spec = self._asked("", request)
        found = await self._runs.estimate(spec)
        return pb.EstimateRunResponse(
            estimated_memory_bytes=found.memory_bytes,
            available_memory_bytes=found.available_bytes,
            parameters=found.parameters,
            trainable_parameters=found.trainable_parameters,
            hyperparameters=hyperparameters_message(spec.hyperparameters),
            engine=spec.engine,
            processes=found.processes,
            host_memory_bytes=found.host_bytes,
        )

    def _spec(self, request: pb.StartRunRequest) -> RunSpec:
        if not _RUN_ID.fullmatch(request.run_id):
            raise InvalidArgument(
                "run_id",
                f"{request.run_id[:80]!r} is no id",
                "give 1 to 128 of the letters a to z and A to Z, digits, _ and -",
            )
        return self._asked(request.run_id, request)

    def _asked(self, run_id: str, request: pb.StartRunRequest | pb.EstimateRunRequest) -> RunSpec:
        kind = _KINDS.get(request.kind)
        if kind is None:
            raise InvalidArgument("kind", "is not given", "give RUN_KIND_SFT or RUN_KIND_GRPO")
        return RunSpec(
            run_id=run_id,
            kind=kind,
            base_uri=request.base_uri,
            engine=request.engine or self._engine,
            hyperparameters=hyperparameters_of(request.hyperparameters, kind),
        )

    async def Step(self, request: pb.StepRequest, context: Context) -> pb.StepResponse:
        batch: bytes | Digest = request.batch
        if not request.batch:
            if not request.HasField("batch_digest"):
                raise InvalidArgument("batch", "is empty", "send batch or batch_digest")
            digest = request.batch_digest
            batch = check_digest(Digest(digest.sha256, digest.size_bytes), "batch_digest")
        record, repeated = await self._runs.step(
            request.run_id,
            request.step,
            batch,
            tuple(request.group_ids),
            lend_memory=request.lend_memory,
        )
        return step_message(record, repeated=repeated)

    async def WatchRun(
        self, request: pb.WatchRunRequest, context: Context
    ) -> AsyncIterator[pb.WatchRunResponse]:
        async for event in self._runs.watch(request.run_id, request.from_step):
            yield event_message(event)

    async def PublishWeights(
        self, request: pb.PublishWeightsRequest, context: Context
    ) -> pb.PublishWeightsResponse:
        _check_stamps(request)

        async def work() -> pb.PublishWeightsResponse:
            made = await self._runs.publish(
                request.run_id, request.policy_version, request.driver_step
            )
            return pb.PublishWeightsResponse(weights=published_message(made))

        response: pb.PublishWeightsResponse = (
            await self._once.once("PublishWeights", request.request_id, request, work)
            if request.request_id
            else await work()
        )
        return response

    async def OfferWeights(
        self, request: pb.OfferWeightsRequest, context: Context
    ) -> pb.OfferWeightsResponse:
        # Not remembered: a process that was ended waits nowhere.
        published = self._runs.get(request.run_id).published
        made = await self._offers.make(published, request.receivers)
        entry = made.published.entry
        offer = WeightOffer(
            address=made.host,
            port=made.waiting.port,
            group=made.group,
            backend=made.waiting.backend,
            receivers=made.receivers,
            digest=DigestMessage(sha256=entry.sha256, size_bytes=entry.size_bytes),
        )
        for name, dtype, shape in made.waiting.tensors:
            offer.tensors.add(name=name, dtype=dtype, shape=shape)
        return pb.OfferWeightsResponse(offer=offer)

    async def SaveCheckpoint(
        self, request: pb.SaveCheckpointRequest, context: Context
    ) -> pb.SaveCheckpointResponse:
        _check_stamps(request)

        async def work() -> pb.SaveCheckpointResponse:
            saved = await self._runs.save(
                request.run_id, request.policy_version, request.driver_step
            )
            return pb.SaveCheckpointResponse(checkpoint=checkpoint_message(saved))

        response: pb.SaveCheckpointResponse = (
            await self._once.once("SaveCheckpoint", request.request_id, request, work)
            if request.request_id
            else await work()
        )
        return response

    async def StopRun(self, request: pb.StopRunRequest, context: Context) -> pb.StopRunResponse:
        return pb.StopRunResponse(run=run_message(await self._runs.stop(request.run_id)))

    async def GetRun(self, request: pb.GetRunRequest, context: Context) -> pb.GetRunResponse:
        return pb.GetRunResponse(run=run_message(self._runs.get(request.run_id)))

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:
        size = request.page_size or _PAGE
        if not 0 < size <= _MAX_PAGE:
            raise InvalidArgument("page_size", f"is {size}", f"give 1 to {_MAX_PAGE}")
        runs = self._runs.all()
        start = 0
        if request.page_token:
            ids = [run.record.spec.run_id for run in runs]
            if request.page_token not in ids:
                raise InvalidArgument("page_token", "is unknown", "start without one")
            start = ids.index(request.page_token) + 1
        page = runs[start : start + size]
        more = start + size < len(runs)
        return pb.ListRunsResponse(
            runs=[run_message(run) for run in page],
            next_page_token=page[-1].record.spec.run_id if more else "",
        )


def _check_stamps(request: pb.PublishWeightsRequest | pb.SaveCheckpointRequest) -> None:
    for field, value in (
        ("policy_version", request.policy_version),
        ("driver_step", request.driver_step),
    ):
        if value < 0:
            raise InvalidArgument(field, "is negative", "give 0 or more")


def hyperparameters_of(message: pb.Hyperparameters, kind: RunKind) -> Hyperparameters:
    """Hyperparameters in force: what the message sets, over the defaults of the kind.

    Raises:
        InvalidArgument: a value is out of range.
    """
    base = defaults(kind, message.loss)
    given: dict[str, Any] = {}
    for descriptor in message.DESCRIPTOR.fields:
        value = getattr(message, descriptor.name)
        if value:
            given[descriptor.name] = value
    # On the wire 0 is "unset", as -1 is: both leave the stage to the engine.
    if given.get("zero_stage", 0) < 0:
        given["zero_stage"] = -1
    result = replace(base, **given)
    result.check(kind)
    return result


def hyperparameters_message(value: Hyperparameters) -> pb.Hyperparameters:
    """The message of hyperparameters in force."""
    known = {descriptor.name for descriptor in pb.Hyperparameters.DESCRIPTOR.fields}
    raw = {item.name: getattr(value, item.name) for item in fields(value) if item.name in known}
    return pb.Hyperparameters(**raw)


def run_message(run: Run) -> pb.LearnerRun:
    """The message of a run."""
    record = run.record
    kinds = {kind: number for number, kind in _KINDS.items()}
    return pb.LearnerRun(
        id=record.spec.run_id,
        kind=kinds[record.spec.kind],
        state=_STATES[record.state],
        step=run.step,
        checkpoint=checkpoint_message(run.checkpoint) if run.checkpoint else None,
        hyperparameters=hyperparameters_message(record.spec.hyperparameters),
        engine=record.engine or record.spec.engine,
        trainable_parameters=record.trainable_parameters,
        parameters=record.parameters,
        error=record.error,
        estimated_memory_bytes=record.estimated_memory_bytes,
        restarts=run.restarts,
        published=published_message(run.published) if run.published else None,
    )


def checkpoint_message(saved: Saved) -> pb.Checkpoint:
    """The message of a checkpoint."""
    manifest = saved.manifest
    message = pb.Checkpoint(
        uri=str(saved.path),
        digest=DigestMessage(**asdict(manifest.weights)),
        step=manifest.step,
        policy_version=manifest.policy_version,
        run_id=manifest.run_id,
        group_ids=manifest.group_ids,
        driver_step=manifest.driver_step,
    )
    message.create_time.FromDatetime(datetime.fromisoformat(manifest.created))
    return message


def published_message(published: Published) -> pb.PublishedWeights:
    """The message of published weights."""
    position = published.position
    message = pb.PublishedWeights(
        uri=str(published.path),
        digest=DigestMessage(**asdict(published.entry)),
        step=position.step,
        policy_version=position.policy_version,
        run_id=position.run_id,
        driver_step=position.driver_step,
    )
    message.create_time.FromDatetime(datetime.fromisoformat(published.created))
    return message


def step_message(record: StepRecord, *, repeated: bool = False) -> pb.StepResponse:
    """The message of a step."""
    message = pb.StepResponse(step=record.step, metrics=record.metrics, repeated_step=repeated)
    message.duration.FromMilliseconds(int(record.duration_s * 1000))
    return message


def event_message(event: Event) -> pb.WatchRunResponse:
    """The message of an event."""
    if isinstance(event, StepRecord):
        return pb.WatchRunResponse(step=step_message(event))
    if isinstance(event, StepProgress):
        return pb.WatchRunResponse(progress=pb.StepProgress(**asdict(event)))
    if isinstance(event, Restart):
        return pb.WatchRunResponse(restart=pb.Restart(**asdict(event)))
    return pb.WatchRunResponse(checkpoint=checkpoint_message(event))

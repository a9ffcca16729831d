"""Client of the learner service.

- Each method is one RPC; it returns the response's main message.
- A step that was done is answered, not repeated, so `step` may be sent again after any failure.
"""

from collections.abc import AsyncIterator, Sequence

import grpc

from regreen.client.channel import READ_S, WRITE_S, Caller, call_metadata, new_request_id, stream
from regreen.common.v1 import Digest, WeightOffer
from regreen.learner import v1 as pb

_START_S = 900.0
_STEP_S = 3600.0


class LearnerClient(Caller):
    """`regreen.learner.v1.LearnerService`."""

    def __init__(self, channel: grpc.aio.Channel, *, patience_s: float = 30.0) -> None:
        super().__init__(channel, patience_s=patience_s)
        self._stub = pb.LearnerServiceStub(channel)

    async def start_run(
        self,
        run_id: str,
        kind: pb.RunKind.ValueType,
        base_uri: str = "",
        *,
        hyperparameters: pb.Hyperparameters | None = None,
        engine: str = "",
        resume_uri: str = "",
        request_id: str = "",
    ) -> pb.LearnerRun:
        """Start a run or take it up again; without a base it trains the small default model."""
        request = pb.StartRunRequest(
            request_id=request_id or new_request_id(),
            run_id=run_id,
            kind=kind,
            base_uri=base_uri,
            hyperparameters=hyperparameters,
            engine=engine,
            resume_uri=resume_uri,
        )
        run: pb.LearnerRun = (await self._call(self._stub.StartRun, request, _START_S)).run
        return run

    async def estimate_run(
        self,
        kind: pb.RunKind.ValueType,
        base_uri: str = "",
        *,
        hyperparameters: pb.Hyperparameters | None = None,
        engine: str = "",
    ) -> pb.EstimateRunResponse:
        """What a run would need; starts nothing."""
        request = pb.EstimateRunRequest(
            kind=kind, base_uri=base_uri, hyperparameters=hyperparameters, engine=engine
        )
        found: pb.EstimateRunResponse = await self._call(self._stub.EstimateRun, request, READ_S)
        return found

    async def step(
        self,
        run_id: str,
        step: int,
        *,
        batch: bytes = b"",
        batch_digest: Digest | None = None,
        group_ids: Sequence[str] = (),
        lend_memory: bool = False,
        request_id: str = "",
    ) -> pb.StepResponse:
        """One optimizer step."""
        request = pb.StepRequest(
            request_id=request_id or new_request_id(),
            run_id=run_id,
            step=step,
            batch=batch,
            batch_digest=batch_digest,
            group_ids=group_ids,
            lend_memory=lend_memory,
        )
        response: pb.StepResponse = await self._call(self._stub.Step, request, _STEP_S)
        return response

    async def watch_run(
        self, run_id: str, *, from_step: int = 0, timeout_s: float = 24 * 3600.0
    ) -> AsyncIterator[pb.WatchRunResponse]:
        """Events of a run until it ends."""
        request = pb.WatchRunRequest(run_id=run_id, from_step=from_step)
        async with stream(
            self._stub.WatchRun(request, timeout=timeout_s, metadata=call_metadata())
        ) as events:
            async for event in events:
                yield event

    async def offer_weights(
        self, run_id: str, receivers: int, *, request_id: str = ""
    ) -> WeightOffer:
        """Have the weights that were published last wait for so many ranks."""
        request = pb.OfferWeightsRequest(
            request_id=request_id or new_request_id(), run_id=run_id, receivers=receivers
        )
        response: pb.OfferWeightsResponse = await self._call(
            self._stub.OfferWeights, request, _START_S
        )
        return response.offer

    async def publish_weights(
        self, run_id: str, *, policy_version: int = 0, driver_step: int = 0, request_id: str = ""
    ) -> pb.PublishedWeights:
        """Write the weights at hand where a policy can load them."""
        request = pb.PublishWeightsRequest(
            request_id=request_id or new_request_id(),
            run_id=run_id,
            policy_version=policy_version,
            driver_step=driver_step,
        )
        weights: pb.PublishedWeights = (
            await self._call(self._stub.PublishWeights, request, _START_S)
        ).weights
        return weights

    async def save_checkpoint(
        self, run_id: str, *, policy_version: int = 0, driver_step: int = 0, request_id: str = ""
    ) -> pb.Checkpoint:
        """Write a checkpoint."""
        request = pb.SaveCheckpointRequest(
            request_id=request_id or new_request_id(),
            run_id=run_id,
            policy_version=policy_version,
            driver_step=driver_step,
        )
        checkpoint: pb.Checkpoint = (
            await self._call(self._stub.SaveCheckpoint, request, _START_S)
        ).checkpoint
        return checkpoint

    async def stop_run(self, run_id: str, *, request_id: str = "") -> pb.LearnerRun:
        """End a run."""
        request = pb.StopRunRequest(request_id=request_id or new_request_id(), run_id=run_id)
        run: pb.LearnerRun = (await self._call(self._stub.StopRun, request, WRITE_S)).run
        return run

    async def get_run(self, run_id: str) -> pb.LearnerRun:
        """One run."""
        run: pb.LearnerRun = (
            await self._call(self._stub.GetRun, pb.GetRunRequest(run_id=run_id), READ_S)
        ).run
        return run

    async def list_runs(self, *, page_size: int = 0, page_token: str = "") -> pb.ListRunsResponse:
        """One page of runs."""
        request = pb.ListRunsRequest(page_size=page_size, page_token=page_token)
        response: pb.ListRunsResponse = await self._call(self._stub.ListRuns, request, READ_S)
        return response

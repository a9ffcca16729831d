"""Client of the judge service.

- Each method is one RPC; it returns the response's main message.
"""

from collections.abc import Sequence

import grpc

from regreen.client.channel import Caller, new_request_id
from regreen.judge import v1 as pb

_JUDGE_S = 300.0


class JudgeClient(Caller):
    """`regreen.judge.v1.JudgeService`."""

    def __init__(self, channel: grpc.aio.Channel, *, patience_s: float = 30.0) -> None:
        super().__init__(channel, patience_s=patience_s)
        self._stub = pb.JudgeServiceStub(channel)

    async def judge(
        self,
        evidence: pb.Evidence,
        *,
        model_use: pb.ModelUse.ValueType = pb.MODEL_USE_UNSPECIFIED,
        request_id: str = "",
    ) -> pb.Verdict:
        """Findings on one trajectory."""
        request = pb.JudgeRequest(
            request_id=request_id or new_request_id(), evidence=evidence, model_use=model_use
        )
        verdict: pb.Verdict = (await self._call(self._stub.Judge, request, _JUDGE_S)).verdict
        return verdict

    async def judge_group(
        self,
        members: Sequence[pb.Evidence],
        *,
        model_use: pb.ModelUse.ValueType = pb.MODEL_USE_UNSPECIFIED,
        request_id: str = "",
    ) -> Sequence[pb.Verdict]:
        """Findings on the members of a group, contrasted."""
        request = pb.JudgeGroupRequest(
            request_id=request_id or new_request_id(), members=members, model_use=model_use
        )
        response = await self._call(self._stub.JudgeGroup, request, _JUDGE_S)
        verdicts: Sequence[pb.Verdict] = response.verdicts
        return verdicts

    async def calibrate(
        self,
        examples: Sequence[pb.LabelledEvidence],
        *,
        model_use: pb.ModelUse.ValueType = pb.MODEL_USE_UNSPECIFIED,
        request_id: str = "",
    ) -> Sequence[pb.ClassCalibration]:
        """Precision and recall on labelled evidence."""
        request = pb.CalibrateRequest(
            request_id=request_id or new_request_id(), examples=examples, model_use=model_use
        )
        response = await self._call(self._stub.Calibrate, request, _JUDGE_S)
        classes: Sequence[pb.ClassCalibration] = response.classes
        return classes

"""`regreen.judge.v1.JudgeService`: translates messages and calls the judge, nothing else.

- Every RPC is a pure function of its request and the stored verdicts: safe to repeat.
"""

from typing import Any

from judge_svc import metrics
from judge_svc.calibrate import calibrate
from judge_svc.convert import (
    calibration_to,
    classes_from,
    evidence_from,
    model_use_from,
    verdict_to,
)
from judge_svc.verdict import Judge, ModelUse
from regreen.judge import v1 as pb
from regreen.rpc.errors import InvalidArgument

MAX_EXAMPLES = 10_000


class JudgeServicer(pb.JudgeServiceServicer):
    """The service's three RPCs."""

    def __init__(self, judge: Judge, default_use: ModelUse) -> None:
        self._judge, self._default_use = judge, default_use

    async def Judge(self, request: pb.JudgeRequest, context: Any) -> pb.JudgeResponse:
        """One trajectory."""
        if not request.HasField("evidence"):
            raise InvalidArgument("evidence", "is missing", "send the changes and validations")
        with metrics.SECONDS.labels("Judge").time():
            evidence = evidence_from(request.evidence, "evidence")
            use = model_use_from(request.model_use, self._default_use)
            verdict = await self._judge.judge(evidence, use)
        metrics.count(verdict)
        return pb.JudgeResponse(verdict=verdict_to(verdict))

    async def JudgeGroup(
        self, request: pb.JudgeGroupRequest, context: Any
    ) -> pb.JudgeGroupResponse:
        """The members of one group."""
        with metrics.SECONDS.labels("JudgeGroup").time():
            members = [
                evidence_from(member, f"members[{index}]")
                for index, member in enumerate(request.members)
            ]
            use = model_use_from(request.model_use, self._default_use)
            verdicts = await self._judge.judge_group(members, use)
        for verdict in verdicts:
            metrics.count(verdict)
        return pb.JudgeGroupResponse(verdicts=[verdict_to(verdict) for verdict in verdicts])

    async def Calibrate(self, request: pb.CalibrateRequest, context: Any) -> pb.CalibrateResponse:
        """Labelled evidence; its verdicts count in no metric."""
        if not request.examples:
            raise InvalidArgument("examples", "is empty", "send labelled evidence")
        if len(request.examples) > MAX_EXAMPLES:
            raise InvalidArgument(
                "examples", f"has {len(request.examples)}", f"send at most {MAX_EXAMPLES}"
            )
        use = model_use_from(request.model_use, self._default_use)
        judged = []
        with metrics.SECONDS.labels("Calibrate").time():
            for index, example in enumerate(request.examples):
                field = f"examples[{index}]"
                if not example.HasField("evidence"):
                    raise InvalidArgument(f"{field}.evidence", "is missing", "send the evidence")
                labels = classes_from(list(example.classes), f"{field}.classes")
                evidence = evidence_from(example.evidence, f"{field}.evidence")
                judged.append((await self._judge.judge(evidence, use), labels))
        return pb.CalibrateResponse(classes=[calibration_to(c) for c in calibrate(judged)])

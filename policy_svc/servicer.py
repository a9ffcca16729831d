"""`regreen.policy.v1.PolicyService`: translates messages, and nothing else.

- Domain code never sees a protobuf message; errors are mapped by the server's interceptor.
"""

from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from policy_svc.chat import Message
from policy_svc.engines.base import Completion, FinishReason, Offer, PauseMode, Request, Sampling
from policy_svc.policy import Policy, Rest
from policy_svc.versions import PolicyVersion
from regreen.common.v1 import Digest, WeightOffer
from regreen.ids import new_id
from regreen.policy import v1 as pb
from regreen.rpc.errors import InvalidArgument
from regreen.rpc.interceptors import own_id

Context = grpc.aio.ServicerContext[Any, Any]

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}
_MODES = {
    pb.PAUSE_MODE_UNSPECIFIED: PauseMode.DRAIN,
    pb.PAUSE_MODE_DRAIN: PauseMode.DRAIN,
    pb.PAUSE_MODE_IN_PLACE: PauseMode.IN_PLACE,
    pb.PAUSE_MODE_ABORT: PauseMode.ABORT,
}
_RESTS = {
    Rest.AWAKE: pb.SLEEP_STATE_AWAKE,
    Rest.FALLING_ASLEEP: pb.SLEEP_STATE_FALLING_ASLEEP,
    Rest.ASLEEP: pb.SLEEP_STATE_ASLEEP,
    Rest.WAKING: pb.SLEEP_STATE_WAKING,
}


class PolicyServicer(pb.PolicyServiceServicer):
    """Answers from a `Policy`."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        """Sample continuations."""
        asked = Request(
            request_id=request.request_id or new_id("gen"),
            prompt_token_ids=tuple(request.prompt_token_ids),
            n=request.n or 1,
            sampling=_sampling(request.sampling),
        )
        answer = await self._policy.generate(
            asked, min_version=request.min_version, patience_s=context.time_remaining()
        )
        return pb.GenerateResponse(
            completions=[_completion(c) for c in answer.generation.completions],
            cached_tokens=answer.generation.cached_tokens,
            duration=_duration(answer.duration_s),
        )

    async def ListQuotas(
        self, request: pb.ListQuotasRequest, context: Context
    ) -> pb.ListQuotasResponse:
        """List the tokens of today by tenant, and their bounds."""
        return pb.ListQuotasResponse(quotas=self._policy.usage.uses())

    async def RenderChat(
        self, request: pb.RenderChatRequest, context: Context
    ) -> pb.RenderChatResponse:
        """Render messages to ids."""
        chat = self._policy.chat
        messages = [Message(message.role, message.content) for message in request.messages]
        if request.continues:
            ids = chat.continue_turns(messages, request.last_token_id)
        else:
            ids = chat.render(messages)
        return pb.RenderChatResponse(token_ids=ids, text=chat.text(ids))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """Encode text or decode ids; control tokens written in a text stay text."""
        tokenizer = self._policy.chat.tokenizer
        if bool(request.text) == bool(request.token_ids):
            raise InvalidArgument("text", "and token_ids: one of them must be given", "give one")
        if request.text:
            ids = tokenizer.encode(request.text)
            return pb.TokenizeResponse(token_ids=ids, text=request.text)
        vocabulary = self._policy.engine.info.vocabulary
        for at, token in enumerate(request.token_ids):
            if not 0 <= token < vocabulary:
                raise InvalidArgument(
                    f"token_ids[{at}]",
                    f"{token} is outside the vocabulary",
                    f"use ids from 0 to {vocabulary - 1}",
                )
        text = tokenizer.decode(request.token_ids, control=True)
        return pb.TokenizeResponse(token_ids=request.token_ids, text=text)

    async def LoadVersion(
        self, request: pb.LoadVersionRequest, context: Context
    ) -> pb.LoadVersionResponse:
        """Switch weights."""
        if not request.HasField("policy"):
            raise InvalidArgument("policy", "is missing", "say what to load")
        policy, pause_s = await self._policy.versions.load(
            _version(request.policy),
            allow_older=request.allow_older,
            offer=_offer(request.offer) if request.HasField("offer") else None,
        )
        return pb.LoadVersionResponse(policy=_policy(policy), pause=_duration(pause_s))

    async def Pause(self, request: pb.PauseRequest, context: Context) -> pb.PauseResponse:
        """Stop taking work."""
        mode = _MODES.get(request.mode)
        if mode is None:
            raise InvalidArgument(
                "mode", f"{request.mode} is no known value", "give drain, in_place or abort"
            )
        return pb.PauseResponse(running=await self._policy.pause(mode))

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> pb.ResumeResponse:
        """Take work again."""
        await self._policy.resume()
        return pb.ResumeResponse()

    async def Sleep(self, request: pb.SleepRequest, context: Context) -> pb.SleepResponse:
        """Give memory back."""
        await self._policy.sleep(context.time_remaining())
        return pb.SleepResponse()

    async def Wake(self, request: pb.WakeRequest, context: Context) -> pb.WakeResponse:
        """Take memory back."""
        asked = _version(request.policy) if request.HasField("policy") else None
        policy, pause_s = await self._policy.wake(asked, allow_older=request.allow_older)
        return pb.WakeResponse(policy=_policy(policy), pause=_duration(pause_s))

    async def GetPolicy(
        self, request: pb.GetPolicyRequest, context: Context
    ) -> pb.GetPolicyResponse:
        """Describe what serves."""
        info, serving = self._policy.engine.info, self._policy.versions.serving
        since = Timestamp()
        since.FromNanoseconds(int(serving.since_s * 1e9))
        return pb.GetPolicyResponse(
            policy=_policy(serving.policy),
            engine=info.name,
            model=info.model,
            vocabulary=info.vocabulary,
            context_length=info.context_length,
            end_of_turn_id=info.end_of_turn_id,
            dtype=info.dtype,
            paused=self._policy.paused,
            load_time=since,
            token_exact=info.token_exact,
            sleep=_RESTS[self._policy.rest],
            can_sleep=info.sleeps,
            receivers=info.receivers,
        )

    async def AbortGeneration(
        self, request: pb.AbortGenerationRequest, context: Context
    ) -> pb.AbortGenerationResponse:
        """End requests."""
        if request.all == bool(request.generate_request_id):
            raise InvalidArgument(
                "generate_request_id", "and all: one of them must be given", "give one"
            )
        chosen = None if request.all else own_id(request.generate_request_id)
        return pb.AbortGenerationResponse(aborted=await self._policy.abort(chosen))


def _sampling(asked: pb.Sampling) -> Sampling:
    return Sampling(
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        max_new_tokens=asked.max_new_tokens,
        seed=asked.seed,
        stop_token_ids=tuple(asked.stop_token_ids),
        stop=tuple(asked.stop),
        regex=asked.regex,
        json_schema=asked.json_schema,
    )


def _completion(completion: Completion) -> pb.Completion:
    return pb.Completion(
        token_ids=completion.token_ids,
        logprobs=completion.logprobs,
        versions=[
            pb.VersionSpan(version=s.version, start=s.start, end=s.end) for s in completion.versions
        ],
        finish_reason=_REASONS[completion.finish_reason],
        text=completion.text,
        token_exact=completion.token_exact,
    )


def _version(asked: pb.PolicyVersion) -> PolicyVersion:
    return PolicyVersion(
        version=asked.version,
        uri=asked.uri,
        sha256=asked.digest.sha256,
        size_bytes=asked.digest.size_bytes,
        run_id=asked.run_id,
        step=asked.step,
    )


def _offer(asked: WeightOffer) -> Offer:
    if not asked.tensors:
        raise InvalidArgument("offer.tensors", "is empty", "say what is sent")
    return Offer(
        address=asked.address,
        port=asked.port,
        group=asked.group,
        backend=asked.backend,
        receivers=asked.receivers,
        tensors=tuple((one.name, one.dtype, tuple(one.shape)) for one in asked.tensors),
        sha256=asked.digest.sha256,
    )


def _policy(policy: PolicyVersion) -> pb.PolicyVersion:
    return pb.PolicyVersion(
        version=policy.version,
        uri=policy.uri,
        digest=Digest(sha256=policy.sha256, size_bytes=policy.size_bytes),
        run_id=policy.run_id,
        step=policy.step,
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration

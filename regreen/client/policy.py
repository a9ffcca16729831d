"""Client of the policy service: token ids in, token ids out.

- Each method is one RPC; nothing here turns text into tokens or back on its own.
"""

from collections.abc import Sequence

import grpc

from regreen.client.channel import READ_S, WRITE_S, Caller, new_request_id
from regreen.common.v1 import QuotaUse, WeightOffer
from regreen.policy import v1 as pb


class PolicyClient(Caller):
    """`regreen.policy.v1.PolicyService`."""

    def __init__(self, channel: grpc.aio.Channel, *, patience_s: float = 30.0) -> None:
        super().__init__(channel, patience_s=patience_s)
        self._stub = pb.PolicyServiceStub(channel)

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        *,
        sampling: pb.Sampling,
        n: int = 1,
        trajectory_id: str = "",
        min_version: int = 0,
        request_id: str = "",
        timeout_s: float = 600.0,
    ) -> pb.GenerateResponse:
        """Sample `n` continuations."""
        request = pb.GenerateRequest(
            request_id=request_id or new_request_id(),
            prompt_token_ids=prompt_token_ids,
            n=n,
            sampling=sampling,
            trajectory_id=trajectory_id,
            min_version=min_version,
        )
        response: pb.GenerateResponse = await self._call(self._stub.Generate, request, timeout_s)
        return response

    async def render_chat(
        self,
        messages: Sequence[pb.ChatMessage],
        *,
        continues: bool = False,
        last_token_id: int = 0,
    ) -> pb.RenderChatResponse:
        """Exact ids of chat messages, or of what to append after a sampled turn."""
        request = pb.RenderChatRequest(
            messages=messages, continues=continues, last_token_id=last_token_id
        )
        response: pb.RenderChatResponse = await self._call(self._stub.RenderChat, request, READ_S)
        return response

    async def tokenize(
        self, *, text: str = "", token_ids: Sequence[int] = ()
    ) -> pb.TokenizeResponse:
        """Encode a text, or decode ids."""
        request = pb.TokenizeRequest(text=text, token_ids=token_ids)
        response: pb.TokenizeResponse = await self._call(self._stub.Tokenize, request, READ_S)
        return response

    async def load_version(
        self,
        policy: pb.PolicyVersion,
        *,
        allow_older: bool = False,
        offer: WeightOffer | None = None,
        request_id: str = "",
        timeout_s: float = 600.0,
    ) -> pb.LoadVersionResponse:
        """Switch to other weights, by reference, or through an offer of them."""
        request = pb.LoadVersionRequest(
            request_id=request_id or new_request_id(),
            policy=policy,
            allow_older=allow_older,
            offer=offer,
        )
        response: pb.LoadVersionResponse = await self._call(
            self._stub.LoadVersion, request, timeout_s
        )
        return response

    async def pause(
        self, mode: pb.PauseMode.ValueType = pb.PAUSE_MODE_DRAIN, *, request_id: str = ""
    ) -> pb.PauseResponse:
        """Stop taking new work."""
        request = pb.PauseRequest(request_id=request_id or new_request_id(), mode=mode)
        response: pb.PauseResponse = await self._call(self._stub.Pause, request, WRITE_S)
        return response

    async def resume(self, *, request_id: str = "") -> None:
        """Take work again."""
        request = pb.ResumeRequest(request_id=request_id or new_request_id())
        await self._call(self._stub.Resume, request, WRITE_S)

    async def sleep(self, *, request_id: str = "", timeout_s: float = 600.0) -> None:
        """Have the policy give its memory back, once what runs has ended."""
        request = pb.SleepRequest(request_id=request_id or new_request_id())
        await self._call(self._stub.Sleep, request, timeout_s)

    async def wake(
        self,
        policy: pb.PolicyVersion | None = None,
        *,
        allow_older: bool = False,
        request_id: str = "",
        timeout_s: float = 600.0,
    ) -> pb.WakeResponse:
        """Have the policy take its memory back, with other weights or those that served."""
        request = pb.WakeRequest(
            request_id=request_id or new_request_id(), policy=policy, allow_older=allow_older
        )
        response: pb.WakeResponse = await self._call(self._stub.Wake, request, timeout_s)
        return response

    async def get_policy(self) -> pb.GetPolicyResponse:
        """What is being served."""
        response: pb.GetPolicyResponse = await self._call(
            self._stub.GetPolicy, pb.GetPolicyRequest(), READ_S
        )
        return response

    async def list_quotas(self) -> list[QuotaUse]:
        """What tenants have of what their quotas bound there, and the bounds."""
        response: pb.ListQuotasResponse = await self._call(
            self._stub.ListQuotas, pb.ListQuotasRequest(), READ_S
        )
        return list(response.quotas)

    async def abort_generation(
        self, generate_request_id: str = "", *, all: bool = False, request_id: str = ""
    ) -> int:
        """End one running request, or all; the number that ended."""
        request = pb.AbortGenerationRequest(
            generate_request_id=generate_request_id,
            all=all,
            request_id=request_id or new_request_id(),
        )
        aborted: int = (await self._call(self._stub.AbortGeneration, request, READ_S)).aborted
        return aborted

"""Client of the sandbox service's record of what was asked of the network.

- Each method is one RPC; `egress_records` pages through all of them.
"""

from collections.abc import AsyncIterator

import grpc

from regreen.client.channel import READ_S, Caller, pages
from regreen.sandbox import v1 as pb


class EgressClient(Caller):
    """`regreen.sandbox.v1.EgressService`."""

    def __init__(self, channel: grpc.aio.Channel, *, patience_s: float = 30.0) -> None:
        super().__init__(channel, patience_s=patience_s)
        self._stub = pb.EgressServiceStub(channel)

    async def list_egress(
        self,
        sandbox_id: str = "",
        *,
        state_id: str = "",
        page_size: int = 0,
        page_token: str = "",
    ) -> pb.ListEgressResponse:
        """One page of requests of a sandbox, or of the preparation of a state, oldest first."""
        request = pb.ListEgressRequest(
            sandbox_id=sandbox_id, state_id=state_id, page_size=page_size, page_token=page_token
        )
        response: pb.ListEgressResponse = await self._call(self._stub.ListEgress, request, READ_S)
        return response

    async def egress_records(
        self, sandbox_id: str = "", *, state_id: str = ""
    ) -> AsyncIterator[pb.EgressRecord]:
        """All requests of a sandbox, or of the preparation of a state, that are kept."""
        found = pages(
            lambda token: self.list_egress(
                sandbox_id, state_id=state_id, page_size=1000, page_token=token
            )
        )
        async for page in found:
            for record in page.records:
                yield record

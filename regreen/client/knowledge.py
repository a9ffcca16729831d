"""Client of the dataset service's knowledge base: past fixes of training tasks.

- Each method is one RPC.
"""

from collections.abc import Sequence

import grpc

from regreen.client.channel import READ_S, WRITE_S, Caller, new_request_id
from regreen.common.v1 import MODE_UNSPECIFIED, Mode
from regreen.dataset import v1 as pb


class KnowledgeClient(Caller):
    """`regreen.dataset.v1.KnowledgeService`."""

    def __init__(self, channel: grpc.aio.Channel, *, patience_s: float = 30.0) -> None:
        super().__init__(channel, patience_s=patience_s)
        self._stub = pb.KnowledgeServiceStub(channel)

    async def record_knowledge(
        self, items: Sequence[pb.KnowledgeItem], *, request_id: str = ""
    ) -> pb.RecordKnowledgeResponse:
        """Record items; those that are there stay."""
        request = pb.RecordKnowledgeRequest(request_id=request_id or new_request_id(), items=items)
        answer: pb.RecordKnowledgeResponse = await self._call(
            self._stub.RecordKnowledge, request, WRITE_S
        )
        return answer

    async def search_knowledge(
        self,
        question: str,
        *,
        task_id: str = "",
        package: str = "",
        signature: str = "",
        named: Sequence[str] = (),
        mode: Mode.ValueType = MODE_UNSPECIFIED,
        limit: int = 0,
    ) -> Sequence[pb.KnowledgeItem]:
        """The items that fit a question of a task, or of a package without one, best first."""
        request = pb.SearchKnowledgeRequest(
            task_id=task_id,
            package=package,
            question=question,
            signature=signature,
            named=named,
            mode=mode,
            limit=limit,
        )
        items: Sequence[pb.KnowledgeItem] = (
            await self._call(self._stub.SearchKnowledge, request, READ_S)
        ).items
        return items

    async def record_use(
        self, trajectory_id: str, item_ids: Sequence[str], *, request_id: str = ""
    ) -> None:
        """Record that a trajectory was shown items."""
        request = pb.RecordKnowledgeUseRequest(
            request_id=request_id or new_request_id(),
            trajectory_id=trajectory_id,
            item_ids=item_ids,
        )
        await self._call(self._stub.RecordKnowledgeUse, request, WRITE_S)

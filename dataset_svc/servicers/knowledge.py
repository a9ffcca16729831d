"""`regreen.dataset.v1.KnowledgeService`.

- Translates only; what may be seen is decided in `queries.knowledge`.
"""

from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc import checks
from dataset_svc.models_knowledge import KNOWLEDGE_KINDS
from dataset_svc.queries import knowledge
from dataset_svc.queries.knowledge import ItemRecord
from dataset_svc.servicers.transactions import Transactions
from dataset_svc.translate import enum_name, enum_value
from regreen.common import v1 as common_pb
from regreen.dataset import v1 as pb
from regreen.ids import check_id
from regreen.rpc.errors import InvalidArgument

_MAX_ITEMS, _MAX_USES = 1000, 100
_MAX_CHARS, _MAX_PARTS = 4000, 200
_LIMIT, _MOST = 5, 50


class KnowledgeServicer(pb.KnowledgeServiceServicer):
    """Past fixes of training tasks."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    async def RecordKnowledge(self, request: pb.RecordKnowledgeRequest, context: Any) -> Any:
        """Record items."""
        _check_count("items", len(request.items), _MAX_ITEMS)
        items = [_record(item, f"items[{place}]") for place, item in enumerate(request.items)]

        async def work(session: AsyncSession) -> pb.RecordKnowledgeResponse:
            recorded, known = await knowledge.record(session, items)
            return pb.RecordKnowledgeResponse(recorded=recorded, known=known)

        return await self._transactions.once(
            "RecordKnowledge", request, pb.RecordKnowledgeResponse, work
        )

    async def SearchKnowledge(self, request: pb.SearchKnowledgeRequest, context: Any) -> Any:
        """Find the items that fit best."""
        if not request.task_id and not request.package:
            raise InvalidArgument("task_id", "and package are empty", "say who asks")
        for name in ("package", "question", "signature"):
            _check_text(name, getattr(request, name))
        if not request.question.strip() and not request.signature:
            raise InvalidArgument("question", "is empty", "ask something")
        _check_parts("named", request.named)
        if not 0 <= request.limit <= _MOST:
            raise InvalidArgument("limit", f"is {request.limit}", f"give 0 to {_MOST}")
        mode = enum_name(common_pb.Mode, request.mode, "mode")

        async def work(session: AsyncSession) -> list[ItemRecord]:
            who = await knowledge.asker(session, request.task_id, request.package)
            return await knowledge.search(
                session,
                who,
                request.question,
                signature=request.signature,
                named=request.named,
                mode=mode,
                limit=request.limit or _LIMIT,
            )

        found = await self._transactions.read("SearchKnowledge", work)
        return pb.SearchKnowledgeResponse(items=[_message(item) for item in found])

    async def RecordKnowledgeUse(self, request: pb.RecordKnowledgeUseRequest, context: Any) -> Any:
        """Record that a trajectory was shown items."""
        check_id(request.trajectory_id, "trj", "trajectory_id")
        _check_count("item_ids", len(request.item_ids), _MAX_USES)

        async def work(session: AsyncSession) -> pb.RecordKnowledgeUseResponse:
            await knowledge.record_use(session, request.trajectory_id, request.item_ids)
            return pb.RecordKnowledgeUseResponse()

        return await self._transactions.once(
            "RecordKnowledgeUse", request, pb.RecordKnowledgeUseResponse, work
        )


def _record(item: pb.KnowledgeItem, field: str) -> ItemRecord:
    checks.one_of(f"{field}.kind", item.kind, KNOWLEDGE_KINDS)
    for name in ("error", "signature", "culprit", "task_id", "trajectory_id"):
        _check_text(f"{field}.{name}", getattr(item, name))
    if not item.error:
        raise InvalidArgument(f"{field}.error", "is empty", "say which error, or which fact")
    fact = item.kind == "changelog"
    if fact == bool(item.task_id):
        raise InvalidArgument(
            f"{field}.task_id",
            "is set" if fact else "is empty",
            "a fix has a task, a fact has none",
        )
    if fact and not item.culprit:
        raise InvalidArgument(f"{field}.culprit", "is empty", "say which package the fact is about")
    if (item.kind == "trajectory") != bool(item.trajectory_id):
        raise InvalidArgument(
            f"{field}.trajectory_id", "does not go with the kind", "give it for a trajectory's fix"
        )
    if not fact and not item.moves and not item.edited:
        raise InvalidArgument(f"{field}.moves", "and edited are empty", "say what the fix did")
    _check_parts(f"{field}.edited", item.edited)
    _check_parts(f"{field}.moves", [move.name for move in item.moves])
    return ItemRecord(
        kind=item.kind,
        task_id=item.task_id,
        trajectory_id=item.trajectory_id,
        mode=enum_name(common_pb.Mode, item.mode, f"{field}.mode"),
        error=item.error,
        signature=item.signature,
        moves=tuple((move.name, move.before, move.after) for move in item.moves),
        edited=tuple(item.edited),
        culprit=item.culprit,
    )


def _message(item: ItemRecord) -> pb.KnowledgeItem:
    same = ("id", "kind", "task_id", "trajectory_id", "error", "signature", "culprit", "score",
            "uses", "wins", "edited")  # fmt: skip
    return pb.KnowledgeItem(
        **{name: getattr(item, name) for name in same},
        mode=enum_value(common_pb.Mode, item.mode),
        moves=[pb.KnowledgeMove(name=n, before=b, after=a) for n, b, a in item.moves],
    )


def _check_count(field: str, count: int, most: int) -> None:
    if not 0 < count <= most:
        raise InvalidArgument(field, f"has {count}", f"give 1 to {most}")


def _check_text(field: str, value: str) -> None:
    if len(value) > _MAX_CHARS:
        raise InvalidArgument(field, f"has over {_MAX_CHARS} characters", "cut it")


def _check_parts(field: str, values: Any) -> None:
    if len(values) > _MAX_PARTS:
        raise InvalidArgument(field, f"has {len(values)}", f"give at most {_MAX_PARTS}")
    for place, value in enumerate(values):
        if not 0 < len(value) <= _MAX_CHARS:
            raise InvalidArgument(f"{field}[{place}]", "is empty or too long", "name it, or cut it")

"""Runs the work of a call in a transaction, measured, and mutations once per request id.

- A mutation, the answer to it and the claim of its request id are committed together.
- The same id with the same request gives the same answer, across restarts and replicas.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

from google.protobuf.message import Message
from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc import measures
from dataset_svc.database import Database
from dataset_svc.queries import requests

T = TypeVar("T")
M = TypeVar("M", bound=Message)
_LARGE_BYTES = 1 << 20
"""Requests above this are hashed beside the event loop."""


class Transactions:
    """The database as the servicers use it."""

    def __init__(self, database: Database) -> None:
        self.database = database

    async def read(self, operation: str, work: Callable[[AsyncSession], Awaitable[T]]) -> T:
        """The result of `work`."""
        with measures.QUERY_SECONDS.labels(operation).time():
            return await self.database.run(work)

    async def answered(self, operation: str, request: Message, answer_type: type[M]) -> M | None:
        """The answer that was given to the same request before, or None.

        For calls that write outside the database and must know first that they may.

        Raises:
            InvalidArgument: the request id is missing or was used for another request.
        """
        request_id, fingerprint = await identity(request)

        async def found(session: AsyncSession) -> bytes | None:
            return await requests.find(session, operation, request_id, fingerprint)

        stored = await self.database.run(found)
        return None if stored is None else answer_type.FromString(stored)

    async def once(
        self,
        operation: str,
        request: Message,
        answer_type: type[M],
        work: Callable[[AsyncSession], Awaitable[M]],
    ) -> M:
        """The answer of `work`, or the one that it gave to the same request before.

        Raises:
            InvalidArgument: the request id is missing or was used for another request.
        """
        request_id, fingerprint = await identity(request)

        async def claimed(session: AsyncSession) -> M:
            stored = await requests.claim(session, operation, request_id, fingerprint)
            if stored is not None:
                return answer_type.FromString(stored)
            answer = await work(session)
            await requests.remember(session, operation, request_id, answer.SerializeToString())
            return answer

        return await self.read(operation, claimed)


async def identity(request: Message) -> tuple[str, bytes]:
    """The id of a mutation, and a fingerprint of what it asks for."""
    request_id: str = getattr(request, "request_id")  # noqa: B009 (every mutation has one)
    if request.ByteSize() > _LARGE_BYTES:
        return request_id, await asyncio.to_thread(_fingerprint, request)
    return request_id, _fingerprint(request)


def _fingerprint(request: Message) -> bytes:
    return hashlib.sha256(request.SerializeToString(deterministic=True)).digest()

"""Remembers the answers of mutations in the same transaction that makes them.

- An answer is stored if and only if its mutation is committed: a repeat after a crash is exact.
- A repeat that overlaps the first call waits for it, then gets its answer.
- An id that comes back with another request is refused.
"""

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc import bulk
from dataset_svc.models import Request
from regreen.rpc.errors import InvalidArgument, RegreenError

MAX_ID_CHARS = 200


async def find(
    session: AsyncSession, method: str, request_id: str, fingerprint: bytes
) -> bytes | None:
    """The answer given before, or None.

    Raises:
        InvalidArgument: the id is missing, too long, or was used for another request.
    """
    if problem := _id_problem(request_id):
        raise problem
    row = (
        await session.execute(
            select(Request.fingerprint, Request.answer).where(
                Request.method == method, Request.request_id == request_id
            )
        )
    ).first()
    if row is None:
        return None
    if row.fingerprint != fingerprint:
        raise used(request_id)
    return row.answer or b""


async def find_many(
    session: AsyncSession, method: str, asked: Sequence[tuple[str, bytes]]
) -> list[bytes | RegreenError | None]:
    """For each (request id, fingerprint): the answer given before, None, or why it is refused."""
    checked: list[bytes | RegreenError | None] = [
        _id_problem(request_id) for request_id, _ in asked
    ]
    wanted = [ask[0] for ask, problem in zip(asked, checked, strict=True) if problem is None]
    rows = await session.execute(
        select(Request.request_id, Request.fingerprint, Request.answer).where(
            Request.method == method, Request.request_id.in_(wanted)
        )
    )
    stored = {row.request_id: row for row in rows}
    for place, (request_id, fingerprint) in enumerate(asked):
        row = stored.get(request_id)
        if checked[place] is None and row is not None:
            same = row.fingerprint == fingerprint
            checked[place] = (row.answer or b"") if same else used(request_id)
    return checked


async def remember_many(
    session: AsyncSession, method: str, answers: Sequence[tuple[str, bytes, bytes]]
) -> None:
    """Store the answers of requests, as (request id, fingerprint, answer), in this transaction.

    Where another transaction has answered one meanwhile this waits for it and then fails, so that
    the caller's transaction is tried again and finds that answer.
    """
    rows = [
        {"method": method, "request_id": request_id, "fingerprint": fingerprint, "answer": answer}
        for request_id, fingerprint, answer in sorted(answers)
    ]
    await bulk.copy_rows(session, Request, rows)


async def claim(
    session: AsyncSession, method: str, request_id: str, fingerprint: bytes
) -> bytes | None:
    """The answer given before, or None if this transaction is to make it.

    Raises:
        InvalidArgument: the id is missing, too long, or was used for another request.
    """
    stored = await find(session, method, request_id, fingerprint)
    if stored is not None:
        return stored
    new = insert(Request).values(method=method, request_id=request_id, fingerprint=fingerprint)
    taken = await session.execute(new.on_conflict_do_nothing().returning(Request.method))
    if taken.first() is not None:
        return None
    # Another call with this id has ended while the insert waited for it.
    return await find(session, method, request_id, fingerprint)


async def remember(session: AsyncSession, method: str, request_id: str, answer: bytes) -> None:
    """Store the answer of a claimed request."""
    await session.execute(
        update(Request)
        .where(Request.method == method, Request.request_id == request_id)
        .values(answer=answer)
    )


async def purge(session: AsyncSession, older_than_s: float) -> int:
    """Forget answers that are older than this; how many they were."""
    limit = func.now() - timedelta(seconds=older_than_s)
    gone = await session.execute(
        delete(Request).where(Request.create_time < limit).returning(Request.method)
    )
    return len(gone.all())


def _id_problem(request_id: str) -> InvalidArgument | None:
    if not request_id:
        return InvalidArgument("request_id", "is empty", "give a fresh UUID with every mutation")
    if len(request_id) > MAX_ID_CHARS:
        return InvalidArgument("request_id", f"has over {MAX_ID_CHARS} characters", "give a UUID")
    return None


def used(request_id: str) -> InvalidArgument:
    """The refusal of an id that came with another request before."""
    return InvalidArgument(
        "request_id", f"{request_id[:80]!r} was used for another request", "use a fresh id"
    )

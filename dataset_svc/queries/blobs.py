"""Which blobs are referenced, and the removal of those that are not.

- A row says how many trajectories name a blob; triggers on `trajectories` count, so that no way of
  inserting or deleting one can forget it.
- A blob is announced before it is put, and only announced blobs can be referenced: a commit whose
  announcement has been collected meanwhile fails (`TokensCollected`) and puts it again.
- The collector holds the row while it removes the blob. Who announces that blob meanwhile waits,
  and then puts it anew; who announced it less than the grace period ago keeps it.
- A collector that is killed has removed blobs that nobody names; the next one removes their rows.
"""

from collections.abc import Iterable
from datetime import timedelta

from sqlalchemy import BigInteger, delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc import bulk
from dataset_svc.models import Blob
from regreen.blobs import BlobStore, Digest


async def announce(session: AsyncSession, digests: Iterable[Digest]) -> None:
    """Say that these blobs are about to be put and referenced."""
    by_sha = {digest.sha256: digest.size_bytes for digest in digests}
    if not by_sha:
        return
    ordered = sorted(by_sha)
    rows = bulk.values(
        "announced",
        sha256=(ordered, bulk.TEXT),
        size_bytes=([by_sha[sha] for sha in ordered], BigInteger()),
    )
    new = insert(Blob).from_select(
        ["sha256", "size_bytes"], select(rows.c.sha256, rows.c.size_bytes)
    )
    await session.execute(
        new.on_conflict_do_update(
            index_elements=[Blob.sha256], set_={"touch_time": func.clock_timestamp()}
        )
    )


async def collect(
    session: AsyncSession, blobs: BlobStore, grace_s: float, limit: int = 200
) -> tuple[int, int]:
    """Remove up to `limit` blobs that nobody has named or announced for the grace period.

    How many they were, and their bytes.
    """
    since = func.clock_timestamp() - timedelta(seconds=grace_s)
    rows = await session.execute(
        select(Blob.sha256, Blob.size_bytes)
        .where(Blob.refs == 0, Blob.touch_time < since)
        .order_by(Blob.touch_time)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    gone = [Digest(row.sha256, row.size_bytes) for row in rows]
    for digest in gone:
        await blobs.delete(digest)
    if gone:
        await session.execute(delete(Blob).where(Blob.sha256.in_([d.sha256 for d in gone])))
    return len(gone), sum(digest.size_bytes for digest in gone)

"""What must happen even when nobody calls: leases run out, old answers and blobs go.

- Nothing here is needed for correctness: every call that depends on it does its own sweep.
- Trouble is logged and tried again at the next turn; it never ends the service.
"""

import asyncio

import structlog
from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc import measures
from dataset_svc.database import Database
from dataset_svc.models import GROUP_STATES, ROLLOUT_STATES
from dataset_svc.queries import blobs as unreferenced
from dataset_svc.queries import groups, requests, rollouts, trajectories
from dataset_svc.queries.rollouts import QueuePolicy
from regreen.blobs import BlobStore
from regreen.rpc.errors import RegreenError

log = structlog.get_logger(__name__)


async def turn(database: Database, policy: QueuePolicy, remember_s: float) -> None:
    """Sweep leases and old answers, set the gauges; once."""

    async def sweep(session: AsyncSession) -> int:
        return await rollouts.sweep(session, policy)

    async def count(session: AsyncSession) -> tuple[dict[str, int], dict[str, int]]:
        return await groups.counts(session, policy)

    await database.run(sweep)
    await database.run(lambda session: requests.purge(session, remember_s))
    await database.run(trajectories.merge_text_index)
    by_rollout, by_group = await database.run(count)
    for state in ROLLOUT_STATES:
        measures.ROLLOUTS.labels(state).set(by_rollout.get(state, 0))
    for state in GROUP_STATES:
        measures.GROUPS.labels(state).set(by_group.get(state, 0))


async def collect(database: Database, blobs: BlobStore, grace_s: float) -> int:
    """Remove blobs that nobody has named for a while; how many."""
    total = 0
    while True:
        count, size_bytes = await database.run(
            lambda session: unreferenced.collect(session, blobs, grace_s)
        )
        measures.COLLECTED.inc(count)
        measures.COLLECTED_BYTES.inc(size_bytes)
        total += count
        if not count:
            return total


async def forever(
    database: Database,
    policy: QueuePolicy,
    *,
    every_s: float,
    remember_s: float,
    blobs: BlobStore,
    grace_s: float,
) -> None:
    """Turn after turn until cancelled."""
    while True:
        try:
            await turn(database, policy, remember_s)
            await collect(database, blobs, grace_s)
        except RegreenError as error:
            log.warning("upkeep_failed", error=str(error))
        await asyncio.sleep(every_s)

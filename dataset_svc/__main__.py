"""`python -m dataset_svc`: the dataset service as a process.

- It serves only after its schema is the newest.
- A Postgres that starts, or comes back, is waited for.
- With no `database_url` it owns a private Postgres: neither outlives the other, however it ends.
"""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator

from dataset_svc import upkeep
from dataset_svc.database import Database, await_server, upgrade, warn_of_plain_text
from dataset_svc.localpg import LocalPostgres, LocalPostgresConfig
from dataset_svc.queries.rollouts import QueuePolicy
from dataset_svc.servicers.archive import ArchiveServicer
from dataset_svc.servicers.knowledge import KnowledgeServicer
from dataset_svc.servicers.parking import ParkingServicer
from dataset_svc.servicers.queue import RolloutQueueServicer
from dataset_svc.servicers.runs import RunServicer
from dataset_svc.servicers.tasks import TaskServicer
from dataset_svc.servicers.trajectories import TrajectoryServicer
from dataset_svc.servicers.transactions import Transactions
from dataset_svc.settings import DatasetSettings
from dataset_svc.store import TrajectoryStore
from regreen.blobs import ready_blobs
from regreen.dataset import v1 as pb
from regreen.rpc import logging
from regreen.rpc.errors import InfraError, RegreenError
from regreen.rpc.quotas import Quotas
from regreen.rpc.server import Server

_RESPONSE_SLACK_BYTES = 1 << 20
_PAGE_BYTES = 32 << 20
_WATCH_S = 1.0
SERVICES = tuple(
    f"regreen.dataset.v1.{name}"
    for name in (
        "TaskService",
        "TrajectoryService",
        "RolloutQueueService",
        "RunService",
        "ParkingService",
        "ArchiveService",
        "KnowledgeService",
    )
)


@contextlib.asynccontextmanager
async def serving(settings: DatasetSettings, database_url: str) -> AsyncIterator[Server]:
    """The running server over a database whose schema is the newest."""
    database = Database(database_url, pool_size=settings.pool_size)
    blobs = await ready_blobs(settings.blobs or settings.home / "blobs", fsync=settings.fsync)
    wire_bytes = settings.max_message_bytes - _RESPONSE_SLACK_BYTES
    store = TrajectoryStore(database, blobs, wire_bytes, Quotas(settings.quotas))
    transactions = Transactions(database)
    policy = QueuePolicy(
        settings.max_attempts,
        settings.max_outages,
        settings.lease_s,
        settings.max_lease_s,
        settings.retry_s,
        park_after=settings.park_after,
        max_waiting=settings.max_waiting,
    )
    server = Server(settings, SERVICES, remember=False)
    page_bytes = min(settings.max_message_bytes // 2, _PAGE_BYTES)
    tasks = TaskServicer(transactions, max_page_bytes=page_bytes)
    pb.add_TaskServiceServicer_to_server(tasks, server.grpc)
    listed = TrajectoryServicer(transactions, store, max_page_bytes=page_bytes)
    pb.add_TrajectoryServiceServicer_to_server(listed, server.grpc)
    queue = RolloutQueueServicer(
        transactions, store, policy, idle_asks_per_s=settings.idle_asks_per_s
    )
    pb.add_RolloutQueueServiceServicer_to_server(queue, server.grpc)
    pb.add_KnowledgeServiceServicer_to_server(KnowledgeServicer(transactions), server.grpc)
    pb.add_ArchiveServiceServicer_to_server(ArchiveServicer(transactions, store), server.grpc)
    pb.add_ParkingServiceServicer_to_server(ParkingServicer(transactions), server.grpc)
    pb.add_RunServiceServicer_to_server(
        RunServicer(transactions, max_page_bytes=page_bytes), server.grpc
    )
    keeper = asyncio.create_task(
        upkeep.forever(
            database,
            policy,
            every_s=settings.upkeep_s,
            remember_s=settings.remember_s,
            blobs=blobs,
            grace_s=settings.blob_grace_s,
        )
    )
    try:
        async with server:
            yield server
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        await queue.close()
        await store.close()
        await database.close()


async def serve(
    settings: DatasetSettings, database_url: str, private: LocalPostgres | None = None
) -> None:
    """Serve until the process is asked to end, or its private Postgres has ended.

    Raises:
        InfraError: the private Postgres has ended by itself.
    """
    async with serving(settings, database_url) as server:
        asked = asyncio.create_task(server.wait())
        while not (await asyncio.wait([asked], timeout=_WATCH_S))[0]:
            if private is not None and not private.alive:
                asked.cancel()
                raise InfraError(f"the private Postgres ended; see {private.home}/postgres.log")
        await asked


def main(argv: list[str] | None = None) -> int:
    """Run the service; the exit code."""
    settings = DatasetSettings.load(argv)
    logging.configure("dataset", settings.log_level)
    try:
        with contextlib.ExitStack() as stack:
            url, private = settings.database_url, None
            if not url:
                config = LocalPostgresConfig(
                    home=settings.home / "pg",
                    pg_bin=settings.pg_bin,
                    run_as=settings.pg_user,
                    fsync=settings.fsync,
                )
                private = stack.enter_context(LocalPostgres(config))
                url = private.url()
            else:
                warn_of_plain_text(url)
                await_server(url, settings.database_wait_s)
            upgrade(url)
            asyncio.run(serve(settings, url, private))
    except RegreenError as error:
        sys.stderr.write(f"dataset_svc: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

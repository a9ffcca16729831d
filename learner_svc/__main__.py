"""`python -m learner_svc`: the learner service as a process.

- This process never imports DeepSpeed and never computes: training is in workers that die with it.
"""

import asyncio
import sys

from learner_svc.run import RunsConfig
from learner_svc.runs import Runs
from learner_svc.servicer import LearnerServicer
from learner_svc.settings import LearnerSettings
from learner_svc.sync import SyncConfig
from regreen.blobs import ready_blobs
from regreen.learner import v1 as pb
from regreen.rpc import logging
from regreen.rpc.errors import RegreenError
from regreen.rpc.server import Server

SERVICE = "regreen.learner.v1.LearnerService"


async def serve(settings: LearnerSettings) -> None:
    """Serve until SIGTERM or SIGINT."""
    config = RunsConfig(
        processes=settings.processes,
        nodes=settings.nodes,
        address=settings.address or "127.0.0.1",
        keep_checkpoints=settings.keep_checkpoints,
        start_timeout_s=settings.start_timeout_s,
        step_timeout_s=settings.step_timeout_s,
        save_timeout_s=settings.save_timeout_s,
        max_restarts=settings.max_restarts,
        silence_s=settings.silence_s,
        sync=SyncConfig(settings.weight_sync, settings.sync_dtype, settings.snapshot_every),
    )
    blobs = await ready_blobs(settings.blobs or settings.home / "blobs")
    runs = Runs(settings.home, blobs, config)
    server = Server(settings, (SERVICE,), remember=False)  # its servicer knows what to remember
    servicer = LearnerServicer(runs, settings.engine, config.address)
    pb.add_LearnerServiceServicer_to_server(servicer, server.grpc)
    try:
        async with server:
            await server.wait()
    finally:
        await servicer.close()
        await runs.close()


def main() -> int:
    """Entry point."""
    settings = LearnerSettings.load()
    logging.configure("learner", settings.log_level)
    try:
        asyncio.run(serve(settings))
    except RegreenError as error:
        logging.get().error("cannot start", error=error.message)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m sandbox_svc.worker`: one sandbox service of this node, inside one container.

- It prints the address once the service serves, and stays until it is asked to end.
- When the container ends by itself, so does this, with the end of its log; while the engine does
  not answer, nothing is known to have ended.
- Flags after `--` are those of `sandbox_svc`.
"""

import argparse
import asyncio
import contextlib
import signal
import sys
from pathlib import Path

from regreen.home import default_home
from regreen.rpc.errors import InfraError, RegreenError
from sandbox_svc.worker.docker import DockerWorker, WorkerOptions


async def run(options: WorkerOptions) -> int:
    """Keep a worker until it, or this process, is ended; the exit code."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with DockerWorker(options) as worker:
        sys.stdout.write(f"serving {worker.address}\n")
        sys.stdout.flush()
        asked = asyncio.create_task(stop.wait())
        try:
            while await _runs(worker):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await asyncio.shield(asked)
                    return 0
            sys.stderr.write(f"sandbox_svc.worker: the service ended: {await worker.log()}\n")
            return 1
        finally:
            asked.cancel()


async def _runs(worker: DockerWorker) -> bool:
    """Whether the container runs, as far as the engine tells."""
    try:
        return await worker.running()
    except InfraError as error:
        sys.stderr.write(f"sandbox_svc.worker: {error}\n")
        return True


def main(argv: list[str] | None = None) -> int:
    """Run a worker; the exit code."""
    parser = argparse.ArgumentParser(prog="sandbox_svc.worker", description=__doc__)
    parser.add_argument("--docker", required=True, metavar="IMAGE", help="image of the worker")
    parser.add_argument("--home", type=Path, default=default_home() / "worker")
    parser.add_argument("--listen", default="", help="127.0.0.1:PORT; default: a unix socket")
    parser.add_argument("--memory-bytes", type=int, default=16 << 30)
    parser.add_argument("--cpus", type=float, default=0.0, help="0: all")
    parser.add_argument("--pids", type=int, default=16_384)
    parser.add_argument("--oci-runtime", default="", help="for example runsc")
    parser.add_argument("--seccomp", type=Path, help="default: infra/docker/sandbox.seccomp.json")
    parser.add_argument("arguments", nargs="*", help="flags of sandbox_svc, after --")
    given = vars(parser.parse_args(argv))
    given["image"] = given.pop("docker")
    options = WorkerOptions(**{key: value for key, value in given.items() if value is not None})
    try:
        return asyncio.run(run(options))
    except RegreenError as error:
        sys.stderr.write(f"sandbox_svc.worker: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())

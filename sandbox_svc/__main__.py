"""`python -m sandbox_svc`: the sandbox service as a process.

- It serves only after the runtime has proven that it can isolate on this host.
- Ended or killed, it leaves no process, mount or control group behind.
"""

import asyncio
import contextlib
import gc
import signal
import sys
from collections.abc import AsyncIterator

import uvloop

from regreen.rpc import logging
from regreen.rpc.errors import RegreenError
from regreen.rpc.server import Server
from regreen.sandbox import v1 as pb
from sandbox_svc import manners
from sandbox_svc.service import SandboxHost
from sandbox_svc.servicer import SandboxServicer, StateServicer
from sandbox_svc.servicer_action import ActionServicer
from sandbox_svc.servicer_egress import EgressServicer
from sandbox_svc.servicer_exec import ExecServicer
from sandbox_svc.servicer_image import ImageServicer
from sandbox_svc.settings import SandboxSettings

_GC = (10_000, 10, 10)
"""New objects before the collector looks: a busy service has thousands that all end by count."""
_NAMES = ("State", "Sandbox", "Action", "Exec", "Image", "Egress")
SERVICES = tuple(f"regreen.sandbox.v1.{name}Service" for name in _NAMES)


@contextlib.asynccontextmanager
async def serving(
    settings: SandboxSettings, host: SandboxHost | None = None
) -> AsyncIterator[Server]:
    """The running server; `host` replaces the one that the settings describe."""
    if settings.backend == "kubernetes":
        from sandbox_svc.fleet import serve as fleet

        async with fleet.serving(settings) as server:
            yield server
        return
    async with host or SandboxHost(settings) as started:
        idle_s = manners.idle_s(settings)
        server = Server(
            settings,
            SERVICES,
            leaving=manners.LEAVING,
            idle_s=idle_s,
            behind_front=settings.behind_front,
        )
        pb.add_StateServiceServicer_to_server(StateServicer(started), server.grpc)
        pb.add_SandboxServiceServicer_to_server(SandboxServicer(started), server.grpc)
        pb.add_ExecServiceServicer_to_server(ExecServicer(started), server.grpc)
        pb.add_EgressServiceServicer_to_server(EgressServicer(started), server.grpc)
        pb.add_ActionServiceServicer_to_server(ActionServicer(started), server.grpc)
        pb.add_ImageServiceServicer_to_server(ImageServicer(started), server.grpc)
        async with server:
            yield server


async def serve(settings: SandboxSettings) -> None:
    """Serve until the process is asked to end, which it may be while it starts."""
    loop, this = asyncio.get_running_loop(), asyncio.current_task()
    for number in (signal.SIGTERM, signal.SIGINT):
        if this is not None:
            loop.add_signal_handler(number, this.cancel)
    async with serving(settings) as server:
        gc.freeze()
        gc.set_threshold(*_GC)
        await server.wait()


def main(argv: list[str] | None = None) -> int:
    """Run the service; the exit code."""
    settings = SandboxSettings.load(argv)
    logging.configure("sandbox", settings.log_level)
    try:
        uvloop.run(serve(settings))
    except asyncio.CancelledError:
        return 0
    except (RegreenError, OSError) as error:  # of the start; later ones are calls' own
        sys.stderr.write(f"sandbox_svc: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

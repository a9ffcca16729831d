"""The sandbox service as a process that may be killed: as `python -m sandbox_svc`, probing nothing.

The probes of a start take longer than all that a test does between two kills.
"""

import sys
from pathlib import Path

import uvloop

from regreen.rpc import logging
from sandbox_svc.__main__ import serving
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.service import SandboxHost
from sandbox_svc.settings import SandboxSettings


async def main(home: Path, flatten_layers: int) -> None:
    settings = SandboxSettings(
        home=home,
        listen=f"unix:{home / 's'}",
        metrics="127.0.0.1:0",
        max_sandboxes=8,
        flatten_layers=flatten_layers,
        drain_s=0.0,
    )
    runtime = EmbeddedRuntime(home / "sandbox", run_probes=False, warm_seats=1)
    async with serving(settings, SandboxHost(settings, runtime)) as server:
        await server.wait()


logging.configure("sandbox", sys.argv[3] if len(sys.argv) > 3 else "error")
uvloop.run(main(Path(sys.argv[1]), int(sys.argv[2])))

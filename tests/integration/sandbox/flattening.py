"""A process that snapshots and flattens without end, to be killed; prints what it promised.

A line is a state and its content, or `flat` and how many layers the latest state has now.
"""

import asyncio
import sys
import time
from pathlib import Path

from sandbox_svc.backends.base import Command, Limits
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.builders.base import Prepared
from sandbox_svc.sandboxes import Manager
from sandbox_svc.states import StateStore
from sandbox_svc.upkeep import Upkeep, UpkeepLimits

_MANY = (
    "mkdir -p many && cd many && for i in $(seq 400); do echo {} > f$i; done; rm -f g*; touch g{}"
)


async def main(home: Path) -> None:
    runtime = EmbeddedRuntime(home, run_probes=False)
    await runtime.start()
    states = StateStore(home, runtime)
    await states.open()
    manager = Manager(runtime, states)
    await manager.start()
    limits = UpkeepLimits(flatten_layers=2)
    upkeep = Upkeep(states, runtime, manager.stood_on, time.time, limits)
    await upkeep.start()

    async def build(progress) -> Prepared:
        box = await runtime.create([], limits=Limits())
        await box.write_file("/work/repo/count", b"0")
        layer = await box.freeze()
        await box.delete()
        return Prepared((layer,), (), {}, {})

    state = await states.prepare("0" * 64, build)
    print(state.id, "0", flush=True)
    sandbox = await manager.create(state.id)
    count = 0
    while True:
        count += 1
        await sandbox.box.write_file("/work/repo/count", str(count).encode())
        script = _MANY.format(count, count)
        await sandbox.box.run(Command(("/bin/sh", "-c", script)))
        snapshot = await manager.snapshot(sandbox.id)
        print(snapshot.id, count, flush=True)
        if count % 3 == 0:
            await upkeep.settled()
            print("flat", len(states.get(snapshot.id).layers), flush=True)


asyncio.run(main(Path(sys.argv[1])))

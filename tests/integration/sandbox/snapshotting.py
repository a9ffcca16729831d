"""A process that snapshots without end, to be killed; prints each state that it promised."""

import asyncio
import sys
from pathlib import Path

from sandbox_svc.backends.base import Command, Limits
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.builders.base import Prepared
from sandbox_svc.sandboxes import Manager
from sandbox_svc.states import StateStore


async def main(home: Path) -> None:
    runtime = EmbeddedRuntime(home, run_probes=False)
    await runtime.start()
    states = StateStore(home, runtime)
    await states.open()
    manager = Manager(runtime, states)
    await manager.start()

    async def build(progress) -> Prepared:
        box = await runtime.create([], limits=Limits())
        await box.write_file("/work/repo/count", b"0")
        layer = await box.freeze()
        await box.delete()
        return Prepared((layer,), (), {}, {})

    state = await states.prepare("0" * 64, build)
    print(state.id, "0", flush=True)
    sandbox = await manager.create(state.id)
    await sandbox.box.run(Command(("/bin/sh", "-c", "(setsid sleep 98765 &)"), cwd="/"))
    count = 0
    while True:
        count += 1
        await sandbox.box.write_file("/work/repo/count", str(count).encode())
        if count % 10 == 0:
            sandbox = await manager.restore(sandbox.id, state.id)
        snapshot = await manager.snapshot(sandbox.id)
        print(snapshot.id, await _read(sandbox), flush=True)


async def _read(sandbox) -> str:
    return (await sandbox.box.read_file("/work/repo/count", 100)).decode()


asyncio.run(main(Path(sys.argv[1])))

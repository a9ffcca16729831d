"""What the model of the state tree is held against: a store in this process, or a whole service.

- Both speak of States and sandboxes by id, so that one model fits both.
- The store in this process can be made to flatten and to collect; the service does it when it
  sees fit, beside everything else, also when it is killed.
- A service that is killed answers nothing that was under way, or it has answered.
"""

import asyncio
import contextlib
import copy
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regreen.client.channel import connect
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.common.v1 import CHANGE_KIND_ADD, FileChange
from regreen.rpc.errors import RegreenError
from regreen.sandbox import v1 as pb
from sandbox_svc.backends.base import Command, Limits
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.builders.base import Prepared
from sandbox_svc.pool import PoolLimits
from sandbox_svc.sandboxes import Manager
from sandbox_svc.states import StateStore
from sandbox_svc.upkeep import Upkeep, UpkeepLimits

FLATTEN_LAYERS = 2
_SERVER = Path(__file__).with_name("treeserver.py")
_READY_S = 30.0


@dataclass(frozen=True, slots=True)
class Known:
    """A State, as much of it as the model speaks of."""

    id: str
    parent_id: str


class Store:
    """Store, manager and runtime in this process."""

    def __init__(self, home: Path) -> None:
        self._home = home

    async def open(self) -> None:
        """Start over what is in the home."""
        self.runtime = EmbeddedRuntime(self._home, run_probes=False, warm_seats=1)
        await self.runtime.start()
        self.store = StateStore(self._home, self.runtime)
        await self.store.open()
        self.manager = Manager(self.runtime, self.store, pool=PoolLimits(max_sandboxes=8))
        await self.manager.start()
        limits = UpkeepLimits(flatten_layers=FLATTEN_LAYERS)
        self._upkeep = Upkeep(self.store, self.runtime, self.manager.stood_on, lambda: 0.0, limits)

    async def close(self) -> None:
        """End it; its sandboxes end too."""
        await self.manager.close()
        await self.store.close()
        await self.runtime.close()

    async def restart(self) -> None:
        """End it and start anew."""
        await self.close()
        await self.open()

    async def root(self, files: dict[str, str]) -> Known:
        """A State of these files."""

        async def build(progress: Any) -> Prepared:
            box = await self.runtime.create([], limits=Limits())
            for path, text in files.items():
                await box.write_file(f"/work/repo/{path}", text.encode())
            layer = await box.freeze()
            await box.delete()
            return Prepared((layer,), (), {}, {})

        return _known(await self.store.prepare("0" * 64, build))

    async def states(self) -> Sequence[Known]:
        """Every State."""
        return [_known(state) for state in self.store.list()]

    async def sh(self, box_id: str, script: str) -> str:
        """What a script in a sandbox prints."""
        return await self._sh(self.manager.get(box_id).box, script)

    async def look(self, state_id: str, script: str) -> str:
        """What a script prints in a fresh fork."""
        async with self.manager.fresh(state_id) as box:
            return await self._sh(box, script)

    async def _sh(self, box: Any, script: str) -> str:
        done = await box.run(Command(("/bin/sh", "-c", script), cwd="/"))
        assert done.ok, done.stderr.text
        return str(done.stdout.text)

    async def create(self, state_id: str) -> str:
        """A sandbox of a State; its id."""
        return (await self.manager.create(state_id)).id

    async def snapshot(self, box_id: str) -> Known:
        """The State that a sandbox was frozen into."""
        return _known(await self.manager.snapshot(box_id))

    async def fork(self, box_id: str, count: int) -> tuple[Known, Sequence[str]]:
        """The State that a sandbox was frozen into, and its forks."""
        state, forks = await self.manager.fork(box_id, count)
        assert all(one.parent_id == box_id for one in forks)
        return _known(state), [one.id for one in forks]

    async def restore(self, box_id: str, state_id: str) -> None:
        """Put a sandbox on a State."""
        await self.manager.restore(box_id, state_id)

    async def delete_sandbox(self, box_id: str) -> None:
        """Delete a sandbox."""
        await self.manager.delete(box_id)

    async def delete_state(self, state_id: str) -> None:
        """Delete a State."""
        await self.manager.delete_state(state_id)

    async def collect(self) -> None:
        """Drop layers that nothing needs; all that a State needs are there."""
        await self.store.collect()
        assert self._needed() <= set(await self.runtime.layers())

    async def flatten(self) -> None:
        """Merge the layers of every chain that is too long."""
        while await self._upkeep._flatten_one():
            pass

    async def check_nothing_is_left(self) -> None:
        """End every sandbox; there are the layers that States need, and no others."""
        await self.manager.close()
        await self.store.collect()
        assert set(await self.runtime.layers()) == self._needed()

    def _needed(self) -> set[str]:
        return {layer for state in self.store.list() for layer in state.layers}


class Service:
    """A service process, spoken to over its socket."""

    def __init__(self, home: Path) -> None:
        self._home = home

    async def open(self) -> None:
        """Start a process over what is in the home."""
        command = [sys.executable, str(_SERVER), str(self._home), str(FLATTEN_LAYERS)]
        self._log = (self._home / "service.log").open("ab")
        self._process = await asyncio.create_subprocess_exec(
            *command, stdout=self._log, stderr=self._log
        )
        self._channel = connect(f"unix:{self._home / 's'}")
        self._boxes, self._states = SandboxClient(self._channel), StateClient(self._channel)
        stub = pb.SandboxServiceStub(self._channel)
        await stub.GetCapabilities(
            pb.GetCapabilitiesRequest(), timeout=_READY_S, wait_for_ready=True
        )

    async def close(self) -> None:
        """End it as whoever runs it would."""
        await self._signal(signal.SIGTERM)
        await self._forget()

    async def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        await self._process.wait()

    async def _forget(self) -> None:
        await self._channel.close()
        self._log.close()

    async def restart(self) -> None:
        """End it and start anew."""
        await self.close()
        await self.open()

    async def killed(self, work: Callable[["Service"], Awaitable[Any]], moment_s: float) -> Any:
        """Kill it in the middle of work and start it anew; what was answered before, or None."""
        hasty = copy.copy(self)  # it does not ask the next service to do what this one did not
        hasty._boxes = SandboxClient(self._channel, patience_s=0.0)
        hasty._states = StateClient(self._channel, patience_s=0.0)
        task = asyncio.ensure_future(work(hasty))
        await asyncio.wait([task], timeout=moment_s)  # another moment each time, no wait for it
        await self._signal(signal.SIGKILL)
        try:
            found = await task  # before its channel is closed, which would cancel it
        except RegreenError:
            found = None
        await self._forget()
        await self.open()
        return found

    async def root(self, files: dict[str, str]) -> Known:
        """A State of these files."""
        overlay = [
            FileChange(path=path, kind=CHANGE_KIND_ADD, content=text.encode())
            for path, text in files.items()
        ]
        spec = pb.EnvironmentSpec(builder="system", overlay=overlay)
        events = [event async for event in self._states.prepare_state(spec)]
        return _known(events[-1].state)

    async def states(self) -> Sequence[Known]:
        """Every State."""
        return [_known(one) for one in (await self._states.list_states(page_size=1000)).states]

    async def sh(self, box_id: str, script: str) -> str:
        """What a script in a sandbox prints."""
        done = await self._boxes.run(box_id, ["/bin/sh", "-c", script], cwd="/")
        assert done.exit_code == 0, done.stderr.head
        return str(done.stdout.head.decode())

    async def look(self, state_id: str, script: str) -> str:
        """What a script prints in a fresh fork."""
        box_id = await self.create(state_id)
        try:
            return await self.sh(box_id, script)
        finally:
            await self.delete_sandbox(box_id)

    async def create(self, state_id: str) -> str:
        """A sandbox of a State; its id."""
        return str((await self._boxes.create_sandbox(state_id)).id)

    async def snapshot(self, box_id: str) -> Known:
        """The State that a sandbox was frozen into."""
        return _known(await self._boxes.snapshot_sandbox(box_id))

    async def fork(self, box_id: str, count: int) -> tuple[Known, Sequence[str]]:
        """The State that a sandbox was frozen into, and its forks."""
        forked = await self._boxes.fork_sandbox(box_id, count)
        return _known(forked.state), [one.id for one in forked.sandboxes]

    async def restore(self, box_id: str, state_id: str) -> None:
        """Put a sandbox on a State."""
        await self._boxes.restore_sandbox(box_id, state_id)

    async def delete_sandbox(self, box_id: str) -> None:
        """Delete a sandbox."""
        await self._boxes.delete_sandbox(box_id)

    async def delete_state(self, state_id: str) -> None:
        """Delete a State."""
        await self._states.delete_state(state_id)

    async def check_nothing_is_left(self) -> None:
        """End it; a store over its home has the layers that States need, and no others."""
        states = {state.id for state in await self.states()}
        await self.close()
        after = Store(self._home / "sandbox")
        await after.open()
        try:
            assert {state.id for state in await after.states()} == states
            await after.check_nothing_is_left()
        finally:
            await after.close()


def _known(state: Any) -> Known:
    return Known(str(state.id), str(state.parent_id))

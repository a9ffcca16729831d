"""Immutable states: what they are made of, which exist, and making each of them once.

- A state is an ordered list of layers and a record; the record is written last, by an atomic
  rename, so a state is whole or absent whenever the process dies.
- A state's id depends on its parent and on the action that made it, on nothing else; the action
  of an imported image is its configuration's digest, so that the base is part of the id.
- A caller gets and lists the states of its tenant; `known`, `peek`, `find` and `every` are for the
  service's own work, whoever made what they give. Who makes a state that is there has it too.
- States of images run on any host of their platform; others only on hosts like the one they are of.
- A state made before a crash of the host counts only if its layers had reached the disk; a crash
  of the process alone loses nothing that was answered. Making one durable is tried until it works.
- A state prepared with another test runner is dropped when the store opens: no validator reads it.
- Layers without a state and without a running sandbox are removed; nothing else removes layers.
- A state's layers may be swapped for others that show the same files, in one write of its record;
  whoever waits between reading a state and holding its layers reads it again.
- Preparations of one spec digest share one run, which ends when nobody waits for it any more.
"""

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from regreen.rpc.errors import FailedPrecondition, RegreenError
from regreen.rpc.quotas import Quotas
from regreen.rpc.tenants import charged, sees_all, sees_any
from sandbox_svc.backends.base import HOST_BASE, Runtime
from sandbox_svc.backends.fds import writing
from sandbox_svc.builders.base import RUNNER, Prepared, Progress
from sandbox_svc.flights import Flights
from sandbox_svc.hosts import boot_id, host_fingerprint, platform_name
from sandbox_svc.state_records import State, state_id
from sandbox_svc.tenancy import Holdings, Owners, made_again
from sandbox_svc.unknown import no_state, state_in_use

_TOUCH_S = 1.0
_AGAIN_S, _AGAIN_AT_MOST_S = 0.25, 10.0
"""How long after a state could not be made durable that is tried again, at first and at most."""
log = structlog.get_logger(__name__)

Build = Callable[[Progress], Awaitable[Prepared]]
Clock = Callable[[], float]


def _outdated(state: State) -> bool:
    """Whether a state was prepared with another test runner; snapshots are still of use."""
    prepared = not state.parent_id and state.metadata.get("baseline") is not None
    return prepared and state.metadata.get("runner") != RUNNER


def _place(state: State) -> tuple[float, str]:
    return state.created_s, state.id


class StateStore:
    """The states of one runtime, indexed by small files below `home`."""

    def __init__(
        self,
        home: Path,
        runtime: Runtime,
        *,
        clock: Clock = time.time,
        quotas: Quotas | None = None,
    ) -> None:
        self._directory = home / "states"
        self._runtime, self._clock = runtime, clock
        self._states: Holdings[State] = Holdings()
        self._flights: Flights[State] = Flights()
        self._installed: dict[str, list[str]] = {}
        """Ids of states that this process prepared, by what is installed in them, newest last."""
        self._used: dict[str, int] = {}
        self._growing = 0
        self._collect_later = False
        self._dropping = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        self._rewriting = asyncio.Lock()
        self.owners = Owners(self._states, self._rewriting, self._rewrite, quotas or Quotas())
        self._closing = asyncio.Event()
        self._touched: dict[str, float] = {}
        self.changed: list[Callable[[str], None]] = []
        """Called with the id of each state that was recorded or deleted."""
        self._host, self._boot = host_fingerprint(), boot_id()

    async def open(self) -> None:
        """Load the index; drop what is not whole and layers that belong to nothing."""
        self._directory.mkdir(parents=True, exist_ok=True)
        held = set(await self._runtime.layers())
        for path in sorted(self._directory.iterdir()):
            try:
                state = State.decode(path.read_bytes())  # unreadable is not damaged: no start then
            except ValueError:
                path.unlink(missing_ok=True)
                continue
            survived = (state.durable or state.boot == self._boot) and not _outdated(state)
            if path.name != f"{state.id}.json" or not survived or not held.issuperset(state.layers):
                path.unlink(missing_ok=True)
                continue
            self._states[state.id] = state
            with contextlib.suppress(OSError):
                self._touched[state.id] = path.stat().st_mtime
            if not state.durable:
                self._save_later(state.id)
        await self.collect()

    async def close(self) -> None:
        """End preparations and wait until all states are durable, or cannot be made so now."""
        await self._flights.close()
        self._closing.set()
        await asyncio.gather(*self._background, return_exceptions=True)

    def get(self, state_id: str) -> State:
        """One state that the caller sees.

        Raises:
            NotFound: there is none of this id.
        """
        state = self._states.get(state_id)
        if state is None or not sees_any(state.tenants):
            raise no_state(state_id)
        return state

    def known(self, state_id: str) -> State:
        """One state, whoever made it.

        Raises:
            NotFound: there is none of this id.
        """
        state = self._states.get(state_id)
        if state is None:
            raise no_state(state_id)
        return state

    def peek(self, state_id: str) -> State | None:
        """One state, whoever made it, if there is one of this id."""
        return self._states.get(state_id)

    def runnable(self, state_id: str) -> State:
        """One state that the caller sees, if this host can run it.

        Raises:
            NotFound: there is none of this id.
            FailedPrecondition: it was made for another machine, C library or distribution.
        """
        return self.usable(self.get(state_id))

    def usable(self, state: State) -> State:
        """A state that is about to be used, if this host can run it.

        Raises:
            FailedPrecondition: it was made for another machine, C library or distribution.
        """
        here = self._host if state.base == HOST_BASE else platform_name()
        if state.host != here:
            raise FailedPrecondition(
                f"state {state.id} was made on {state.host}, this host is {here}; "
                "prepare it again here",
                metadata={"id": state.id},
            )
        self._touch(state.id)
        return state

    def _touch(self, state_id: str) -> None:
        """Remember in the record's time that a state is used now."""
        now = self._clock()
        if now - self._touched.get(state_id, 0.0) >= _TOUCH_S:
            self._touched[state_id] = now
            with contextlib.suppress(OSError):
                os.utime(self._directory / f"{state_id}.json", (now, now))

    def used_s(self, state: State) -> float:
        """When a state was last used, as Unix time; about right after a restart too."""
        return max(state.created_s, self._touched.get(state.id, 0.0))

    def in_use(self, layer: str) -> bool:
        """Whether something runs over a layer."""
        return layer in self._used

    def lineage(self, state_id: str) -> Sequence[State]:
        """A state and those that it was made from, the root first, as far as the caller sees them.

        Raises:
            NotFound: there is none of this id.
        """
        ids = self.ancestors(state_id)
        return [*(self._states[id] for id in ids if id in self._states), self._states[state_id]]

    def ancestors(self, state_id: str) -> Sequence[str]:
        """Ids of all that a state was made from, the root first.

        Who sees everything is told of deleted ones too.

        Raises:
            NotFound: there is none of this id.
        """
        ids = dict.fromkeys(self._ancestors(self.get(state_id)))
        return [id for id in ids if id != state_id and (sees_all() or self._is_seen(id))]

    def _is_seen(self, state_id: str) -> bool:
        state = self._states.get(state_id)
        return state is not None and sees_any(state.tenants)

    def _ancestors(self, state: State) -> tuple[str, ...]:
        """Ids of those that a state was made from, as far as records tell."""
        line, seen = [], {state.id}
        while not state.ancestors and state.parent_id and state.parent_id not in seen:
            seen.add(state.parent_id)
            line.append(state.parent_id)
            state = self._states.get(state.parent_id, state)
        return (*state.ancestors, *line[::-1])

    def find(self, spec_sha256: str) -> State | None:
        """The prepared state of a spec that this host can run, whoever made it."""
        found = self._states.get(state_id("", spec_sha256))
        return found if found is not None and found.host == self._host else None

    def installed(self, installation: str) -> tuple[str, ...]:
        """The layers of a state with an installation, if this process has prepared one.

        Nothing is removed while a preparation runs, so that one may begin on them. What a record
        says of itself counts for nothing here: it may have been imported.
        """
        ids = self._installed.get(installation, ())
        found = (self._states[id].layers for id in reversed(ids) if id in self._states)
        return next(found, ())

    def list(self, *, spec_sha256: str = "", parent_id: str = "") -> Sequence[State]:
        """States that the caller sees and that match, oldest first."""
        matching = (
            state
            for state in self._states.values()
            if (not spec_sha256 or state.spec_sha256 == spec_sha256)
            and (not parent_id or state.parent_id == parent_id)
            and sees_any(state.tenants)
        )
        return sorted(matching, key=_place)

    def every(self) -> Sequence[State]:
        """All states, whoever made them, oldest first."""
        return sorted(self._states.values(), key=_place)

    async def add(
        self,
        layers: Sequence[str],
        *,
        action: str,
        parent: State | None = None,
        spec_sha256: str = "",
        prepared: Prepared | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> State:
        """Record a state over frozen layers; a snapshot inherits its parent's mounts and env."""
        above = [layer for layer in layers if not parent or layer not in parent.layers]
        sizes = [await self._runtime.layer_size(layer) for layer in above]
        state = State(
            id=state_id(parent.id if parent else "", action),
            layers=tuple(layers),
            parent_id=parent.id if parent else "",
            ancestors=(*self._ancestors(parent), parent.id) if parent else (),
            spec_sha256=spec_sha256,
            created_s=self._clock(),
            size_bytes=sum(sizes),
            host=self._host,
            boot=self._boot,
            labels=dict(labels or {}),
            tenants=(charged(),),
        )
        if prepared is not None:
            python = str(prepared.metadata.get("python", ""))
            state = replace(
                state,
                mounts=tuple(prepared.mounts),
                env=dict(prepared.env),
                metadata=dict(prepared.metadata),
                python=python,
            )
        elif parent is not None:
            state = replace(
                state,
                mounts=parent.mounts,
                env=parent.env,
                metadata=parent.metadata,
                python=parent.python,
                host=parent.host if parent.base != HOST_BASE else state.host,
                base=parent.base,
                cwd=parent.cwd,
            )
        return self.record(state)

    def record(self, state: State) -> State:
        """Make a state exist from now on; who had the one in its place has it too."""
        state = made_again(self._states.get(state.id), state)
        self._write(state, durable=False)
        self._states[state.id] = state
        self._touched[state.id] = self._clock()
        self._save_later(state.id)
        self._tell(state.id)
        return state

    def _tell(self, state_id: str) -> None:
        for listener in self.changed:
            listener(state_id)

    def stamp(self, state: State) -> State:
        """The state as recorded in this boot, now."""
        return replace(state, boot=self._boot, durable=False, created_s=self._clock())

    def _write(self, state: State, *, durable: bool) -> None:
        path = self._directory / f"{state.id}.json"
        draft = self._directory / f".{state.id}.{secrets.token_hex(4)}"
        try:
            with writing(), draft.open("wb") as target:
                target.write(state.encode())
                if durable:
                    target.flush()
                    os.fsync(target.fileno())
            draft.rename(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise

    def _save_later(self, state_id: str) -> None:
        self._in_background(self._save(state_id))

    async def _save(self, state_id: str) -> None:
        """Bring a state's layers to the disk, then say so in its record; until that works."""
        wait_s = _AGAIN_S
        while True:
            try:
                await self._runtime.make_durable()
                async with self._rewriting:
                    state = self._states.get(state_id)
                    if state is not None and not state.durable:
                        await self._rewrite(state, replace(state, durable=True))
                return
            except (OSError, RegreenError) as error:  # no space or no descriptors, for a while
                log.warning("state is not durable yet", state_id=state_id, error=str(error))
                if self._closing.is_set():
                    return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), wait_s)
            wait_s = min(2 * wait_s, _AGAIN_AT_MOST_S)

    async def _rewrite(self, old: State, new: State) -> None:
        """Put a record in the place of another of the same state, unless that has gone."""
        await asyncio.to_thread(self._write, new, durable=True)
        present = self._states.get(new.id)
        if present is old:
            self._states[new.id] = new
        elif present is None:
            (self._directory / f"{new.id}.json").unlink(missing_ok=True)
        else:
            try:
                self._write(present, durable=False)
            except (OSError, RegreenError):
                self._save_later(present.id)  # it lies there as it was
                raise

    async def swap_layers(self, old: Sequence[str], new: Sequence[str]) -> int:
        """Have all states that stand on `old` stand on `new`, which shows the same files.

        `new` has reached the disk. Each record is replaced whole; returns how many were.
        """
        lowest, swapped = tuple(old), 0
        async with self._rewriting:
            for state in list(self._states.values()):
                if state.layers[: len(lowest)] == lowest and self._states.get(state.id) is state:
                    layers = (*new, *state.layers[len(lowest) :])
                    await self._rewrite(state, replace(state, layers=layers))
                    swapped += 1
        return swapped

    async def prepare(
        self,
        spec_sha256: str,
        build: Build,
        *,
        rebuild: bool = False,
        progress: Progress | None = None,
    ) -> State:
        """The state of a spec: found, or built once for all who ask meanwhile.

        Raises:
            ResourceExhausted: the quota of the caller's tenant is used up.
        """
        found = self.find(spec_sha256)
        if found is not None and not rebuild and spec_sha256 not in self._flights:
            self.owners.admit_share(found)
            return await self.owners.share(found)
        self.owners.admit()

        async def run(report: Progress) -> State:
            with self.growing():
                self._collect_later = True
                prepared = await build(report)
                state = await self.add(
                    prepared.layers, action=spec_sha256, spec_sha256=spec_sha256, prepared=prepared
                )
                if prepared.installation:
                    others = self._installed.get(prepared.installation, [])
                    others = [other for other in others if other != state.id]
                    self._installed[prepared.installation] = [*others, state.id]
                return state

        return await self.owners.share(await self._flights.join(spec_sha256, run, progress))

    def hold(self, layers: Iterable[str]) -> None:
        """Protect layers that a running sandbox uses."""
        for layer in layers:
            self._used[layer] = self._used.get(layer, 0) + 1

    def release(self, layers: Iterable[str]) -> None:
        """Undo one `hold`."""
        for layer in layers:
            self._used[layer] -= 1
            if not self._used[layer]:
                del self._used[layer]

    async def delete(self, state_id: str, *, in_use: bool = False) -> None:
        """Forget a state, whoever made it, and remove layers that nothing else uses.

        Absent ones are fine.

        Raises:
            FailedPrecondition: sandboxes run on it.
        """
        if state_id not in self._states:
            return
        if in_use:
            raise state_in_use(state_id)
        del self._states[state_id]
        self._touched.pop(state_id, None)
        for installation, ids in list(self._installed.items()):
            self._installed[installation] = [id for id in ids if id != state_id]
            if not self._installed[installation]:
                del self._installed[installation]
        (self._directory / f"{state_id}.json").unlink(missing_ok=True)
        self._tell(state_id)
        await self.collect()

    async def collect(self) -> int:
        """Remove layers that no state and no sandbox uses; returns how many.

        While layers are being made nothing is removed; it is done afterwards instead.
        """
        if self._growing:
            self._collect_later = True
            return 0
        self._collect_later = False
        held = await self._runtime.layers()
        if self._growing:
            self._collect_later = True
            return 0
        wanted = {layer for state in self._states.values() for layer in state.layers}
        unused = [layer for layer in held if layer not in wanted and layer not in self._used]
        async with self._dropping:
            for layer in unused:
                await self._runtime.drop_layer(layer)
        return len(unused)

    async def undisturbed(self) -> None:
        """Wait, within `growing`, until no layer is being removed any more.

        Layers that are named by their content may be found and used only after that.
        """
        async with self._dropping:
            return

    @contextlib.contextmanager
    def growing(self) -> Iterator[None]:
        """Around anything that makes layers before they are held or recorded."""
        self._growing += 1
        try:
            yield
        finally:
            self._growing -= 1
            if not self._growing and self._collect_later:
                self._in_background(self._collect_quietly())

    async def _collect_quietly(self) -> None:
        with contextlib.suppress(OSError):
            await self.collect()

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

"""Immutable states: what they are made of, which exist, and making each of them once.

- A state is an ordered list of layers and a record; the record is written last, by an atomic
  rename, so a state is whole or absent whenever the process dies.
- A state's id depends on its parent and on the action that made it, on nothing else; the action
  of an imported image is its configuration's digest, so that the base is part of the id.
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
import hashlib
import json
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog

from regreen.rpc.errors import FailedPrecondition, RegreenError
from sandbox_svc.backends.base import HOST_BASE, Mount, Runtime
from sandbox_svc.backends.fds import writing
from sandbox_svc.builders.base import RUNNER, Prepared, Progress
from sandbox_svc.flights import Flights
from sandbox_svc.hosts import boot_id, host_fingerprint, platform_name
from sandbox_svc.state_records import check_record
from sandbox_svc.unknown import no_state

_FORMAT = 1
DEFAULT_CWD = "/work/repo"
_TOUCH_S = 1.0
_AGAIN_S, _AGAIN_AT_MOST_S = 0.25, 10.0
"""How long after a state could not be made durable that is tried again, at first and at most."""
log = structlog.get_logger(__name__)

Build = Callable[[Progress], Awaitable[Prepared]]
Clock = Callable[[], float]


def image_action(config_sha256: str) -> str:
    """The action that makes the root state of an image."""
    return f"image sha256:{config_sha256}"


def state_id(parent_id: str, action: str) -> str:
    """The id of the state that `action` makes of `parent_id`."""
    digest = hashlib.sha256(f"regreen-state\n{parent_id}\n{action}".encode()).hexdigest()
    return f"st_{digest[:32]}"


@dataclass(frozen=True, slots=True)
class State:
    """An immutable snapshot of a prepared file system."""

    id: str
    layers: tuple[str, ...]
    parent_id: str = ""
    spec_sha256: str = ""
    created_s: float = 0.0
    """Unix time."""
    size_bytes: int = 0
    python: str = ""
    mounts: tuple[Mount, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    host: str = ""
    boot: str = ""
    durable: bool = False
    base: str = HOST_BASE
    """Where its programs come from: the host, or `image:sha256:` and a configuration's digest."""
    cwd: str = DEFAULT_CWD
    """Where commands run that name no directory."""
    ancestors: tuple[str, ...] = ()
    """Ids of those it was made from, the root first; older records name the parent alone."""

    def encode(self) -> bytes:
        """The record as JSON."""
        fields = asdict(self)
        fields["mounts"] = [[str(m.source), m.target, m.read_only] for m in self.mounts]
        return json.dumps({"format": _FORMAT, **fields}, sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes) -> "State":
        """The state of a record.

        Raises:
            ValueError: the bytes are no record of this format.
        """
        fields = json.loads(data)
        if not isinstance(fields, dict) or fields.pop("format", None) != _FORMAT:
            raise ValueError("not a state record")
        fields = {"base": HOST_BASE, "cwd": DEFAULT_CWD, "ancestors": [], **fields}  # new ones
        try:
            check_record(fields)
            fields["mounts"] = tuple(Mount(Path(a), b, c) for a, b, c in fields["mounts"])
            fields["layers"] = tuple(fields["layers"])
            fields["ancestors"] = tuple(fields["ancestors"])
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a state record: {error}") from error


def _outdated(state: State) -> bool:
    """Whether a state was prepared with another test runner; snapshots are still of use."""
    prepared = not state.parent_id and state.metadata.get("baseline") is not None
    return prepared and state.metadata.get("runner") != RUNNER


class StateStore:
    """The states of one runtime, indexed by small files below `home`."""

    def __init__(self, home: Path, runtime: Runtime, *, clock: Clock = time.time) -> None:
        self._directory = home / "states"
        self._runtime, self._clock = runtime, clock
        self._states: dict[str, State] = {}
        self._flights: Flights[State] = Flights()
        self._used: dict[str, int] = {}
        self._growing = 0
        self._collect_later = False
        self._dropping = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        self._rewriting = asyncio.Lock()
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
        """One state.

        Raises:
            NotFound: there is none of this id.
        """
        try:
            return self._states[state_id]
        except KeyError:
            raise no_state(state_id) from None

    def peek(self, state_id: str) -> State | None:
        """One state, if there is one of this id."""
        return self._states.get(state_id)

    def runnable(self, state_id: str) -> State:
        """One state, if this host can run it.

        Raises:
            NotFound: there is none of this id.
            FailedPrecondition: it was made for another machine, C library or distribution.
        """
        state = self.get(state_id)
        here = self._host if state.base == HOST_BASE else platform_name()
        if state.host != here:
            raise FailedPrecondition(
                f"state {state_id} was made on {state.host}, this host is {here}; "
                "prepare it again here",
                metadata={"id": state_id},
            )
        self._touch(state_id)
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
        """A state and those that it was made from, the root first; deleted ones are left out.

        Raises:
            NotFound: there is none of this id.
        """
        ids = self.ancestors(state_id)
        return [*(self._states[id] for id in ids if id in self._states), self._states[state_id]]

    def ancestors(self, state_id: str) -> Sequence[str]:
        """Ids of all that a state was made from, the root first, deleted ones included.

        Raises:
            NotFound: there is none of this id.
        """
        ids = dict.fromkeys(self._ancestors(self.get(state_id)))
        return [id for id in ids if id != state_id]

    def _ancestors(self, state: State) -> tuple[str, ...]:
        """Ids of those that a state was made from, as far as records tell."""
        line, seen = [], {state.id}
        while not state.ancestors and state.parent_id and state.parent_id not in seen:
            seen.add(state.parent_id)
            line.append(state.parent_id)
            state = self._states.get(state.parent_id, state)
        return (*state.ancestors, *line[::-1])

    def find(self, spec_sha256: str) -> State | None:
        """The prepared state of a spec that this host can run, if there is one."""
        found = self._states.get(state_id("", spec_sha256))
        return found if found is not None and found.host == self._host else None

    def list(self, *, spec_sha256: str = "", parent_id: str = "") -> Sequence[State]:
        """States that match, oldest first."""
        matching = (
            state
            for state in self._states.values()
            if (not spec_sha256 or state.spec_sha256 == spec_sha256)
            and (not parent_id or state.parent_id == parent_id)
        )
        return sorted(matching, key=lambda state: (state.created_s, state.id))

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
        own = [layer for layer in layers if not parent or layer not in parent.layers]
        sizes = [await self._runtime.layer_size(layer) for layer in own]
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
        self.record(state)
        return state

    def record(self, state: State) -> None:
        """Make a state exist from now on."""
        self._write(state, durable=False)
        self._states[state.id] = state
        self._touched[state.id] = self._clock()
        self._save_later(state.id)
        self._tell(state.id)

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
        """The state of a spec: found, or built once for all who ask meanwhile."""
        found = self.find(spec_sha256)
        if found is not None and not rebuild and spec_sha256 not in self._flights:
            return found

        async def run(report: Progress) -> State:
            with self.growing():
                self._collect_later = True
                prepared = await build(report)
                return await self.add(
                    prepared.layers, action=spec_sha256, spec_sha256=spec_sha256, prepared=prepared
                )

        return await self._flights.join(spec_sha256, run, progress)

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
        """Forget a state and remove layers that nothing else uses; absent ones are fine.

        Raises:
            FailedPrecondition: sandboxes run on it.
        """
        if state_id not in self._states:
            return
        if in_use:
            raise FailedPrecondition(
                f"sandboxes run on state {state_id}; delete them first", metadata={"id": state_id}
            )
        del self._states[state_id]
        self._touched.pop(state_id, None)
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

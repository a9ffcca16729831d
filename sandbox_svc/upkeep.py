"""What is done to states in the background: long chains are flattened, a disk budget is kept.

- The layers of a chain above its root state are flattened when there are more than a bound; the
  root's own layers stay, so that its other children go on sharing them.
- Flattening changes no state: one new layer is made, and the records that stood on the old ones
  are rewritten whole. Whoever runs over the old layers keeps them until it ends or freezes.
- A chain that cannot be read (a directory closed to the service itself) is left as it is.
- Over the budget, the state goes that was used least recently, among those that nothing runs on and
  whose going frees something: first prepared ones, which their spec makes again, then snapshots
  older than a grace.
- Without a budget nothing is ever dropped.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from dataclasses import dataclass

import structlog

from regreen.rpc.errors import FailedPrecondition, RegreenError
from sandbox_svc import metrics
from sandbox_svc.backends.base import Runtime
from sandbox_svc.state_records import State
from sandbox_svc.states import StateStore

log = structlog.get_logger(__name__)
_TICK_S = 30.0
"""With a budget: what was in use or young may not be any more."""
_PREPARED_GRACE_S = 60.0
"""Time for who prepared a state to make something of it."""


@dataclass(frozen=True, slots=True)
class UpkeepLimits:
    """When upkeep acts."""

    flatten_layers: int = 30
    """Layers above the root state before they become one; 0 never."""
    state_bytes: int = 0
    """Bytes of all layers; 0 means no bound."""
    snapshot_grace_s: float = 86_400.0
    """Snapshots used within this time are not dropped."""


class Upkeep:
    """Looks after the states of one service."""

    def __init__(
        self,
        states: StateStore,
        runtime: Runtime,
        stood_on: Callable[[], Set[str]],
        clock: Callable[[], float],
        limits: UpkeepLimits | None = None,
    ) -> None:
        self._states, self._runtime, self._stood_on = states, runtime, stood_on
        self._clock, self._limits = clock, limits or UpkeepLimits()
        self._sizes: dict[str, int] = {}
        self._unreadable: set[tuple[str, ...]] = set()
        self._wake, self._idle = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._tick_s = _TICK_S if self._limits.state_bytes else None

    async def start(self) -> None:
        """Begin; the first look is at what is there."""
        self._states.changed.append(self._on_change)
        self._on_change("")
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop; work in a thread ends first."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def _on_change(self, state_id: str) -> None:
        self._idle.clear()
        self._wake.set()

    async def settled(self) -> None:
        """Wait until there is nothing left to do."""
        await self._idle.wait()

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._tick_s)
            self._wake.clear()
            for step in (self._flatten_all, self._keep_budget):  # one that fails stops no other
                try:
                    await step()
                except (RegreenError, OSError) as error:
                    log.warning("upkeep of states failed", error=str(error))
            if not self._wake.is_set():
                self._idle.set()

    async def _flatten_all(self) -> None:
        while await self._flatten_one():
            pass

    async def _flatten_one(self) -> bool:
        """Flatten one chain; whether there was one."""
        merge = getattr(self._runtime, "merge_layers", None)
        if merge is None or not self._limits.flatten_layers:
            return False
        for state in self._states.every():
            if len(state.layers) <= self._limits.flatten_layers:
                continue
            root = self._root_layers(state)
            chain = state.layers[root : root + self._limits.flatten_layers]
            lowest = state.layers[: root + len(chain)]
            if len(lowest) == len(state.layers) or lowest in self._unreadable:
                continue
            await self._flatten(merge, state, root, chain)
            return True
        return False

    def _root_layers(self, state: State) -> int:
        """How many layers of a state are those of its root; at most all but one."""
        roots = [root for root in self._states.every() if not root.parent_id]
        fitting = (r.layers for r in roots if state.layers[: len(r.layers)] == r.layers)
        most = max((len(layers) for layers in fitting if layers != state.layers), default=0)
        return most if state.parent_id else len(state.layers)

    async def _flatten(
        self, merge: Callable[..., Awaitable[str]], state: State, root: int, chain: Sequence[str]
    ) -> None:
        below = state.layers[:root]
        self._states.hold([*below, *chain])
        try:
            with self._states.growing():
                merged = await merge(below, chain, state.mounts, state.base)
                count = await self._states.swap_layers((*below, *chain), (*below, merged))
        except (OSError, FailedPrecondition) as error:
            self._unreadable.add((*below, *chain))
            log.warning("chain not flattened", state_id=state.id, error=str(error))
            return
        finally:
            self._states.release([*below, *chain])
        metrics.LAYERS_FLATTENED.inc(len(chain))
        log.info("chain flattened", state_id=state.id, layers=len(chain), states=count)
        await self._states.collect()

    async def _measure(self, *, again: bool) -> None:
        """Learn the sizes of layers, of all or of those that are new."""
        held = await self._runtime.layers()
        known = {} if again else self._sizes
        sizes: dict[str, int] = {}
        for layer in held:
            found = known.get(layer)
            with contextlib.suppress(FileNotFoundError):  # it went meanwhile
                sizes[layer] = await self._runtime.layer_size(layer) if found is None else found
        self._sizes = sizes

    async def _keep_budget(self) -> None:
        most = self._limits.state_bytes
        if not most:
            return
        await self._measure(again=False)
        if self._wanted_bytes() <= most:
            return
        await self._measure(again=True)  # what is shared with layers that went counts in full now
        while self._wanted_bytes() > most and await self._drop_down_to(most):
            await self._measure(again=True)

    async def _drop_down_to(self, most: int) -> bool:
        """Drop states until the rest seems to fit; whether one was."""
        dropped = False
        while (size := self._wanted_bytes()) > most:
            victim = self._victim()
            if victim is None:
                log.warning("states are over their budget, and none may go", bytes=size)
                break
            kind = _kind(victim)
            log.info("state dropped for space", state_id=victim.id, kind=kind)
            metrics.STATES_DROPPED.labels(kind).inc()
            await self._states.delete(victim.id)
            dropped = True
        return dropped

    def _wanted_bytes(self) -> int:
        """Bytes of the layers that states are made of; others go by themselves."""
        wanted = {layer for state in self._states.every() for layer in state.layers}
        return sum(self._sizes.get(layer, 0) for layer in wanted)

    def _victim(self) -> State | None:
        """The state to drop next, if there is one."""
        states = self._states.every()
        alike: dict[tuple[str, ...], list[State]] = {}
        for state in states:  # those of one installation: bytes go with the last of them
            alike.setdefault(state.layers, []).append(state)
        counts = Counter(layer for layers in alike for layer in layers)
        stood_on, now = self._stood_on(), self._clock()

        def goes(one: State) -> bool:
            return one.id not in stood_on and self._is_old(one, now)

        may = [s for s in states if self._frees(s, counts) and all(map(goes, alike[s.layers]))]
        order = {"prepared": 0, "snapshot": 1}
        return min(may, key=lambda s: (order[_kind(s)], self._states.used_s(s), s.id), default=None)

    def _frees(self, state: State, counts: Mapping[str, int]) -> bool:
        """Whether bytes go with a state, and nothing runs over what would go."""
        own = [layer for layer in state.layers if counts[layer] == 1]
        running = any(self._states.in_use(layer) for layer in own)
        return not running and any(self._sizes.get(layer, 0) for layer in own)

    def _is_old(self, state: State, now: float) -> bool:
        age_s = now - self._states.used_s(state)
        prepared = _kind(state) == "prepared"
        return age_s >= (_PREPARED_GRACE_S if prepared else self._limits.snapshot_grace_s)


def _kind(state: State) -> str:
    return "prepared" if state.spec_sha256 and not state.parent_id else "snapshot"

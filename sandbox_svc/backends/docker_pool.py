"""Started containers for states in use, so that making a sandbox is taking one.

- A container is given out once and never comes back: no command of anybody ran in it before.
- What it was started with (layers, limits, mounts) is the key; only equal wishes share.
- Bounded per key and in all; those longest unwanted go first, and all go after `idle_s`.
- Filled in the background, one container at a time; a failure to fill is no failure of anybody's
  call, and whatever goes wrong there, filling goes on.
- A container is on a shelf, given to a caller, or being discarded: a caller that goes away while
  it takes one, and a pool that closes while it fills, leave none behind.
- Containers carry the runtime's label, so what a killed service left is swept with the rest.
"""

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from regreen.rpc.errors import RegreenError
from regreen.rpc.logging import get
from sandbox_svc.backends.base import Limits, Mount

_TIDY_S = 10.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a container is started with."""

    layers: tuple[str, ...]
    limits: Limits
    mounts: tuple[Mount, ...] = ()


@dataclass(frozen=True, slots=True)
class PoolSize:
    """How many containers wait, and for how long."""

    each: int = 0
    """Per state in use; 0 keeps none."""
    total: int = 8
    idle_s: float = 300.0


@dataclass(slots=True)
class _Shelf:
    ready: deque[str] = field(default_factory=deque)
    wanted_s: float = 0.0
    rests_until_s: float = 0.0
    """Not filled before, because it could not be."""


class ContainerPool:
    """The waiting containers of one runtime.

    `start` leaves nothing when it fails or is cancelled; `discard` removes now or later.
    """

    def __init__(
        self,
        size: PoolSize,
        *,
        start: Callable[[Recipe], Awaitable[str]],
        discard: Callable[[str], Awaitable[None]],
        running: Callable[[str], Awaitable[bool]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._size, self._clock = size, clock
        self._start, self._discard, self._running = start, discard, running
        self._shelves: OrderedDict[Recipe, _Shelf] = OrderedDict()
        self._stir = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def waiting(self) -> int:
        """Containers that nobody has taken yet."""
        return sum(len(shelf.ready) for shelf in self._shelves.values())

    @property
    def containers(self) -> frozenset[str]:
        """Ids of those that wait."""
        return frozenset(c for shelf in self._shelves.values() for c in shelf.ready)

    async def take(self, recipe: Recipe) -> str | None:
        """A started container, if one waits; another is started in its place."""
        if not self._size.each or self._closed:
            return None
        shelf = self._shelves.setdefault(recipe, _Shelf())
        shelf.wanted_s = self._clock()
        self._shelves.move_to_end(recipe)
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep())
        self._stir.set()
        while shelf.ready:
            container, good = shelf.ready.popleft(), False
            try:
                good = await self._running(container)
            except RegreenError:
                return None
            finally:  # also when the caller goes away meanwhile
                if not good:
                    await asyncio.shield(self._discard(container))
            if good:
                return container
        return None

    async def drop_layer(self, layer: str) -> None:
        """Remove what waits over a layer that is about to go."""
        for recipe in [recipe for recipe in self._shelves if layer in recipe.layers]:
            await self._clear(recipe)

    async def close(self) -> None:
        """Discard everything that waits."""
        self._closed = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        for recipe in list(self._shelves):
            await self._clear(recipe)

    async def _clear(self, recipe: Recipe) -> None:
        shelf = self._shelves.pop(recipe, _Shelf())
        going = list(shelf.ready)
        shelf.ready.clear()  # a `take` under way still has the shelf
        await asyncio.shield(asyncio.gather(*(self._discard(container) for container in going)))

    async def _keep(self) -> None:
        while True:
            self._stir.clear()
            try:
                await self._tidy()
                while await self._fill_one():
                    pass
            except Exception as error:  # noqa: BLE001  (of the platform; the next round tries again)
                get().warning("container pool not filled", error=str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TIDY_S):
                    await self._stir.wait()

    async def _tidy(self) -> None:
        until = self._clock() - self._size.idle_s
        for recipe in [r for r, shelf in self._shelves.items() if shelf.wanted_s <= until]:
            await self._clear(recipe)

    async def _fill_one(self) -> bool:
        """Start one container where one is missing; whether there may be more to do."""
        now = self._clock()
        for recipe, shelf in reversed(self._shelves.items()):
            if len(shelf.ready) < self._size.each and shelf.rests_until_s <= now:
                return await self._make_room(recipe) and await self._fill(recipe)
        return False

    async def _make_room(self, recipe: Recipe) -> bool:
        """Whether there is room for one more; what was longest unwanted is removed for it."""
        if self.waiting < self._size.total:
            return True
        oldest = next((r for r, shelf in self._shelves.items() if shelf.ready), recipe)
        if oldest == recipe:
            return False
        await self._clear(oldest)
        return True

    async def _fill(self, recipe: Recipe) -> bool:
        try:
            container = await self._start(recipe)
        except Exception as error:  # noqa: BLE001  (whatever it is, others are filled and it rests)
            get().warning("container not kept ready", error=str(error))
            if (shelf := self._shelves.get(recipe)) is not None:
                shelf.rests_until_s = self._clock() + _TIDY_S
            return True
        shelf = self._shelves.get(recipe)
        if shelf is None:  # its layers went meanwhile
            await self._discard(container)
        else:
            shelf.ready.append(container)
        return True

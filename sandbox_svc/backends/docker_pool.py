"""Started containers for states in use, so that making a sandbox is taking one.

- A container is given out once and never comes back: no command of anybody ran in it before.
- What it was started with (layers, limits, mounts) is the key; only equal wishes share.
- Bounded per key and in all; those longest unwanted go first, and all go after `idle_s`.
- Filled in the background by a thread of its own, one container at a time; a failure to fill is
  no failure of anybody's call.
- Containers carry the runtime's label, so what a killed service left is swept with the rest.
"""

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from regreen.rpc.errors import RegreenError
from sandbox_svc.backends.base import Limits, Mount

_TIDY_S = 10.0
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a container is started with."""

    layers: tuple[str, ...]
    limits: Limits
    mounts: tuple[Mount, ...] = ()
    network: bool = False


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


class ContainerPool:
    """The waiting containers of one runtime; its callables block and run in its thread."""

    def __init__(
        self,
        size: PoolSize,
        *,
        start: Callable[[Recipe], str],
        remove: Callable[[str], None],
        running: Callable[[str], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._size, self._clock = size, clock
        self._start, self._remove, self._running = start, remove, running
        self._shelves: OrderedDict[Recipe, _Shelf] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sandbox-docker-pool")
        self._stir = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Containers that nobody has taken yet."""
        return sum(len(shelf.ready) for shelf in self._shelves.values())

    async def take(self, recipe: Recipe) -> str | None:
        """A started container, if one waits; another is started in its place."""
        if not self._size.each or recipe.network:
            return None
        shelf = self._shelves.setdefault(recipe, _Shelf())
        shelf.wanted_s = self._clock()
        self._shelves.move_to_end(recipe)
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep())
        self._stir.set()
        while shelf.ready:
            container = shelf.ready.popleft()
            if await self._blocking(self._running, container):
                return container
            await self._blocking(self._remove, container)
        return None

    async def drop_layer(self, layer: str) -> None:
        """Remove what waits over a layer that is about to go."""
        for recipe in [recipe for recipe in self._shelves if layer in recipe.layers]:
            await self._clear(recipe)

    async def close(self) -> None:
        """Remove everything that waits."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        for recipe in list(self._shelves):
            await self._clear(recipe)
        self._thread.shutdown()

    async def _clear(self, recipe: Recipe) -> None:
        shelf = self._shelves.pop(recipe, _Shelf())
        for container in shelf.ready:
            await self._blocking(self._remove, container)

    async def _keep(self) -> None:
        while True:
            await self._tidy()
            while await self._fill_one():
                pass
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TIDY_S):
                    await self._stir.wait()
            self._stir.clear()

    async def _tidy(self) -> None:
        until = self._clock() - self._size.idle_s
        for recipe in [r for r, shelf in self._shelves.items() if shelf.wanted_s <= until]:
            await self._clear(recipe)

    async def _fill_one(self) -> bool:
        """Start one container where one is missing; whether there may be more to do."""
        for recipe, shelf in reversed(self._shelves.items()):
            if len(shelf.ready) < self._size.each:
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
            container = await self._blocking(self._start, recipe)
        except RegreenError:
            self._shelves.pop(recipe, None)  # wanted again, it is tried again
            return False
        shelf = self._shelves.get(recipe)
        if shelf is None:  # its layers went meanwhile
            await self._blocking(self._remove, container)
        else:
            shelf.ready.append(container)
        return True

    async def _blocking(self, call: Callable[..., _T], *args: object) -> _T:
        """Do a blocking call to its end, even when the caller goes away."""
        loop = asyncio.get_running_loop()
        return await asyncio.shield(loop.run_in_executor(self._thread, call, *args))

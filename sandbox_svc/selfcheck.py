"""Looks at regular times for what should not be there, and measures what the layers take.

- A leak is what belongs to no live sandbox look after look, for at least `grace_s`: what is being
  made or removed at one moment is none.
- Layers never change, so each is measured once.
- A look that fails is logged and left out; the service goes on.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from regreen.rpc import logging
from regreen.rpc.errors import RegreenError
from sandbox_svc import metrics
from sandbox_svc.backends.base import Inspectable, Runtime

_MAX_NAMED = 10
_GRACE_S = 20.0
_KINDS = ("process", "cgroup", "directory", "mount", "container", "door")


class SelfCheck:
    """Keeps the gauges of leaks and of disk use."""

    def __init__(
        self,
        runtime: Runtime,
        home: Path,
        *,
        period_s: float,
        grace_s: float = _GRACE_S,
        doors: Callable[[], frozenset[str]] = frozenset,
        live: Callable[[], frozenset[str]] = frozenset,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runtime, self._home = runtime, home
        self._period_s, self._grace_s, self._clock = period_s, grace_s, clock
        self._doors, self._live = doors, live
        self._since: dict[tuple[str, str], float] = {}
        self._sizes: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None
        self._log = logging.get()

    async def start(self) -> None:
        """Begin to look."""
        for kind in _KINDS:
            metrics.LEAKS.labels(kind).set(0)
        self._task = asyncio.create_task(self._loop())

    async def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _loop(self) -> None:
        while True:
            try:
                await self.look()
            except (OSError, RegreenError) as error:
                self._log.warning("self-check failed", error=str(error))
            await asyncio.sleep(self._period_s)

    async def look(self) -> Mapping[str, frozenset[str]]:
        """Look once; what has belonged to nothing for too long, by kind."""
        await self._measure()
        found: dict[str, frozenset[str]] = {"door": self._doors() - self._live()}
        if isinstance(self._runtime, Inspectable):
            found |= await self._runtime.orphans()
        leaks = self._lasting(found)
        for kind, names in leaks.items():
            metrics.LEAKS.labels(kind).set(len(names))
            if names:
                named = sorted(names)[:_MAX_NAMED]
                self._log.error("leak", kind=kind, count=len(names), names=named)
        metrics.SELF_CHECKS.inc()
        return leaks

    def _lasting(self, found: Mapping[str, frozenset[str]]) -> Mapping[str, frozenset[str]]:
        """What was seen before, and first long enough ago."""
        now, before = self._clock(), self._since
        names = [(kind, name) for kind, group in found.items() for name in group]
        self._since = {name: before.get(name, now) for name in names}
        old = {name for name in names if name in before and now - before[name] >= self._grace_s}
        return {
            kind: frozenset(name for name in group if (kind, name) in old)
            for kind, group in found.items()
        }

    async def _measure(self) -> None:
        layers = await self._runtime.layers()
        for gone in self._sizes.keys() - set(layers):
            del self._sizes[gone]
        for layer in layers:
            if layer not in self._sizes:
                with contextlib.suppress(FileNotFoundError):
                    self._sizes[layer] = await self._runtime.layer_size(layer)
        metrics.LAYERS.set(len(layers))
        metrics.LAYER_BYTES.set(sum(self._sizes.values()))
        space = await asyncio.to_thread(os.statvfs, self._home)
        metrics.DISK_FREE_BYTES.set(space.f_bavail * space.f_frsize)

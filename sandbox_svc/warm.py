"""Sandboxes in which a test run has been started ahead and waits for the diff.

- Each is a fresh fork of a State that nobody else has used; it serves one validation and goes.
- What it loads ahead was learned from the State alone: no diff of an agent ever had a part in it.
- Only a State's own packages are loaded, and only if that leaves nothing that another could see
  (`builders/inbox/preload.py`); whatever a diff could change about them is run cold instead.
- A run whose conditions turned out to be others has no result: it is done again, cold.
- A State whose verdicts differed once, cold and warm, is never warm again, also after a restart.
- States in use longest ago give way; memory is bounded; nothing is left after `close`.
"""

import asyncio
import contextlib
import random
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Container, Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regreen.rpc import logging
from regreen.rpc.errors import RegreenError
from sandbox_svc import metrics
from sandbox_svc.backends.base import Box, Limits, Runtime
from sandbox_svc.builders import testrun
from sandbox_svc.builders.base import TOOLS
from sandbox_svc.builders.modules import SOURCE_FOLDERS
from sandbox_svc.builders.protect import is_own, places_of
from sandbox_svc.forks import fork_of
from sandbox_svc.spares import Miss, Names, Spare
from sandbox_svc.state_records import State
from sandbox_svc.states import StateStore
from sandbox_svc.verdicts import Plan

ROUNDS = 16
"""Trials until the modules that can be loaded ahead are known."""
REMEMBERED = 1024
DEATHS = 3
FUTILE = 5
"""Runs in a row that had to be done anew, none having gone on before, until a State stays cold."""
_INBOX = Path(__file__).parent / "builders" / "inbox"
_SOURCE = (".py", ".pyi")


@dataclass(frozen=True, slots=True)
class WarmSettings:
    """How much is kept warm."""

    states: int = 2
    spares: int = 1
    """Sandboxes that wait, for each State."""
    memory_bytes: int = 2 << 30
    check_share: float = 0.05
    """Share of warm verdicts that are checked cold."""


@dataclass(slots=True)
class _Hot:
    """A State that is kept warm."""

    state: State
    names: Names | None = None
    spares: list[Spare] = field(default_factory=list)
    refill: asyncio.Task[None] | None = None
    served: int = 0
    deaths: int = 0
    futile: int = 0
    """Runs that were done anew as long as none has gone on."""


class WarmPool:
    """Warm sandboxes of the States that are validated most recently."""

    checks = metrics.WARM_CHECKS

    def __init__(
        self,
        states: StateStore,
        runtime: Runtime,
        home: Path,
        *,
        settings: WarmSettings | None = None,
        limits: Limits | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._states, self._runtime, self._limits = states, runtime, limits or Limits()
        self._settings, self._chance = settings or WarmSettings(), chance
        self._marks = home / "never-warm"
        self._hot: OrderedDict[str, _Hot] = OrderedDict()
        self._seen: OrderedDict[str, int] = OrderedDict()
        self._off: OrderedDict[str, str] = OrderedDict()
        self._one = asyncio.Lock()
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        """Sandboxes that exist for validations to come."""
        return sum(len(hot.spares) for hot in self._hot.values())

    def why_off(self, state_id: str) -> str:
        """Why a State is not kept warm; empty if it may be."""
        if (self._marks / state_id).exists():
            return "its verdicts differed, cold and warm"
        return self._off.get(state_id, "")

    @contextlib.asynccontextmanager
    async def spare(self, plan: Plan, seed: int) -> AsyncIterator[Spare | Miss]:
        """A warm sandbox for one run of a plan, or the reason why it has to be cold."""
        why = self._unfit(plan, seed)
        # A State whose diffs have to be cold anyway is not worth a warm-up; one that is looked at
        # independently neither: a gate asks for a few such runs and is done with it.
        if why is None and not plan.alone:
            self._use(plan.state)
        spare = None if why else await self._take(plan.state.id)
        if spare is None:
            yield why or Miss.NOT_READY
            return
        try:
            yield spare
        finally:
            hot = self._hot.get(plan.state.id)
            if hot is not None:  # only now, so that the run has the processors to itself
                self._refill_later(hot)
            await asyncio.shield(self._in_background(self._discard(spare)))

    def _unfit(self, plan: Plan, seed: int) -> Miss | None:
        """Why the verdict on a plan could be another one warm."""
        if self.why_off(plan.state.id):
            return Miss.OFF
        if plan.options.coverage or seed:
            return Miss.OPTIONS
        if plan.lock is not None:
            return Miss.LOCK
        own, places = frozenset(plan.facts["modules"]), places_of(plan.facts["places"])
        for change in plan.changes:
            if not change.path.endswith(_SOURCE):
                return Miss.SOURCE
            if change.content is not None and _brings_module(change.path, places, own):
                return Miss.SOURCE
        return None

    async def _take(self, state_id: str) -> Spare | None:
        """A sandbox that is ready or about to be."""
        hot = self._hot.get(state_id)
        while hot is not None and hot.names is not None and hot.spares:
            hot.spares.sort(key=lambda s: not s.ready.done())
            spare = hot.spares.pop(0)
            metrics.WARM_WAITING.set(self.waiting)
            good = False
            try:
                with contextlib.suppress(TimeoutError):
                    good = bool(await spare.loaded()) and spare.alive
                if good:
                    return spare
            finally:  # also when the validation is cancelled while it waits
                if not good:
                    await asyncio.shield(self._in_background(self._discard(spare)))
            hot.deaths += 1
            if hot.deaths >= DEATHS:
                self._switch_off(hot.state.id, "its warm sandboxes die")
        return None

    def _use(self, state: State) -> None:
        """Note that a State is validated; the second time it becomes warm."""
        count = self._seen.pop(state.id, 0) + 1
        self._seen[state.id] = count
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        if state.id in self._hot:
            self._hot.move_to_end(state.id)
        if count > 1:
            self.warm(state)

    def warm(self, state: State) -> None:
        """Keep a State warm from now on."""
        if self._closing or not self._settings.states or self.why_off(state.id):
            return
        if not _is_own(state):
            self._switch_off(state.id, "it was not prepared by this version of the service")
            return
        if state.id not in self._hot:
            self._hot[state.id] = _Hot(state)
            while len(self._hot) > self._settings.states:
                self.forget(next(iter(self._hot)))
        self._refill_later(self._hot[state.id])

    async def settled(self) -> None:
        """Wait until nothing gets warm any more."""
        while tasks := [h.refill for h in self._hot.values() if h.refill and not h.refill.done()]:
            await asyncio.wait(tasks)

    def forget(self, state_id: str) -> None:
        """Let a State be cold again."""
        hot = self._hot.pop(state_id, None)
        if hot is None:
            return
        if hot.refill is not None:
            hot.refill.cancel()
        for spare in hot.spares:
            self._in_background(self._discard(spare))
        hot.spares = []
        metrics.WARM_WAITING.set(self.waiting)

    async def drop(self, state_id: str) -> None:
        """Let a State be cold again, and wait until nothing holds its layers any more."""
        hot = self._hot.get(state_id)
        self.forget(state_id)
        if hot is not None and hot.refill is not None:
            await asyncio.gather(hot.refill, return_exceptions=True)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def went(self, state_id: str, miss: Miss | None) -> None:
        """Hear how a warm run went: a State whose own tests end each of them is not worth it."""
        hot = self._hot.get(state_id)
        if hot is None or hot.futile < 0:
            return
        if miss is None:
            hot.futile = -1
        elif miss is Miss.ANEW:
            hot.futile += 1
            if hot.futile >= FUTILE:
                self._switch_off(state_id, "its runs have to be done anew")

    def wants_check(self, state_id: str) -> bool:
        """Whether a warm verdict is to be checked cold: a State's first, then a sample."""
        hot = self._hot.get(state_id)
        first = hot is not None and hot.served == 0
        if hot is not None:
            hot.served += 1
        return first or self._chance() < self._settings.check_share

    def differed(self, state_id: str, what: str) -> None:
        """A State's verdicts differ: it is never warm again."""
        metrics.WARM_MISMATCHES.inc()
        logging.get().error("warm_verdict_differs", state_id=state_id, difference=what)
        self._switch_off(state_id, "its verdicts differed, cold and warm")
        try:
            self._marks.mkdir(parents=True, exist_ok=True)
            (self._marks / state_id).write_text(what + "\n", encoding="utf-8")
        except OSError as error:
            logging.get().error("never_warm_not_recorded", state_id=state_id, error=str(error))

    def check_again(self, state_id: str) -> None:
        """A check came to nothing: the next warm verdict is checked instead."""
        if (hot := self._hot.get(state_id)) is not None:
            hot.served = 0

    def _switch_off(self, state_id: str, why: str) -> None:
        logging.get().info("state_stays_cold", state_id=state_id, reason=why)
        self._off[state_id] = why
        while len(self._off) > REMEMBERED:
            self._off.popitem(last=False)
        self.forget(state_id)

    def _refill_later(self, hot: _Hot) -> None:
        busy = hot.refill is not None and not hot.refill.done()
        if not busy and not self._closing and len(hot.spares) < self._settings.spares:
            hot.refill = asyncio.create_task(self._refill(hot))

    async def _refill(self, hot: _Hot) -> None:
        """Warm as many sandboxes as a State may have."""
        try:
            if hot.names is None:
                async with self._one:
                    hot.names = await self._learn(hot.state)
            while len(hot.spares) < self._settings.spares and hot.names is not None:
                async with self._one:
                    await self._add(hot, hot.names)
        except (_Unsuited, TimeoutError) as error:
            hot.refill = None
            self._switch_off(hot.state.id, str(error) or type(error).__name__)
        except (RegreenError, OSError) as error:  # of the platform, not of the State
            hot.refill = None
            logging.get().warning("warming_failed", state_id=hot.state.id, error=str(error))
            self._seen.pop(hot.state.id, None)  # two more validations, then it is tried again
            self.forget(hot.state.id)

    async def _add(self, hot: _Hot, names: Names) -> None:
        spare = await self._begin(hot.state, names, deep=False)
        hot.spares.append(spare)
        report = await spare.loaded()
        if report and not report.get("refused"):
            spare.memory_bytes = await _memory(spare.box)
        elif report:
            raise _Unsuited(f"it loads otherwise each time: {report['refused']}")
        metrics.WARM_WAITING.set(self.waiting)
        self._bound_memory(hot)

    def _bound_memory(self, hot: _Hot) -> None:
        """Let States go, longest unused first, until what waits fits."""
        while sum(s.memory_bytes for h in self._hot.values() for s in h.spares) > (
            self._settings.memory_bytes
        ):
            oldest = next(iter(self._hot))
            if oldest == hot.state.id:
                raise _Unsuited("its warm sandboxes take more memory than there is for them")
            self.forget(oldest)

    async def _learn(self, state: State) -> Names:
        """Which modules a State's tests import and which of them can be loaded ahead."""
        async with fork_of(self._states, self._runtime, state.id, self._limits) as box:
            options = testrun.options_of(state.metadata, state.env)
            survey = (await testrun.run_tests(box, options, survey=True)).survey
        if survey is None:
            raise _Unsuited("its tests cannot be collected")
        names = survey.names
        for _ in range(ROUNDS):
            refused = await self._try(state, names)
            if not refused:
                return names
            if "*" in refused:
                raise _Unsuited(refused["*"])
            logging.get().debug("not_loaded_ahead", state_id=state.id, modules=refused)
            whole = {name.partition(".")[0] for name in refused} - sys.stdlib_module_names
            whole -= {"_pytest"}
            names = tuple(n for n in names if not _lost(n[0], refused, whole))
        raise _Unsuited("what it imports is not settled")

    async def _try(self, state: State, names: Names) -> dict[str, str]:
        """Load the modules once with every check; those that cannot be, and why."""
        spare = await self._begin(state, names, deep=True)
        try:
            report = await spare.loaded()
            if not report:
                raise _Unsuited("its packages end the process")
            return dict(report["refused"])
        finally:
            await self._discard(spare)

    async def _begin(self, state: State, names: Names, *, deep: bool) -> Spare:
        state = self._states.known(state.id)  # its layers may have been swapped meanwhile
        self._states.hold(state.layers)
        try:
            box = await self._runtime.create(
                state.layers, limits=self._limits, mounts=state.mounts, base=state.base
            )
        except BaseException:
            self._states.release(state.layers)
            raise
        spare = Spare(state, box)
        spare.start(testrun.options_of(state.metadata, state.env), names, deep=deep)
        return spare

    async def _discard(self, spare: Spare) -> None:
        try:
            await spare.delete()
        finally:
            self._states.release(spare.state.layers)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Remove every warm sandbox."""
        self._closing = True
        refills = [hot.refill for hot in self._hot.values() if hot.refill is not None]
        for state_id in list(self._hot):
            self.forget(state_id)
        await asyncio.gather(*refills, return_exceptions=True)
        await asyncio.gather(*self._tasks, return_exceptions=True)


class _Unsuited(Exception):
    """A State cannot be kept warm."""


def _is_own(state: State) -> bool:
    """Whether a State came from a builder and holds the runner of this service."""
    tools = next((m.source for m in state.mounts if m.target == TOOLS), None)
    if state.parent_id or tools is None:
        return False
    try:
        return all(
            (tools / "lib" / source.name).read_bytes() == source.read_bytes()
            for source in _INBOX.glob("*.py")
        )
    except OSError:
        return False


def _lost(name: str, refused: Iterable[str], whole: Container[str]) -> bool:
    """Whether the import of a module brings about that of one that is refused."""
    inside = any(name == other or name.startswith(other + ".") for other in refused)
    return inside or name.partition(".")[0] in whole


def _brings_module(path: str, places: frozenset[str], own: frozenset[str]) -> bool:
    """Whether a file could be imported as a top-level module that the State does not have."""
    for place in places:
        prefix = f"{place}/" if place else ""
        if path.startswith(prefix):
            module = path[len(prefix) :].partition("/")[0].partition(".")[0]
            if not is_own(place, module, own) and (place or module not in SOURCE_FOLDERS):
                return True
    return False


async def _memory(box: Box) -> int:
    """Resident memory of a sandbox, if its runtime tells."""
    usage = getattr(box, "usage", None)
    return int((await usage())["memory"]) if usage is not None else 0

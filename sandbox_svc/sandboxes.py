"""Running sandboxes: forked from states, bounded in number, ended by time.

- A sandbox keeps its id through snapshot and restore; its box may change beneath it.
- Operations that replace or end a box exclude each other; commands end when their box does.
- Such an operation, once begun, goes on to its end when its caller goes away: no work is lost.
- A sandbox with a call in progress does not expire; any other ends at `expires_s`.
- Layers below a live sandbox are held, so that deleting its state cannot pull them away.
- A caller gets, lists and deletes the sandboxes of its tenant; what the service does by itself, it
  does to all. A tenant may have so many, those that start included.
- Sandboxes of agents and fresh forks to compare them with draw on separate allowances: a full pool
  of agents cannot block a diff.
"""

import asyncio
import contextlib
import os
import time
from collections import Counter, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, TypeVar

import structlog

from regreen.allowlist import AllowList
from regreen.ids import new_id
from regreen.rpc.errors import NotFound, RegreenError, Unavailable
from regreen.rpc.quotas import Quotas
from regreen.rpc.tenants import charged, sees
from sandbox_svc import metrics
from sandbox_svc.backends.base import Box, Limits, Runtime, check_kept, kept
from sandbox_svc.egress import Door, Egress
from sandbox_svc.labels import check_labels
from sandbox_svc.pace import Places
from sandbox_svc.pool import PoolLimits
from sandbox_svc.sandbox import Sandbox
from sandbox_svc.state_records import State
from sandbox_svc.states import StateStore
from sandbox_svc.unknown import no_sandbox, no_state, state_in_use

log = structlog.get_logger(__name__)
STARTS_AT_ONCE = max(4, 2 * (os.cpu_count() or 1))
"""Sandboxes of all calls that start at a time: more would only wait for each other, and a call that
is refused would wait for their processes as well."""
_BURST, _BURST_S, _GIVE_WAY_S, _LOOK_S = 16, 0.016, 0.05, 0.002
"""While so many calls come in so short a time, no start takes it from them; so long at most."""
_REAP_S = 1.0
_NO_LIMITS = Limits()
_T = TypeVar("_T")


class Manager:
    """Creates, forks, snapshots, restores and ends sandboxes of one runtime."""

    def __init__(
        self,
        runtime: Runtime,
        states: StateStore,
        *,
        pool: PoolLimits | None = None,
        egress: Egress | None = None,
        quotas: Quotas | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.runtime, self.states = runtime, states
        self.egress = egress or Egress(enabled=False)
        self.pool = pool or PoolLimits()
        self._quotas = quotas or Quotas()
        self._clock = clock
        self._sandboxes: dict[str, Sandbox] = {}
        self._reserved: Counter[str] = Counter()
        """Places of sandboxes to come, by tenant."""
        self._came: deque[float] = deque(maxlen=_BURST)
        """When the last calls came that ask for a sandbox."""
        self._comparisons = asyncio.Semaphore(self.pool.max_comparisons)
        self.large_diffs = Places("large diffs", self.pool.max_large_diffs)
        self._reaper: asyncio.Task[None] | None = None
        self._finishing: set[asyncio.Task[Any]] = set()
        self._starting = asyncio.Semaphore(STARTS_AT_ONCE)
        self._awaited: Counter[str] = Counter()  # states that sandboxes are about to stand on

    async def start(self) -> None:
        """Start ending sandboxes whose time is over."""
        self._reaper = asyncio.create_task(self._reap())

    async def close(self) -> None:
        """Delete every sandbox."""
        if self._reaper is not None:
            self._reaper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reaper
        await asyncio.gather(
            *(self._end(sandbox) for sandbox in list(self._sandboxes)), return_exceptions=True
        )
        await asyncio.gather(*self._finishing, return_exceptions=True)

    def _finish(self, work: Coroutine[Any, Any, _T]) -> Awaitable[_T]:
        """Do work to its end, whether or not the caller waits for it."""

        def done(task: asyncio.Task[_T]) -> None:
            self._finishing.discard(task)
            if not task.cancelled():
                task.exception()

        task = asyncio.create_task(work)
        self._finishing.add(task)
        task.add_done_callback(done)
        return asyncio.shield(task)

    def get(self, sandbox_id: str) -> Sandbox:
        """One live sandbox that the caller sees.

        Raises:
            NotFound: there is none, or it has expired.
        """
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is None or self._is_over(sandbox) or not sees(sandbox.tenant):
            raise no_sandbox(sandbox_id)
        return sandbox

    def list(self, labels: Mapping[str, str] | None = None) -> Sequence[Sandbox]:
        """Live sandboxes that the caller sees and that carry all `labels`, oldest first."""
        wanted = set((labels or {}).items())
        seen = (s for s in self._sandboxes.values() if sees(s.tenant))
        found = (s for s in seen if wanted <= set(s.labels.items()))
        return sorted(found, key=lambda sandbox: (sandbox.created_s, sandbox.id))

    def count(self) -> int:
        """How many sandboxes live, whosever they are."""
        return len(self._sandboxes)

    def with_doors(self) -> frozenset[str]:
        """Ids of live sandboxes that have a way out."""
        return frozenset(s.id for s in self._sandboxes.values() if s.door is not None)

    def _is_over(self, sandbox: Sandbox) -> bool:
        return sandbox.calls == 0 and self._clock() >= sandbox.expires_s

    async def create(
        self,
        state_id: str,
        *,
        limits: Limits | None = None,
        labels: Mapping[str, str] | None = None,
        ttl_s: float = 0.0,
        allow: Sequence[str] = (),
    ) -> Sandbox:
        """Fork a state; `allow` names what it may reach over the network.

        Raises:
            NotFound: no such state.
            InvalidArgument: an entry of `allow` is malformed.
            FailedPrecondition: there is no way out of sandboxes here, or nothing would keep one of
                the limits.
            ResourceExhausted: too many sandboxes; carries a delay.
        """
        self._came.append(time.monotonic())
        state = self.states.runnable(state_id)
        self.pool.check_ttl(ttl_s)
        check_kept(limits or _NO_LIMITS, self.runtime.unkept())
        reach = AllowList.parse(allow) if allow else None
        with self._reserve(1):
            return await self._create(state, limits or _NO_LIMITS, labels or {}, ttl_s, reach)

    async def _create(
        self,
        state: State,
        limits: Limits,
        labels: Mapping[str, str],
        ttl_s: float,
        reach: AllowList | None,
        parent_id: str = "",
    ) -> Sandbox:
        sandbox_id = new_id("sbx")
        door = self.egress.door(sandbox_id, reach) if reach is not None else None
        try:
            async with self._starting:
                await self._give_way()
                state = self.states.known(state.id)  # as it is after the wait
                with self._awaiting(state), metrics.START_SECONDS.time():
                    box = await self._box(state, limits, door)
        except BaseException:
            if door is not None:
                door.close()
            raise
        now = self._clock()
        ttl_s = ttl_s or self.pool.default_ttl_s
        sandbox = Sandbox(
            id=sandbox_id,
            state_id=state.id,
            box=box,
            layers=state.layers,
            limits=kept(box.limits, self.runtime.unkept()),
            labels=dict(labels),
            tenant=charged(),
            ttl_s=ttl_s,
            created_s=now,
            expires_s=now + ttl_s,
            door=door,
            parent_id=parent_id,
            states=[(state.id, len(state.layers))],
            cwd=state.cwd,
        )
        self._sandboxes[sandbox.id] = sandbox
        return sandbox

    async def _give_way(self) -> None:
        """Let a burst of calls come in, to be refused or to wait, before one starts."""
        now = time.monotonic()
        until_s = now + _GIVE_WAY_S
        while len(self._came) == _BURST and now < min(until_s, self._came[0] + _BURST_S):
            await asyncio.sleep(_LOOK_S)
            now = time.monotonic()

    @contextlib.contextmanager
    def _awaiting(self, state: State) -> Iterator[None]:
        """Keep a state while a sandbox starts; nothing may be awaited before it counts itself."""
        self._awaited[state.id] += 1
        try:
            yield
        finally:
            self._awaited -= Counter([state.id])

    async def _box(self, state: State, limits: Limits, door: Door | None = None) -> Box:
        """A box over a state, whose layers are then held once."""
        self.states.hold(state.layers)
        try:
            return await self.runtime.create(
                state.layers,
                limits=limits,
                mounts=state.mounts,
                env=state.env,
                door=door,
                base=state.base,
            )
        except BaseException:
            self.states.release(state.layers)
            raise

    def by_tenant(self) -> Counter[str]:
        """How many each tenant has, those that are starting among them."""
        return Counter(sandbox.tenant for sandbox in self._sandboxes.values()) + self._reserved

    @contextlib.contextmanager
    def _reserve(self, count: int) -> Iterator[Callable[[], None]]:
        """Places for sandboxes to come; what it gives is called for each that has come."""
        mine, starting = charged(), self._reserved.total()
        if mine:
            would_be = self.by_tenant()[mine] + count
            self._quotas.check("sandboxes", would_be, retry_after_s=self.pool.retry_after_s)
        self.pool.check_room(len(self._sandboxes), starting, count)
        self._reserved[mine] += count
        open_places = count

        def taken() -> None:
            nonlocal open_places
            open_places -= 1
            self._reserved[mine] -= 1

        try:
            yield taken
        finally:
            self._reserved[mine] -= open_places
            self._reserved += Counter()  # forgets tenants that wait for nothing

    @contextlib.contextmanager
    def using(self, sandbox_id: str, *, linger_s: float = 1.0) -> Iterator[Sandbox]:
        """A sandbox that does not expire meanwhile, nor within `linger_s` afterwards.

        Raises:
            Unavailable: it was restored meanwhile, and what was asked is gone with its old files.
        """
        sandbox = self.get(sandbox_id)
        box = sandbox.box
        sandbox.calls += 1
        try:
            yield sandbox
        except NotFound as error:
            if sandbox.box is box:
                raise
            raise Unavailable(f"sandbox {sandbox_id} was restored meanwhile; try again") from error
        finally:
            sandbox.calls -= 1
            sandbox.expires_s = max(sandbox.expires_s, self._clock() + linger_s)

    async def snapshot(self, sandbox_id: str, labels: Mapping[str, str] | None = None) -> State:
        """Freeze a sandbox into a state; its processes end, it goes on over the same files."""
        with self.using(sandbox_id) as sandbox:
            self.states.owners.admit()
            return await self._finish(self._snapshot(sandbox, labels or {}))

    async def _snapshot(self, sandbox: Sandbox, labels: Mapping[str, str]) -> State:
        async with sandbox.lock:
            return await self._frozen(sandbox, labels)

    async def _frozen(self, sandbox: Sandbox, labels: Mapping[str, str]) -> State:
        with self.states.growing():
            left = self._follow(sandbox)
            try:
                layer = await sandbox.box.freeze()
            finally:
                self.states.release(left)
            self.states.hold([layer])
            sandbox.layers = (*sandbox.layers, layer)
            parent, depth = self._parent_of(sandbox)
            below = () if depth is None else parent.layers
            state = await self.states.add(
                (*below, *sandbox.layers[depth or 0 :]),
                action=f"snapshot {layer}",
                parent=parent,
                labels=labels,
            )
            sandbox.states.append((state.id, len(sandbox.layers)))
            return state

    def _parent_of(self, sandbox: Sandbox) -> tuple[State, int | None]:
        """The latest state that the sandbox stands on, and how many of its layers that covers."""
        for id, depth in reversed(sandbox.states):
            if (state := self.states.peek(id)) is not None:
                return state, depth
        raise no_state(sandbox.state_id)

    def _follow(self, sandbox: Sandbox) -> Sequence[str]:
        """Let a sandbox that is about to start anew stand on its parent's layers as they are now.

        They were flattened meanwhile; a chain that only grew would get too long to mount. Returns
        what it held before, to be released when it has started anew.
        """
        parent, depth = self._parent_of(sandbox)
        rebase = getattr(sandbox.box, "rebase", None)
        if rebase is None or depth is None or sandbox.layers[:depth] == parent.layers:
            return ()
        held, rest = sandbox.layers, sandbox.layers[depth:]
        sandbox.layers = (*parent.layers, *rest)
        self.states.hold(sandbox.layers)
        rebase(depth, parent.layers)
        before = [id for id, _ in sandbox.states if id != parent.id]
        sandbox.states = [*((id, None) for id in before), (parent.id, len(parent.layers))]
        return held

    async def fork(
        self, sandbox_id: str, count: int, labels: Mapping[str, str] | None = None
    ) -> tuple[State, Sequence[Sandbox]]:
        """Snapshot a sandbox and start `count` more from there.

        Raises:
            InvalidArgument: there is never room for so many.
            ResourceExhausted: not enough room for all of them now; none was started.
        """
        self.pool.check_count(count)
        with self.using(sandbox_id) as sandbox, self._reserve(count) as taken:
            self.states.owners.admit()
            merged = check_labels({**sandbox.labels, **(labels or {})})
            state = await self._finish(self._snapshot(sandbox, {}))
            reach = sandbox.door.allow if sandbox.door is not None else None

            turn = asyncio.Semaphore(STARTS_AT_ONCE)

            async def one() -> Sandbox:
                async with turn:  # other calls wait behind so many of these, not behind all
                    fork = await self._create(
                        state, sandbox.limits, merged, sandbox.ttl_s, reach, sandbox.id
                    )
                taken()
                return fork

            tasks = [asyncio.create_task(one()) for _ in range(count)]
            try:
                return state, tuple(await asyncio.gather(*tasks))
            except BaseException:
                for task in tasks:
                    task.cancel()
                ended = await asyncio.gather(*tasks, return_exceptions=True)
                started = [fork for fork in ended if isinstance(fork, Sandbox)]
                await asyncio.gather(*(self._end(fork.id) for fork in started))
                with contextlib.suppress(RegreenError):  # somebody else may have come to use it
                    await self.delete_state(state.id)
                raise

    async def restore(self, sandbox_id: str, state_id: str) -> Sandbox:
        """Put a sandbox, in place, on another state; its processes and changes end."""
        state = self.states.runnable(state_id)
        with self.using(sandbox_id) as sandbox:
            await self._finish(self._restore(sandbox, state))
        return sandbox

    async def _restore(self, sandbox: Sandbox, state: State) -> None:
        async with sandbox.lock:
            state = self.states.known(state.id)
            with self._awaiting(state):
                fresh = await self._box(state, sandbox.limits, sandbox.door)
            old, held = sandbox.box, sandbox.layers
            sandbox.box, sandbox.layers = fresh, state.layers
            sandbox.state_id, sandbox.cwd = state.id, state.cwd
            sandbox.states = [(state.id, len(state.layers))]
            try:
                await old.delete()
            finally:
                self.states.release(held)

    def keep_alive(self, sandbox_id: str, ttl_s: float = 0.0) -> Sandbox:
        """Move the expiry to `ttl_s` from now."""
        self.pool.check_ttl(ttl_s)
        sandbox = self.get(sandbox_id)
        sandbox.ttl_s = ttl_s or sandbox.ttl_s
        sandbox.expires_s = self._clock() + sandbox.ttl_s
        return sandbox

    async def delete(self, sandbox_id: str) -> None:
        """Kill all in a sandbox that the caller sees, and remove it; absent ones are fine."""
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is not None and sees(sandbox.tenant):
            await self._end(sandbox_id)

    async def _end(self, sandbox_id: str) -> None:
        """Remove a sandbox, whosever it is."""
        sandbox = self._sandboxes.pop(sandbox_id, None)
        if sandbox is not None:
            if sandbox.door is not None:
                sandbox.door.close()
            await self._finish(self._delete(sandbox))

    async def _delete(self, sandbox: Sandbox) -> None:
        async with sandbox.lock:
            try:
                await sandbox.box.delete()
            except BaseException:
                sandbox.expires_s = 0.0
                self._sandboxes[sandbox.id] = sandbox  # the reaper tries again
                raise
            self.states.release(sandbox.layers)

    async def delete_state(self, state_id: str) -> None:
        """Forget a state that the caller sees, or take it from its tenant where others have it.

        Raises:
            FailedPrecondition: sandboxes run on it, of those whom it would be taken from.
        """
        if not self.states.owners.goes(state_id):
            if any(s.state_id == state_id for s in self.list()):
                raise state_in_use(state_id)
            if await self.states.owners.withdraw(state_id):
                return
        used = any(s.state_id == state_id for s in self._sandboxes.values())
        await self.states.delete(state_id, in_use=used or state_id in self._awaited)

    def stood_on(self) -> set[str]:
        """Ids of the states that live sandboxes stand on, those of their snapshots included."""
        on = {id for s in self._sandboxes.values() for id, _ in (*s.states, (s.state_id, 0))}
        return on | self._awaited.keys()

    @contextlib.asynccontextmanager
    async def fresh(self, state_id: str) -> AsyncIterator[Box]:
        """A box over an untouched state, to compare with; waits for a place, always deleted."""
        self.states.usable(self.states.known(state_id))
        async with self._comparisons:
            state = self.states.known(state_id)  # as it is after the wait
            box = await self._box(state, _NO_LIMITS)
            try:
                yield box
            finally:
                await self._finish(self._discard(box, state.layers))

    async def _discard(self, box: Box, held: Sequence[str]) -> None:
        try:
            await box.delete()
        finally:
            self.states.release(held)

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(_REAP_S)
            try:
                await self.reap()
            except (RegreenError, OSError) as error:
                log.warning("sandbox not deleted; it is tried again", error=str(error))

    async def reap(self) -> int:
        """Delete sandboxes whose time is over; returns how many."""
        over = [s.id for s in list(self._sandboxes.values()) if self._is_over(s)]
        ended = await asyncio.gather(
            *(self._end(sandbox_id) for sandbox_id in over), return_exceptions=True
        )
        failed = [error for error in ended if isinstance(error, BaseException)]
        metrics.EXPIRED.inc(len(over) - len(failed))
        if failed:
            raise failed[0]
        return len(over)

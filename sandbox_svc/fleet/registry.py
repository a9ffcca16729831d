"""What a front knows of its workers: who is ready, which states and sandboxes are where.

- All of it is learned from the workers and can be learned again: a front keeps nothing on disk.
- A worker counts from the moment that its states and sandboxes are known.
- A worker that is not ready for a while keeps what it has, and calls in progress; one whose process
  began anew has lost its sandboxes, one that is gone its states too, and this is remembered for
  those who ask.
- What a worker that was there before the front has is not known until it was asked: meanwhile
  nothing that may be on it is said not to exist.
- Whose things are is learned with them. A tenant's call is told of its own: what another has, or
  had, is to it as if it were nowhere.
- Memory is bounded: what falls out is asked of the workers anew.
"""

import asyncio
import contextlib
import time
from collections import Counter, OrderedDict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regreen.rpc.certificates import Tls
from regreen.rpc.errors import NotFound, RegreenError, Unavailable
from regreen.rpc.logging import get
from regreen.rpc.tenants import charged, sees_any
from regreen.sandbox import v1 as pb
from sandbox_svc.fleet.calls import ASK_S, METHODS, Endpoint, Worker
from sandbox_svc.fleet.ring import ranked
from sandbox_svc.tenancy import Holdings, together
from sandbox_svc.unknown import no_sandbox

_KNOWN = 200_000
_LOST = 20_000
_PAGE = 1000
_AGAIN_S, _MOST_AGAIN_S = 0.3, 5.0
_STRANGE_S = 120.0
"""For so long a worker that the front found, and that does not get ready, may have anything."""
_GONE_GRACE_S = 45.0
"""A pod that goes drains its calls; when its node is cut off, keepalive ends them by then."""
_ASIDE_GRACE_S = 24 * 3600.0
"""A worker that is not ready, mostly for being busy, ends its calls itself."""


@dataclass(frozen=True, slots=True)
class Copy:
    """What a worker holds of a state."""

    since_ns: int
    tenants: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Held:
    """A state, whoever holds it."""

    tenants: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sandbox lives, or where a thing was, and whose it is."""

    worker: str
    tenants: tuple[str, ...]


class Registry:
    """The workers of one front."""

    def __init__(self, *, max_message_bytes: int = 64 << 20, tls: Tls | None = None) -> None:
        self._max_message_bytes, self._tls = max_message_bytes, tls
        self.ready: dict[str, Worker] = {}
        self.keys: dict[str, str] = {}
        """State id to what its line of descent is placed by: the id of its first ancestor."""
        self._endpoints: dict[str, Endpoint] = {}
        self._strangers: dict[str, float] | None = None
        """Workers that were there first, with what nobody knows, and until when that counts."""
        self._holders: OrderedDict[str, dict[str, Copy]] = OrderedDict()
        """By state: what the workers hold of it."""
        self._held: Holdings[Held] = Holdings()
        self._sandboxes: OrderedDict[str, Place] = OrderedDict()
        self._lost: OrderedDict[str, Place] = OrderedDict()
        self._greeting: dict[str, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._log = get()

    async def close(self) -> None:
        """End all channels."""
        for name in list(self._endpoints):
            self._leave(name)
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)

    async def wait_ready(self, timeout_s: float) -> bool:
        """Whether there is a worker within so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self.ready:
                    self._changed.clear()
                    await self._changed.wait()
        return bool(self.ready)

    def update(self, endpoints: Iterable[Endpoint]) -> None:
        """Take note of the workers that there are now."""
        now = {endpoint.name: endpoint for endpoint in endpoints}
        if self._strangers is None:
            self._strangers = dict.fromkeys(now, time.monotonic() + _STRANGE_S)
        for name, old in list(self._endpoints.items()):
            new = now.get(name)
            if new is None or new.incarnation != old.incarnation:
                self._drop(name)
            elif new.process != old.process:
                self._leave(name)
                self._end_sandboxes(name)
            elif not new.ready or new.address != old.address:
                self._leave(name, _ASIDE_GRACE_S)
        self._endpoints = now
        for name, endpoint in now.items():
            if endpoint.ready and name not in self.ready and name not in self._greeting:
                self._greeting[name] = asyncio.create_task(self._greet(endpoint))

    async def _greet(self, endpoint: Endpoint) -> None:
        """Learn what a worker has, then let it count."""
        most_bytes, delay_s = self._max_message_bytes, _AGAIN_S
        worker = Worker(endpoint, max_message_bytes=most_bytes, tls=self._tls)
        try:
            while True:
                try:
                    await self._learn_all(worker)
                    break
                except RegreenError as error:
                    self._log.warning("worker not known yet", worker=worker.name, why=str(error))
                    await asyncio.sleep(delay_s)
                    delay_s = min(delay_s * 2, _MOST_AGAIN_S)
            self.ready[worker.name] = worker
            (self._strangers or {}).pop(worker.name, None)
            self._log.info("worker ready", worker=worker.name, states=len(self._holders))
            self._changed.set()
        finally:
            if self._greeting.get(endpoint.name) is asyncio.current_task():
                del self._greeting[endpoint.name]
            if self.ready.get(endpoint.name) is not worker:
                await worker.close()

    async def _learn_all(self, worker: Worker) -> None:
        listed = [state async for state in pages(worker, "StateService/ListStates", "states")]
        for state_id in [key for key, held in self._holders.items() if worker.name in held]:
            self.forget_state(state_id, worker.name)
        for state in listed:
            self.learn_state(worker, state)
        async for sandbox in pages(worker, "SandboxService/ListSandboxes", "sandboxes"):
            self.learn_sandbox(worker, sandbox)

    def _leave(self, name: str, grace_s: float = 0.0) -> None:
        """Use a worker no more; what it has stays known, calls in progress get a while."""
        if task := self._greeting.pop(name, None):
            task.cancel()
        worker = self.ready.pop(name, None)
        if worker is not None:
            closing = asyncio.create_task(worker.close(grace_s))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def _drop(self, name: str) -> None:
        """Forget what a worker had."""
        self._leave(name, _GONE_GRACE_S)
        (self._strangers or {}).pop(name, None)
        self._end_sandboxes(name)
        states = 0
        for state_id, holders in list(self._holders.items()):
            gone = holders.pop(name, None)
            if gone is not None and not holders:
                self._remember_loss(state_id, Place(name, gone.tenants))
                states += 1
            self._count(state_id)
        self._log.warning("worker lost", worker=name, states=states)

    def _end_sandboxes(self, name: str) -> None:
        sandboxes = [id_ for id_, place in self._sandboxes.items() if place.worker == name]
        for sandbox in sandboxes:
            self._remember_loss(sandbox, self._sandboxes.pop(sandbox))
        self._log.warning("sandboxes ended with their worker", worker=name, count=len(sandboxes))

    def _remember_loss(self, id_: str, place: "Place") -> None:
        self._lost[id_] = place
        while len(self._lost) > _LOST:
            self._lost.popitem(last=False)

    def lost_with(self, id_: str) -> str:
        """The worker that took a state or sandbox with it; empty when none is known."""
        place = self._lost.get(id_)
        return place.worker if place is not None and sees_any(place.tenants) else ""

    def not_known_yet(self) -> Unavailable | None:
        """The error for what no worker has, while it may be on one that was not asked yet."""
        now = time.monotonic()
        names = [name for name, until in (self._strangers or {}).items() if now < until]
        if not names:
            return None
        return Unavailable(
            f"worker {min(names)} is not ready yet, and may have it; try again",
            metadata={"worker": min(names)},
            retry_after_s=1.0,
        )

    def _is_current(self, worker: Worker, *, process: bool) -> bool:
        """Whether what a worker answers still is so."""
        asked, now = worker.endpoint, self._endpoints.get(worker.name)
        if now is None or now.incarnation != asked.incarnation:
            return False
        return not process or now.process == asked.process

    def learn_state(self, worker: Worker, state: pb.State) -> None:
        """A worker holds a state, which is the caller's if it was not told whose."""
        known = self._holders.get(state.id, {}).get(worker.name)
        tenants = tuple(state.tenants) or together(known.tenants if known else (), (charged(),))
        if not self._is_current(worker, process=False):
            if state.id not in self._holders:
                self._remember_loss(state.id, Place(worker.name, tenants))
            return
        copy = Copy(state.create_time.ToNanoseconds(), tenants, state.size_bytes)
        self._holders.setdefault(state.id, {})[worker.name] = copy
        self._holders.move_to_end(state.id)
        self._count(state.id)
        self._lost.pop(state.id, None)
        parent = state.parent_id
        self.keys.setdefault(state.id, self.keys.get(parent, parent) if parent else state.id)
        while len(self._holders) > _KNOWN:
            self.forget_state(next(iter(self._holders)))

    def forget_state(self, state_id: str, worker: str | None = None) -> None:
        """A worker, or all of them, holds a state no more."""
        holders = self._holders.get(state_id, {})
        for name in [worker] if worker else list(holders):
            holders.pop(name, None)
        if not holders:
            self.keys.pop(state_id, None)
        self._count(state_id)

    def _count(self, state_id: str) -> None:
        """Bring up to date who has how much; a state that nobody holds is forgotten."""
        copies = self._holders.get(state_id, {}).values()
        if copies:
            tenants = together(*(copy.tenants for copy in copies))
            self._held[state_id] = Held(tenants, max(copy.size_bytes for copy in copies))
        else:
            self._holders.pop(state_id, None)
            self._held.pop(state_id, None)

    def tenants_of(self, state_id: str) -> tuple[str, ...]:
        """Whose a state is on any worker."""
        held = self._held.get(state_id)
        return held.tenants if held is not None else ()

    def bytes_of(self, tenant: str) -> int:
        """Bytes of the states that a tenant has on workers."""
        return self._held.bytes_of(tenant)

    def bytes_by_tenant(self) -> Mapping[str, int]:
        """Bytes of the states that each tenant has on workers."""
        return self._held.bytes_by_tenant()

    def sandboxes_of(self, tenant: str) -> set[str]:
        """Sandboxes that a tenant is known to have; all where it is empty. Some may have ended."""
        return {
            id_
            for id_, place in self._sandboxes.items()
            if not tenant or place.tenants == (tenant,)
        }

    def sandboxes_by_tenant(self) -> Counter[str]:
        """How many sandboxes each tenant is known to have."""
        return Counter(tenant for place in self._sandboxes.values() for tenant in place.tenants)

    def placed_on(self, worker: str, sandboxes: Iterable[str]) -> set[str]:
        """Those sandboxes that live on a worker."""
        places = {id_: self._sandboxes.get(id_) for id_ in sandboxes}
        return {id_ for id_, place in places.items() if place and place.worker == worker}

    def learn_sandbox(self, worker: Worker, sandbox: pb.Sandbox) -> None:
        """A sandbox lives on a worker; it is the caller's if it was not told whose."""
        known = self._sandboxes.get(sandbox.id)
        place = Place(worker.name, (sandbox.tenant or charged(),))
        if known is not None and known.worker == worker.name and not sandbox.tenant:
            place = known
        if not self._is_current(worker, process=True):
            self._remember_loss(sandbox.id, place)
            return
        self._sandboxes[sandbox.id] = place
        self._sandboxes.move_to_end(sandbox.id)
        while len(self._sandboxes) > _KNOWN:
            self._sandboxes.popitem(last=False)

    def forget_sandbox(self, sandbox_id: str) -> None:
        """A sandbox is over."""
        self._sandboxes.pop(sandbox_id, None)

    def holders(self, state_id: str) -> set[str]:
        """Names of the workers that hold a state for the caller, ready or not."""
        copies = self._holders.get(state_id, {})
        return {name for name, copy in copies.items() if sees_any(copy.tenants)}

    def is_oldest(self, state_id: str, worker: str, among: Container[str]) -> bool:
        """Whether no other of these workers is known to have held a state for longer."""
        known, seen = self._holders.get(state_id, {}), self.holders(state_id)
        if worker not in seen:
            return True
        named = (name for name in seen if name in among)
        return worker == min(named, key=lambda name: (known[name].since_ns, name))

    def states(self) -> Iterator[str]:
        """Ids of the states that some worker holds."""
        return iter(self._holders)

    def none_ready(self) -> Unavailable:
        """The error for calls that any worker would do for."""
        return Unavailable("no worker is ready; try again", retry_after_s=1.0)

    def ranked(self, key: str) -> Sequence[Worker]:
        """The ready workers in the order in which a key prefers them.

        Raises:
            Unavailable: there is none.
        """
        if not self.ready:
            raise self.none_ready()
        return [self.ready[name] for name in ranked(key, self.ready)]

    async def worker_of(self, sandbox_id: str) -> Worker:
        """The worker on which a sandbox lives.

        Raises:
            NotFound: it lives nowhere, or its worker is lost.
            Unavailable: its worker, or one that may have it, is not ready for now.
        """
        place = self._sandboxes.get(sandbox_id)
        if place is not None and not sees_any(place.tenants):
            raise no_sandbox(sandbox_id)
        if place is None and (lost := self.lost_with(sandbox_id)):
            raise NotFound(
                f"sandbox {sandbox_id} ended with its worker {lost}; create it again",
                metadata={"id": sandbox_id, "worker": lost},
            )
        if place is None:
            unknown = self.not_known_yet()
            found = await self.ask_all("SandboxService/GetSandbox", id=sandbox_id)
            for worker, response in found:
                self.learn_sandbox(worker, response.sandbox)
                return worker
            place = self._sandboxes.get(sandbox_id)  # of a worker that became ready meanwhile
        if place is None or not sees_any(place.tenants):
            raise unknown or no_sandbox(sandbox_id)
        if place.worker not in self.ready:
            raise Unavailable(
                f"worker {place.worker} is not ready; try again",
                metadata={"worker": place.worker},
                retry_after_s=1.0,
            )
        return self.ready[place.worker]

    async def find_state(self, state_id: str) -> set[str]:
        """Ready workers that hold a state; asked for when none is known."""
        known = self.holders(state_id) & set(self.ready)
        if known:
            return known
        for worker, response in await self.ask_all("StateService/GetState", id=state_id):
            self.learn_state(worker, response.state)
        return self.holders(state_id) & set(self.ready)

    async def ask_all(
        self, method: str, *, timeout_s: float = ASK_S, **fields: Any
    ) -> Sequence[tuple[Worker, Any]]:
        """The answers of those ready workers that have what is asked for.

        Raises:
            Unavailable: nobody has it, and somebody did not answer.
        """
        asked = METHODS[method]
        workers = list(self.ready.values())
        answers = await asyncio.gather(
            *(worker.ask(asked, asked.request(**fields), timeout_s) for worker in workers),
            return_exceptions=True,
        )
        pairs = list(zip(workers, answers, strict=True))
        for _, answer in pairs:
            if isinstance(answer, BaseException) and not isinstance(answer, RegreenError):
                raise answer
        found = [(w, a) for w, a in pairs if not isinstance(a, RegreenError)]
        silent = [a for _, a in pairs if isinstance(a, RegreenError) and not _is_no(a)]
        if silent and not found:
            raise silent[0]
        return found

    def count(self, state: str) -> int:
        """How many workers are "ready", or "waiting" to be."""
        ready = len(self.ready)
        return ready if state == "ready" else max(0, len(self._endpoints) - ready)


def _is_no(error: RegreenError) -> bool:
    return isinstance(error, NotFound)


async def pages(worker: Worker, method: str, field: str, **fields: Any) -> Any:
    """Every entry of a list of one worker."""
    asked, token = METHODS[method], ""
    while True:
        request = asked.request(page_size=_PAGE, page_token=token, **fields)
        response = await worker.ask(asked, request)
        for entry in getattr(response, field):
            yield entry
        token = response.next_page_token
        if not token:
            return

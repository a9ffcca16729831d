"""Chooses the worker of a call, and brings states to where they are wanted.

- A line of states goes to the worker that rendezvous hashing gives for its first ancestor; those
  that hold the state come before those that would have to fetch it.
- A worker without room, or that does not answer, is passed over for the next in that order; when
  none takes the call, what the first one said is answered. Nothing is brought to a worker that is
  known to be full.
- A state that a worker lacks is taken from the blob store by its id, verified; one that is only on
  another worker, or damaged in the store, is put there first. Each move is done once, whoever
  waits for it.
- A state that went with its worker is FAILED_PRECONDITION with its id: make it again.
- What is deleted is not brought back by what was under way: deleting waits for moves, and meanwhile
  none begins; what a preparation makes that a deletion has overtaken is deleted too.
- A tenant's call goes by what is its tenant's: a worker that holds a state for others is to it one
  that lacks it, and is given it from one that has both. Moves are the platform's own, and bring
  along whose a state is.
- While a state made anew takes the place of its copies, nobody is given one of them.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, Literal, TypeVar

from regreen.rpc.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    RegreenError,
    ResourceExhausted,
    Unavailable,
)
from regreen.rpc.logging import get
from regreen.rpc.tenants import charged, for_all, own, sees, sees_any
from regreen.sandbox import v1 as pb
from sandbox_svc import metrics
from sandbox_svc.fleet.archive import Archive, Archived
from sandbox_svc.fleet.calls import METHODS, Worker
from sandbox_svc.fleet.preparation import Preparation
from sandbox_svc.fleet.registry import Registry
from sandbox_svc.unknown import no_state

Keep = Literal["prepared", "all", "none"]
_T = TypeVar("_T")
_MOVE_S = 3600.0
_KEEPS = 2
"""States that are put into the blob store at once; more wait."""
_CLOSE_S = 20.0
_MOST_LISTED = 1000
_NEXT = (ResourceExhausted, Unavailable)
"""What another worker may do better."""


class Router:
    """Routes calls of one front."""

    def __init__(
        self,
        registry: Registry,
        archive: Archive,
        *,
        keep: Keep = "prepared",
        max_sandboxes: int = _MOST_LISTED + 1,
    ) -> None:
        """`max_sandboxes` is how many each worker takes."""
        self.registry, self.archive, self._keep = registry, archive, keep
        self._max_sandboxes = max_sandboxes
        self._flights: dict[tuple[str, ...], asyncio.Task[Any]] = {}
        self._deleting: Counter[tuple[str, str]] = Counter()
        """States and the tenants whom they are taken from."""
        self._preparing: dict[str, set[Preparation]] = {}
        self._replacing: dict[str, asyncio.Event] = {}
        """States of which the copies are being replaced; set at the end."""
        self._keeps = asyncio.Semaphore(_KEEPS)
        self._log = get()

    async def close(self) -> None:
        """Wait a little for states that are on their way into the blob store."""
        if self._flights:
            _, late = await asyncio.wait(list(self._flights.values()), timeout=_CLOSE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def missing(self, state_id: str) -> RegreenError:
        """The error for a state that cannot be had now."""
        holders = self.registry.holders(state_id)
        if waiting := holders - set(self.registry.ready) or holders:
            return Unavailable(
                f"worker {min(waiting)}, which holds state {state_id}, is not ready; try again",
                metadata={"id": state_id, "worker": min(waiting)},
                retry_after_s=1.0,
            )
        if worker := self.registry.lost_with(state_id):
            return FailedPrecondition(
                f"state {state_id} was only on worker {worker}, which is lost; make it again",
                metadata={"id": state_id, "worker": worker},
            )
        if unknown := self.registry.not_known_yet():
            return unknown
        return no_state(state_id)

    async def candidates(self, state_id: str) -> Sequence[Worker]:
        """Workers for a state: those that hold it, then the others, each as its line prefers."""
        held: set[str] = set()
        silent: Unavailable | None = None
        try:
            held = await self.registry.find_state(state_id)
        except Unavailable as error:
            silent = error  # it may still be in the blob store
        key = self.registry.keys.get(state_id)
        if key is None:
            archived = await self.archived(state_id)
            if archived is None:
                raise silent or self.missing(state_id)
            key = archived.key
        order = self.registry.ranked(key)
        return sorted(order, key=lambda worker: worker.name not in held)

    async def on_state(
        self,
        state_id: str,
        call: Callable[[Worker], Awaitable[_T]],
        *,
        takes_place: bool = False,
    ) -> _T:
        """Do a call on a worker that has, or is given, a state.

        `takes_place` says that the call needs room for a sandbox.
        """
        first: RegreenError | None = None
        for worker in await self.candidates(state_id):
            try:
                if takes_place and worker.name not in self.registry.holders(state_id):
                    await self._check_room(worker)
                await self.ensure(worker, state_id)
            except RegreenError as error:
                # Trouble in moving a state is no answer where the state is, but found no room.
                if first is None and not isinstance(error, _NEXT):
                    raise
                first = first or error
                continue
            try:
                return await self.with_state(worker, state_id, call)
            except _NEXT as error:
                first = first or error
        raise first or self.missing(state_id)

    async def with_state(
        self, worker: Worker, state_id: str, call: Callable[[Worker], Awaitable[_T]]
    ) -> _T:
        """Do a call on a worker that is given a state if it lacks it, or turns out to."""
        await self.ensure(worker, state_id)
        try:
            return await call(worker)
        except NotFound as error:
            if error.metadata.get("id") != state_id:
                raise
        self.registry.forget_state(state_id, worker.name)  # dropped behind the front's back
        await self.ensure(worker, state_id)
        return await call(worker)

    async def _check_room(self, worker: Worker) -> None:
        """Spare a full worker a state that it could do nothing with.

        Raises:
            ResourceExhausted: it has as many sandboxes as it takes.
        """
        most = self._max_sandboxes
        if most > _MOST_LISTED:
            return
        with for_all():
            listed = await worker.ask(
                METHODS["SandboxService/ListSandboxes"], pb.ListSandboxesRequest(page_size=most)
            )
        if len(listed.sandboxes) >= most:
            raise ResourceExhausted(
                f"{most} of {most} sandboxes are in use on worker {worker.name}",
                metadata={"limit": str(most), "worker": worker.name},
                retry_after_s=1.0,
            )

    async def ensure(self, worker: Worker, state_id: str) -> None:
        """Have a worker hold a state.

        Raises:
            NotFound: there is no such state, or it is being deleted.
            FailedPrecondition: it went with its worker, or only a damaged archive is left of it.
        """
        while (replacing := self._replacing.get(state_id)) is not None:
            await replacing.wait()
        if worker.name not in self.registry.holders(state_id):
            if self._is_deleting(state_id):
                raise NotFound(f"state {state_id} is being deleted", metadata={"id": state_id})
            to = worker.endpoint
            names = ("bring", state_id, to.incarnation, to.process, own())
            await self._once(names, lambda: self._bring(worker, state_id))

    async def offer(self, worker: Worker, state_id: str) -> None:
        """Have a worker hold a state if the blob store has it, whosever that is.

        Trouble with that is only logged.
        """
        with for_all():
            if worker.name in self.registry.holders(state_id):
                return
            try:
                if await self.archived(state_id) is not None:
                    await self.ensure(worker, state_id)
            except RegreenError as error:
                self._log.warning("state not brought", state=state_id, why=str(error))

    async def archived(self, state_id: str) -> Archived | None:
        """The caller's state in the blob store, if it is there."""
        found = await self._stored(state_id)
        return found if found is not None and sees_any(found.tenants) else None

    async def _stored(self, state_id: str) -> Archived | None:
        """A state in the blob store; a damaged manifest is removed and counts as none."""
        try:
            return await self.archive.find(state_id)
        except DataLoss as error:
            self._log.error("archive damaged", state=state_id, why=str(error))
        await self.archive.forget(state_id)
        return None

    async def _bring(self, worker: Worker, state_id: str) -> None:
        damage: DataLoss | None = None
        archived = await self.archived(state_id)
        if archived is not None:
            try:
                return await self._put(worker, state_id, archived)
            except DataLoss as error:
                self._log.error("archive damaged", state=state_id, why=str(error))
                damage = error
        others = archived is None and await self._stored(state_id) is not None
        if await self._keep_from_any(worker, state_id, replace=others or damage is not None):
            return None
        archived = await self.archived(state_id)
        if archived is None:
            raise self.missing(state_id)
        try:
            return await self._put(worker, state_id, archived)
        except DataLoss as error:
            raise FailedPrecondition(
                f"the archive of state {state_id} is damaged ({error}); make it again",
                metadata={"id": state_id},
            ) from error

    async def _keep_from_any(self, worker: Worker, state_id: str, *, replace: bool) -> bool:
        """Have the blob store get a state from who holds it; whether `worker` itself does."""
        trouble: RegreenError | None = None
        for name in sorted(await self.registry.find_state(state_id)):
            source = self.registry.ready.get(name)
            if name == worker.name:
                return True
            if source is None:
                continue
            try:
                await self.keep(source, state_id, replace=replace)
            except NotFound:
                self.registry.forget_state(state_id, name)
            except Unavailable as error:
                trouble = trouble or error
            else:
                return False
        if trouble is not None:
            raise trouble
        return False

    async def _put(self, worker: Worker, state_id: str, archived: Archived) -> None:
        """Give a worker a state out of the blob store.

        Raises:
            DataLoss: what is there is damaged.
        """
        try:
            state = await self._import(worker, archived)
        except InvalidArgument as error:
            raise DataLoss(f"worker {worker.name} refuses it: {error}") from error
        if state.id != state_id:
            raise DataLoss(f"it is of state {state.id}")
        self.registry.keys[state_id] = archived.key
        self.registry.learn_state(worker, state)
        metrics.STATE_MOVES.inc()
        self._log.info("state brought", state=state_id, worker=worker.name)

    async def _import(self, worker: Worker, archived: Archived) -> pb.State:
        method = METHODS["StateService/ImportState"]

        async def requests() -> AsyncIterator[pb.ImportStateRequest]:
            async with contextlib.aclosing(self.archive.read(archived)) as chunks:
                async for chunk in chunks:
                    yield pb.ImportStateRequest(chunk=chunk)

        with for_all():
            state: pb.State = (await worker.send(method, requests(), _MOVE_S)).state
        return state

    async def keep(self, worker: Worker, state_id: str, *, replace: bool = False) -> None:
        """Put a state of a worker into the blob store, unless it is there."""
        names = ("keep", state_id, "anew" if replace else "")
        await self._once(names, lambda: self._store(worker, state_id, replace))

    async def _store(self, worker: Worker, state_id: str, replace: bool) -> None:
        with for_all():
            await self._store_whole(worker, state_id, replace)

    async def _store_whole(self, worker: Worker, state_id: str, replace: bool) -> None:
        """Keep a state with whose it is."""
        async with self._keeps:
            get_state, export = (
                METHODS["StateService/GetState"],
                METHODS["StateService/ExportState"],
            )
            state = (await worker.ask(get_state, pb.GetStateRequest(id=state_id))).state
            key = self.registry.keys.get(state_id, state_id)
            exported = worker.stream(export, pb.ExportStateRequest(id=state_id), _MOVE_S)
            async with contextlib.aclosing(exported) as responses:
                chunks = (response.chunk async for response in responses)
                await self.archive.store(
                    state_id, state.SerializeToString(), key, chunks, replace=replace
                )

    async def settled(self, state_id: str) -> None:
        """Wait until nothing moves a state any more."""
        while flights := [f for names, f in self._flights.items() if names[1] == state_id]:
            await asyncio.wait(flights)

    @contextlib.asynccontextmanager
    async def deleting(self, state_id: str) -> AsyncIterator[None]:
        """While a state is deleted: nothing moves it, and nothing begins to."""
        self._deleting[state_id, own()] += 1
        for preparation in self._preparing.get(state_id, ()):
            preparation.overtaken |= sees(preparation.tenant)
        try:
            await self.settled(state_id)
            yield
        finally:
            self._deleting[state_id, own()] -= 1
            self._deleting += Counter()  # forgets what is deleted no more

    def _is_deleting(self, state_id: str) -> bool:
        """Whether a state is being taken from the caller, or from all."""
        return bool(self._deleting[state_id, own()] or self._deleting[state_id, ""])

    async def has(self, state_id: str) -> bool:
        """Whether the caller has a state, or prepares it."""
        if any(sees(turn.tenant) for turn in self._preparing.get(state_id, ())):
            return True
        found = await self.registry.find_state(state_id)
        return bool(found) or await self.archived(state_id) is not None

    @contextlib.asynccontextmanager
    async def preparing(self, worker: Worker, state_id: str) -> AsyncIterator[Preparation]:
        """While a worker prepares a state; if that is deleted meanwhile, so is what comes of it.

        Unless somebody asked for it again since: the worker makes it once for both.
        """
        turn = Preparation(state_id)
        turns = self._preparing.setdefault(state_id, set())
        turns.add(turn)
        try:
            yield turn
        finally:
            turns.discard(turn)
            if not turns:
                self._preparing.pop(state_id, None)
            if (
                turn.overtaken
                and not turn.remade
                and all(other.overtaken for other in turns if other.tenant == turn.tenant)
            ):
                names = ("unmake", state_id, worker.endpoint.incarnation)
                await self._once(names, lambda: self._unmake(worker, state_id))

    async def _unmake(self, worker: Worker, state_id: str) -> None:
        method = METHODS["StateService/DeleteState"]
        try:
            await worker.ask(method, pb.DeleteStateRequest(id=state_id))
        except RegreenError as error:
            self._log.warning("a deleted state stays", state=state_id, why=str(error))
        else:
            await self.look_again(worker, state_id)

    async def look_again(self, worker: Worker, state_id: str) -> None:
        """Learn whose a state is on a worker that has taken it from the caller."""
        if not own():
            self.registry.forget_state(state_id, worker.name)
            return
        with for_all():
            try:
                request = pb.GetStateRequest(id=state_id)
                answer = await worker.ask(METHODS["StateService/GetState"], request)
            except NotFound:
                self.registry.forget_state(state_id, worker.name)
            else:
                self.registry.learn_state(worker, answer.state)

    async def withdraw(self, worker: Worker, state_id: str) -> bool:
        """Before a state is taken from the caller: whether the blob store's is others' too.

        It has to be made anew from a worker then; `worker` is given it where none has it for them.
        """
        stored = await self._stored(state_id)
        if not own() or stored is None or set(stored.tenants) <= {own()}:
            return False
        mine = own()
        with for_all():
            await self.registry.find_state(state_id)
            if not set(self.registry.tenants_of(state_id)) - {mine}:
                await self._put(worker, state_id, stored)
        return True

    async def keep_for_others(self, state_id: str) -> None:
        """Have the blob store's copy of a state be theirs alone who have it on workers."""
        with for_all():
            for name in sorted(await self.registry.find_state(state_id)):
                await self.keep(self.registry.ready[name], state_id, replace=True)
                return

    async def forget(self, state_id: str) -> None:
        """Have the blob store forget a state, after what is on its way there."""
        await self.settled(state_id)
        await self.archive.forget(state_id)

    async def replaced(self, worker: Worker, state: pb.State) -> None:
        """A worker made a state anew: no other copy is used any more, if it can be helped."""
        while (replacing := self._replacing.get(state.id)) is not None:
            await replacing.wait()
        done = self._replacing[state.id] = asyncio.Event()
        try:
            await self._replace(worker, state)
            self.registry.learn_state(worker, state)
        finally:
            del self._replacing[state.id]
            done.set()

    async def _replace(self, worker: Worker, state: pb.State) -> None:
        method = METHODS["StateService/DeleteState"]
        await self.settled(state.id)
        for name in sorted(self.registry.holders(state.id) - {worker.name}):
            other = self.registry.ready.get(name)
            try:
                if other is not None:
                    await other.ask(method, pb.DeleteStateRequest(id=state.id))
                    await self.look_again(other, state.id)
            except RegreenError as error:
                self._log.warning("an older copy stays", state=state.id, why=str(error))
        if not own():
            self.registry.forget_state(state.id)
        try:
            await self.forget(state.id)
        except (RegreenError, OSError) as error:
            self._log.warning("an older archive stays", state=state.id, why=str(error))

    def made(self, worker: Worker, state: pb.State, *, replace: bool = False) -> None:
        """A worker made a state; it is kept in the background if it should be."""
        self.registry.learn_state(worker, state)
        for preparation in self._preparing.get(state.id, ()):
            preparation.remade = True
        wanted = self._keep == "all" or (self._keep == "prepared" and not state.parent_id)
        if wanted and not self._is_deleting(state.id):
            self._fly(
                ("later", state.id, "anew" if replace else "", charged()),
                lambda: self._keep_later(worker, state.id, replace),
            )

    async def _keep_later(self, worker: Worker, state_id: str, replace: bool) -> None:
        try:
            stored = await self._stored(state_id)
            if replace or stored is None or charged() not in stored.tenants:
                await self.keep(worker, state_id, replace=replace or stored is not None)
        except (RegreenError, OSError) as error:
            self._log.warning("state not kept", state=state_id, why=str(error))

    async def _once(
        self, names: tuple[str, ...], work: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        """Do work for all who want it meanwhile; it goes on when a caller goes away."""
        await asyncio.shield(self._fly(names, work))

    def _fly(
        self, names: tuple[str, ...], work: Callable[[], Coroutine[Any, Any, None]]
    ) -> "asyncio.Task[None]":
        task = self._flights.get(names)
        if task is None:
            task = self._flights[names] = asyncio.create_task(work())
            task.add_done_callback(lambda done: self._land(names, done))
        return task

    def _land(self, names: tuple[str, ...], task: "asyncio.Task[None]") -> None:
        if self._flights.get(names) is task:
            del self._flights[names]
        if not task.cancelled():
            task.exception()

"""Chooses the worker of a call, and brings states to where they are wanted.

- A line of states goes to the worker that rendezvous hashing gives for its first ancestor; those
  that hold the state come before those that would have to fetch it.
- A worker without room, or that does not answer, is passed over for the next in that order; when
  none takes the call, what the first one said is answered.
- A state that a worker lacks is taken from the blob store by its id, verified; one that is only on
  another worker is put there first. Each move is done once, whoever waits for it.
- A state that went with its worker is FAILED_PRECONDITION with its id: make it again.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, Literal, TypeVar

from regreen.rpc.errors import (
    DataLoss,
    FailedPrecondition,
    NotFound,
    RegreenError,
    ResourceExhausted,
    Unavailable,
)
from regreen.rpc.logging import get
from regreen.sandbox import v1 as pb
from sandbox_svc import metrics
from sandbox_svc.fleet.archive import Archive, Archived
from sandbox_svc.fleet.calls import METHODS, Worker
from sandbox_svc.fleet.registry import Registry

Keep = Literal["prepared", "all", "none"]
_T = TypeVar("_T")
_MOVE_S = 3600.0
_KEEPS = 2
"""States that are put into the blob store at once; more wait."""
_CLOSE_S = 20.0


class Router:
    """Routes calls of one front."""

    def __init__(self, registry: Registry, archive: Archive, *, keep: Keep = "prepared") -> None:
        self.registry, self.archive, self._keep = registry, archive, keep
        self._flights: dict[tuple[str, ...], asyncio.Task[Any]] = {}
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
        if waiting := self.registry.holders(state_id):
            return Unavailable(
                f"worker {min(waiting)}, which holds state {state_id}, is not ready; try again",
                metadata={"id": state_id, "worker": min(waiting)},
                retry_after_s=1.0,
            )
        worker = self.registry.lost_with(state_id)
        if not worker:
            return NotFound(f"no such state: {state_id}", metadata={"id": state_id})
        return FailedPrecondition(
            f"state {state_id} was only on worker {worker}, which is lost; make it again",
            metadata={"id": state_id, "worker": worker},
        )

    async def candidates(self, state_id: str) -> Sequence[Worker]:
        """Workers for a state: those that hold it, then the others, each as its line prefers."""
        held = await self.registry.find_state(state_id)
        key = self.registry.keys.get(state_id)
        if key is None:
            archived = await self.archive.find(state_id)
            if archived is None:
                raise self.missing(state_id)
            key = archived.key
        order = self.registry.ranked(key)
        return sorted(order, key=lambda worker: worker.name not in held)

    async def on_state(self, state_id: str, call: Callable[[Worker], Awaitable[_T]]) -> _T:
        """Do a call on a worker that has, or is given, a state."""
        first: RegreenError | None = None
        for worker in await self.candidates(state_id):
            try:
                return await self._with_state(worker, state_id, call)
            except (ResourceExhausted, Unavailable) as error:
                first = first or error
        raise first or self.missing(state_id)

    async def _with_state(
        self, worker: Worker, state_id: str, call: Callable[[Worker], Awaitable[_T]]
    ) -> _T:
        await self.ensure(worker, state_id)
        try:
            return await call(worker)
        except NotFound as error:
            if error.metadata.get("id") != state_id:
                raise
        self.registry.forget_state(state_id, worker.name)  # deleted behind the front's back
        await self.ensure(worker, state_id)
        return await call(worker)

    async def ensure(self, worker: Worker, state_id: str) -> None:
        """Have a worker hold a state.

        Raises:
            NotFound: there is no such state.
            FailedPrecondition: it went with its worker.
            DataLoss: its archive is damaged.
        """
        if worker.name not in self.registry.holders(state_id):
            names = ("bring", worker.endpoint.incarnation, worker.endpoint.process, state_id)
            await self._once(names, lambda: self._bring(worker, state_id))

    async def _bring(self, worker: Worker, state_id: str) -> None:
        archived = await self.archive.find(state_id)
        if archived is None:
            sources = await self.registry.find_state(state_id)
            if worker.name in sources:
                return
            if sources:
                await self.keep(self.registry.ready[min(sources)], state_id)
                archived = await self.archive.find(state_id)
        if archived is None:
            raise self.missing(state_id)
        state = await self._import(worker, archived)
        if state.id != state_id:
            raise DataLoss(f"the archive of state {state_id} holds {state.id}")
        self.registry.keys[state_id] = archived.key
        self.registry.learn_state(worker, state)
        metrics.STATE_MOVES.inc()
        self._log.info("state brought", state=state_id, worker=worker.name)

    async def _import(self, worker: Worker, archived: Archived) -> pb.State:
        method = METHODS["StateService/ImportState"]

        async def requests() -> AsyncIterator[pb.ImportStateRequest]:
            async for chunk in self.archive.read(archived):
                yield pb.ImportStateRequest(chunk=chunk)

        state: pb.State = (await worker.send(method, requests(), _MOVE_S)).state
        return state

    async def keep(self, worker: Worker, state_id: str, *, replace: bool = False) -> None:
        """Put a state of a worker into the blob store, unless it is there."""
        await self._once(("keep", state_id), lambda: self._store(worker, state_id, replace))

    async def _store(self, worker: Worker, state_id: str, replace: bool) -> None:
        async with self._keeps:
            get_state, export = (
                METHODS["StateService/GetState"],
                METHODS["StateService/ExportState"],
            )
            state = (await worker.call(get_state, pb.GetStateRequest(id=state_id))).state
            key = self.registry.keys.get(state_id, state_id)
            responses = worker.stream(export, pb.ExportStateRequest(id=state_id), _MOVE_S)
            chunks = (response.chunk async for response in responses)
            await self.archive.store(
                state_id, state.SerializeToString(), key, chunks, replace=replace
            )

    def made(self, worker: Worker, state: pb.State, *, replace: bool = False) -> None:
        """A worker made a state; it is kept in the background if it should be."""
        if replace:
            self.registry.forget_state(state.id)
        self.registry.learn_state(worker, state)
        wanted = self._keep == "all" or (self._keep == "prepared" and not state.parent_id)
        if wanted:
            task = self._fly(
                ("later", state.id), lambda: self._keep_later(worker, state.id, replace)
            )
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _keep_later(self, worker: Worker, state_id: str, replace: bool) -> None:
        try:
            if replace or await self.archive.find(state_id) is None:
                await self.keep(worker, state_id, replace=replace)
        except RegreenError as error:
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

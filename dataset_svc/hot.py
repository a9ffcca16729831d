"""Leases and commits of many workers, a few transactions for all that come at the same time.

- Only calls of one tenant share a transaction, so that the walls hold within it.
- Every call is answered once for its request id, whatever else was in its transaction.
- A commit is looked at before its tokens are written and again, under a lock, when it is stored.
- Workers that find nothing are told when to ask again, so that however many of them are idle,
  together they ask no more often than `idle_asks_per_s`.
"""

import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc import measures
from dataset_svc.database import Database, TokensCollected
from dataset_svc.gather import Gatherer
from dataset_svc.queries import committing, leasing, requests
from dataset_svc.queries.committing import Admission, Committed
from dataset_svc.queries.leasing import Ask
from dataset_svc.queries.rollouts import QueuePolicy
from dataset_svc.queries.trajectories import Packed
from dataset_svc.records import LeaseRecord, TrajectoryRecord
from dataset_svc.store import TrajectoryStore
from regreen.rpc.errors import Aborted, RegreenError
from regreen.rpc.tenants import own

T = TypeVar("T")
_PUTS = 3
"""Times that tokens are put which the collector takes away before a row names them."""
_LEASE, _COMMIT = "LeaseRollouts", "CommitRollout"


@dataclass(frozen=True, slots=True)
class Asked(Generic[T]):
    """What a call asks for, with what makes its repetition known."""

    request_id: str
    fingerprint: bytes
    what: T


@dataclass(frozen=True, slots=True)
class _Commit:
    lease_id: str
    packed: Packed


Answers = list[bytes | RegreenError]


class HotQueue:
    """The two calls that every rollout makes; answers are the bytes of the contract's messages.

    It is of one tenant: a transaction that several calls share sees what each of them may see.
    """

    def __init__(
        self,
        database: Database,
        store: TrajectoryStore,
        policy: QueuePolicy,
        *,
        lease_answer: Callable[[Sequence[LeaseRecord]], bytes],
        commit_answer: Callable[[Committed], bytes],
    ) -> None:
        self._database, self._store, self._policy = database, store, policy
        self._lease_answer, self._commit_answer = lease_answer, commit_answer
        self._leasing: Gatherer[Asked[Ask], bytes] = Gatherer(self._lease_many, flights=1)
        self._admission: Gatherer[Asked[tuple[str, str]], bytes | Admission] = Gatherer(
            self._admit_many
        )
        self._storing: Gatherer[Asked[_Commit], bytes] = Gatherer(self._store_many)

    async def close(self) -> None:
        """Wait for what is under way."""
        for gatherer in (self._leasing, self._admission, self._storing):
            await gatherer.close()

    async def lease(self, asked: Asked[Ask]) -> bytes:
        """Lease rollouts to a worker.

        Raises:
            NotFound: no such run.
            InvalidArgument: a bad length, or a request id that is missing or used.
        """
        return await self._leasing.submit(asked)

    async def commit(self, asked: Asked[tuple[str, TrajectoryRecord]]) -> bytes:
        """Store the trajectory of a lease.

        Raises:
            LeaseExpired: the rollout is not this lease's, or holds another trajectory.
            NotFound: there never was such a lease.
            InvalidArgument: it is malformed, or a request id is missing or used.
            AlreadyExists: the trajectory's id is stored with other content.
            ResourceExhausted: more would be kept of the tenant's than it may have.
        """
        lease_id, record = asked.what
        identity = (asked.request_id, asked.fingerprint)
        found = await self._admission.submit(Asked(*identity, (lease_id, record.id)))
        if isinstance(found, bytes):
            return found
        for _ in range(_PUTS):
            packed = await self._store.pack_for_lease(lease_id, record, found)
            with contextlib.suppress(TokensCollected):
                return await self._storing.submit(Asked(*identity, _Commit(lease_id, packed)))
        raise Aborted("the tokens were collected again and again; raise blob_grace_s")

    async def _lease_many(self, asked: Sequence[Asked[Ask]]) -> Answers:
        async def work(session: AsyncSession, new: list[Asked[Ask]]) -> Answers:
            given = await leasing.lease_many(session, self._policy, [ask.what for ask in new])
            return [one if isinstance(one, RegreenError) else self._lease_answer(one)
                    for one in given]  # fmt: skip

        return await self._once(_LEASE, asked, work)

    async def _store_many(self, asked: Sequence[Asked[_Commit]]) -> Answers:
        async def work(session: AsyncSession, new: list[Asked[_Commit]]) -> Answers:
            pairs = [(ask.what.lease_id, ask.what.packed) for ask in new]
            done = await committing.commit_many(session, pairs, self._store.quotas)
            return [one if isinstance(one, RegreenError) else self._commit_answer(one)
                    for one in done]  # fmt: skip

        return await self._once(_COMMIT, asked, work)

    async def _admit_many(
        self, asked: Sequence[Asked[tuple[str, str]]]
    ) -> list[bytes | Admission | RegreenError]:
        async def work(session: AsyncSession) -> list[bytes | Admission | RegreenError]:
            identities = [(ask.request_id, ask.fingerprint) for ask in asked]
            before = await requests.find_many(session, _COMMIT, identities)
            known = await committing.admissions(session, [ask.what for ask in asked])
            return [
                admission if answer is None else answer
                for answer, admission in zip(before, known, strict=True)
            ]

        return await self._database.run(work)

    async def _once(
        self,
        method: str,
        asked: Sequence[Asked[T]],
        work: Callable[[AsyncSession, list[Asked[T]]], Awaitable[Answers]],
    ) -> Answers:
        """Answer what was answered before, do the rest, and remember its answers; all or none."""
        measures.GATHERED.labels(method).observe(len(asked))

        async def claimed(session: AsyncSession) -> Answers:
            first: dict[str, int] = {}
            identities = [(ask.request_id, ask.fingerprint) for ask in asked]
            found = await requests.find_many(session, method, identities)
            for place, ask in enumerate(asked):
                if found[place] is None:
                    first.setdefault(ask.request_id, place)
            places = list(first.values())
            done = await work(session, [asked[place] for place in places])
            for place, one in zip(places, done, strict=True):
                found[place] = one
            # The same id twice at once: the second is a repeat, or another request.
            for place, ask in enumerate(asked):
                if found[place] is None:
                    twin = asked[first[ask.request_id]]
                    same = twin.fingerprint == ask.fingerprint
                    found[place] = (
                        found[first[ask.request_id]] if same else requests.used(ask.request_id)
                    )
            new = [
                (asked[place].request_id, asked[place].fingerprint, answer)
                for place in places
                if isinstance(answer := found[place], bytes)
            ]
            await requests.remember_many(session, method, new)
            return [answer for answer in found if answer is not None]

        with measures.QUERY_SECONDS.labels(method).time():
            return await self._database.run(claimed)


class HotQueues:
    """One `HotQueue` for each tenant that has called, and one for those who see everything."""

    def __init__(self, make: Callable[[], HotQueue]) -> None:
        self._make = make
        self._queues: dict[str, HotQueue] = {}

    def mine(self) -> HotQueue:
        """That of the present call's tenant."""
        if (queue := self._queues.get(own())) is None:
            queue = self._queues[own()] = self._make()
        return queue

    async def close(self) -> None:
        """Wait for what is under way."""
        for queue in self._queues.values():
            await queue.close()


class IdlePace:
    """Spreads out workers that find nothing to do."""

    def __init__(
        self,
        asks_per_s: float,
        *,
        least_s: float = 0.1,
        most_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gap_s, self._least_s, self._most_s = 1.0 / asks_per_s, least_s, most_s
        self._clock = clock
        self._next_s = 0.0

    def pause_s(self) -> float:
        """How long the worker that asks now is to wait before it asks again."""
        now = self._clock()
        soonest = now + self._least_s
        latest = now + self._most_s
        self._next_s = min(max(self._next_s + self._gap_s, soonest), latest)
        return self._next_s - now

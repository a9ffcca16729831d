"""Stores and reads whole trajectories: tokens in the blob store, the rest in Postgres.

- Tokens are announced, then stored, then named by a row: a crash in between leaves a blob that the
  next attempt uses, or the collector removes.
- What a lease says of its rollout fills what is empty and must equal what is not.
- A commit that cannot succeed is refused before its tokens are written.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

from sqlalchemy.ext.asyncio import AsyncSession

from dataset_svc import arrays, checks
from dataset_svc.database import Database
from dataset_svc.gather import Gatherer
from dataset_svc.queries import blobs as announced
from dataset_svc.queries import trajectories
from dataset_svc.queries.committing import Admission
from dataset_svc.queries.trajectories import Packed, Room
from dataset_svc.records import LeaseRecord, TrajectoryQuery, TrajectoryRecord
from regreen.blobs import BlobStore, Digest, digest_of
from regreen.ids import check_id, new_id
from regreen.rpc.errors import InvalidArgument, NotFound
from regreen.rpc.quotas import Quotas

_EXPORT_ROWS = 64
_EXPORT_BYTES = 32 << 20


@dataclass(slots=True)
class TrajectoryStore:
    """Postgres and the blob store as one place for trajectories."""

    database: Database
    blobs: BlobStore
    max_wire_bytes: int = 60 << 20
    """Bound on a response; no trajectory or group may need more."""
    quotas: Quotas = field(default_factory=Quotas)
    _announcing: Gatherer[Digest, None] = field(init=False)

    def __post_init__(self) -> None:
        self._announcing = Gatherer(self._announce_many)

    async def close(self) -> None:
        """Wait for what is under way."""
        await self._announcing.close()

    async def pack(self, record: TrajectoryRecord) -> Packed:
        """Check a trajectory, store its tokens, and give what a transaction then inserts.

        Raises:
            InvalidArgument: it is malformed; names the field.
            AlreadyExists: its id is stored with other content.
            NotFound: an unknown task or run.
            ResourceExhausted: more would be kept of the tenant's than it may have.
        """
        packed, blob = self._packed(record, share=1)
        await self._admitted([packed])
        await self._keep(packed, blob)
        return packed

    async def store_many(self, records: Sequence[TrajectoryRecord], first: int) -> tuple[int, int]:
        """Store trajectories that have ids, in one transaction; how many are new and known.

        `first` is the place of the first in its stream.

        Raises:
            InvalidArgument: one is malformed; names it by its place.
            AlreadyExists: an id is stored with other content, or comes twice.
            NotFound: an unknown task or run.
            ResourceExhausted: more would be kept of the tenant's than it may have.
        """
        made = await asyncio.to_thread(self._packed_many, records, first)
        new = await self._admitted([packed for packed, _ in made])
        if new:
            blobs = {packed.record.id: blob for packed, blob in made}
            digests = [packed.blob for packed in new]
            await self.database.run(lambda session: announced.announce(session, digests))
            await self.blobs.put_many([blobs[packed.record.id] for packed in new])
            await self.database.run(
                lambda session: trajectories.insert_checked(session, new, self.quotas)
            )
        return len(new), len(made) - len(new)

    async def _admitted(self, packed: Sequence[Packed]) -> list[Packed]:
        """Those that are still to be stored, and would be now: no token is written before."""

        async def admit(session: AsyncSession) -> list[Packed]:
            new = await trajectories.to_store(session, packed)
            tenants = {item.tenant for item in new}
            room = Room(self.quotas, await trajectories.kept_bytes(session, tenants))
            for item in new:
                room.take(item)
            return [item.packed for item in new]

        return await self.database.run(admit)

    def _packed_many(
        self, records: Sequence[TrajectoryRecord], first: int
    ) -> list[tuple[Packed, bytes]]:
        made = []
        for place, record in enumerate(records, first):
            try:
                check_id(record.id, "trj", "trajectory.id")
                made.append(self._packed(record, share=1))
            except InvalidArgument as error:
                raise InvalidArgument(
                    error.field.replace("trajectory", f"trajectories[{place}]", 1),
                    error.problem,
                    error.remedy,
                ) from error
        return made

    async def _keep(self, packed: Packed, blob: bytes) -> None:
        """Announce and put the tokens of a trajectory that is about to be stored."""
        await self._announcing.submit(packed.blob)
        await self.blobs.put(blob)

    async def _announce_many(self, digests: Sequence[Digest]) -> list[None]:
        await self.database.run(lambda session: announced.announce(session, digests))
        return [None] * len(digests)

    def _packed(self, record: TrajectoryRecord, *, share: int) -> tuple[Packed, bytes]:
        """A checked trajectory and its tokens; `share` of them must fit into one response."""
        if not record.id:
            record = replace(record, id=new_id("trj"))
        check_id(record.id, "trj", "trajectory.id")
        checks.check_trajectory(record, max_wire_bytes=self.max_wire_bytes // share)
        if record.stream is None:
            raise InvalidArgument("trajectory.token_ids", "is empty", "give the tokens")
        blob = arrays.pack(record.stream)
        return Packed(record, digest_of(blob), record.fingerprint(blob)), blob

    async def pack_for_lease(
        self, lease_id: str, record: TrajectoryRecord, found: Admission
    ) -> Packed:
        """As `pack`, for the rollout of a lease of which `found` is known.

        Raises:
            InvalidArgument: it is malformed, or is not of that rollout.
            LeaseExpired: the rollout is not this lease's, or holds another trajectory.
            AlreadyExists: its id is stored with other content.
            ResourceExhausted: more would be kept of the tenant's than it may have.
        """
        packed, blob = self._packed(fill(record, found.lease), share=found.lease.group.size)
        found.check(lease_id, packed, self.quotas)
        await self._keep(packed, blob)
        return packed

    async def load(
        self, trajectory_ids: Sequence[str], *, tokens: bool = True
    ) -> list[TrajectoryRecord]:
        """Whole trajectories in the order of the ids.

        Raises:
            NotFound: an id is not stored.
            DataLoss: tokens are gone or damaged.
        """

        async def read(session: AsyncSession) -> list[trajectories.Stored]:
            return await trajectories.load(session, trajectory_ids)

        stored = await self.database.run(read)
        if not tokens:
            return [item.record for item in stored]
        return [await trajectories.read_tokens(self.blobs, item) for item in stored]

    async def export(self, query: TrajectoryQuery) -> AsyncIterator[TrajectoryRecord]:
        """Whole trajectories in order of insertion, read in bounded batches."""
        after = 0
        while True:

            async def ids(session: AsyncSession, after: int = after) -> list[tuple[int, str, int]]:
                return await trajectories.next_ids(session, query, after, _EXPORT_ROWS)

            rows = await self.database.run(ids)
            if not rows:
                return
            wanted: list[str] = []
            total_bytes = 0
            for seq, trajectory_id, wire_bytes in rows:
                total_bytes += wire_bytes
                if wanted and total_bytes > _EXPORT_BYTES:
                    break
                wanted.append(trajectory_id)
                after = seq
            for record in await self.there(wanted):
                yield record

    async def there(self, trajectory_ids: Sequence[str]) -> list[TrajectoryRecord]:
        """Those of the trajectories that retention has not removed meanwhile, whole."""
        try:
            return await self.load(trajectory_ids)
        except NotFound:
            if len(trajectory_ids) == 1:
                return []
        return [record for one in trajectory_ids for record in await self.there([one])]


def fill(record: TrajectoryRecord, lease: LeaseRecord) -> TrajectoryRecord:
    """The record with what the lease knows.

    Raises:
        InvalidArgument: a field that is set says something else.
    """
    group = lease.group
    known: dict[str, str | int] = {
        "task_id": group.task_id,
        "run_id": group.run_id,
        "group_id": group.id,
        "group_index": lease.group_index,
        "seed": lease.seed,
        "pipeline": group.pipeline,
        "mode": group.mode,
        "grader": group.grader,
    }
    for name, value in known.items():
        given = getattr(record, name)
        if given and given != value:
            raise InvalidArgument(
                f"trajectory.{name}",
                f"is {given!r} and its rollout's is {value!r}",
                "copy the lease's",
            )
    return replace(record, **known, attempt=lease.attempt)  # type: ignore[arg-type]

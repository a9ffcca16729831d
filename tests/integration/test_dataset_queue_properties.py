"""The rollout queue as a state machine against a real Postgres, checked step by step with a model.

- Whatever the order of leases, heartbeats, commits, failures, expiries, takes, checkpoints and
  rewinds: no rollout is lost, none is used twice, and the database agrees with the model.
"""

import asyncio
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import DateTime, func, literal, select

from dataset_svc import models
from dataset_svc.arrays import stream_of
from dataset_svc.database import Database
from dataset_svc.queries import committing, groups, leasing, rollouts, runs, tasks
from dataset_svc.queries.rollouts import QueuePolicy
from dataset_svc.records import CheckpointRecord, GroupRecord, TaskRecord, TrajectoryRecord
from dataset_svc.store import TrajectoryStore
from regreen.blobs import open_blobs
from regreen.ids import new_id
from regreen.rpc.errors import FailedPrecondition, LeaseExpired

LEASE_S = 60.0
MAX_ATTEMPTS, MAX_OUTAGES = 3, 4
RETRY_S, MAX_RETRY_S = 30.0, 60.0


@dataclass
class Slot:
    """What the model knows of one rollout."""

    attempt: int = 0
    outages: int = 0
    state: str = "waiting"
    lease_id: str = ""
    expires: datetime | None = None
    not_before: datetime | None = None
    trajectory: str = ""


@dataclass
class ModelGroup:
    """What the model knows of one group."""

    slots: list[Slot]
    state: str = "open"
    checkpoint: int = -1


@dataclass
class Model:
    """The queue as it should be."""

    groups: dict[str, ModelGroup] = field(default_factory=dict)
    leases: dict[str, tuple[str, int]] = field(default_factory=dict)
    checkpoints: list[str] = field(default_factory=list)

    def slot(self, lease_id: str) -> Slot:
        group_id, index = self.leases[lease_id]
        return self.groups[group_id].slots[index]

    def settle(self, now: datetime) -> None:
        """What a sweep does, and completeness."""
        for group in self.groups.values():
            for slot in group.slots:
                if (
                    slot.state == "leased"
                    and slot.expires < now
                    and slot.outages >= MAX_OUTAGES - 1
                ):
                    slot.state, slot.outages = "lost", MAX_OUTAGES
            if group.state == "open" and all(s.state in ("committed", "lost") for s in group.slots):
                group.state = "complete"


class Queue:
    """Calls on the real queue, each checked against the model; `pick` chooses what a call is on."""

    def __init__(self, url: str, directory: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.database = Database(url, pool_size=4)
        self.store = TrajectoryStore(self.database, open_blobs(directory, fsync=False))
        clock_type = DateTime(timezone=True)
        self.policy = QueuePolicy(
            MAX_ATTEMPTS,
            MAX_OUTAGES,
            LEASE_S,
            retry_s=RETRY_S,
            max_retry_s=MAX_RETRY_S,
            clock=lambda: literal(self.now, clock_type),
        )
        self.model = Model()
        self.task_id, self.run_id = f"task-{new_id('tsk')}", ""
        self.setup()

    def teardown(self) -> None:
        self.loop.run_until_complete(self.database.close())
        self.loop.close()

    def run(self, work):
        """The result of `work(session)` in one transaction."""
        return self.loop.run_until_complete(self.database.run(work))

    def setup(self) -> None:
        modes = ("any_fix",)
        task = TaskRecord(
            self.task_id, "k", "p", "3.11", "", "", "", modes, "", {"id": self.task_id}
        )
        self.run(lambda s: tasks.import_tasks(s, [task], replace_changed=False))
        run, _ = self.run(lambda s: runs.create_run(s, new_id("run"), "grpo", None))
        self.run_id = run.id

    def trajectory(self, salt: str) -> TrajectoryRecord:
        return TrajectoryRecord(
            id="",
            task_id=self.task_id,
            pipeline="simplified",
            mode="any_fix",
            grader="build",
            end="submitted",
            stream=stream_of([1, 2], b"\0\1", [0.0, -1.0], [(0, 1, 2)]),
            token_exact=True,
            prompt_tokens=1,
            labels={"salt": salt},
        )

    def enqueue(self, pick: int) -> None:
        size = 1 + pick % 3
        group = GroupRecord(
            "", self.run_id, self.task_id, size, "simplified", "any_fix", "build", step=1
        )
        (group_id,) = self.run(lambda s: rollouts.enqueue(s, [group]))
        self.model.groups[group_id] = ModelGroup([Slot() for _ in range(size)])

    def lease(self, pick: int) -> None:
        count = 1 + pick % 4
        leases = self.run(
            lambda s: leasing.lease(s, self.policy, worker="w", count=count, run_id=self.run_id)
        )
        self.model.settle(self.now)
        free = [
            (slot, group_id, index)
            for group_id, group in self.model.groups.items()
            for index, slot in enumerate(group.slots)
            if (slot.state == "waiting" and (slot.not_before or self.now) <= self.now)
            or (slot.state == "leased" and slot.expires < self.now)
        ]
        assert [(lease.group.id, lease.group_index) for lease in leases] == [
            (group_id, index) for _, group_id, index in free[:count]
        ]
        for lease, (slot, group_id, index) in zip(leases, free, strict=False):
            slot.attempt += slot.state == "leased"
            slot.outages += slot.state == "leased"
            slot.state, slot.lease_id = "leased", lease.id
            slot.expires = self.now + timedelta(seconds=LEASE_S)
            assert (lease.attempt, lease.expire_time) == (slot.attempt, slot.expires)
            self.model.leases[lease.id] = (group_id, index)

    def time_passes(self, pick: int) -> None:
        self.now += timedelta(seconds=(1, 40, 61)[pick % 3])

    def heartbeat(self, pick: int) -> None:
        if not (lease_id := self.some_lease(pick)):
            return
        slot = self.model.slot(lease_id)
        extended, gone = self.run(lambda s: rollouts.heartbeat(s, self.policy, [lease_id]))
        holds = slot.state == "leased" and slot.lease_id == lease_id
        assert (len(extended), len(gone)) == ((1, 0) if holds else (0, 1))
        if holds:
            slot.expires = self.now + timedelta(seconds=LEASE_S)

    def commit(self, pick: int) -> None:
        if not (lease_id := self.some_lease(pick)):
            return
        slot = self.model.slot(lease_id)
        salt = "ab"[pick // 64 % 8 == 0]
        trajectory = self.trajectory(salt)

        async def commit() -> str:
            (found,) = await self.database.run(lambda s: committing.admissions(s, [(lease_id, "")]))
            packed = await self.store.pack_for_lease(lease_id, trajectory, found)
            done = await self.database.run(lambda s: committing.commit(s, lease_id, packed))
            return done.trajectory_id

        holds = slot.state == "leased" and slot.lease_id == lease_id
        same = slot.state == "committed" and slot.trajectory.startswith(f"{lease_id} {salt} ")
        if holds:
            slot.trajectory = f"{lease_id} {salt} {self.loop.run_until_complete(commit())}"
            slot.state = "committed"
        elif same:
            assert slot.trajectory.endswith(" " + self.loop.run_until_complete(commit()))
        else:
            with pytest.raises(LeaseExpired):
                self.loop.run_until_complete(commit())
        self.settle_commits()

    def fail(self, pick: int) -> None:
        if not (lease_id := self.some_lease(pick)):
            return
        slot = self.model.slot(lease_id)
        release, outage = pick // 64 % 4 == 0, pick // 64 % 4 == 1
        if slot.state == "leased" and slot.lease_id == lease_id:
            retried = self.run(
                lambda s: rollouts.fail(
                    s, self.policy, lease_id, "?", release=release, outage=outage
                )
            )
            slot.attempt += not release
            slot.outages += outage
            assert retried == (
                slot.attempt - slot.outages < MAX_ATTEMPTS and slot.outages < MAX_OUTAGES
            )
            slot.state, slot.lease_id = ("waiting" if retried else "lost"), ""
            rests_s = 0 if release else min(RETRY_S * 2 ** (slot.attempt - 1), MAX_RETRY_S)
            slot.not_before = self.now + timedelta(seconds=rests_s)
        else:
            with pytest.raises(LeaseExpired):
                self.run(lambda s: rollouts.fail(s, self.policy, lease_id, "?"))
        self.settle_commits()

    def some_lease(self, pick: int) -> str:
        """One of the latest leases, held or not; empty if there never was one."""
        latest = list(self.model.leases)[-12:]
        return latest[pick % len(latest)] if latest else ""

    def settle_commits(self) -> None:
        for group in self.model.groups.values():
            if group.state == "open" and all(s.state in ("committed", "lost") for s in group.slots):
                group.state = "complete"

    def take(self, pick: int) -> None:
        count = 1 + pick % 3
        taken = self.run(
            lambda s: groups.take(s, self.policy, run_id=self.run_id, count=count, taker="t")
        )
        self.model.settle(self.now)
        ready = [g for g, group in self.model.groups.items() if group.state == "complete"]
        assert [item.group.id for item in taken] == ready[:count]
        for item in taken:
            group = self.model.groups[item.group.id]
            group.state = "taken"
            committed = [s.trajectory.split()[2] for s in group.slots if s.state == "committed"]
            assert list(item.trajectory_ids) == committed
            assert item.lost == len(group.slots) - len(committed)

    def checkpoint(self, pick: int) -> None:
        taken = [g for g, group in self.model.groups.items() if group.state == "taken"]
        chosen = taken[: pick % 3]
        if pick % 5 == 0:
            chosen += [g for g in self.model.groups if g not in taken][:1]
        record = CheckpointRecord("", self.run_id, 1, "file:///c", group_ids=tuple(chosen))
        if all(self.model.groups[g].state == "taken" for g in chosen):
            stored = self.run(lambda s: runs.record_checkpoint(s, record, 0))
            for group_id in chosen:
                self.model.groups[group_id].state = "acknowledged"
                self.model.groups[group_id].checkpoint = len(self.model.checkpoints)
            self.model.checkpoints.append(stored.id)
        else:
            with pytest.raises(FailedPrecondition):
                self.run(lambda s: runs.record_checkpoint(s, record, 0))

    def rewind(self, pick: int) -> None:
        kept = pick % (len(self.model.checkpoints) + 1)
        target = self.model.checkpoints[kept - 1] if kept else ""
        back, _ = self.run(lambda s: groups.rewind(s, self.run_id, target))
        expected = 0
        for group in self.model.groups.values():
            if group.state == "taken" or (
                group.state == "acknowledged" and group.checkpoint >= kept
            ):
                group.state, group.checkpoint = "complete", -1
                expected += 1
            if group.state == "acknowledged":
                continue
            for slot in group.slots:
                if slot.state == "lost":
                    group.state, slot.state, slot.attempt = "open", "waiting", 0
                    slot.outages = 0
                    slot.not_before = None
        assert back == expected
        del self.model.checkpoints[kept:]

    def database_agrees(self) -> None:
        if not self.run_id:
            return

        async def read(session):
            slots = await session.execute(
                select(
                    models.Rollout.group_id,
                    models.Rollout.group_index,
                    models.Rollout.state,
                    models.Rollout.trajectory_id,
                    models.Rollout.outages,
                    models.Group.state,
                    models.Group.pending,
                )
                .join(models.Group, models.Group.id == models.Rollout.group_id)
                .where(models.Rollout.run_id == self.run_id)
            )
            count = await session.execute(
                select(func.count()).where(models.Trajectory.run_id == self.run_id)
            )
            return slots.all(), count.scalar_one()

        slots, trajectories = self.run(read)
        committed = 0
        for group_id, index, state, trajectory_id, outages, group_state, pending in slots:
            group = self.model.groups[group_id]
            slot = group.slots[index]
            assert (state, group_state) == (slot.state, group.state)
            assert outages == slot.outages
            assert (trajectory_id or "") == (slot.trajectory.split() or ["", "", ""])[-1]
            assert pending == sum(s.state in ("waiting", "leased") for s in group.slots)
            committed += state == "committed"
        assert len(slots) == sum(len(group.slots) for group in self.model.groups.values())
        assert trajectories == committed


CALLS = (
    ["enqueue", "rewind"]
    + ["lease", "time_passes", "heartbeat", "fail", "take", "checkpoint"] * 2
    + ["commit"] * 5
)


def test_the_queue_behaves_like_its_model(database_url: str):
    calls = st.lists(
        st.tuples(st.sampled_from(CALLS), st.integers(0, 1023)), min_size=50, max_size=60
    )

    @settings(
        max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(calls)
    def check(calls: list[tuple[str, int]]) -> None:
        with tempfile.TemporaryDirectory() as directory:
            queue = Queue(database_url, directory)
            try:
                for name, pick in [("enqueue", 2), ("lease", 2), *calls]:
                    getattr(queue, name)(pick)
                    queue.database_agrees()
            finally:
                queue.teardown()

    check()

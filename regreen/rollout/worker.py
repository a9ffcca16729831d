"""A rollout worker: leases rollouts, runs them, commits them; stateless.

- A lease ends in exactly one of: committed, given back, or expired (this worker was killed); the
  queue hands it on in the last two cases, so no rollout is lost.
- A commit is repeated with the same request id until it is answered or the lease is gone, so no
  rollout is stored twice.
- Trouble of the platform gives the rollout back and is never scored; a service that was away and
  a sandbox that was ended from outside are given back as outages. A defect of our own ends the
  worker loudly, after its leases were given back. A worker that is stopped releases its leases,
  which uses up no attempt.
- What is done for a rollout is charged to the tenant of its run.
- An idle worker asks as seldom as the queue tells it to.
- Any service may restart: every wait for one is bounded by `patience_s`, and by a few seconds once
  the worker is stopped.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

import structlog

from regreen.client.channel import new_request_id
from regreen.dataset import v1 as pb
from regreen.ids import new_id
from regreen.rollout import past
from regreen.rollout.actors import PolicyActor
from regreen.rollout.context import EpisodeSpec, spec_of_lease
from regreen.rollout.episode import Runner
from regreen.rollout.group import SharedStart, shared_start
from regreen.rollout.knowledge import Knowledge, build
from regreen.rpc import tenants, traces
from regreen.rpc.errors import (
    Aborted,
    DeadlineExceeded,
    InfraError,
    LeaseExpired,
    NotFound,
    RegreenError,
    ResourceExhausted,
    SandboxLost,
    Unavailable,
)

if TYPE_CHECKING:
    from regreen.client.stack import Stack

_LOST = "the lease ran out"
log = structlog.get_logger(__name__)
T = TypeVar("T")
_PASSING = (Unavailable, InfraError, DeadlineExceeded, Aborted, ResourceExhausted)
_OUTAGES = (Unavailable, SandboxLost)
"""What says nothing about the rollout that it ended."""
_POLL_S = (0.1, 2.0)
_BATCH = 1000
"""Most leases that one call may ask for or extend."""
_LEAVE_S = 5.0
"""How long a worker that was stopped waits for a service; its leases expire by themselves."""


@dataclass(slots=True)
class WorkerStats:
    """What a worker has done so far."""

    committed: int = 0
    given_back: int = 0
    expired: int = 0


@dataclass(frozen=True, slots=True)
class RolloutProgress:
    """What became of a rollout at this worker."""

    what: Literal["leased", "committed", "given back", "expired", "stopped"]
    task_id: str
    rollout_id: str
    detail: str = ""

    def __str__(self) -> str:
        text = f"{self.what} {self.task_id} {self.rollout_id}"
        return f"{text}: {self.detail}" if self.detail else text


@dataclass(slots=True)
class Worker:
    """Leases and runs rollouts until stopped."""

    stack: "Stack"
    runner: Runner
    run_id: str = ""
    """Only rollouts of this run; empty takes any."""
    concurrency: int = 4
    name: str = field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}")
    lease_s: float = 120.0
    patience_s: float = 600.0
    """How long a service may be away before the worker ends."""
    share_prompts: bool = True
    clock: Callable[[], float] = time.monotonic
    listener: Callable[[RolloutProgress], None] = lambda progress: None
    stats: WorkerStats = field(default_factory=WorkerStats)
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _active: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _idle_s: float = 0.0
    """How long the queue asks a worker that found nothing to wait."""

    def stop(self) -> None:
        """Take no more work; what runs is given back."""
        self._stopping.set()

    async def run(self, *, until_idle: bool = False) -> WorkerStats:
        """Work until stopped; with `until_idle`, until the queue has nothing more.

        Raises:
            RegreenError: a service was away for longer than `patience_s`.
        """
        if self.runner.knowledge is None:
            self.runner.knowledge = await self._persist(lambda: knowledge_of(self.stack))
        heart = asyncio.create_task(self._beat())
        wait_s = _POLL_S[0]
        try:
            while not self._stopping.is_set():
                self._raise_defects(heart)
                leases = await self._lease()
                if leases:
                    wait_s = _POLL_S[0]
                    await self._start(leases)
                    continue
                if until_idle and not self._active and not await self._waiting():
                    break
                await self._wait(max(wait_s, self._idle_s))
                wait_s = min(wait_s * 1.5, _POLL_S[1])
        except RegreenError as error:
            if not self._stopping.is_set():
                raise
            log.warning("stopped while a service was away", error=str(error))
        finally:
            heart.cancel()
            await self._give_all_back()
            await asyncio.gather(heart, return_exceptions=True)
        return self.stats

    async def _lease(self) -> Sequence[pb.Lease]:
        free = min(self.concurrency - len(self._active), _BATCH)
        if free <= 0:
            return ()
        request_id = new_request_id()
        answer = await self._persist(
            lambda: self.stack.queue.ask_for_rollouts(
                self.name,
                free,
                run_id=self.run_id,
                duration_s=self.lease_s,
                request_id=request_id,
            )
        )
        self._idle_s = answer.poll_after.ToTimedelta().total_seconds()
        leases: Sequence[pb.Lease] = answer.leases
        return leases

    async def _waiting(self) -> bool:
        """Whether rollouts wait, be it for their pause after a failure."""
        queue = await self._persist(lambda: self.stack.queue.get_queue(self.run_id))
        return queue.rollouts["waiting"] > 0

    async def _start(self, leases: Sequence[pb.Lease]) -> None:
        """Start the episodes of new leases, members of one group together."""
        groups: dict[tuple[str, int], list[pb.Lease]] = defaultdict(list)
        for lease in leases:
            groups[lease.group.id, lease.attempt].append(lease)
        for members in groups.values():
            with tenants.charging(members[0].tenant):  # a group is of one run
                start = asyncio.ensure_future(self._shared(members))
                for lease in members:
                    self._active[lease.id] = asyncio.create_task(self._traced(lease, start))
                    self._tell("leased", lease)

    async def _shared(self, members: Sequence[pb.Lease]) -> SharedStart | None:
        group = members[0].group
        if group.size < 2 or not self.share_prompts:
            return None
        with traces.span("shared start", group_id=group.id, run_id=group.run_id):
            task = await self.stack.tasks.get_task(group.task_id)
            return await shared_start(self.runner, task, spec_of_lease(members[0]), group.size)

    async def _traced(self, lease: pb.Lease, start: "asyncio.Future[SharedStart | None]") -> None:
        """One leased rollout, from start to commit or give-back, as one trace."""
        about = {"rollout_id": lease.rollout_id, "group_id": lease.group.id}
        with traces.span(
            "rollout", trajectory_id := new_id("trj"), run_id=lease.group.run_id, **about
        ) as link:
            link.error = await self._work(lease, start, trajectory_id)

    async def _work(
        self, lease: pb.Lease, start: "asyncio.Future[SharedStart | None]", trajectory_id: str
    ) -> str:
        """The status of what made it fail; empty if it is committed."""
        try:
            spec = spec_of_lease(lease)
            shared = await asyncio.shield(start)
            actor = shared.actor(spec.group_index) if shared else PolicyActor()
            trajectory = await self._episode(lease, spec, actor, trajectory_id)
        except RegreenError as error:
            log.warning("rollout failed", rollout_id=lease.rollout_id, error=str(error))
            # So does who asks to come back later: a service that is full, a quota until midnight.
            outage = isinstance(error, _OUTAGES) or error.retry_after_s is not None
            await self._give_back(lease, f"{type(error).__name__}: {error}", outage=outage)
            failed = error.status
        except asyncio.CancelledError as stop:
            self._tell("expired" if stop.args == (_LOST,) else "stopped", lease)
            raise
        else:
            failed = await self._commit(lease, trajectory)
        # A defect of our own stays in `_active`, where the main loop finds and raises it.
        self._active.pop(lease.id, None)
        return failed

    async def _episode(
        self, lease: pb.Lease, spec: EpisodeSpec, actor: PolicyActor, trajectory_id: str
    ) -> pb.Trajectory:
        task = await self.stack.tasks.get_task(lease.group.task_id)
        trajectory = await self.runner.run(task, spec, actor, trajectory_id=trajectory_id)
        trajectory.labels.update(
            {k: v for k, v in lease.group.labels.items() if k not in trajectory.labels}
        )
        return trajectory

    async def _commit(self, lease: pb.Lease, trajectory: pb.Trajectory) -> str:
        """The status of what it was refused with; empty if it was not."""
        request_id = new_request_id()
        try:
            done = await self._persist(
                lambda: self.stack.queue.commit_rollout(lease.id, trajectory, request_id=request_id)
            )
            self.stats.committed += 1
            self._tell("committed", lease, outcome(trajectory))
            await past.record_use(self.stack, done.trajectory_id, trajectory.labels)
        except (LeaseExpired, NotFound) as error:
            self.stats.expired += 1
            self._tell("expired", lease, str(error))
            log.warning("lease lost", rollout_id=lease.rollout_id, error=str(error))
            return error.status
        except RegreenError as error:
            log.error("commit refused", rollout_id=lease.rollout_id, error=str(error))
            await self._give_back(lease, f"commit refused: {error}")
            return error.status
        return ""

    async def _give_back(self, lease: pb.Lease, reason: str, *, outage: bool = False) -> None:
        request_id = new_request_id()
        try:
            await self._persist(
                lambda: self.stack.queue.fail_rollout(
                    lease.id, reason[:1000], outage=outage, request_id=request_id
                )
            )
            self.stats.given_back += 1
            self._tell("given back", lease, reason)
        except (LeaseExpired, NotFound):
            self.stats.expired += 1
            self._tell("expired", lease, reason)

    def _tell(
        self,
        what: Literal["leased", "committed", "given back", "expired", "stopped"],
        lease: pb.Lease,
        detail: str = "",
    ) -> None:
        try:
            self.listener(RolloutProgress(what, lease.group.task_id, lease.rollout_id, detail))
        except Exception as error:  # noqa: BLE001 - whoever listens must not cost a rollout
            log.warning("a listener failed", error=f"{type(error).__name__}: {error}")

    async def _give_all_back(self) -> None:
        active = dict(self._active)
        self._active.clear()
        for task in active.values():
            task.cancel()
        await asyncio.gather(*active.values(), return_exceptions=True)
        ends = [self._release(lease_id, task) for lease_id, task in active.items()]
        await asyncio.gather(*ends)

    async def _release(self, lease_id: str, task: "asyncio.Task[None]") -> None:
        """Give the lease of an ended task back; only a defect counts as a failed attempt."""
        error = None if task.cancelled() else task.exception()
        if not task.cancelled() and error is None:
            return
        away = error is None or isinstance(error, RegreenError)
        reason = f"{type(error).__name__}: {error}"[:1000] if error else "the worker ended"
        try:
            async with asyncio.timeout(_LEAVE_S):
                await self.stack.queue.fail_rollout(lease_id, reason, release=away)
            self.stats.given_back += 1
        except (RegreenError, TimeoutError) as trouble:
            log.warning("lease left to expire", lease_id=lease_id, error=str(trouble))

    async def _beat(self) -> None:
        """Keep every lease alive; drop the work of a lease that is lost."""
        while True:
            await asyncio.sleep(self.lease_s / 4)
            lease_ids = list(self._active)
            for start in range(0, len(lease_ids), _BATCH):
                await self._extend(lease_ids[start : start + _BATCH])

    async def _extend(self, lease_ids: Sequence[str]) -> None:
        if not lease_ids:
            return
        try:
            await self.stack.queue.heartbeat(lease_ids, duration_s=self.lease_s)
        except LeaseExpired as error:
            self._drop(error.metadata.get("lease_ids", "").split(","))
        except NotFound:
            if len(lease_ids) == 1:
                self._drop(lease_ids)
            else:
                for lease_id in lease_ids:
                    await self._extend([lease_id])
        except RegreenError as error:
            log.warning("heartbeat failed", leases=len(lease_ids), error=str(error))

    def _drop(self, lease_ids: Sequence[str]) -> None:
        for lease_id in lease_ids:
            if task := self._active.pop(lease_id, None):
                self.stats.expired += 1
                task.cancel(_LOST)

    async def _wait(self, seconds: float) -> None:
        """Until something ends, the worker is stopped, or the time is over."""
        stop = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait(
                {stop, *self._active.values()},
                timeout=seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            stop.cancel()

    def _raise_defects(self, heart: "asyncio.Task[None]") -> None:
        for task in [heart, *self._active.values()]:
            if task.done() and not task.cancelled() and (error := task.exception()):
                raise error

    async def _persist(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeat a call while its service is away, for at most `patience_s` or until stopped."""
        give_up_s = self.clock() + self.patience_s
        wait_s = _POLL_S[0]
        while True:
            try:
                return await self._unless_stopped(call)
            except _PASSING as error:
                if "quota" in error.metadata:  # what is used up stays so: nothing is away
                    raise
                if self._stopping.is_set() or self.clock() + wait_s > give_up_s:
                    raise
                log.warning("service away", error=str(error))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait_s)
            wait_s = min(wait_s * 2, 10.0)

    async def _unless_stopped(self, call: Callable[[], Awaitable[T]]) -> T:
        """A call that gets `_LEAVE_S` to end from when the worker is stopped.

        Raises:
            Unavailable: it did not end in that time.
        """
        task = asyncio.ensure_future(call())
        stop = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                await asyncio.wait({task}, timeout=_LEAVE_S)
            if not task.done():
                raise Unavailable("the worker was stopped while a service was away")
            return await task
        finally:
            stop.cancel()
            task.cancel()


def outcome(trajectory: pb.Trajectory) -> str:
    """What came of a rollout, in one line."""
    reward = trajectory.reward
    solved = "solved" if reward.solved else "not solved"
    hacks = f"  hacks: {' '.join(reward.hacks)}" if reward.hacks else ""
    outputs = sum(turn.role == pb.TURN_ROLE_POLICY for turn in trajectory.turns)
    turns = "1 turn" if outputs == 1 else f"{outputs} turns"
    return f"{solved}  reward {reward.value:+.2f}  {turns}{hacks}"


@asynccontextmanager
async def worker_pool(
    stack: "Stack",
    *,
    run_id: str = "",
    concurrency: int = 4,
    knowledge: Knowledge | None = None,
    runner: Runner | None = None,
    lease_s: float = 120.0,
) -> AsyncIterator[Worker]:
    """A worker in this process while the context is open; its failure ends the context.

    Raises:
        RegreenError: what ended the worker.
    """
    if runner is None:
        runner = Runner(stack, knowledge)
    worker = Worker(stack, runner, run_id=run_id, concurrency=concurrency, lease_s=lease_s)
    parent = asyncio.current_task()
    task = asyncio.create_task(worker.run())

    def ended(done: "asyncio.Task[WorkerStats]") -> None:
        if parent is not None and not done.cancelled() and done.exception() is not None:
            parent.cancel()

    task.add_done_callback(ended)
    try:
        yield worker
    except asyncio.CancelledError:
        if task.done() and not task.cancelled() and (error := task.exception()):
            if parent is not None:
                parent.uncancel()
            raise error from None
        raise
    finally:
        task.remove_done_callback(ended)
        worker.stop()
        await asyncio.gather(task, return_exceptions=True)


async def knowledge_of(stack: "Stack") -> Knowledge:
    """The knowledge base of the admitted training tasks; the served one has them from now on."""
    wanted = pb.TaskFilter(statuses=[pb.TASK_STATUS_ADMITTED], split="train")
    tasks = await stack.tasks.all_tasks(wanted)
    await past.record(stack, [*past.task_items(tasks), *past.changelog_items()])
    return build(tasks)

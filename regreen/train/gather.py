"""The groups of one step: planned, enqueued, taken, refilled.

- A step's plan is a pure function of (run, step, history, settings); group ids derive from
  (run, step, slot), so enqueueing again after a crash adds nothing.
- `collect` returns only when every group it asked for was taken: each group that is enqueued
  reaches exactly one step, whatever its fate.
- Refills are bounded by the plan's length. They replace groups that do not teach (dynamic sampling,
  DAPO, arXiv:2503.14476); the groups they replace are still returned and counted.
- A step most of whose rollouts were lost to infrastructure is not used: it waits for the services
  and its lost rollouts are tried anew, so that an outage is never taken for a result.
- Waiting is bounded by `idle_deadline_s` without any rollout being committed.
"""

import asyncio
import hashlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from regreen.client.stack import Stack
from regreen.common import v1 as common_pb
from regreen.common.v1 import PIPELINE_FULL
from regreen.dataset import v1 as dataset_pb
from regreen.ids import derive_seed
from regreen.rpc.errors import FailedPrecondition, Unavailable
from regreen.train.schedule import Candidate, Curriculum, History, choose
from regreen.train.signals import KEEP_BASELINE, TRAINED, fate

_POLL_S = (0.1, 1.0)


@dataclass(frozen=True, slots=True)
class GatherSettings:
    """What the groups of a run look like."""

    groups_per_step: int
    group_size: int
    max_refills: int
    pipeline: common_pb.Pipeline.ValueType
    grader: common_pb.Grader.ValueType
    seed: int
    full_share: float
    """Share of groups that run the full pipeline whatever `pipeline` says."""
    max_staleness: int
    idle_deadline_s: float
    curriculum: Curriculum = field(default_factory=Curriculum)
    labels: Mapping[str, str] = field(default_factory=dict)
    truncated: str = KEEP_BASELINE
    """The learner's hyperparameter: whether members that hit a limit are trained on."""


@dataclass(frozen=True, slots=True)
class Collected:
    """All groups of a step with their fates."""

    groups: tuple[dataset_pb.CompleteGroup, ...]
    """In slot order."""
    fates: Mapping[str, str]
    refills: int

    @property
    def group_ids(self) -> list[str]:
        """Ids in slot order."""
        return [group.group.id for group in self.groups]

    @property
    def teaching(self) -> list[dataset_pb.CompleteGroup]:
        """The groups to train on."""
        return [g for g in self.groups if self.fates[g.group.id] == TRAINED]


def group_id(run_id: str, step: int, slot: int) -> str:
    """The id of the group in `slot` of `step`."""
    digest = hashlib.sha256(f"{run_id}/{step}/{slot}".encode()).hexdigest()
    return f"grp_{digest[:32]}"


def plan_step(
    run_id: str,
    step: int,
    candidates: Sequence[Candidate],
    history: History,
    settings: GatherSettings,
) -> tuple[dataset_pb.Group, ...]:
    """The groups of a step in slot order: first the wave, then the refills in case."""
    seed = derive_seed(settings.seed, run_id, "plan", step)
    picks = choose(
        candidates,
        history,
        count=settings.groups_per_step + settings.max_refills,
        seed=seed,
        curriculum=settings.curriculum,
    )
    rng = random.Random(derive_seed(seed, "pipeline"))
    return tuple(
        dataset_pb.Group(
            id=group_id(run_id, step, slot),
            run_id=run_id,
            task_id=pick.candidate.task_id,
            size=settings.group_size,
            pipeline=PIPELINE_FULL if rng.random() < settings.full_share else settings.pipeline,
            mode=pick.candidate.mode,
            grader=settings.grader,
            seed=derive_seed(settings.seed, run_id, "group", step, slot),
            step=step,
            labels={**settings.labels, "slot": str(slot), "reason": pick.reason},
        )
        for slot, pick in enumerate(picks)
    )


class Gatherer:
    """Enqueues and collects the groups of one run."""

    def __init__(
        self,
        stack: Stack,
        run_id: str,
        candidates: Sequence[Candidate],
        settings: GatherSettings,
        *,
        epoch: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stack, self._run_id = stack, run_id
        self._candidates, self._settings = candidates, settings
        self._epoch, self._clock = epoch, clock
        self._plans: dict[int, tuple[dataset_pb.Group, ...]] = {}

    async def enqueue(self, step: int, history: History) -> None:
        """Enqueue the first wave of a step, once; harmless when it is there already."""
        if step in self._plans:
            return
        plan = plan_step(self._run_id, step, self._candidates, history, self._settings)
        await self._stack.queue.enqueue_groups(plan[: self._settings.groups_per_step])
        self._plans[step] = plan

    async def collect(
        self, step: int, version: int, report: Callable[[int, int, int, str], None]
    ) -> Collected:
        """Take every group of `step`, refilling while too few of them teach.

        `report` is told (rollouts ended, rollouts asked for, rollouts under way, detail).

        Raises:
            FailedPrecondition: no rollout was committed for too long; says what the queue holds.
            Unavailable: most rollouts were lost to infrastructure; says with which error.
        """
        plan = self._plans[step]
        slots = {group.id: slot for slot, group in enumerate(plan)}
        wave = min(self._settings.groups_per_step, len(plan))
        asked, taken = wave, dict[str, dataset_pb.CompleteGroup]()
        patience = _Patience(self._stack, self._run_id, self._settings.idle_deadline_s, self._clock)
        while True:
            count = max(1, asked - len(taken))
            fresh = await self._stack.queue.take_groups(
                self._run_id, count, step=step, epoch=self._epoch
            )
            taken |= {group.group.id: group for group in fresh}
            # Refills of an earlier life may come before groups of the first wave.
            asked = max([asked, *(slots[name] + 1 for name in taken)])
            rollouts = (await self._stack.queue.get_queue(self._run_id, step=step)).rollouts
            ended = rollouts["committed"] + rollouts["lost"]
            detail = f"step {step}, {len(taken)} of {asked} groups"
            report(ended, sum(rollouts.values()), rollouts["leased"], detail)
            if any(group.id not in taken for group in plan[:asked]):
                await patience.wait(step, progressed=bool(fresh))
                continue
            _check_lost(step, list(taken.values()))
            collected = self._collected(plan[:asked], taken, version, asked - wave)
            missing = self._settings.groups_per_step - len(collected.teaching)
            more = min(missing, len(plan) - asked)
            if more > 0:
                await self._stack.queue.enqueue_groups(plan[asked : asked + more])
                asked += more
                continue
            left = min(await self._left(step), len(plan) - asked)
            if left == 0:
                del self._plans[step]
                return collected
            asked += left

    async def _left(self, step: int) -> int:
        """Refills that an earlier life asked for, and whose groups turned out otherwise now."""
        groups = (await self._stack.queue.get_queue(self._run_id, step=step)).groups
        return groups["open"] + groups["complete"]

    def _collected(
        self,
        plan: Sequence[dataset_pb.Group],
        taken: Mapping[str, dataset_pb.CompleteGroup],
        version: int,
        refills: int,
    ) -> Collected:
        groups = tuple(taken[group.id] for group in plan)
        limit, truncated = self._settings.max_staleness, self._settings.truncated
        fates = {
            g.group.id: fate(g, version=version, max_staleness=limit, truncated=truncated)
            for g in groups
        }
        return Collected(groups, fates, refills)


def _check_lost(step: int, groups: Sequence[dataset_pb.CompleteGroup]) -> None:
    """Tell an outage, which takes most rollouts of several tasks or all there are, from a bad task.

    Raises:
        Unavailable: it is an outage; the step must be tried anew.
    """
    lost, size = sum(g.lost for g in groups), sum(g.group.size for g in groups)
    hit = {g.group.task_id for g in groups if g.lost}
    if lost == size or (2 * lost > size and len(hit) > 1):
        reason = next((g.lost_error for g in groups if g.lost_error), "no error is recorded")
        raise Unavailable(
            f"step {step}: {lost} of {size} rollouts were lost to infrastructure ({reason}); "
            "see the logs of the services"
        )


class _Patience:
    """Polls with backoff and gives up when the queue stands still."""

    def __init__(
        self, stack: Stack, run_id: str, deadline_s: float, clock: Callable[[], float]
    ) -> None:
        self._stack, self._run_id, self._deadline_s = stack, run_id, deadline_s
        self._clock = clock
        self._since_s, self._committed, self._wait_s = clock(), -1, _POLL_S[0]

    async def wait(self, step: int, *, progressed: bool) -> None:
        """Sleep until the next poll."""
        if progressed:
            self._since_s, self._wait_s = self._clock(), _POLL_S[0]
        elif self._wait_s >= _POLL_S[1]:
            await self._check(step)
        await asyncio.sleep(self._wait_s)
        self._wait_s = min(self._wait_s * 1.5, _POLL_S[1])

    async def _check(self, step: int) -> None:
        queue = await self._stack.queue.get_queue(self._run_id)
        if queue.rollouts["committed"] != self._committed:
            self._since_s, self._committed = self._clock(), queue.rollouts["committed"]
        if self._clock() - self._since_s > self._deadline_s:
            counts = ", ".join(f"{n} {state}" for state, n in sorted(queue.rollouts.items()))
            raise FailedPrecondition(
                f"step {step}: no rollout was committed for {self._deadline_s:.0f} s "
                f"(rollouts: {counts or 'none'}); are rollout workers running and healthy?"
            )

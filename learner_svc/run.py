"""A run in memory, and what happens to it."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from learner_svc import checkpoint as ckpt
from learner_svc.process import WorkerProcess
from learner_svc.published import Published
from learner_svc.record import RunFiles, RunRecord, StepRecord
from learner_svc.sync import SyncConfig


@dataclass(frozen=True, slots=True)
class RunsConfig:
    """Bounds of the runs of one learner."""

    processes: int = 1
    """Ranks of each machine."""
    nodes: int = 1
    """Machines of a run."""
    address: str = "127.0.0.1"
    """Where the others reach this one."""
    keep_checkpoints: int = 3
    start_timeout_s: float = 600.0
    step_timeout_s: float = 3600.0
    save_timeout_s: float = 900.0
    stop_grace_s: float = 20.0
    """Time that a stopped worker gets to finish what it does."""
    max_restarts: int = 3
    """In a row; one more step than ever done begins a new row."""
    silence_s: float = 30.0
    """Time without a sign of life of another machine after which it is lost."""
    sync: SyncConfig = field(default_factory=SyncConfig)
    """How weights are offered to policies that do not share this disk."""


@dataclass(frozen=True, slots=True)
class StepProgress:
    """How far a step is."""

    step: int
    tokens_done: int
    tokens_total: int


@dataclass(frozen=True, slots=True)
class Restart:
    """Ranks are begun anew after some were lost; or, `complete`, stand where they were."""

    number: int
    limit: int
    reason: str
    from_step: int
    to_step: int
    complete: bool = False


Event = StepRecord | ckpt.Saved | StepProgress | Restart


@dataclass(slots=True)
class Run:
    """A run in memory."""

    record: RunRecord
    files: RunFiles
    worker: WorkerProcess | None = None
    step: int = 0
    checkpoint: ckpt.Saved | None = None
    """What the weights at hand go back to: written by this run, or what it was started from."""
    published: Published | None = None
    """What was published last, if it is still there; it may be ahead of `checkpoint`."""
    restarts: int = 0
    restarts_in_row: int = 0
    """Since the run was last further than ever."""
    events: list[Event] = field(default_factory=list)
    progress: StepProgress | None = None
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _waking: set[asyncio.Task[Any]] = field(default_factory=set)

    def progressed(self, progress: StepProgress) -> None:
        """Tell the watchers, soon, how far a step is."""
        self.progress = progress
        task = asyncio.ensure_future(self.publish(None))
        self._waking.add(task)
        task.add_done_callback(self._waking.discard)

    async def publish(self, event: Event | None) -> None:
        """Record an event and wake the watchers."""
        async with self.changed:
            if event is not None:
                self.events.append(event)
            self.changed.notify_all()

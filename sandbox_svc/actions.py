"""Commands as functions of a state: run in a fresh fork, or answered with what they gave before.

- The key covers all that may decide a result: state, arguments, environment, directory, input, the
  limits a program can run into, the runtime with its program and its rules, the interpreters that
  the state names and the host has, and the host's programs where it stands on them. Bounds on time
  are not part of it, because what they cut is never kept.
- Only commands that came to their own end are kept, failing ones too: never a timeout, trouble of
  the platform, or a run in which any process went over a limit or the host was short of room.
- Equal actions in flight share one run, except those that ask for no cache or are quarantined.
- A share of the answers is run again in the background. Runs that differ in reason, exit code,
  output or kept files quarantine their key: it is never answered from the cache again.
- A kept result of files is a state named by parent and action; a state that exists is never
  replaced, so a run that differs from it gets a name of its own.
- Actions have places of their own, with a bounded queue before them.
"""

import asyncio
import contextlib
import errno
import hashlib
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from regreen.rpc.errors import DiskFull, RegreenError, ResourceExhausted
from regreen.rpc.tenants import charged, sees
from sandbox_svc import metrics
from sandbox_svc.action_store import ActionStore, Outcome, Quarantined
from sandbox_svc.backends.base import (
    Box,
    Command,
    EndReason,
    ExecResult,
    Limits,
    Runtime,
    check_kept,
    short_of_room,
)
from sandbox_svc.backends.commands import check_command
from sandbox_svc.backends.tree_digest import tree_digest
from sandbox_svc.builders.interpreters import stamps
from sandbox_svc.flights import Flights
from sandbox_svc.state_records import State, state_id
from sandbox_svc.states import StateStore

log = structlog.get_logger(__name__)

_FORMAT = 2
"""Counts up when equal actions would give something else than before."""
_KILLED = 9
_UNREADABLE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
_RERUNS_AT_ONCE = 2
_SHOWN_BYTES = 40


@dataclass(frozen=True, slots=True)
class ActionLimits:
    """How many actions there may be, and what is kept of them."""

    running: int = 4
    queued: int = 256
    cache_bytes: int = 1 << 30
    rerun_share: float = 0.02
    retry_after_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Action:
    """A command on a state, with the limits in force."""

    state_id: str
    command: Command
    limits: Limits

    def key(self, runtime: str, interpreters: Sequence[object] = ()) -> str:
        """SHA-256 over everything that may decide the result."""
        command, limits = self.command, self.limits
        parts = [
            _FORMAT,
            runtime,
            list(interpreters),
            self.state_id,
            list(command.argv),
            sorted(command.env.items()),
            command.cwd,
            hashlib.sha256(command.stdin).hexdigest(),
            command.output_bytes,
            limits.memory_bytes,
            limits.pids,
            limits.cpus,
            limits.disk_bytes,
            limits.inodes,
            limits.output_bytes,
        ]
        return hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Answer:
    """What an action gave, and where that comes from."""

    outcome: Outcome
    key: str
    cached: bool = False
    quarantined: bool = False
    state: State | None = None


class Actions:
    """Runs and remembers the actions of one service."""

    def __init__(
        self,
        states: StateStore,
        runtime: Runtime,
        home: Path,
        *,
        limits: ActionLimits | None = None,
        defaults: Limits | None = None,
        clock: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._states, self._runtime = states, runtime
        self._limits, self._defaults = limits or ActionLimits(), defaults or Limits()
        self._clock, self._chance = clock, chance
        self._store = ActionStore(home / "actions", max_bytes=self._limits.cache_bytes)
        self._flights: Flights[Answer] = Flights()
        self._places = asyncio.Semaphore(self._limits.running)
        self._queued = 0
        self._reruns: dict[str, asyncio.Task[None]] = {}

    async def open(self) -> None:
        """Read what was kept; the states must be open."""
        await asyncio.to_thread(self._store.open, lambda id: self._states.peek(id) is not None)
        self._states.changed.append(self._on_change)

    async def close(self) -> None:
        """End what is running."""
        for task in self._reruns.values():
            task.cancel()
        await asyncio.gather(*self._reruns.values(), return_exceptions=True)
        await self._flights.close()

    def _on_change(self, changed_id: str) -> None:
        if self._states.peek(changed_id) is None:
            self._store.drop_state(changed_id)

    def quarantined(self) -> "list[Quarantined]":
        """Quarantined actions that the caller sees, oldest first."""
        return [item for item in self._store.list_quarantined() if sees(item.tenant)]

    async def execute(
        self,
        state_id: str,
        command: Command,
        *,
        limits: Limits | None = None,
        do_not_cache: bool = False,
        skip_cache_lookup: bool = False,
        keep_state: bool = False,
    ) -> Answer:
        """What a command gives on a state.

        Raises:
            NotFound: no such state.
            InvalidArgument: the command makes no sense.
            FailedPrecondition: nothing here would keep one of the limits.
            ResourceExhausted: too many actions wait; carries a delay. Or the quota of the caller's
                tenant is used up.
        """
        state = self._states.runnable(state_id)
        check_command(command)
        check_kept(limits or Limits(), self._runtime.unkept())
        action = Action(state_id, command, _complete(limits or Limits(), self._defaults))
        key = action.key(self._runtime.identity(), stamps(state.metadata, state.base))
        answer = await self._answer(action, key, do_not_cache, skip_cache_lookup, keep_state)
        if answer.state is None:
            return answer
        return replace(answer, state=await self._states.owners.share(answer.state))

    async def _answer(
        self,
        action: Action,
        key: str,
        do_not_cache: bool,
        skip_cache_lookup: bool,
        keep_state: bool,
    ) -> Answer:
        """From the cache, from a run under way or from one of its own."""
        if do_not_cache or self._store.is_quarantined(key):
            self._admit(keep_state)
            metrics.ACTION_CACHE_MISSES.inc()
            answer = await self._run(action, key, keep_state, own_name=True)
            return replace(answer, quarantined=self._store.is_quarantined(key))
        if not skip_cache_lookup:
            found = await self._look_up(action, key, keep_state)
            if found is not None:
                metrics.ACTION_CACHE_HITS.inc()
                self._maybe_rerun(action, key, keep_state, found.outcome)
                return found
        self._admit(keep_state)
        flight = f"{key} {keep_state}"
        joined = flight in self._flights
        (metrics.ACTION_CACHE_HITS if joined else metrics.ACTION_CACHE_MISSES).inc()
        answer = await self._flights.join(
            flight, lambda _: self._run_and_keep(action, key, keep_state)
        )
        return replace(answer, cached=joined)

    async def _look_up(self, action: Action, key: str, keep_state: bool) -> Answer | None:
        found = await asyncio.to_thread(self._store.get, key)
        state = self._states.peek(action.state_id)
        if found is None or state is None or found.state_created_s != state.created_s:
            return None
        if self._store.is_quarantined(key):
            return None
        if not keep_state:
            return Answer(found, key, cached=True)
        child = self._states.peek(found.child_id)
        if child is None:
            return None
        self._states.owners.admit_share(child)
        return Answer(found, key, cached=True, state=child)

    def _admit(self, keep_state: bool) -> None:
        if keep_state:
            self._states.owners.admit()

    async def _run_and_keep(self, action: Action, key: str, keep_state: bool) -> Answer:
        answer = await self._run(action, key, keep_state)
        if not _is_lasting(answer.outcome.result, action.limits):
            return answer
        known = await asyncio.to_thread(self._store.get, key)
        if known is not None and known.state_created_s != answer.outcome.state_created_s:
            known = None
        if self._differ(action, key, known, answer):
            return replace(answer, quarantined=True)
        outcome = answer.outcome
        if known is not None and not outcome.child_id:
            outcome = replace(outcome, files_sha256=known.files_sha256, child_id=known.child_id)
        if not self._store.is_quarantined(key) and self._states.peek(action.state_id):
            with contextlib.suppress(OSError, DiskFull):  # a result that is not kept is one still
                await asyncio.to_thread(self._store.put, key, action.state_id, outcome)
        return answer

    def _differ(self, action: Action, key: str, known: Outcome | None, answer: Answer) -> bool:
        """Whether a run gave something else than is known; then its key is quarantined."""
        found = answer.outcome
        detail = ""
        if known is not None:
            detail = difference(known, found)
        named = state_id(action.state_id, f"action {key}")
        if not detail and answer.state is not None and answer.state.id != named:
            detail = "the files that it left differ from those of an earlier run"
        if detail and not self._store.is_quarantined(key):
            argv = action.command.argv
            item = Quarantined(key, action.state_id, argv, self._clock(), detail, charged())
            self._store.quarantine(item)
            metrics.ACTIONS_QUARANTINED.inc()
            log.warning("action quarantined", key=key, state_id=action.state_id, detail=detail)
        return bool(detail)

    def _maybe_rerun(self, action: Action, key: str, keep_state: bool, known: Outcome) -> None:
        """Run a share of what is answered from the cache again, in the background."""
        busy = key in self._reruns or len(self._reruns) >= _RERUNS_AT_ONCE or self._queued
        if busy or self._chance() >= self._limits.rerun_share:
            return
        task = asyncio.create_task(self._rerun(action, key, keep_state, known))
        self._reruns[key] = task
        task.add_done_callback(lambda _: self._reruns.pop(key, None))

    async def _rerun(self, action: Action, key: str, keep_state: bool, known: Outcome) -> None:
        metrics.ACTION_RERUNS.inc()
        try:
            answer = await self._run(action, key, keep_state)
        except (RegreenError, OSError) as error:
            log.info("action not compared", key=key, error=str(error))
            return
        made = answer.state
        named = state_id(action.state_id, f"action {key}")
        try:
            same_state = answer.outcome.state_created_s == known.state_created_s
            if same_state and _is_lasting(answer.outcome.result, action.limits):
                self._differ(action, key, known, answer)
        finally:
            if made is not None and made.id != named:
                await self._states.delete(made.id)

    async def _run(
        self, action: Action, key: str, keep_state: bool, *, own_name: bool = False
    ) -> Answer:
        """One run in a fresh fork."""
        async with self._place():
            state = self._states.known(action.state_id)
            self._states.hold(state.layers)
            try:
                box = await self._runtime.create(
                    state.layers,
                    limits=action.limits,
                    mounts=state.mounts,
                    env=state.env,
                    base=state.base,
                )
                try:
                    return await self._in_box(box, action, key, state, keep_state, own_name)
                finally:
                    await asyncio.shield(box.delete())
            finally:
                self._states.release(state.layers)

    async def _in_box(
        self, box: Box, action: Action, key: str, state: State, keep_state: bool, own_name: bool
    ) -> Answer:
        streams = {"stdout": hashlib.sha256(), "stderr": hashlib.sha256()}

        async def sink(stream: str, data: bytes) -> None:
            streams[stream].update(data)

        result = await box.run(replace(action.command, measured=True), sink)
        if self._runtime.disk_is_full():
            result = replace(result, least_free_bytes=0)
        metrics.EXEC_SECONDS.labels(result.reason.value).observe(result.wall_s)
        digests = (streams["stdout"].hexdigest(), streams["stderr"].hexdigest())
        outcome = Outcome(result, *digests, state_created_s=state.created_s)
        if not keep_state or not _is_lasting(result, action.limits):
            return Answer(outcome, key)
        child, files_sha256 = await self._keep(box, key, state, own_name)
        outcome = replace(outcome, files_sha256=files_sha256, child_id=child.id)
        return Answer(outcome, key, state=child)

    async def _keep(self, box: Box, key: str, state: State, own_name: bool) -> tuple[State, str]:
        """The state that a command has left, and the digest of what it changed."""
        with self._states.growing():
            layer = await box.freeze()
            digest = await self._digest(layer)
            action = f"action {key}"
            child = None if own_name else self._states.peek(state_id(state.id, action))
            if child is not None and child.created_s >= state.created_s:
                if not digest or child.labels.get("files_sha256") == digest:
                    await self._states.collect()  # the new layer goes when nothing grows any more
                    return child, digest
                own_name = True
            labels = {"action_sha256": key, "files_sha256": digest}
            parent = self._states.peek(state.id) or state  # flattened meanwhile, or deleted
            added = await self._states.add(
                (*parent.layers, layer),
                action=f"{action} {layer}" if own_name else action,
                parent=parent,
                labels=labels,
            )
            return added, digest

    async def _digest(self, layer: str) -> str:
        """Digest of a layer's files; empty where they cannot be compared.

        The runtime may not show them, or a command may have left what the service cannot read.
        """
        files = getattr(self._runtime, "layer_files", None)
        if files is None:
            return ""
        try:
            return await asyncio.to_thread(tree_digest, files().layer_path(layer))
        except OSError as error:
            if error.errno not in _UNREADABLE:
                raise
            log.info("files of an action not compared", layer=layer, error=str(error))
            return ""

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """One of the places of actions."""
        if self._places.locked() and self._queued >= self._limits.queued:
            raise ResourceExhausted(
                f"{self._limits.running} actions run and {self._queued} wait",
                metadata={"limit": str(self._limits.queued)},
                retry_after_s=self._limits.retry_after_s,
            )
        self._queued += 1
        try:
            with metrics.ACTION_QUEUE_DEPTH.track_inprogress():
                await self._places.acquire()
        finally:
            self._queued -= 1
        try:
            yield
        finally:
            self._places.release()


def _is_lasting(result: ExecResult, limits: Limits) -> bool:
    """Whether a command came to its own end, and nothing in it was cut short.

    A kill may have come from the host; on a host without room something may have failed for that.
    """
    if result.overruns or short_of_room(result.least_free_bytes, limits):
        return False
    if result.reason is EndReason.SIGNAL:
        return result.signal != _KILLED
    return result.reason is EndReason.EXIT


def _complete(limits: Limits, defaults: Limits) -> Limits:
    """Limits with the defaults in the place of zeros, so that equal actions have one key."""
    return Limits(
        memory_bytes=limits.memory_bytes or defaults.memory_bytes,
        pids=limits.pids or defaults.pids,
        cpus=limits.cpus or defaults.cpus,
        disk_bytes=limits.disk_bytes or defaults.disk_bytes,
        inodes=limits.inodes or defaults.inodes,
        output_bytes=limits.output_bytes or defaults.output_bytes,
        wall_s=limits.wall_s or defaults.wall_s,
    )


def difference(first: Outcome, second: Outcome) -> str:
    """What differs between two runs, for people; empty where nothing does."""
    one, two = first.result, second.result
    found = []
    if one.reason is not two.reason:
        found.append(f"ended by {one.reason.value}, then {two.reason.value}")
    elif (one.exit_code, one.signal) != (two.exit_code, two.signal):
        found.append(f"exit code {one.exit_code}, then {two.exit_code}")
    for name in ("stdout", "stderr"):
        digests = [getattr(outcome, f"{name}_sha256") for outcome in (first, second)]
        if digests[0] != digests[1]:
            place = _first_difference(getattr(one, name).head, getattr(two, name).head)
            found.append(f"{name} {digests[0][:12]}, then {digests[1][:12]}{place}")
    if first.files_sha256 and second.files_sha256 and first.files_sha256 != second.files_sha256:
        found.append(f"files {first.files_sha256[:12]}, then {second.files_sha256[:12]}")
    return "; ".join(found)


def _first_difference(one: bytes, two: bytes) -> str:
    """Where two outputs part, with a little of each."""
    pairs = zip(one, two, strict=False)
    shortest = min(len(one), len(two))
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), shortest)
    if one == two:
        return ""
    shown = [repr(part[at : at + _SHOWN_BYTES])[1:] for part in (one, two)]
    return f" (from byte {at}: {shown[0]}, then {shown[1]})"

"""Watches a sandbox while anything runs in it, for the limits that the kernel does not enforce.

- Whatever runs counts: commands, and what commands that have returned left behind.
- Disk: the upper is measured when the file system's free space says it could be over, and
  otherwise at intervals that grow with the cost of measuring, and shrink where the sandbox would
  be over before at the pace at which it grew. What was measured is kept for the sandbox's life, so
  that many short commands add up.
- What is written from outside is counted before it is written, against the last measure and what
  came since; the upper is measured where that could be too much, and then the write is refused.
  What processes wrote meanwhile shows in the free space, unless others give back as much between
  two looks at it: then it counts from the next interval on.
- A tree that cannot be looked at whole is over as soon as free space could say so, and after a
  short while in any case: hiding files is no way around the limit.
- Each look at the free space is noted for the commands that run: what fails on a host that is
  nearly full may have failed for that.
- Output: a command that prints more than the sandbox's output limit is stopped.
- Memory, only without cgroups: the sum of resident memory.
- An overrun kills every process of the sandbox; its running commands carry the reason.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from regreen.rpc.errors import RegreenError, ResourceExhausted
from sandbox_svc.backends import uppers
from sandbox_svc.backends.base import EndReason
from sandbox_svc.backends.layers import free_bytes
from sandbox_svc.backends.link import LinkClosed

if TYPE_CHECKING:
    from sandbox_svc.backends.embedded_box import EmbeddedBox
    from sandbox_svc.backends.jobs import Job

_TICK_S = 0.1
_SLOW_S = 2.0
_COST_FACTOR = 10.0
_HIDDEN_S = 1.0
_COUNT_S = 1.0
_BLOCK = 4096
"""Of the disk; no file with content takes less."""


class _Disk:
    """Decides when the upper must be measured again."""

    def __init__(self, box: "EmbeddedBox", path: str) -> None:
        self._box, self._path = box, path
        self._bytes = self._inodes = 0
        self._reached = False
        """Whether it was at a limit when it was measured last."""
        self.reached = 0
        """How often it has come to one."""
        self.written_bytes = self.made = 0
        """Bytes and files since it was measured, as far as they were counted."""
        self.free_bytes = 0
        """Room that the host had at the last look."""
        self._free = self._free_inodes = 0
        self._lost_bytes = self._lost_inodes = 0
        self._lost_before = self.look()
        """What the file system had lost when the upper was measured."""
        self._measured_s = time.monotonic()
        self._next = self._measured_s + _SLOW_S / 4
        self._hidden_since = 0.0

    def look(self) -> tuple[int, int]:
        """Bytes and inodes that the file system has lost so far, whatever it was given back."""
        info = os.statvfs(self._path)
        self.free_bytes = free_bytes(info)
        free, free_inodes = info.f_bavail * info.f_frsize, info.f_ffree
        self._lost_bytes += max(0, self._free - free)
        self._lost_inodes += max(0, self._free_inodes - free_inodes)
        self._free, self._free_inodes = free, free_inodes
        return self._lost_bytes, self._lost_inodes

    def _is_over(self, size_bytes: int, inodes: int) -> bool:
        limits = self._box.limits
        return (0 < limits.disk_bytes < size_bytes) or (0 < limits.inodes < inodes)

    def _at_worst(self) -> tuple[int, int]:
        """What was measured, and all that the file system has lost since."""
        (lost, lost_inodes), (before, inodes_before) = self.look(), self._lost_before
        return self._bytes + lost - before, self._inodes + lost_inodes - inodes_before

    def could_be_over(self, now: float) -> bool:
        return now > self._next or self._is_over(*self._at_worst())

    def could_be_near(self) -> bool:
        """Whether about as much was written, or lost by the file system, as may be written."""
        size_bytes, inodes = self._at_most()
        return self._is_over(size_bytes * 8 // 7, inodes * 8 // 7)

    def _at_most(self) -> tuple[int, int]:
        """What was measured, and what has come since by either account."""
        size_bytes, inodes = self._at_worst()
        return (
            max(size_bytes, self._bytes + self.written_bytes),
            max(inodes, self._inodes + self.made),
        )

    async def admit(self, path: str, size_bytes: int) -> None:
        """Count a file that is written from outside, before it is.

        Raises:
            ResourceExhausted: with it the sandbox would be over a limit.
        """
        size_bytes = -(-size_bytes // _BLOCK) * _BLOCK
        entries, freed = path.count("/"), 0
        bytes_now, inodes_now = self._at_most()
        if self._is_over(bytes_now + size_bytes, inodes_now + entries):
            await self.is_over(time.monotonic())
            freed, entries = uppers.room_of(Path(self._box.upper_path), path)
            used = self._at_worst() if self._hidden_since else (self._bytes, self._inodes)
            _check(path, "disk_bytes", self._box.limits.disk_bytes, used[0], size_bytes - freed)
            _check(path, "inodes", self._box.limits.inodes, used[1], entries)
        self.written_bytes += size_bytes - freed
        self.made += entries

    async def is_over(self, now: float) -> bool:
        box = self._box
        before, written, made = self.look(), self.written_bytes, self.made
        used = await box.measure()
        unlinked = 0
        if box.limits.disk_bytes:
            unlinked = int((await box.usage()).get("unlinked", 0))
        size_bytes, inodes = used.size_bytes + unlinked, used.inodes
        cost_s = time.monotonic() - now
        if not used.whole:
            self._hidden_since = self._hidden_since or now
            self._next = now + cost_s
            hiding = now - self._hidden_since > _HIDDEN_S
            return hiding or self._is_over(size_bytes, inodes) or self._is_over(*self._at_worst())
        self._hidden_since = 0.0
        self._next = now + self._interval_s(now, cost_s, size_bytes, inodes)
        self._bytes, self._inodes, self._measured_s = size_bytes, inodes, now
        largest = max(size_bytes, used.largest_bytes)
        already, self._reached = self._reached, self._is_over(largest + 1, inodes + 1)
        self.reached += self._reached and not already
        self.written_bytes -= written
        self.made -= made
        self._lost_before = before
        return self._is_over(size_bytes, inodes)

    def _interval_s(self, now: float, cost_s: float, size_bytes: int, inodes: int) -> float:
        """Until the next measure: shorter where, grown on as since the last, it would be over."""
        interval_s, since_s = max(_SLOW_S, _COST_FACTOR * cost_s), now - self._measured_s
        limits = self._box.limits
        for most, last, used in (
            (limits.disk_bytes, self._bytes, size_bytes),
            (limits.inodes, self._inodes, inodes),
        ):
            if most and used > last:
                interval_s = min(interval_s, since_s * (most - used) / (used - last))
        return max(2 * cost_s, interval_s)


def _check(path: str, limit: str, most: int, used: int, more: int) -> None:
    if more > 0 and 0 < most < used + more:
        raise ResourceExhausted(
            f"writing {path} would take the sandbox over limits.{limit} ({used} of {most} are "
            f"used, it needs {more}); delete files, or use a sandbox with a higher limit",
            metadata={"limit": f"limits.{limit}", "most": str(most), "used": str(used)},
        )


class Watch:
    """The watchdog of one sandbox, from the start of its first process to its end."""

    def __init__(self, box: "EmbeddedBox", jobs: Mapping[int, "Job"], *, memory: bool) -> None:
        """`memory`: whether it is watched too, because no control group does."""
        self._box, self._jobs, self._memory = box, jobs, memory
        self._disk = _Disk(box, box.upper_path)
        self._next_count = 0.0
        self._task: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """Watch from now on, until nothing runs any more."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._watch())

    def look(self) -> None:
        """Note for every command that runs how much room the host has."""
        with contextlib.suppress(FileNotFoundError):  # the sandbox is being deleted
            self._disk.look()
        free = self._disk.free_bytes
        for job in self._jobs.values():
            least = job.least_free_bytes
            job.least_free_bytes = free if least < 0 else min(least, free)

    @property
    def disk_reached(self) -> int:
        """How often the sandbox was seen to come to a limit of its disk."""
        return self._disk.reached

    async def admit(self, path: str, size_bytes: int) -> None:
        """Count a file that no process of the sandbox writes, before it is written.

        Raises:
            ResourceExhausted: with it the sandbox would be over a limit.
        """
        await self._disk.admit(path, size_bytes)
        if self._disk.could_be_near():
            self.wake()

    async def measure(self, written_bytes: int, *, anyway: bool) -> None:
        """Look what is on the disk after so much was written: if need be, or anyway."""
        self._disk.written_bytes += written_bytes
        with contextlib.suppress(LinkClosed, RegreenError, TimeoutError, FileNotFoundError):
            if anyway or self._disk.could_be_near():
                await self._disk.is_over(time.monotonic())  # else it is frozen or ended

    def close(self) -> None:
        """Watch no more."""
        if self._task is not None:
            self._task.cancel()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                self.look()
                await self._stop_floods()
                reason = await self._overrun()
                if reason is not None:
                    await self._box.stop_all(reason)
                if await self._is_quiet():
                    return
            except (TimeoutError, FileNotFoundError, ResourceExhausted):
                continue  # the service may be out of descriptors for a while
            except (LinkClosed, RegreenError):
                return

    async def _stop_floods(self) -> None:
        for job in list(self._jobs.values()):
            too_much = sum(reader.collector.total_bytes for reader in job.readers)
            if 0 < self._box.limits.output_bytes < too_much:
                await self._box.stop(job, EndReason.OUTPUT)

    async def _overrun(self) -> EndReason | None:
        now, limits, box = time.monotonic(), self._box.limits, self._box
        bounded = limits.disk_bytes or limits.inodes
        if bounded and self._disk.could_be_over(now) and await self._disk.is_over(now):
            return EndReason.DISK
        if self._memory and 0 < limits.memory_bytes < int((await box.usage())["memory"]):
            return EndReason.OOM
        return None

    async def _is_quiet(self) -> bool:
        """Whether neither a command nor anything that one left behind runs; asked now and then."""
        now = time.monotonic()
        if self._jobs or now < self._next_count:
            return False
        self._next_count = now + _COUNT_S
        left = int((await self._box.usage())["processes"])
        return not left and not self._jobs

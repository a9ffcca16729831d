"""Watches a sandbox while commands run, for the limits that the kernel does not enforce.

- Disk: the upper is measured when the file system's free space says it could be over, and
  otherwise at intervals that grow with the cost of measuring.
- Output: a command that prints more than the sandbox's output limit is stopped.
- Memory, only without cgroups: the sum of resident memory.
- An overrun stops all running commands of the sandbox, each with the reason.
"""

import asyncio
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from regreen.rpc.errors import RegreenError
from sandbox_svc.backends.base import EndReason
from sandbox_svc.backends.link import LinkClosed

if TYPE_CHECKING:
    from sandbox_svc.backends.embedded_box import EmbeddedBox, Job

_TICK_S = 0.1
_SLOW_S = 2.0
_COST_FACTOR = 10.0


class _Disk:
    """Decides when the upper must be measured again."""

    def __init__(self, box: "EmbeddedBox", path: str) -> None:
        self._box, self._path = box, path
        self._bytes = self._inodes = 0
        self._free = self._free_inodes = -1
        self._next = 0.0

    def could_be_over(self, now: float) -> bool:
        info = os.statvfs(self._path)
        free, free_inodes = info.f_bavail * info.f_frsize, info.f_ffree
        if self._free < 0:
            self._free, self._free_inodes = free, free_inodes
            self._next = now + _SLOW_S / 4
        limits = self._box.limits
        bytes_now = self._bytes + max(0, self._free - free)
        inodes_now = self._inodes + max(0, self._free_inodes - free_inodes)
        over_bytes = bool(limits.disk_bytes) and bytes_now > limits.disk_bytes
        over_inodes = bool(limits.inodes) and inodes_now > limits.inodes
        return over_bytes or over_inodes or now > self._next

    async def is_over(self, now: float) -> bool:
        box = self._box
        used = await box.measure()
        unlinked = 0
        if box.limits.disk_bytes:
            unlinked = int((await box.usage()).get("unlinked", 0))
        self._bytes, self._inodes = used.size_bytes + unlinked, used.inodes
        info = os.statvfs(self._path)
        self._free, self._free_inodes = info.f_bavail * info.f_frsize, info.f_ffree
        self._next = now + max(_SLOW_S, _COST_FACTOR * (time.monotonic() - now))
        limits = box.limits
        return (0 < limits.disk_bytes < self._bytes) or (0 < limits.inodes < self._inodes)


async def watch(box: "EmbeddedBox", jobs: Mapping[int, "Job"]) -> None:
    """Watch until cancelled."""
    disk = _Disk(box, box.upper_path)
    while True:
        await asyncio.sleep(_TICK_S)
        try:
            reason = await _overrun(box, disk)
        except (LinkClosed, RegreenError):
            return
        except (TimeoutError, FileNotFoundError):
            continue
        for job in list(jobs.values()):
            too_much = sum(reader.collector.total_bytes for reader in job.readers)
            if 0 < box.limits.output_bytes < too_much:
                await box.stop(job, EndReason.OUTPUT)
            elif reason is not None:
                await box.stop(job, reason)


async def _overrun(box: "EmbeddedBox", disk: _Disk) -> EndReason | None:
    now, limits = time.monotonic(), box.limits
    bounded = limits.disk_bytes or limits.inodes
    if bounded and disk.could_be_over(now) and await disk.is_over(now):
        return EndReason.DISK
    if box.soft_memory and 0 < limits.memory_bytes < int((await box.usage())["memory"]):
        return EndReason.OOM
    return None

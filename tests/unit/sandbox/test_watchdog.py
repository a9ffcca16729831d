"""When the watchdog of a sandbox's disk measures: in time, whatever else the host does."""

import time
from types import SimpleNamespace

import pytest

from sandbox_svc.backends import watchdog
from sandbox_svc.backends.base import Limits
from sandbox_svc.backends.uppers import Usage

MIB = 1 << 20
LIMIT = 10 * MIB


class Host:
    """A file system on which a sandbox writes and others write and delete."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = 1000 * MIB
        self.used = 0
        self.limits = Limits(disk_bytes=LIMIT)
        self.upper_path = "/upper"
        monkeypatch.setattr("os.statvfs", self._statvfs)

    def _statvfs(self, path: str) -> SimpleNamespace:
        blocks = self.free // 4096
        return SimpleNamespace(
            f_bavail=blocks, f_frsize=4096, f_ffree=10**6, f_favail=10**6, f_files=10**7
        )

    def write(self, size_bytes: int, given_back: int = 0) -> None:
        self.used += size_bytes
        self.free += given_back - size_bytes

    async def measure(self) -> Usage:
        return Usage(self.used, 1)

    async def usage(self) -> dict[str, int]:
        return {"unlinked": 0}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


def disk_of(host: Host) -> watchdog._Disk:
    return watchdog._Disk(host, host.upper_path)  # type: ignore[arg-type]


async def measured(disk: watchdog._Disk, now: float) -> bool:
    assert disk.could_be_over(now)
    return await disk.is_over(now)


async def test_what_others_gave_back_before_does_not_hide_what_is_written(host: Host) -> None:
    disk = disk_of(host)
    began = time.monotonic()
    host.free += 100 * MIB
    assert not disk.could_be_over(began)
    host.write(LIMIT)
    assert not disk.could_be_over(began)
    host.write(MIB)
    assert await measured(disk, began)


async def test_what_came_while_it_was_measured_counts_as_well(host: Host) -> None:
    disk = disk_of(host)
    began = time.monotonic()

    async def slow() -> Usage:
        found = Usage(host.used, 1)
        host.write(0, given_back=50 * MIB)
        disk.look()
        host.write(LIMIT + MIB)
        return found

    measure, host.measure = host.measure, slow  # type: ignore[method-assign]
    assert not await disk.is_over(began)
    host.measure = measure  # type: ignore[method-assign]
    assert await measured(disk, began)


async def test_a_sandbox_that_would_soon_be_over_is_measured_before(host: Host) -> None:
    disk = disk_of(host)
    began = time.monotonic()
    host.write(8 * MIB, given_back=8 * MIB)  # within one look, so that nothing shows
    assert not await measured(disk, began + 1)
    host.write(MIB, given_back=MIB)
    assert not disk.could_be_over(began + 1.2)
    assert not await measured(disk, began + 1.3)
    assert not disk.could_be_over(began + 1.4)
    host.write(2 * MIB, given_back=2 * MIB)
    assert await measured(disk, began + 1.7)


async def test_one_that_does_not_grow_is_measured_now_and_then(host: Host) -> None:
    host.write(9 * MIB)
    disk = disk_of(host)
    began = time.monotonic()
    assert not await measured(disk, began + 1)
    assert not await measured(disk, began + 3.1)
    assert not disk.could_be_over(began + 5)


async def test_what_a_measure_costs_bounds_how_often_there_is_one(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = disk_of(host)
    began = time.monotonic()
    host.write(LIMIT - 4096, given_back=LIMIT)
    monkeypatch.setattr("time.monotonic", lambda: began + 4)
    assert not await measured(disk, began + 1)  # took three seconds
    assert not disk.could_be_over(began + 6.9)
    assert disk.could_be_over(began + 7.1)

"""Proves, in small sandboxes, which limits and protections this host enforces.

- A limit is proven by the sign that it acted, and by the same script going through where the
  limit is wide. Silence, a time-out or a missing program proves nothing.
- What goes over a limit goes over it by half or more, and not by much: each service pays when it
  starts, most for what goes through.
- Probes only look at protected files (`test -w`); they never write outside their sandbox.
- What is known to be shared between sandboxes is reported too, as not proven.
"""

import asyncio
import errno
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from sandbox_svc.backends.base import Capability, Command, EndReason, ExecResult, Limits

if TYPE_CHECKING:
    from sandbox_svc.backends.embedded import EmbeddedRuntime
    from sandbox_svc.backends.embedded_box import EmbeddedBox

_FORKS = "i=0; while [ $i -lt 40 ]; do sleep 3 & i=$((i+1)); done; echo all"
_MEMORY = "head -c 100000000 /dev/zero | tail -c 100000000 > /dev/null && echo all"
MEMFD = """
import os
for number in range(12):
    fd = os.memfd_create("probe")
    for _ in range(8):
        os.write(fd, bytes(1 << 20))
print("all")
"""
SHARED = """
import ctypes
call = ctypes.CDLL(None, use_errno=True).shmget
call.argtypes = (ctypes.c_int, ctypes.c_size_t, ctypes.c_int)
print("all" if call(0, 100 << 20, 0o1600) >= 0 else ctypes.get_errno())
"""
_SPIN = "while :; do :; done"
_FLOOD = "head -c 4000000 /dev/zero; sleep 0.5; echo all >&2"
_DISK = (
    "head -c 8000000 /dev/zero > /work/home/a; head -c 8000000 /dev/zero > /work/home/b;"
    " sleep 1; echo all"
)
_FILES = (
    "i=0; while [ $i -lt 1000 ]; do : > /work/home/$i; i=$((i+1)); done;"
    " [ -e /work/home/999 ] && sleep 1; echo all"
)
_LOOK = """
grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status
grep -c : /proc/net/dev
test -w /work/home && test -d /usr/bin && test -e /proc/sys/kernel/core_pattern && echo LOOKED
for f in kernel/core_pattern vm/overcommit_memory; do test -w /proc/sys/$f && echo WRITABLE; done
test -w /proc/sysrq-trigger && echo WRITABLE
test -w /usr/bin && echo WRITABLE
unshare --version > /dev/null 2>&1 && echo UNSHARES
LC_ALL=C unshare -U true 2>&1 && echo NESTED
echo end
"""
_TIGHT = Limits(
    memory_bytes=64 << 20,
    pids=16,
    cpus=0.25,
    disk_bytes=10 << 20,
    output_bytes=1 << 20,
)
_WIDE = Limits(
    memory_bytes=1 << 30,
    pids=256,
    cpus=16.0,
    disk_bytes=1 << 30,
    inodes=1 << 20,
    output_bytes=1 << 28,
)
_FEW_FILES = replace(_WIDE, inodes=500)


async def prove(runtime: "EmbeddedRuntime") -> list[Capability]:
    """Run all probes; the result has one entry per limit and protection.

    Raises:
        InfraError: a sandbox could not be made, or was lost, for what the host may not be to blame.
    """
    wanted = (_TIGHT, _WIDE, _TIGHT, _WIDE, _TIGHT, _FEW_FILES, _WIDE)
    made = await asyncio.gather(
        *(runtime.create([], limits=limits) for limits in wanted), return_exceptions=True
    )
    boxes = [box for box in made if not isinstance(box, BaseException)]
    try:
        for failed in made:
            if isinstance(failed, BaseException):
                raise failed
        groups = await asyncio.gather(
            _kernel_limits(runtime.cgroups.name, boxes[0], boxes[1]),
            _service_limits(boxes[2], boxes[3]),
            _walls(boxes[4]),
            _own_files(boxes[1], boxes[3]),
            _numbers_of_files(boxes[5], boxes[6]),
        )
        return [capability for group in groups for capability in group]
    finally:
        await asyncio.gather(*(box.delete() for box in boxes))


async def _run(box: "EmbeddedBox", script: str, timeout_s: float) -> ExecResult:
    return await box.run(Command(("/bin/sh", "-c", script), cwd="/", timeout_s=timeout_s))


def _went_through(result: ExecResult) -> bool:
    """Whether a script came to its last line."""
    return result.ok and b"all" in result.stdout.head + result.stderr.head


def _compared(
    name: str, driver: str, acted: bool, tight: ExecResult, wide: ExecResult
) -> Capability:
    """A limit that acted in one sandbox and let the same script go through in another."""
    reference = _went_through(wide)
    detail = f"at the limit: {tight.reason}" + (
        "" if reference else f"; without it: {wide.reason}, which proves nothing"
    )
    return Capability(name, acted and reference, driver, detail)


async def _kernel_limits(
    driver: str, tight: "EmbeddedBox", wide: "EmbeddedBox"
) -> list[Capability]:
    free = await _run(wide, _SPIN, 0.3)
    unthrottled = wide.throttled() == 0
    spin = await _run(tight, _SPIN, 0.3)
    tries = 10  # a host with much to do gives it less than its limit for a while
    while not (throttled := tight.throttled()) and tries:
        tries -= 1
        await _run(tight, _SPIN, 0.3)
    # A host with much to do takes seconds to fill memory; time proves nothing of this limit.
    memory, much = await _run(tight, _MEMORY, 20.0), await _run(wide, _MEMORY, 20.0)
    refused = memory.reason is EndReason.EXIT and b"memory" in memory.stderr.head
    forks, many = await _run(tight, _FORKS, 2.0), await _run(wide, _FORKS, 2.0)
    unforked = b"fork" in forks.stderr.head.lower() and b"all" not in forks.stdout.head
    timed_out = spin.reason is free.reason is EndReason.TIMEOUT
    return [
        Capability("wall_time", timed_out, "service", f"{spin.wall_s:.2f} s"),
        Capability("cpu", throttled > 0 and unthrottled, driver, f"throttled {throttled} times"),
        _compared("pids", driver, forks.reason is EndReason.PIDS or unforked, forks, many),
        _compared("memory", driver, memory.reason is EndReason.OOM or refused, memory, much),
        await _anonymous_files(driver, tight, wide),
        await _segments(tight, wide),
        Capability(
            "inotify", False, "none", "sandboxes share the inotify instances of one host user"
        ),
    ]


async def _anonymous_files(driver: str, tight: "EmbeddedBox", wide: "EmbeddedBox") -> Capability:
    """Memory in files without a name, which only a control group counts."""
    results = []
    for box in (tight, wide):
        command = Command(("/usr/bin/python3", "-I", "-S", "-c", MEMFD), cwd="/", timeout_s=5.0)
        results.append(await box.run(command))
    return _compared("memfd", driver, results[0].reason is EndReason.OOM, *results)


async def _segments(tight: "EmbeddedBox", wide: "EmbeddedBox") -> Capability:
    """Shared memory that stays when its processes have ended (System V)."""
    command = Command(("/usr/bin/python3", "-I", "-S", "-c", SHARED), cwd="/", timeout_s=5.0)
    refused, had = await tight.run(command), await wide.run(command)
    acted = refused.ok and refused.stdout.text == f"{errno.ENOSPC}\n"
    return _compared("shared_memory", "kernel.shmall", acted, refused, had)


async def _service_limits(tight: "EmbeddedBox", wide: "EmbeddedBox") -> list[Capability]:
    """Disk comes last: what it leaves keeps the sandbox over its limit, which ends any command."""
    flood, loud = await _run(tight, _FLOOD, 5.0), await _run(wide, _FLOOD, 5.0)
    disk, room = await _until_seen(tight, _DISK), await _run(wide, _DISK, 5.0)
    return [
        _compared("disk", "watchdog", disk.reason is EndReason.DISK, disk, room),
        _compared("output", "service", flood.reason is EndReason.OUTPUT, flood, loud),
    ]


async def _until_seen(tight: "EmbeddedBox", script: str) -> ExecResult:
    """What ends a script that goes over a limit of the disk, or else the next command: on a host
    with much to do the watchdog looks later, but what is there is still too much."""
    found = await _run(tight, script, 5.0)
    return found if found.reason is EndReason.DISK else await _run(tight, "sleep 4; echo all", 5.0)


async def _numbers_of_files(tight: "EmbeddedBox", wide: "EmbeddedBox") -> list[Capability]:
    """Empty files: too small for the disk limit to act."""
    few, many = await asyncio.gather(_until_seen(tight, _FILES), _run(wide, _FILES, 5.0))
    return [_compared("inodes", "watchdog", few.reason is EndReason.DISK, few, many)]


async def _own_files(one: "EmbeddedBox", other: "EmbeddedBox") -> list[Capability]:
    """Whether programs are not the host's files, and devices each sandbox's own: locks and watches
    lie on their inodes."""
    found = []
    for name, driver, path, whose, inodes in (
        ("own_programs", "overlayfs", "/usr/bin/env", "the host's", 2),
        ("own_devices", "tmpfs", "/dev/null", "the host's and all sandboxes'", 3),
    ):
        info = os.stat(path)
        looks = [await _run(box, f"stat -L -c '%d %i' {path}", 3.0) for box in (one, other)]
        inside = {look.stdout.text.strip() for look in looks}
        host = f"{info.st_dev} {info.st_ino}"
        own = all(look.ok for look in looks) and host not in inside and len(inside) + 1 >= inodes
        detail = "" if own else f"locks and watches on {path} are {whose}"
        found.append(Capability(name, own, driver if own else "none", detail))
    return found


async def _walls(box: "EmbeddedBox") -> list[Capability]:
    look = (await _run(box, _LOOK, 3.0)).stdout.text
    lines = [line.split() for line in look.splitlines()]
    fields = {line[0].rstrip(":"): line[1] for line in lines if len(line) == 2}
    looked = ["LOOKED"] in lines and ["end"] in lines
    unshares = ["UNSHARES"] in lines and "not permitted" in look
    no_capabilities = fields.get("CapEff") == "0" * 16 == fields.get("CapBnd")
    return [
        Capability("no_capabilities", no_capabilities, "userns", str(fields.get("CapEff"))),
        Capability("no_new_privs", fields.get("NoNewPrivs") == "1", "prctl"),
        Capability("syscall_filter", fields.get("Seccomp") == "2", "seccomp"),
        Capability("no_network", ["1"] in lines, "netns", "only lo exists"),
        Capability("host_read_only", looked and "WRITABLE" not in look, "mounts"),
        Capability(
            "no_nested_namespaces",
            unshares and "NESTED" not in look,
            "seccomp",
            "" if unshares else "no unshare program here that says it was refused",
        ),
    ]

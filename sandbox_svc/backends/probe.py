"""Proves, in small sandboxes, which limits and protections this host enforces.

- Each probe attacks a limit and reports what it saw; a probe that cannot run proves nothing.
- Probes only look at protected files (`test -w`); they never write outside their sandbox.
"""

import asyncio
from typing import TYPE_CHECKING

from sandbox_svc.backends.base import Capability, Command, EndReason, ExecResult, Limits

if TYPE_CHECKING:
    from sandbox_svc.backends.embedded import EmbeddedRuntime
    from sandbox_svc.backends.embedded_box import EmbeddedBox

_FORKS = "i=0; while [ $i -lt 40 ]; do sleep 3 & i=$((i+1)); done; echo all"
_MEMORY = "head -c 200000000 /dev/zero | tail -c 200000000 | wc -c"
_SPIN = "while :; do :; done"
_DISK = (
    "head -c 8000000 /dev/zero > /work/home/a; head -c 8000000 /dev/zero > /work/home/b; sleep 2"
)
_LOOK = """
grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status
grep -c : /proc/net/dev
for f in kernel/core_pattern vm/overcommit_memory; do test -w /proc/sys/$f && echo WRITABLE; done
test -w /proc/sysrq-trigger && echo WRITABLE
test -w /usr/bin && echo WRITABLE
unshare -U true 2>/dev/null && echo NESTED
echo end
"""
_PROBE_LIMITS = Limits(
    memory_bytes=64 << 20,
    pids=16,
    cpus=0.25,
    disk_bytes=10 << 20,
    output_bytes=1 << 20,
)


async def prove(runtime: "EmbeddedRuntime") -> list[Capability]:
    """Run all probes; the result has one entry per limit and protection."""
    boxes = await asyncio.gather(*(runtime.create([], limits=_PROBE_LIMITS) for _ in range(3)))
    try:
        groups = await asyncio.gather(
            _kernel_limits(runtime, boxes[0]), _service_limits(boxes[1]), _walls(boxes[2])
        )
        return [capability for group in groups for capability in group]
    finally:
        await asyncio.gather(*(box.delete() for box in boxes))


async def _run(box: "EmbeddedBox", script: str, timeout_s: float) -> ExecResult:
    return await box.run(Command(("/bin/sh", "-c", script), cwd="/", timeout_s=timeout_s))


async def _kernel_limits(runtime: "EmbeddedRuntime", box: "EmbeddedBox") -> list[Capability]:
    driver = runtime.cgroups.name
    spin = await _run(box, _SPIN, 0.3)
    throttled = box.counters().throttled
    memory = await _run(box, _MEMORY, 3.0)
    memory_held = memory.reason is EndReason.OOM or b"200000000" not in memory.stdout.head
    forks = await _run(box, _FORKS, 2.0)
    forks_held = b"all" not in forks.stdout.head
    return [
        Capability(
            "wall_time", spin.reason is EndReason.TIMEOUT, "service", f"{spin.wall_s:.2f} s"
        ),
        Capability("cpu", throttled > 0, driver, f"throttled {throttled} times"),
        Capability("pids", forks_held, driver, f"40 forks at limit 16: {forks.reason}"),
        Capability("memory", memory_held, driver, f"200 MB at limit 64 MiB: {memory.reason}"),
    ]


async def _service_limits(box: "EmbeddedBox") -> list[Capability]:
    disk = await _run(box, _DISK, 3.0)
    flood = await _run(box, "yes", 3.0)
    held = disk.reason is EndReason.DISK
    output = flood.reason is EndReason.OUTPUT
    return [
        Capability("disk", held, "watchdog", f"16 MB at limit 10 MiB: {disk.reason}"),
        Capability("output", output, "service", f"stopped after {flood.stdout.total_bytes} bytes"),
    ]


async def _walls(box: "EmbeddedBox") -> list[Capability]:
    look = (await _run(box, _LOOK, 3.0)).stdout.text
    lines = [line.split() for line in look.splitlines()]
    fields = {line[0].rstrip(":"): line[1] for line in lines if len(line) == 2}
    complete = "end" in look
    no_capabilities = fields.get("CapEff") == "0" * 16 == fields.get("CapBnd")
    return [
        Capability("no_capabilities", no_capabilities, "userns", str(fields.get("CapEff"))),
        Capability("no_new_privs", fields.get("NoNewPrivs") == "1", "prctl"),
        Capability("syscall_filter", fields.get("Seccomp") == "2", "seccomp"),
        Capability("no_network", ["1"] in lines, "netns", "only lo exists"),
        Capability("host_read_only", complete and "WRITABLE" not in look, "mounts"),
        Capability("no_nested_namespaces", complete and "NESTED" not in look, "seccomp"),
    ]

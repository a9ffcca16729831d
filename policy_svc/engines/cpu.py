"""What this machine's CPU can do.

- A number type is chosen by probing, never by a machine's name.
"""

import os
from pathlib import Path


def has_fast_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether BF16 matrix units (AMX) are there; AVX-512 alone emulates BF16 slowly."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    return any("amx_bf16" in line for line in text.splitlines() if line.startswith("flags"))


def cpu_count() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0))
